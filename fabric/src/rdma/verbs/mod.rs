//! The part of libibverbs that the fabric uses, behind safe types.
//!
//! - [`ffi`]: structures and constants of `<infiniband/verbs.h>`, with their sizes and offsets asserted.
//! - [`library`]: `libibverbs.so.1`, opened when it is first needed. A host without it runs everything else.
//! - [`context`]: an opened device, its ports, and its asynchronous events.
//! - [`memory`]: protection domains and registered memory, cut into slots.
//! - [`completion`]: completion queues and the channel that says that there is something in them.
//! - [`queue`]: reliable-connected queue pairs.
//!
//! Each type owns what it was made from (a queue pair its queues, they their device), so nothing is destroyed
//! before what uses it, in whatever order Rust drops them.

pub(super) mod completion;
pub(super) mod context;
pub(super) mod ffi;
pub(super) mod library;
pub(super) mod memory;
pub(super) mod queue;

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
