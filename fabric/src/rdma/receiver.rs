//! The receiving side of a lane.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::lane::{Lane, RECEIVES};
use super::notes::Note;
use super::reconnect::lane::LaneReconnect;
use super::reconnect::protocol::Violation;
use super::stream::{BadLength, Reader};
use super::verbs::ffi::status;
use super::verbs::receive::{BATCH, ReceiveQueue, Received};
use super::window::Immediate;
use crate::{FabricError, NodeId, Receiver};

/// Every so many polls that find nothing look at the rest: finished sends, the session.
const LOOK_EVERY: u32 = 32;
/// How long messages that a goodbye announced may still take.
const STRAGGLERS: Duration = Duration::from_secs(1);

/// The receiving side of one lane over RDMA.
pub(super) struct LaneReceiver {
    lane: Arc<Lane>,
    /// The same lane of the session: goodbyes, and the end of a peer's process.
    session: Box<dyn Receiver>,
    epoll: Epoll,
    /// By node.
    peers: Vec<Peer>,
    /// Connects those that are lost again.
    reconnect: LaneReconnect,
    queue: ReceiveQueue,
    /// The receive queue was asked to raise an event, which was not taken yet.
    armed: bool,
    /// Completions came since: the event has been raised or will be at once.
    due: bool,
    /// The send queue was asked to raise an event, if it was: for every completion, or for failed ones only.
    sends: Option<Watched>,
    /// The session's receiver said that there is nothing, and was not polled since: its descriptor will tell.
    session_armed: bool,
    /// Look at everything at the next poll that finds nothing.
    look: bool,
    /// A loss is to be reported.
    trouble: bool,
    idle_polls: u32,
    /// What the messages of a batch mean to the sending side, by peer.
    tally: Vec<Tally>,
}

/// What one peer's messages of a batch mean to the sending side.
struct Tally {
    peer: NodeId,
    /// Credits that they returned.
    gained: u32,
    /// How many had data.
    taken: u32,
}

/// Which completions of sends raise an event.
#[derive(Copy, Clone, Eq, PartialEq)]
enum Watched {
    All,
    Failed,
}

#[derive(Default)]
struct Peer {
    reader: Reader,
    /// Messages that arrived.
    messages: u64,
    goodbye: Option<Goodbye>,
    /// What it sent has no meaning any more.
    deaf: bool,
    /// Its loss was reported.
    gone: bool,
}

/// What one message means to the sending side.
struct Taken {
    /// Credits that it returned.
    gained: u16,
    /// Whether it had data, and so cost the peer a credit.
    data: bool,
}

struct Goodbye {
    why: String,
    /// How many messages there were, if it said so.
    messages: Option<u64>,
    until: Instant,
}

impl LaneReceiver {
    pub(super) fn new(
        lane: Arc<Lane>,
        queue: ReceiveQueue,
        session: Box<dyn Receiver>,
        reconnect: LaneReconnect,
        nodes: usize,
    ) -> Result<LaneReceiver, FabricError> {
        let io = |error: nix::Error| FabricError::Io {
            what: "creating a lane's epoll descriptor",
            source: error.into(),
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io)?;
        for fd in [lane.channel.as_fd(), session.fd()] {
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(io)?;
        }
        epoll.add(&*lane.bell, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(io)?;
        let mut receiver = LaneReceiver {
            lane,
            session,
            epoll,
            peers: (0..nodes).map(|_| Peer::default()).collect(),
            reconnect,
            queue,
            armed: false,
            due: false,
            sends: None,
            session_armed: false,
            look: false,
            trouble: false,
            idle_polls: 0,
            tally: Vec::with_capacity(BATCH),
        };
        receiver.arm()?;
        Ok(receiver)
    }

    /// Takes completions; whether there are any.
    fn fetch(&mut self) -> bool {
        if self.queue.has_fetched() {
            return true;
        }
        let any = self.queue.fetch().unwrap_or_else(|error| {
            self.lane.lock().lose_all(&format!("this node's receive queue failed ({error})"));
            self.trouble = true;
            false
        });
        self.due |= any;
        any
    }

    /// Works through the completions that were taken; how many frames they brought.
    fn work(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> usize {
        let (mut frames, mut bytes) = (0, 0);
        while let Some(received) = self.queue.take() {
            let peer = self.lane.peer_of(received.share);
            let state = &mut self.peers[peer.index()];
            // The slots of a connection that failed are given to the next one.
            if state.gone || state.deaf {
                continue;
            }
            let mut count_frame = |frame: &[u8]| {
                frames += 1;
                bytes += frame.len() as u64;
                sink(peer, frame);
            };
            match receive(&self.lane, &received, state, &mut count_frame) {
                Ok(Taken { gained, data }) => {
                    let at = self.tally.iter().position(|tally| tally.peer == peer).unwrap_or_else(|| {
                        self.tally.push(Tally { peer, gained: 0, taken: 0 });
                        self.tally.len() - 1
                    });
                    let tally = &mut self.tally[at];
                    (tally.gained, tally.taken) =
                        (tally.gained + u32::from(gained), tally.taken + u32::from(data));
                }
                Err(why) => {
                    state.deaf = true;
                    let mut sender = self.lane.lock();
                    // A send that failed says more than the receives that fail with it.
                    sender.reap();
                    sender.lose(peer, &why);
                }
            }
        }
        let mut sender = self.lane.lock();
        for Tally { peer, gained, taken } in self.tally.drain(..) {
            // Ordering: the slots are back in the queue before a credit for them is.
            sender.refill(peer, &mut self.queue);
            sender.settle(peer, gained, taken);
        }
        drop(sender);
        self.lane.counters.received(frames as u64, bytes);
        frames
    }

    /// Looks at everything but messages.
    fn look_around(&mut self) -> Result<(), FabricError> {
        (self.look, self.idle_polls, self.session_armed) = (false, 0, false);
        self.lane.bell.hear();
        for peer in self.reconnect.advance(&mut self.queue) {
            self.peers[peer.index()] = Peer::default();
        }
        let (lane, peers, reconnect) = (&self.lane, &mut self.peers, &mut self.reconnect);
        let until = Instant::now() + STRAGGLERS;
        let polled = self.session.poll(&mut |peer, frame| {
            let state = &mut peers[peer.index()];
            let note = Note::decode(frame);
            if let Ok(Note::Goodbye(messages)) = note
                && !state.gone
            {
                let why = "it closed the connection".to_owned();
                state.goodbye.get_or_insert(Goodbye { why, messages: Some(messages), until });
            }
            let again = || "it began the RDMA connection again".to_owned();
            let taken = note.and_then(|note| reconnect.note(peer, &note).map_err(|Violation| again()));
            match taken {
                Ok(()) => {}
                Err(why) if state.gone => {
                    tracing::warn!("a rail to {peer} stays lost: {why}");
                    reconnect.end(peer);
                }
                Err(why) => {
                    lane.lock().lose(peer, &why);
                }
            }
        });
        match polled {
            Ok(0) => {}
            // There may be more.
            Ok(_) => self.look = true,
            Err(FabricError::PeerLost { peer, why }) => {
                self.look = true;
                self.reconnect.end(peer);
                self.peers[peer.index()].goodbye.get_or_insert(Goodbye { why, messages: None, until });
            }
            Err(other) => return Err(other),
        }
        let mut sender = self.lane.lock();
        sender.look_around();
        self.trouble = (0..).zip(&self.peers).any(|(node, peer)| {
            !peer.gone && (peer.goodbye.is_some() || sender.loss(NodeId(node)).is_some())
        });
        Ok(())
    }

    /// The next loss of which everything that came before it was delivered.
    fn report(&mut self) -> Result<(), FabricError> {
        let now = Instant::now();
        for (node, peer) in (0..).map(NodeId).zip(&mut self.peers) {
            if peer.gone {
                continue;
            }
            let mut sender = self.lane.lock();
            let lost = sender.loss(node).is_some();
            let why = match &peer.goodbye {
                _ if lost => String::new(),
                Some(goodbye) => {
                    let all = goodbye.messages.is_none_or(|messages| peer.messages >= messages);
                    if !all && now < goodbye.until {
                        continue;
                    }
                    goodbye.why.clone()
                }
                None => continue,
            };
            peer.gone = true;
            peer.reader = Reader::default();
            let error = sender.lose(node, &why);
            drop(sender);
            self.reconnect.lost(node);
            return Err(self.lane.events.explain(error));
        }
        self.trouble = self.peers.iter().any(|peer| !peer.gone && peer.goodbye.is_some());
        Ok(())
    }

    /// Takes the events that were raised; whether there were any.
    fn take_events(&mut self) -> Result<bool, FabricError> {
        let mut any = false;
        // One is the rule; a second one, if sends are not watched closely, makes the descriptor readable
        // again.
        while self.armed || self.sends == Some(Watched::All) {
            let event = self.lane.channel.take_event();
            match event
                .map_err(|source| FabricError::Io { what: "reading RDMA completion events", source })?
            {
                Some(RECEIVES) => (self.armed, self.due) = (false, false),
                Some(_) => self.sends = None,
                None => break,
            }
            any = true;
        }
        Ok(any)
    }
}

impl Drop for LaneReceiver {
    fn drop(&mut self) {
        // Peers that have said goodbye acknowledge no last words, and so nobody waits for that.
        self.look = true;
        while self.look && self.look_around().is_ok() {}
        let mut sender = self.lane.lock();
        for (node, peer) in (0..).map(NodeId).zip(&self.peers) {
            if let Some(goodbye) = &peer.goodbye {
                sender.lose(node, &goodbye.why);
            }
        }
    }
}

/// Works through one completion. An error is the end of a sentence about the peer.
fn receive(
    lane: &Lane,
    received: &Received<'_>,
    peer: &mut Peer,
    sink: &mut dyn FnMut(&[u8]),
) -> Result<Taken, String> {
    if received.status != status::SUCCESS {
        return Err(lane.lock().reason(received.status));
    }
    let immediate = received.immediate.ok_or("it sent a message without credits")?;
    let Immediate { credits: gained, farewell } =
        Immediate::decode(immediate).ok_or("it sent a message with malformed credits")?;
    peer.messages += 1;
    if received.bytes.is_empty() {
        // It returns what was sent to the peer before, so there are never many of these.
        return if gained > 0 || farewell {
            Ok(Taken { gained, data: false })
        } else {
            Err("it sent a message without any content".into())
        };
    }
    match peer.reader.deliver(received.bytes, sink) {
        Ok(_) => Ok(Taken { gained, data: true }),
        Err(BadLength(len)) => Err(format!("it sent a frame of {len} bytes, which no node does")),
    }
}

impl Receiver for LaneReceiver {
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        self.look |= self.lane.bell.is_rung();
        if self.fetch() {
            return Ok(self.work(sink));
        }
        self.idle_polls += 1;
        if self.look || self.trouble || self.idle_polls >= LOOK_EVERY {
            self.look_around()?;
            // What the peer sent before the news of its end is delivered before them.
            if self.trouble && !self.fetch() {
                self.report()?;
            }
        }
        Ok(0)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        if self.queue.has_fetched() {
            return Ok(true);
        }
        let taken = self.take_events()?;
        let waits = self.lane.lock().waits_for_completions();
        let sends = if waits { Watched::All } else { Watched::Failed };
        let io = |source| FabricError::Io { what: "arming RDMA completion queues", source };
        if !self.armed || self.due {
            self.queue.notify().map_err(io)?;
            (self.armed, self.due) = (true, false);
        }
        if self.sends != Some(sends) {
            self.lane.send_queue.notify(!waits).map_err(io)?;
            self.sends = Some(sends);
        }
        // Ordering: whatever came before the queues were armed raises no event, so look after that.
        if self.fetch() {
            return Ok(true);
        }
        if taken || waits {
            self.lane.lock().look_around();
        }
        if !self.session_armed {
            self.session_armed = !self.session.arm()?;
            self.look |= !self.session_armed;
        }
        self.look |= self.trouble || self.lane.bell.is_rung();
        Ok(self.look)
    }

    fn returned(&mut self) -> Option<NodeId> {
        self.reconnect.returned()
    }
}
