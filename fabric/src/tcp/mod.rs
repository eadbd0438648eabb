//! Frames over TCP: one connection per lane and peer.
//!
//! - [`Listener`] binds this node's address; [`Listener::mesh`] connects every node to every other and
//!   returns the [`TcpTransport`] (`listener`, `mesh`, `transport`).
//! - `connecting`: connections up to the end of their handshakes; `hello` and `handshake` say which peers may
//!   connect, `sockets` how sockets are set up.
//! - `link`: one lane to one peer, both directions. `lane`: one lane's receiving side over all peers.
//!   `frames` cuts the byte stream into frames.
//! - `silence`, `tcp_info`: connections whose peer acknowledges nothing any more.
//! - `failover`, `mailbox`: moving lanes between rails, where a node has several.
//!
//! On the wire a frame is its length (`u32`, little-endian, `1..=MAX_FRAME`), its bytes, sealed to the peer,
//! and the seal's 16 bytes; in plaintext mode its bytes as they are and no seal. A length or seal that is
//! wrong ends the session with that peer.
//!
//! # A connection's life
//!
//! ```text
//!  higher id                                lower id
//!  connect ──────────────────────────────> accept
//!  hello{machine, version, from, to, lane} ─> checked ── wrong ──> warning, closed
//!  handshake <─────────────────────────────> handshake ── another key, a replay ──> warning, closed
//!     │                                         │
//!     └──────── frames in both directions ──────┘
//!                        │
//!        EOF, reset, bad length or seal, backlog too long
//!                        │
//!             lost: send() says so each time, poll() once
//! ```
//!
//! # Rails
//!
//! With one address per node all lanes use it, and the end of a connection is the loss of the peer. With
//! several, lanes are spread over them, and a frame is copied and kept until the peer acknowledges it (every
//! 64 frames or 128 KiB). When a connection ends or falls silent, the lane moves: the node with the higher id
//! connects over another rail, both say in the handshake how many frames of the lane they have received, and
//! each sends again from there. So no frame is lost, doubled or reordered. A lane returns to its own rail
//! when that takes connections again.
//!
//! A connection that is dropped is closed; a peer's receiver sees the frames that reached it before that,
//! then the loss. What was still in the backlog then is gone: a node that must not lose its last words waits
//! for the answer to them before it leaves.

mod connecting;
mod failover;
mod frames;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod handshake;
mod hello;
mod lane;
mod link;
mod listener;
mod mailbox;
mod mesh;
mod silence;
mod sockets;
mod tcp_info;
mod transport;

pub use listener::{Listener, MAX_RAILS, MeshConfig, MeshKeys};
pub use transport::TcpTransport;
