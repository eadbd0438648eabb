//! Frames over TCP: one connection per lane and peer.
//!
//! - [`Listener`] binds this node's address; [`Listener::mesh`] connects every node to every other and
//!   returns the [`TcpTransport`] (`listener`, `mesh`; who may connect is in `hello` and `handshake`).
//! - `link`: one lane to one peer, its sending side with its backlog; `incoming` is its receiving side.
//! - `lane`: one lane's receiving side over all peers; `frames` cuts the byte stream into frames.
//! - `retained`, `keeper`: where a node has several rails, what moves lanes between them.
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
//! # Rails
//!
//! With one address per node all lanes use it, and the end of a connection is the loss of the peer. With several, lanes
//! are spread over them, and a frame is copied and kept until the peer acknowledges it (every 64 frames or 128 KiB). When
//! a connection ends or falls silent, the lane moves: the node with the higher id connects over another rail, both say in
//! the handshake how many frames of the lane they have received, and each sends again from there. So no frame is lost,
//! doubled or reordered. A lane returns to its own rail when that takes connections again.
//!
//! A connection that is dropped is closed; a peer's receiver sees the frames that reached it before that,
//! then the loss. What was still in the backlog then is gone: who must not lose its last words waits for
//! the answer to them before it leaves.

mod doors;
mod frames;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod handshake;
mod hello;
mod incoming;
mod keeper;
mod lane;
mod link;
mod listener;
mod mesh;
pub(crate) mod retained;

use std::sync::Arc;

use crate::transport::{Receivers, check_frame};
use crate::{FabricError, LaneId, MAX_FRAME, NodeId, Receiver, Transport, TransportStats};
use doors::Doors;
use keeper::Mailbox;
use lane::{Lane, LaneReceiver};
pub use listener::{Listener, MAX_RAILS, MeshConfig, MeshKeys};
use mesh::Sessions;

/// The fabric of one node over TCP. Made by [`Listener::mesh`].
///
/// The connections of a lane close when both the transport and that lane's receiver have been dropped.
pub struct TcpTransport {
    node: NodeId,
    nodes: usize,
    lanes: Vec<Arc<Lane>>,
    receivers: Receivers<LaneReceiver>,
    /// The keeper's, where there are several rails.
    mailbox: Option<Arc<Mailbox>>,
}

impl TcpTransport {
    /// Takes the finished connections, `sessions[lane][node]` with `None` for `node` itself.
    fn new(
        node: NodeId,
        plaintext: bool,
        sessions: Sessions,
        doors: Doors,
    ) -> Result<TcpTransport, FabricError> {
        let nodes = sessions.first().map_or(0, Vec::len);
        let several = doors.rails() > 1 && nodes > 1;
        let mailbox = several.then(Mailbox::new).transpose()?.map(Arc::new);
        let on_rails = sessions.iter().flatten().flatten();
        let places = on_rails.map(|session| (session.met.peer, session.met.lane, session.rail)).collect();
        let lanes = sessions
            .into_iter()
            .zip(0..)
            .map(|(sessions, lane)| Lane::new(lane, plaintext, sessions, mailbox.clone()).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let receivers = lanes.iter().map(|lane| LaneReceiver::new(lane.clone())).collect();
        if let Some(mailbox) = &mailbox {
            keeper::start(doors, mailbox.clone(), &lanes, places, plaintext)?;
        }
        Ok(TcpTransport { node, nodes, lanes, receivers, mailbox })
    }
}

impl Drop for TcpTransport {
    fn drop(&mut self) {
        if let Some(mailbox) = &self.mailbox {
            mailbox.stop();
        }
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
        let len = check_frame(self.node, to, lane, self.nodes, self.lanes.len(), MAX_FRAME, parts)?;
        self.lanes[usize::from(lane)].send(to, len, parts)
    }

    fn send_all(&self, to: NodeId, lane: LaneId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        for frame in frames {
            check_frame(self.node, to, lane, self.nodes, self.lanes.len(), MAX_FRAME, frame)?;
        }
        match frames {
            [] => Ok(()),
            frames => self.lanes[usize::from(lane)].send_all(to, frames),
        }
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        self.receivers.take(lane)
    }

    fn stats(&self) -> TransportStats {
        let mut stats = TransportStats::default();
        for lane in &self.lanes {
            lane.add_stats(&mut stats);
        }
        stats
    }
}
