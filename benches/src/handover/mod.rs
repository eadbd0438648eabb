//! The cost of passing on a word that CPUs of several nodes write: micro guests on KVM, a vCPU on each node,
//! beside a bare round trip of 64 bytes over the same transport.
//!
//! ```text
//!   node 0: vCPU ── fault ──> engine ──┐          node 1: vCPU ── fault ──> engine
//!           code, page tables          └─ messages ─────┘  home of the words
//! ```
//!
//! The nodes are those of [`crate::fault_path`]: processes over TCP, threads in process. Each row is a
//! program ([`code`]) that all vCPUs run for the same time ([`guest`]); [`plan`] says which rows there are.
//! The time of a row is that of the whole machine by the number of operations of all CPUs: a word that is
//! handed on 10,000 times a second takes 100 us a hand-over.

pub mod code;
pub mod guest;
pub mod plan;
