//! The part of libibverbs that the fabric uses, behind safe types.
//!
//! - [`ffi`]: structures and constants of `<infiniband/verbs.h>`, with their sizes and offsets asserted.
//! - [`library`]: `libibverbs.so.1`, opened when it is first needed. A host without it runs everything else.
//! - [`context`]: an opened device, its ports, and its asynchronous events.
//! - [`memory`]: protection domains and registered memory, cut into slots.
//! - [`completion`]: completion queues and the channel that says that there is something in them.
//! - [`send`], [`receive`]: the slots of messages, and the queues that say what was sent and what has
//!   arrived.
//! - [`queue`]: reliable-connected queue pairs.
//!
//! Each type owns what it was made from (a queue pair its queues and its slots, they their device), so
//! nothing is destroyed before what uses it, in whatever order Rust drops them. Outside of this module no
//! promise is to be kept: there is nothing `unsafe` in what it offers.

pub(super) mod completion;
pub(super) mod context;
#[cfg(test)]
pub(super) mod fake;
pub(super) mod ffi;
pub(super) mod library;
pub(super) mod memory;
pub(super) mod queue;
pub(super) mod receive;
pub(super) mod send;

use std::io;

/// What a verb that returns an error number says.
fn check(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        // Some verbs return -1 and set errno, most return the number, some the negative number.
        -1 => Err(io::Error::last_os_error()),
        code => Err(io::Error::from_raw_os_error(code.abs())),
    }
}
