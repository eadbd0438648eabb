//! Coherent memory: several nodes share the guest's pages as the caches of one machine share cache lines, and
//! this crate decides which node may read or write which page.
//!
//! - [`page`]: pages, their homes, and the shards that work on them.
//! - [`protocol`]: the home-based directory protocol, a pure state machine.
//! - [`cluster`]: several protocols as one value, for the model checker, the tests and the simulator.
//! - [`simulator`]: hundreds of nodes in virtual time, by seed.
//! - [`memory`]: guest RAM as one file mapped twice, the guest view and the engine view.
//! - [`execution`]: a shipped operation, done to a frame.
//! - [`uffd`]: the kernel's userfaultfd.
//! - [`engine`]: the threads that connect these with the fabric.
//! - [`stats`]: what is counted.
//! - `testing`: engines of several nodes in one process, for tests and benches (feature `testing`).
//!
//! # The way of one read miss
//! ```text
//! node A                                        home H                            owner B
//! vCPU touches the page
//!  kernel ─ userfaultfd event ─> shard thread
//!   Protocol::fault ─ GetShared ─────────────> Protocol::message
//!                                              clean: Data ──> A
//!                                              dirty: ForwardShared ────────────> Protocol::message
//!                                                                                 protect, Data ──> A
//!                                              Land, directory <── Writeback ─────┘
//!   Protocol::message <── Data
//!   Land: bytes through the engine view
//!   Map: UFFDIO_CONTINUE, write-protected, wakes the vCPU
//! ```

pub mod cluster;
pub mod engine;
pub mod execution;
pub mod memory;
pub mod node_set;
pub mod page;
pub mod protocol;
pub mod simulator;
pub mod stats;
#[cfg(feature = "testing")]
pub mod testing;
mod trace;
pub mod uffd;
