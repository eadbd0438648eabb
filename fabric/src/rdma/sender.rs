//! The sending side of a lane: to every peer a queue pair with its credits and its backlog.
//!
//! ```text
//!                     credit, room in the queue, slot?
//! send ── backlog empty ──> yes ──> posted ── completion ──> slot free
//!              │             no                               │
//!              └──> backlog <┘ <──── flushed when credits or completions come back
//! ```
//!
//! Everything here happens under the lane's lock.

use std::collections::VecDeque;
use std::sync::Arc;

use super::notes::Note;
use super::stream::{HEADER, header};
use super::verbs::ffi::status;
use super::verbs::library::Library;
use super::verbs::queue::{Data, Message, Qp};
use super::verbs::receive::ReceiveQueue;
use super::verbs::send::{SendQueue, SendSlot, Sent};
use super::window::{BESIDE, INLINE, Immediate, SIGNAL_EVERY, SLOT, Window};
use crate::bell::Bell;
use crate::transport::too_far_behind;
use crate::{FabricError, LaneId, MAX_BACKLOG, NodeId, Transport};

/// A backlog that grew past this gives its memory back when it has been sent.
const KEPT_CAPACITY: usize = 1 << 20;

/// The sending side of one lane.
pub(super) struct Sender {
    /// By node; `None` for this node itself.
    links: Vec<Option<PeerQueue>>,
    /// Slots that no message is in.
    free: Vec<SendSlot>,
    queue: Arc<SendQueue>,
    /// Sends that are finished, between two looks at the queue; kept so that none needs an allocation.
    sent: Vec<Sent>,
    window: Window,
    library: &'static Library,
    session: Arc<dyn Transport>,
    lane: LaneId,
    bell: Arc<Bell>,
}

/// The connection to one peer.
struct PeerQueue {
    /// `None` once it is lost and another one is being made.
    qp: Option<Qp>,
    /// Messages with data that the peer has room for.
    credits: u16,
    /// Messages of the peer that were worked through and whose credits were not returned yet.
    owed: u16,
    /// Messages posted so far.
    messages: u64,
    /// Messages since the last one that says when it is done.
    silent: usize,
    /// What could not be sent yet, as a stream of bytes.
    backlog: VecDeque<u8>,
    /// Why the peer is lost, once it is.
    lost: Option<String>,
}

impl PeerQueue {
    /// Messages that were posted and not seen to be finished.
    fn in_flight(&self) -> usize {
        self.qp.as_ref().map_or(0, Qp::in_flight)
    }
}

impl Sender {
    /// Takes the connected queue pairs, by node.
    #[allow(clippy::too_many_arguments, reason = "the parts of a lane, each once")]
    pub(super) fn new(
        qps: Vec<Option<Qp>>,
        free: Vec<SendSlot>,
        queue: Arc<SendQueue>,
        window: Window,
        library: &'static Library,
        session: Arc<dyn Transport>,
        lane: LaneId,
        bell: Arc<Bell>,
    ) -> Sender {
        let link = |qp| PeerQueue {
            qp: Some(qp),
            credits: window.credits,
            owed: 0,
            messages: 0,
            silent: 0,
            backlog: VecDeque::new(),
            lost: None,
        };
        let links = qps.into_iter().map(|qp| qp.map(link)).collect();
        Sender { links, free, queue, sent: Vec::new(), window, library, session, lane, bell }
    }

    fn link(&mut self, to: NodeId) -> Result<&mut PeerQueue, FabricError> {
        let link = self.links.get_mut(to.index()).and_then(Option::as_mut);
        let link = link.ok_or_else(|| FabricError::Refused(format!("{to} is no peer of this node")))?;
        match &link.lost {
            Some(why) => Err(FabricError::PeerLost { peer: to, why: why.clone() }),
            None => Ok(link),
        }
    }

    /// Sends a frame of `len` bytes, checked by the caller, or keeps it.
    pub(super) fn send(&mut self, to: NodeId, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        let header = header(len);
        let fits = HEADER + len <= SLOT && self.link(to)?.backlog.is_empty();
        let fill = |put: &mut dyn FnMut(&[u8])| {
            put(&header);
            parts.iter().for_each(|part| put(part));
        };
        if fits && self.post(to, HEADER + len, false, fill)? {
            return Ok(());
        }
        self.keep(to, HEADER + len, fill)?;
        self.flush(to)
    }

    /// Sends frames, checked by the caller: as many as fit in one message together.
    pub(super) fn send_all(&mut self, to: NodeId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        let len = |frame: &[&[u8]; 2]| frame[0].len() + frame[1].len();
        let mut rest = frames;
        while !rest.is_empty() {
            let mut total = 0;
            let fits = |frame: &&[&[u8]; 2]| {
                total += HEADER + len(frame);
                total <= SLOT
            };
            let count = rest.iter().take_while(fits).count();
            let (now, later) = rest.split_at(count.max(1));
            let total = now.iter().map(|frame| HEADER + len(frame)).sum();
            let fill = |put: &mut dyn FnMut(&[u8])| {
                for frame in now {
                    put(&header(len(frame)));
                    frame.iter().for_each(|part| put(part));
                }
            };
            let may = count > 0 && self.link(to)?.backlog.is_empty();
            if !(may && self.post(to, total, false, fill)?) {
                self.keep(to, total, fill)?;
                self.flush(to)?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Posts a message of `total` bytes that `fill` puts together; `false` if it has to wait. One without
    /// bytes only returns credits, and needs none itself.
    fn post(
        &mut self,
        to: NodeId,
        total: usize,
        farewell: bool,
        fill: impl Fn(&mut dyn FnMut(&[u8])),
    ) -> Result<bool, FabricError> {
        let (data, window) = (total > 0, self.window);
        // Credits can always be returned.
        let limit = if data { window.depth - BESIDE } else { window.depth };
        if data && self.link(to)?.credits == 0 {
            return Ok(false);
        }
        if self.link(to)?.in_flight() >= limit {
            self.reap();
            if self.link(to)?.in_flight() >= limit {
                return Ok(false);
            }
        }
        let mut slot = if total <= self.link(to)?.qp.as_ref().map_or(0, Qp::max_inline) {
            None
        } else {
            if self.free.is_empty() {
                self.reap();
            }
            let Some(slot) = self.free.pop() else { return Ok(false) };
            Some(slot)
        };
        let (mut inline, mut at) = ([0; INLINE], 0);
        if let Some(slot) = &mut slot {
            slot.clear();
        }
        fill(&mut |bytes| {
            match &mut slot {
                Some(slot) => slot.append(bytes),
                None => inline[at..at + bytes.len()].copy_from_slice(bytes),
            }
            at += bytes.len();
        });
        debug_assert_eq!(at, total);
        let Some(link) = self.links[to.index()].as_mut() else { return Ok(false) };
        let Some(qp) = &mut link.qp else { return Ok(false) };
        let signaled = slot.is_some() || farewell || link.silent + 1 >= SIGNAL_EVERY;
        let immediate = Immediate { credits: link.owed, farewell }.encode();
        let place = slot.map_or_else(|| Data::Inline(&inline[..total]), Data::Slot);
        if let Err(error) = qp.post(Message { immediate, data: place, signaled }) {
            return Err(self.lose(to, &format!("its RDMA connection takes no message ({error})")));
        }
        link.silent = if signaled { 0 } else { link.silent + 1 };
        link.credits -= u16::from(data);
        link.owed = 0;
        link.messages += 1;
        Ok(true)
    }

    /// Appends bytes to the peer's backlog.
    fn keep(
        &mut self,
        to: NodeId,
        total: usize,
        fill: impl Fn(&mut dyn FnMut(&[u8])),
    ) -> Result<(), FabricError> {
        let link = self.link(to)?;
        if link.backlog.len() + total > MAX_BACKLOG {
            return Err(self.lose(to, &too_far_behind()));
        }
        let first = link.backlog.is_empty();
        fill(&mut |bytes| link.backlog.extend(bytes));
        if first {
            // The receiver may be asleep without watching for what lets it go on.
            self.bell.ring();
        }
        Ok(())
    }

    /// Sends of the backlog what can be sent now.
    fn flush(&mut self, to: NodeId) -> Result<(), FabricError> {
        let mut backlog = std::mem::take(&mut self.link(to)?.backlog);
        while !backlog.is_empty() {
            let total = backlog.len().min(SLOT);
            let (front, back) = backlog.as_slices();
            let front = &front[..front.len().min(total)];
            let back = &back[..total - front.len()];
            let fill = |put: &mut dyn FnMut(&[u8])| {
                put(front);
                put(back);
            };
            if !self.post(to, total, false, fill)? {
                break;
            }
            backlog.drain(..total);
        }
        if !backlog.is_empty() || backlog.capacity() <= KEPT_CAPACITY {
            self.link(to)?.backlog = backlog;
        }
        Ok(())
    }

    /// The receiver has worked through `taken` messages of the peer, and these returned `gained` credits.
    pub(super) fn settle(&mut self, peer: NodeId, gained: u32, taken: u32) {
        let most = u32::from(self.window.credits);
        let Ok(link) = self.link(peer) else { return };
        let (credits, owed) = (u32::from(link.credits) + gained, u32::from(link.owed) + taken);
        if credits > most || owed > most {
            let why = if owed > most { "sent more than it may" } else { "gave room that it does not have" };
            self.lose(peer, &format!("it {why}"));
            return;
        }
        (link.credits, link.owed) = (credits as u16, owed as u16);
        // A loss is found again by the receiver, which looks when it hears the bell.
        let _ = self.catch_up(peer);
    }

    /// Sends what waits, credits included.
    fn catch_up(&mut self, peer: NodeId) -> Result<(), FabricError> {
        let return_at = self.window.return_at;
        if !self.link(peer)?.backlog.is_empty() {
            self.flush(peer)?;
        }
        if self.link(peer)?.owed >= return_at {
            self.post(peer, 0, false, |_| ())?;
        }
        Ok(())
    }

    /// Takes completions, and sends to every peer what waits.
    pub(super) fn look_around(&mut self) {
        self.reap();
        for peer in (0..self.links.len() as u16).map(NodeId) {
            // A lost or absent peer has nothing that waits.
            let _ = self.catch_up(peer);
        }
    }

    /// Takes the news of sends that are finished.
    pub(super) fn reap(&mut self) {
        let mut sent = std::mem::take(&mut self.sent);
        loop {
            let more = self.queue.poll(&mut sent);
            sent.drain(..).for_each(|sent| self.finish(sent));
            match more {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    self.lose_all(&format!("its send queue failed ({error})"));
                    break;
                }
            }
        }
        self.sent = sent;
    }

    fn finish(&mut self, sent: Sent) {
        let peer = NodeId(sent.user());
        let link = self.links.get_mut(peer.index()).and_then(Option::as_mut);
        // That of a queue pair that was replaced says nothing any more.
        let Some(qp) = link.and_then(|link| link.qp.as_mut()).filter(|qp| qp.has_sent(&sent)) else { return };
        if sent.status() == status::SUCCESS {
            qp.finish(sent, &mut self.free);
        } else {
            let why = self.reason(sent.status());
            self.lose(peer, &why);
        }
    }

    /// Whether something waits for a send to finish, rather than for credits.
    pub(super) fn waits_for_completions(&self) -> bool {
        self.links.iter().flatten().any(|link| !link.backlog.is_empty() && link.credits > 0)
    }

    /// What a failed completion says of the peer, as the end of a sentence.
    pub(super) fn reason(&self, failed: u32) -> String {
        match failed {
            status::RETRY_EXC_ERR => "its adapter does not answer (transport retries exceeded)".into(),
            status::RNR_RETRY_EXC_ERR => "it takes no messages although it gave room for them".into(),
            status::REM_INV_REQ_ERR => "it refused a message".into(),
            status::LOC_LEN_ERR => "it sent a message that is too long".into(),
            status::WR_FLUSH_ERR => "its RDMA connection failed".into(),
            other => format!("its RDMA connection failed ({})", self.library.status(other)),
        }
    }

    /// Ends the connection to a peer because of `why`, unless it was lost before for another reason; the
    /// error with the first reason.
    pub(super) fn lose(&mut self, peer: NodeId, why: &str) -> FabricError {
        let Some(Some(link)) = self.links.get_mut(peer.index()) else {
            return FabricError::Refused(format!("{peer} is no peer of this node"));
        };
        if link.lost.is_none() {
            link.lost = Some(why.to_owned());
            link.backlog = VecDeque::new();
            // Its slots stay with the queue pair, which may still read them.
            if let Some(Err(error)) = link.qp.as_ref().map(Qp::fail) {
                tracing::debug!(peer = peer.0, %error, "a lost RDMA connection could not be ended");
            }
            // So that the peer need not wait for its own timeouts. If the session is gone, it knows already.
            let _ = self.session.send(peer, self.lane, &[&Note::Goodbye(link.messages).encode()]);
            self.bell.ring();
        }
        FabricError::PeerLost { peer, why: link.lost.clone().unwrap_or_default() }
    }

    /// Gives the slots of a peer's messages that were worked through back to its queue pair; not if the peer
    /// is lost.
    pub(super) fn refill(&mut self, peer: NodeId, queue: &mut ReceiveQueue) {
        let Ok(PeerQueue { qp: Some(qp), .. }) = self.link(peer) else { return };
        if let Err(error) = qp.refill(queue) {
            self.lose(peer, &format!("its RDMA connection takes no receive slot ({error})"));
        }
    }

    /// Takes the queue pair of a peer that is lost.
    pub(super) fn retire(&mut self, peer: NodeId) -> Option<Qp> {
        let link = self.links.get_mut(peer.index())?.as_mut()?;
        link.lost.as_ref()?;
        link.qp.take()
    }

    /// Takes slots back that a queue pair had when it was destroyed.
    pub(super) fn reclaim(&mut self, slots: Vec<SendSlot>) {
        self.free.extend(slots);
    }

    /// Begins again with a peer that was lost and whose queue pair was retired.
    pub(super) fn install(&mut self, peer: NodeId, qp: Qp) {
        let credits = self.window.credits;
        let Some(Some(link)) = self.links.get_mut(peer.index()) else { return };
        (link.qp, link.credits, link.owed) = (Some(qp), credits, 0);
        (link.messages, link.silent, link.lost) = (0, 0, None);
    }

    /// Ends all connections.
    pub(super) fn lose_all(&mut self, why: &str) {
        for peer in 0..self.links.len() as u16 {
            self.lose(NodeId(peer), why);
        }
    }

    /// Why a peer is lost, if it is.
    pub(super) fn loss(&self, peer: NodeId) -> Option<&String> {
        self.links.get(peer.index())?.as_ref()?.lost.as_ref()
    }

    /// The last message to everybody.
    pub(super) fn farewell(&mut self) {
        for peer in (0..self.links.len() as u16).map(NodeId) {
            // A lost or absent peer needs none.
            let _ = self.post(peer, 0, true, |_| ());
        }
    }

    /// Whether everything that was posted to peers that are not lost has reached them.
    pub(super) fn is_drained(&mut self) -> bool {
        self.reap();
        self.links.iter().flatten().all(|link| link.lost.is_some() || link.in_flight() == 0)
    }

    /// Tells the peers how many messages there were.
    pub(super) fn say_goodbye(&self) {
        for (peer, link) in (0..).zip(&self.links) {
            if let Some(link) = link
                && link.lost.is_none()
            {
                // A peer that is gone need not be told.
                let note = Note::Goodbye(link.messages).encode();
                let _ = self.session.send(NodeId(peer), self.lane, &[&note]);
            }
        }
    }
}
