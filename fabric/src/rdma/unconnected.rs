//! Queue pairs that are not connected yet.

use super::notes::{Hello, random_psn};
use super::port::{Port, PortState};
use super::verbs::queue::{Qp, Queues, Remains};
use super::verbs::receive::Share;
use super::window::{INLINE, SLOT, Window};
use crate::NodeId;

/// A queue pair that is not connected yet.
pub(super) struct UnconnectedQp {
    qp: Qp,
    /// The number of the first packet that it will send.
    psn: u32,
    port: PortState,
}

impl UnconnectedQp {
    /// A queue pair to `peer` on a port in this state. An error is what the kernel says.
    pub(super) fn new(
        queues: &Queues,
        window: &Window,
        port: PortState,
        peer: NodeId,
    ) -> std::io::Result<UnconnectedQp> {
        let qp = Qp::new(queues, peer.0, window.depth as u32, window.share as u32, INLINE)?;
        Ok(UnconnectedQp { qp, psn: random_psn(), port })
    }

    /// Tells the peer how to reach it.
    pub(super) fn hello(&self, window: &Window) -> Hello {
        Hello {
            link_layer: self.port.attr.link_layer,
            mtu: self.port.attr.active_mtu as u8,
            qpn: self.qp.number(),
            psn: self.psn,
            lid: self.port.attr.lid,
            credits: window.credits,
            slot: SLOT as u32,
            gid: self.port.gid.map(|gid| gid.bytes).unwrap_or_default(),
        }
    }

    /// Gives it its slots and connects it to the queue pair of a hello. An error is the end of a sentence
    /// about the peer, with what is left of the queue pair.
    pub(super) fn connect(
        mut self,
        port: &Port,
        hello: &Hello,
        share: Share,
    ) -> Result<Qp, (String, Remains)> {
        let route = match port.route(&self.port, self.psn, hello) {
            Ok(route) => route,
            Err(why) => return Err((why, Remains { share: Some(share.spend()), slots: Vec::new() })),
        };
        match self.qp.bind(route.port, share).and_then(|()| self.qp.connect(&route)) {
            Ok(()) => Ok(self.qp),
            Err(why) => Err((why, self.qp.destroy())),
        }
    }
}
