//! The `gestalt` command: the coordinator that holds a machine's nodes together, and what operators use.
//!
//! ```text
//! gestalt run ──── cli ── coordinator ══ control connection ══ vmm::node ── cli ── gestalt node
//!                              │
//! gestalt device ─ cli ── operator
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`coordinator`], [`terminal`] | `gestalt run`: brings the nodes up and holds them to the end |
//! | [`operator`] | what `gestalt device` says to a running machine |
//! | [`doctor`] | whether a node can run on this host |
//! | [`log_limit`] | log lines that come too often |
//! | [`output`] | bytes on their way to a terminal that may stand still |
//!
//! A node itself is the crate `vmm`; what both talk about is the crate `machine`.

pub mod cli;
pub mod coordinator;
pub mod doctor;
pub mod log_limit;
pub mod operator;
pub mod output;
pub mod terminal;
