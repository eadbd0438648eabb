//! One lane: its connections to all peers, and the receiver over them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::frames::{FrameBuffer, HEADER};
use super::link::{Link, Received};
use super::mesh::Session;
use crate::secure::Opener;
use crate::transport::Counters;
use crate::{FabricError, LaneId, NodeId, Receiver, TransportStats};

/// Up to this many live peers the receiver tries each socket; beyond, it asks epoll which ones are ready.
///
/// `examples/poll_cost.rs` measures both (ns, this is one run; the proportions are what counts):
///
/// ```text
/// peers   finds nothing: epoll  direct    finds a frame: epoll  direct
///     1                    120     270                    3295    2864
///     2                    120     510                    3345    3105
///     3                    120     751                    3335    3385
///     8                    120    1983                    3305    4647
/// ```
///
/// A frame waits on average for half of the look that just missed it and then for the look that finds it:
/// with one peer trying the socket is 350 ns quicker, with two both are equal, and epoll wins from there.
const DIRECT_PEERS: usize = 1;

/// Readiness events taken from epoll at once; more wait for the next poll.
const EVENTS: usize = 64;

/// Frames sent with one system call. Each is three parts to the kernel, which takes 1024.
pub(super) const MOST_AT_ONCE: usize = 64;

/// What senders and the receiver of a lane share.
pub(super) struct Lane {
    /// Watches every live link: readable always, writable while the link has a backlog. Level-triggered.
    epoll: Epoll,
    /// By node; `None` for this node itself.
    links: Vec<Option<Link>>,
    counters: Counters,
}

impl Lane {
    /// Takes the lane's connections, by node; returns what opens the frames of each for the receiver.
    pub(super) fn new(
        lane: LaneId,
        plaintext: bool,
        sessions: Vec<Option<Session>>,
    ) -> Result<(Lane, Vec<Option<Opener>>), FabricError> {
        let io = |what| move |error: Errno| FabricError::Io { what, source: error.into() };
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io("creating a lane's epoll descriptor"))?;
        let (mut links, mut openers) = (Vec::with_capacity(sessions.len()), Vec::new());
        for (session, peer) in sessions.into_iter().zip(0..) {
            let Some(Session { socket, met }) = session else {
                links.push(None);
                openers.push(None);
                continue;
            };
            let (sealer, opener) =
                if plaintext { (None, None) } else { (Some(met.sealer), Some(met.opener)) };
            let link = Link::new(NodeId(peer), socket, sealer);
            epoll
                .add(&link, EpollEvent::new(EpollFlags::EPOLLIN, peer.into()))
                .map_err(io("watching a peer's connection"))?;
            links.push(Some(link));
            openers.push(opener);
        }
        tracing::debug!(lane, nodes = links.len(), plaintext, "lane is up");
        Ok((Lane { epoll, links, counters: Counters::default() }, openers))
    }

    /// Sends a frame of `len` bytes, checked by the caller; see [`Link::send`].
    pub(super) fn send(&self, to: NodeId, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.link(to)?.send(&self.epoll, len, parts)?;
        self.counters.sent(1, (HEADER + len) as u64);
        Ok(())
    }

    /// Sends up to [`MOST_AT_ONCE`] frames, checked by the caller; see [`Link::send_all`].
    pub(super) fn send_all(&self, to: NodeId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        let bytes = self.link(to)?.send_all(&self.epoll, frames)?;
        self.counters.sent(frames.len() as u64, bytes as u64);
        Ok(())
    }

    fn link(&self, to: NodeId) -> Result<&Link, FabricError> {
        let link = self.links.get(to.index()).and_then(Option::as_ref);
        link.ok_or_else(|| FabricError::Refused(format!("{to} is no peer of this node")))
    }

    /// Adds this lane's totals to `stats`.
    pub(super) fn add_stats(&self, stats: &mut TransportStats) {
        self.counters.add_to(stats);
    }
}

/// The receiving side of a lane.
pub(super) struct LaneReceiver {
    lane: Arc<Lane>,
    /// By node; `None` for this node and for lost peers.
    buffers: Vec<Option<FrameBuffer>>,
    /// The peers that are not lost, as indexes.
    live: Vec<usize>,
    events: [EpollEvent; EVENTS],
}

impl LaneReceiver {
    /// `openers` are those that [`Lane::new`] returned.
    pub(super) fn new(lane: Arc<Lane>, openers: Vec<Option<Opener>>) -> LaneReceiver {
        let links = lane.links.iter().zip(openers);
        let buffers: Vec<_> =
            links.map(|(link, opener)| link.as_ref().map(|_| FrameBuffer::new(opener))).collect();
        let live = (0..buffers.len()).filter(|peer| buffers[*peer].is_some()).collect();
        LaneReceiver { lane, buffers, live, events: [EpollEvent::empty(); EVENTS] }
    }

    /// One receive from `peer`, and its frames to `sink`.
    fn receive(&mut self, peer: usize, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        let (Some(link), Some(buffer)) = (&self.lane.links[peer], &mut self.buffers[peer]) else {
            return Ok(0);
        };
        match link.receive(buffer.space()) {
            Received::Nothing => Ok(0),
            Received::Bytes(n) => {
                buffer.filled(n);
                let (mut frames, mut bytes) = (0, 0);
                let delivered = buffer.deliver(|frame| {
                    frames += 1;
                    bytes += (HEADER + frame.len()) as u64;
                    sink(link.peer(), frame);
                });
                self.lane.counters.received(frames, bytes);
                let Err(bad) = delivered else { return Ok(frames as usize) };
                let error = link.end(bad.to_string());
                self.forget(peer);
                Err(error)
            }
            Received::End(error) => {
                let error = match error {
                    FabricError::PeerLost { peer, why } if buffer.has_partial_frame() => {
                        FabricError::PeerLost { peer, why: format!("{why} in the middle of a frame") }
                    }
                    other => other,
                };
                self.forget(peer);
                Err(error)
            }
        }
    }

    /// Stops receiving from a lost peer.
    fn forget(&mut self, peer: usize) {
        self.buffers[peer] = None;
        self.live.retain(|live| *live != peer);
        if let Some(link) = &self.lane.links[peer]
            && let Err(error) = self.lane.epoll.delete(link)
        {
            tracing::debug!(peer, %error, "a lost connection was not watched");
        }
    }

    fn wait(&mut self) -> Result<usize, FabricError> {
        match self.lane.epoll.wait(&mut self.events, EpollTimeout::ZERO) {
            Ok(ready) => Ok(ready),
            Err(Errno::EINTR) => Ok(0),
            Err(error) => {
                Err(FabricError::Io { what: "asking which peers sent something", source: error.into() })
            }
        }
    }
}

impl Receiver for LaneReceiver {
    // A loss returns at once: whatever is ready at the other peers is still ready at the next poll.
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        let mut frames = 0;
        if self.live.len() <= DIRECT_PEERS {
            for at in 0..self.live.len() {
                let peer = self.live[at];
                if let Some(link) = &self.lane.links[peer]
                    && link.is_behind()
                {
                    link.flush(&self.lane.epoll);
                }
                frames += self.receive(peer, sink)?;
            }
            return Ok(frames);
        }
        for at in 0..self.wait()? {
            let event = self.events[at];
            let peer = event.data() as usize;
            if event.events().contains(EpollFlags::EPOLLOUT)
                && let Some(link) = &self.lane.links[peer]
            {
                link.flush(&self.lane.epoll);
            }
            if event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                frames += self.receive(peer, sink)?;
            }
        }
        Ok(frames)
    }

    fn fd(&self) -> RawFd {
        self.lane.epoll.0.as_raw_fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        // The descriptor is level-triggered and every whole frame was delivered by the poll that received
        // it, so there is nothing to arm: only to look.
        Ok(self.wait()? > 0)
    }
}
