//! Tests that cross crates, and what they share.
//!
//! - [`engines`]: coherence engines of several nodes in this process, without guests: `tests/messages.rs` counts
//!   what they say to each other.
//! - [`litmus`]: small programs on vCPUs of one node and of several, and which outcomes x86 allows:
//!   `tests/litmus.rs`.
//!
//! Tests of one crate alone are in that crate; guest boots are `cargo xtask test`.

pub mod engines;
pub mod litmus;
