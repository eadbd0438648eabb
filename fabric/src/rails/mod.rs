//! Rails: several transports behind one, so that a lane goes on over another when its own fails.
//!
//! ```text
//! RailsTransport::send ── Link: which rail ──> Transport of that rail ~~~> LaneReceiver: all rails ── Link ── sink
//! ```
//!
//! Each lane is on one rail at a time, moves to another when that one loses the peer, and back when its own
//! is connected again ([`Receiver::returned`]); `link` says how. The rails know nothing of each other. What
//! moves TCP lanes is in [`crate::tcp`].

mod link;
mod share;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::bell::Bell;
use crate::transport::{Counters, ENVELOPE, Receivers, check_frame};
use crate::{FabricError, LaneId, MAX_FRAME, NodeId, Receiver, Transport, TransportStats};
#[cfg(fuzzing)]
pub use link::fuzz;
use link::{Link, Wire};
pub(crate) use share::share;

/// One transport over several.
pub(crate) struct RailsTransport {
    lanes: Vec<Arc<Lane>>,
    receivers: Receivers<LaneReceiver>,
}

/// What senders and the receiver of a lane share.
struct Lane {
    id: LaneId,
    rails: Arc<[Box<dyn Transport>]>,
    /// By node; this node's own is not used.
    links: Vec<Mutex<Link>>,
    counters: Counters,
    /// Rung when a peer may have been lost that the receiver has not reported.
    bell: Bell,
}

impl RailsTransport {
    /// Takes transports of the same machine: at least one, all of as many nodes and lanes, all new.
    pub(crate) fn new(rails: Vec<Box<dyn Transport>>) -> Result<RailsTransport, FabricError> {
        let count = rails.len();
        let (nodes, lanes) = rails.first().map_or((0, 0), |rail| (rail.nodes(), rail.lanes()));
        let rails: Arc<[Box<dyn Transport>]> = rails.into();
        let me = rails.first().map_or(NodeId(0), |rail| rail.node());
        let lane = |id| {
            // Of two nodes the first leads.
            let link = |peer| Mutex::new(Link::new(id, count, me < peer));
            let links = (0..nodes as u16).map(NodeId).map(link).collect();
            let (counters, bell) = (Counters::default(), Bell::new()?);
            Ok(Arc::new(Lane { id, rails: rails.clone(), links, counters, bell }))
        };
        let lanes = (0..lanes as LaneId).map(lane).collect::<Result<Vec<_>, FabricError>>()?;
        let receivers = lanes.iter().map(|lane| LaneReceiver::new(lane.clone()));
        let receivers = receivers.collect::<Result<_, _>>()?;
        Ok(RailsTransport { lanes, receivers })
    }

    fn first(&self) -> Option<&dyn Transport> {
        Some(&**self.lanes.first()?.rails.first()?)
    }
}

impl Transport for RailsTransport {
    fn node(&self) -> NodeId {
        self.first().map_or(NodeId(0), Transport::node)
    }

    fn nodes(&self) -> usize {
        self.first().map_or(0, Transport::nodes)
    }

    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let len = check_frame(self.node(), to, lane, self.nodes(), self.lanes.len(), MAX_FRAME, parts)?;
        self.lanes[usize::from(lane)].send(to, len, parts)
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        self.receivers.take(lane)
    }

    fn stats(&self) -> TransportStats {
        let mut stats = TransportStats::default();
        self.lanes.iter().for_each(|lane| lane.counters.add_to(&mut stats));
        stats
    }
}

/// The way to one peer on one lane.
struct ToPeer<'a> {
    lane: &'a Lane,
    peer: NodeId,
}

impl Wire for ToPeer<'_> {
    fn put(&self, rail: usize, parts: &[&[u8]]) -> bool {
        self.lane.rails[rail].send(self.peer, self.lane.id, parts).is_ok()
    }
}

impl Lane {
    fn send(&self, to: NodeId, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        let sent = self.link(to).send(&ToPeer { lane: self, peer: to }, len, parts);
        sent.map_err(|why| {
            self.bell.ring();
            FabricError::PeerLost { peer: to, why }
        })?;
        self.counters.sent(1, (ENVELOPE + len) as u64);
        Ok(())
    }

    /// Takes a message; the frame in it, if it is one.
    fn take<'a>(&self, peer: NodeId, rail: usize, message: &'a [u8]) -> Result<Option<&'a [u8]>, String> {
        let mut link = self.link(peer);
        let before = link.settled();
        let taken = link.take(&ToPeer { lane: self, peer }, rail, message);
        if let Some(rail) = link.settled()
            && before != Some(rail)
        {
            tracing::info!("lane {} to {peer} goes on over rail {rail}", self.id);
        }
        taken
    }

    /// A rail has lost a peer.
    fn lost(&self, peer: NodeId, rail: usize, why: &str) {
        let mut link = self.link(peer);
        if link.settled() == Some(rail) {
            tracing::warn!("lane {} to {peer} lost rail {rail} ({why})", self.id);
        } else {
            tracing::debug!("lane {} to {peer} lost rail {rail}, which it did not use ({why})", self.id);
        }
        if link.rail_lost(&ToPeer { lane: self, peer }, rail, why).is_err() {
            self.bell.ring();
        }
    }

    fn link(&self, peer: NodeId) -> MutexGuard<'_, Link> {
        // No code under the lock can panic half-way through a change.
        base::lock(&self.links[peer.index()])
    }
}

/// The receiving side of a lane.
struct LaneReceiver {
    lane: Arc<Lane>,
    /// By rail.
    rails: Vec<Box<dyn Receiver>>,
    epoll: Epoll,
    /// By node: its loss was reported.
    gone: Vec<bool>,
}

impl LaneReceiver {
    fn new(lane: Arc<Lane>) -> Result<LaneReceiver, FabricError> {
        let io = |error: nix::Error| FabricError::Io {
            what: "creating a lane's epoll descriptor",
            source: error.into(),
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io)?;
        epoll.add(&lane.bell, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(io)?;
        let mut rails = Vec::new();
        for rail in &*lane.rails {
            let receiver = rail.take_receiver(lane.id).ok_or_else(|| {
                FabricError::Setup(format!("lane {} of a rail is in use, and it is needed", lane.id))
            })?;
            epoll.add(receiver.fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(io)?;
            rails.push(receiver);
        }
        let gone = vec![false; lane.links.len()];
        Ok(LaneReceiver { lane, rails, epoll, gone })
    }

    /// Reports the next lost peer, if there is one.
    fn report(&mut self) -> Result<(), FabricError> {
        if !self.lane.bell.is_rung() {
            return Ok(());
        }
        self.lane.bell.hear();
        for (peer, gone) in (0..).map(NodeId).zip(&mut self.gone) {
            if let Some(why) = self.lane.link(peer).loss().filter(|_| !*gone) {
                *gone = true;
                // There may be more of them.
                self.lane.bell.ring();
                return Err(FabricError::PeerLost { peer, why: why.clone() });
            }
        }
        Ok(())
    }
}

impl Receiver for LaneReceiver {
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        let (mut frames, mut bytes) = (0, 0);
        let lane = &*self.lane;
        for (rail, receiver) in self.rails.iter_mut().enumerate() {
            let polled = receiver.poll(&mut |peer, message| {
                // The lock is free again for the sink, which may send.
                let taken = lane.take(peer, rail, message);
                match taken {
                    Ok(Some(frame)) => {
                        (frames, bytes) = (frames + 1, bytes + message.len() as u64);
                        sink(peer, frame);
                    }
                    Ok(None) => {}
                    Err(_) => lane.bell.ring(),
                }
            });
            match polled {
                Ok(_) => {}
                Err(FabricError::PeerLost { peer, why }) => lane.lost(peer, rail, &why),
                Err(other) => return Err(other),
            }
            while let Some(peer) = receiver.returned() {
                lane.link(peer).rail_returned(&ToPeer { lane, peer }, rail);
            }
        }
        lane.counters.received(frames as u64, bytes);
        if frames == 0 {
            self.report()?;
        }
        Ok(frames)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        for rail in &mut self.rails {
            if rail.arm()? {
                return Ok(true);
            }
        }
        Ok(self.lane.bell.is_rung())
    }
}
