//! The fabric moves frames between the nodes of one machine.
//!
//! It knows nothing of what a frame means, of guest pages, or of KVM. Its users see three things:
//!
//! - [`Transport`]: the sending side, shared by every thread of the node. A frame goes to one peer on
//!   one *lane*; frames of one lane to one peer arrive whole and in the order in which they were sent.
//!   Nothing is promised between lanes, or between peers.
//! - [`Receiver`]: the receiving side of one lane from all peers, owned by the one thread that works on
//!   that lane. It polls without blocking, and offers a file descriptor to sleep on.
//! - [`secure`]: how peers prove their identity, and channels that only the two of them read; other crates
//!   use it too.
//!
//! # The way of one frame (TCP)
//!
//! ```text
//! thread ── Transport::send ──> lane socket ~~~ wire ~~~> lane socket ──> Receiver::poll ── sink(peer, frame)
//!              │ socket full                                                     ▲
//!              └── backlog of the lane, flushed by that lane's Receiver::poll ───┘
//! ```
//!
//! # Transports
//!
//! - [`tcp`]: one TCP connection per lane and peer, sealed, on one of several rails; what runs between
//!   servers.
//! - [`rdma`]: queue pairs over InfiniBand or RoCE, set up over one of the others.
//!   With several ports, `rails` makes one transport of them.
//! - [`sim`]: all nodes in one process; for the tests of everything above the fabric.
//!
//! `tests/conformance.rs` holds all to the same contract.

mod bell;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod rails;
pub mod rdma;
mod resend;
pub mod secure;
pub mod sim;
pub mod tcp;
mod transport;

pub use error::FabricError;
pub use transport::{LaneId, MAX_BACKLOG, MAX_FRAME, MAX_NODES, NodeId, Receiver, Transport, TransportStats};
