//! The transport: all lanes of one node, and what keeps them connected.

use std::sync::Arc;

use super::connecting::Connecting;
use super::failover;
use super::lane::{Lane, LaneReceiver};
use super::mailbox::Mailbox;
use super::mesh::Connections;
use super::silence;
use crate::transport::{Receivers, check_frame};
use crate::{FabricError, LaneId, MAX_FRAME, NodeId, Receiver, Transport, TransportStats};

/// The fabric of one node over TCP. Made by [`super::Listener::mesh`].
///
/// The connections of a lane close when both the transport and that lane's receiver have been dropped.
pub struct TcpTransport {
    node: NodeId,
    nodes: usize,
    lanes: Vec<Arc<Lane>>,
    receivers: Receivers<LaneReceiver>,
    /// The failover's, where there are several rails.
    mailbox: Option<Arc<Mailbox>>,
}

impl TcpTransport {
    /// Takes the finished connections, `connections[lane][node]` with `None` for `node` itself.
    pub(super) fn new(
        node: NodeId,
        plaintext: bool,
        connections: Connections,
        connecting: Connecting,
    ) -> Result<TcpTransport, FabricError> {
        let nodes = connections.first().map_or(0, Vec::len);
        let several = connecting.rails() > 1 && nodes > 1;
        let mailbox = several.then(Mailbox::new).transpose()?.map(Arc::new);
        let each = connections.iter().flatten().flatten();
        let rails = each.map(|each| (each.met.peer, each.met.lane, each.rail)).collect();
        let lanes = connections
            .into_iter()
            .zip(0..)
            .map(|(connections, lane)| Lane::new(lane, plaintext, connections, mailbox.clone()).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let receivers = lanes.iter().map(|lane| LaneReceiver::new(lane.clone())).collect();
        silence::watch(&lanes, connecting.silence)?;
        if let Some(mailbox) = &mailbox {
            failover::start(connecting, mailbox.clone(), &lanes, rails, plaintext)?;
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
