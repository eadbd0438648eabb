//! Tests that cross crates, and what they share.
//!
//! - [`engines`]: coherence engines of several nodes in this process, without guests: `tests/messages.rs`
//!   counts what they say to each other, `tests/transfers.rs` moves data as a disk and its driver do,
//!   `tests/home_memory.rs` looks at memory that nobody shares, `tests/discard.rs` at memory that nobody
//!   needs, `tests/direct.rs` at devices that use memory where it is, `tests/idle.rs` at what doing nothing
//!   costs.
//! - [`litmus`]: small programs on vCPUs of one node and of several, and which outcomes x86 allows:
//!   `tests/litmus.rs`; `tests/fairness.rs` has two of them fight over one word.
//! - [`vectors`]: what vCPUs have in vector registers, while they leave the guest, are kicked and lose pages:
//!   `tests/vectors.rs`.
//! - [`cpl3`]: the vCPU of such programs, which the hand-over bench uses as well.
//! - `fuzz`: a workspace of its own for cargo-fuzz, with a target for everything that reads a stranger's
//!   bytes (`cargo xtask fuzz`).
//!
//! Tests of one crate alone are in that crate; guest boots are `cargo xtask test`.

pub mod cpl3;
pub mod engines;
pub mod litmus;
pub mod vectors;
