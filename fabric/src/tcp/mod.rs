//! Frames over TCP: one connection per lane and peer.
//!
//! - [`Listener`] binds this node's address; [`Listener::mesh`] connects every node to every other and
//!   returns the [`TcpTransport`] (`listener`, `mesh`; who may connect is in `hello` and `handshake`).
//! - `link`: one connection's sending side, with its backlog.
//! - `lane`: one lane's receiving side over all peers; `frames` cuts the byte stream into frames.
//!
//! On the wire a frame is its length (`u32`, little-endian, `1..=MAX_FRAME`), its bytes, sealed to the peer, and the
//! seal's 16 bytes; in plaintext mode its bytes as they are and no seal. A length or seal that is wrong ends the session
//! with that peer.
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
//! A connection that is dropped is closed; a peer's receiver sees the frames that reached it before that,
//! then the loss. What was still in the backlog then is gone: who must not lose its last words waits for
//! the answer to them before it leaves.

mod frames;
mod handshake;
mod hello;
mod lane;
mod link;
mod listener;
mod mesh;

use std::sync::{Arc, Mutex, PoisonError};

use crate::transport::check_frame;
use crate::{FabricError, LaneId, NodeId, Receiver, Transport, TransportStats};
use lane::{Lane, LaneReceiver};
pub use listener::{Listener, MeshConfig, MeshKeys};
use mesh::Session;

/// The fabric of one node over TCP. Made by [`Listener::mesh`].
///
/// The connections of a lane close when both the transport and that lane's receiver have been dropped.
pub struct TcpTransport {
    node: NodeId,
    nodes: usize,
    lanes: Vec<Arc<Lane>>,
    receivers: Mutex<Vec<Option<LaneReceiver>>>,
}

impl TcpTransport {
    /// Takes the finished connections, `sessions[lane][node]` with `None` for `node` itself.
    fn new(
        node: NodeId,
        plaintext: bool,
        sessions: Vec<Vec<Option<Session>>>,
    ) -> Result<TcpTransport, FabricError> {
        let nodes = sessions.first().map_or(0, Vec::len);
        let (mut lanes, mut receivers) = (Vec::new(), Vec::new());
        for (sessions, lane) in sessions.into_iter().zip(0..) {
            let (lane, openers) = Lane::new(lane, plaintext, sessions)?;
            let lane = Arc::new(lane);
            receivers.push(Some(LaneReceiver::new(lane.clone(), openers)));
            lanes.push(lane);
        }
        Ok(TcpTransport { node, nodes, lanes, receivers: Mutex::new(receivers) })
    }
}

impl Transport for TcpTransport {
    fn node(&self) -> NodeId {
        self.node
    }

    fn nodes(&self) -> usize {
        self.nodes
    }

    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let len = check_frame(self.node, to, lane, self.nodes, self.lanes.len(), parts)?;
        self.lanes[usize::from(lane)].send(to, len, parts)
    }

    fn send_all(&self, to: NodeId, lane: LaneId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        for frame in frames {
            check_frame(self.node, to, lane, self.nodes, self.lanes.len(), frame)?;
        }
        frames
            .chunks(lane::MOST_AT_ONCE)
            .try_for_each(|some| self.lanes[usize::from(lane)].send_all(to, some))
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        let mut receivers = self.receivers.lock().unwrap_or_else(PoisonError::into_inner);
        let receiver = receivers.get_mut(usize::from(lane))?.take()?;
        Some(Box::new(receiver))
    }

    fn stats(&self) -> TransportStats {
        let mut stats = TransportStats::default();
        for lane in &self.lanes {
            lane.add_stats(&mut stats);
        }
        stats
    }
}
