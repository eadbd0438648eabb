//! One lane: its links to all peers, and the receiver over them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connecting::Connection;
use super::frames::HEADER;
use super::link::Link;
use super::link::incoming::Received;
use super::mailbox::Mailbox;
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

/// What the lane's epoll says when a peer was given up; no node has this number.
const NEWS: u64 = u64::MAX;

/// What senders, the receiver and the failover of a lane share.
pub(super) struct Lane {
    id: LaneId,
    /// Watches every live link: readable always, writable while the link has a backlog. Level-triggered.
    epoll: Epoll,
    /// By node; `None` for this node itself.
    links: Vec<Option<Link>>,
    counters: Counters,
    /// Where broken connections are reported, if there are several rails.
    mailbox: Option<Arc<Mailbox>>,
    /// Readable while a peer may have been given up that the receiver has not reported.
    news: EventFd,
    has_news: AtomicBool,
}

impl Lane {
    /// Takes the lane's connections, by node. With a `mailbox` they may be replaced.
    pub(super) fn new(
        id: LaneId,
        plaintext: bool,
        connections: Vec<Option<Connection>>,
        mailbox: Option<Arc<Mailbox>>,
    ) -> Result<Lane, FabricError> {
        let io = |what| move |error: Errno| FabricError::Io { what, source: error.into() };
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io("creating a lane's epoll descriptor"))?;
        let news = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(io("creating an eventfd"))?;
        epoll.add(&news, EpollEvent::new(EpollFlags::EPOLLIN, NEWS)).map_err(io("watching an eventfd"))?;
        let mut links = Vec::with_capacity(connections.len());
        for (connection, peer) in connections.into_iter().zip(0..) {
            let link = connection.map(|made| Link::new(NodeId(peer), made, plaintext, mailbox.is_some()));
            if let Some(link) = &link {
                link.register(&epoll).map_err(io("watching a peer's connection"))?;
            }
            links.push(link);
        }
        tracing::debug!(lane = id, nodes = links.len(), plaintext, "lane is up");
        let has_news = AtomicBool::new(false);
        Ok(Lane { id, epoll, links, counters: Counters::default(), mailbox, news, has_news })
    }

    /// Sends a frame of `len` bytes, checked by the caller; see [`Link::send`].
    pub(super) fn send(&self, to: NodeId, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.link(to)?.send(&self.epoll, len, parts).inspect_err(|_| self.wake_receiver())?;
        self.counters.sent(1, (HEADER + len) as u64);
        Ok(())
    }

    /// Sends frames, checked by the caller; see [`Link::send_all`].
    pub(super) fn send_all(&self, to: NodeId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        let bytes = self.link(to)?.send_all(&self.epoll, frames).inspect_err(|_| self.wake_receiver())?;
        self.counters.sent(frames.len() as u64, bytes as u64);
        Ok(())
    }

    /// The links, by node.
    pub(super) fn links(&self) -> &[Option<Link>] {
        &self.links
    }

    fn link(&self, to: NodeId) -> Result<&Link, FabricError> {
        let link = self.links.get(to.index()).and_then(Option::as_ref);
        link.ok_or_else(|| FabricError::Refused(format!("{to} is no peer of this node")))
    }

    /// Adds this lane's totals to `stats`.
    pub(super) fn add_stats(&self, stats: &mut TransportStats) {
        self.counters.add_to(stats);
    }

    /// Whether the lane to `peer` must move.
    pub(super) fn is_down(&self, peer: NodeId) -> bool {
        self.link(peer).is_ok_and(Link::is_down)
    }

    /// See [`Link::suspend`].
    pub(super) fn suspend(&self, peer: NodeId) -> Result<u64, String> {
        self.link(peer).map_err(|error| error.to_string())?.suspend(&self.epoll)
    }

    /// See [`Link::resume`].
    pub(super) fn resume(&self, connection: Connection, plaintext: bool) -> Result<(), FabricError> {
        let resumed = self.link(connection.met.peer)?.resume(&self.epoll, connection, plaintext);
        resumed.inspect_err(|_| self.wake_receiver())
    }

    /// The peer is lost: no connection to it will come any more.
    pub(super) fn give_up(&self, peer: NodeId, why: &str) {
        if let Ok(link) = self.link(peer) {
            link.end(why.to_owned());
            self.wake_receiver();
        }
    }

    /// Wakes the receiver to look for lost peers: where a lane may be without a connection, nothing else
    /// would.
    fn wake_receiver(&self) {
        if self.mailbox.is_some() {
            // Fails only if it has been rung 2^64 times. Before the mark: whoever sees the mark can clear the
            // descriptor.
            let _ = self.news.write(1);
            self.has_news.store(true, SeqCst);
        }
    }

    /// The receiver has looked, or begins to: the descriptor is readable no more.
    fn clear_news(&self) {
        if self.has_news.load(SeqCst) {
            self.has_news.store(false, SeqCst);
            // Fails only if it was not rung.
            let _ = self.news.read();
        }
    }
}

/// The receiving side of a lane.
pub(super) struct LaneReceiver {
    lane: Arc<Lane>,
    /// The peers that are not lost, as indexes.
    live: Vec<usize>,
    events: [EpollEvent; EVENTS],
}

impl LaneReceiver {
    pub(super) fn new(lane: Arc<Lane>) -> LaneReceiver {
        let live = (0..lane.links.len()).filter(|peer| lane.links[*peer].is_some()).collect();
        LaneReceiver { lane, live, events: [EpollEvent::empty(); EVENTS] }
    }

    /// One receive from `peer`, and its frames to `sink`.
    fn receive(&mut self, peer: usize, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        let Some(link) = self.lane.links.get(peer).and_then(Option::as_ref) else { return Ok(0) };
        match link.receive(&self.lane.epoll, &mut |frame| sink(link.peer, frame)) {
            Received::Frames(frames, bytes) => {
                if frames > 0 {
                    self.lane.counters.received(frames, bytes);
                }
                Ok(frames as usize)
            }
            Received::Broken => {
                if let Some(mailbox) = &self.lane.mailbox {
                    mailbox.broken(link.peer, self.lane.id);
                }
                Ok(0)
            }
            Received::End(error) => {
                link.forget(&self.lane.epoll);
                self.live.retain(|live| *live != peer);
                Err(error)
            }
        }
    }

    /// Reports the next lost peer, if there is one that has no connection which would tell.
    fn report_news(&mut self) -> Result<(), FabricError> {
        self.lane.clear_news();
        for at in 0..self.live.len() {
            let peer = self.live[at];
            let lost = self.lane.links[peer].as_ref().and_then(|link| link.lock().lost.clone());
            if let (Some(why), Some(link)) = (lost, &self.lane.links[peer]) {
                // There may be more of them.
                self.lane.wake_receiver();
                link.forget(&self.lane.epoll);
                self.live.remove(at);
                return Err(link.loss(why));
            }
        }
        Ok(())
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
            self.lane.clear_news();
            return Ok(frames);
        }
        for at in 0..self.wait()? {
            let event = self.events[at];
            if event.data() == NEWS {
                self.report_news()?;
                continue;
            }
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

    fn fd(&self) -> BorrowedFd<'_> {
        self.lane.epoll.0.as_fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        // The descriptor is level-triggered and every whole frame was delivered by the poll that received
        // it, so there is nothing to arm: only to look.
        Ok(self.wait()? > 0)
    }
}
