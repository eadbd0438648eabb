//! The cost of a page fault that another node must answer, beside the floor: a bare fault handler and a bare
//! round trip of the same bytes over the same transport, waiting in the same way.
//!
//! ```text
//!   requester (node 0, the bench itself)        home (node 1)        further nodes
//!   thread touches pages ── fault ──┐
//!   engine, or bare handler  <──────┘ ── messages ──> engine, or bare server
//! ```
//!
//! Over TCP every node is a process of its own (the bench starts itself again); in process, a thread. A
//! *cell* is one set of nodes: engines or bare nodes, one transport, one way of waiting. Cells come one after
//! the other, ours and the floor's in turn, several rounds; of each operation the best round's median counts.
//!
//! - [`command`]: what the bench tells a node.
//! - [`worker`]: a node, which does as it is told.
//! - [`ours`]: the node as an engine; [`bare`]: the node as a floor, over a [`wire`].
//! - [`peers`]: nodes as processes and as threads.
//! - [`cell`]: nodes put together.
//! - [`plan`]: which operations are measured, and how.
//! - [`phases`]: where the time of a miss goes, from the nodes' traces.
//! - [`home`]: memory that never left its home, beside plain memory.

pub mod bare;
pub mod cell;
pub mod command;
pub mod home;
pub mod ours;
pub mod peers;
pub mod phases;
pub mod plan;
pub mod wire;
pub mod worker;
