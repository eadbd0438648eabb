//! From a session to queue pairs: each side tells the other how to reach its own, and connects to the other's.
//!
//! ```text
//! hello(queue pair, packet number, address) ──────>
//! <────── hello: connect the own queue pair to that one
//! ready ──────>
//! <────── ready: messages may be sent
//! ```

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::lane::{LAST_WORDS, Lane, RECEIVES, SENDS, place_of};
use super::mender::Mender;
use super::notes::{Hello, Note};
use super::place::{Half, Place, Port, unavailable};
use super::sender::Sender;
use super::verbs::completion::{Channel, Cq};
use super::verbs::memory::{Pd, Slots};
use super::verbs::queue::Qp;
use super::watch::Watch;
use super::window::{SEND_SLOTS, SLOT, Window};
use crate::bell::Bell;
use crate::transport::Counters;
use crate::{FabricError, LaneId, NodeId, Receiver, Transport};

/// A lane and the session's receiver for it.
pub(super) type Connected = (Arc<Lane>, Box<dyn Receiver>);

/// Connects every lane to every peer over `place`, whose port is `port`. Lost peers are connected again if `mends`.
pub(super) fn connect(
    session: &Arc<dyn Transport>,
    place: Place,
    port: Port,
    timeout: Duration,
    mends: bool,
) -> Result<Vec<Connected>, FabricError> {
    let place = Arc::new(place);
    let watch = Watch::new(place.context.clone(), place.number())?;
    let last_words = Arc::new(Mutex::new(LAST_WORDS));
    let mender = if mends { Some(Mender::start(place.clone())?) } else { None };
    let common = Common { place: &place, port, session, watch, last_words, mender };
    let mut lanes = (0..session.lanes() as LaneId)
        .map(|lane| HalfLane::new(&common, lane))
        .collect::<Result<Vec<_>, _>>()?;
    exchange(&common, &mut lanes, timeout)?;
    let connected = lanes
        .into_iter()
        .map(|lane| lane.finish(&common))
        .collect::<Result<Vec<Connected>, FabricError>>()?;
    let lanes: Vec<Arc<Lane>> = connected.iter().map(|(lane, _)| lane.clone()).collect();
    common.watch.start(&lanes)?;
    Ok(connected)
}

/// What all lanes have in common.
struct Common<'a> {
    place: &'a Place,
    port: Port,
    session: &'a Arc<dyn Transport>,
    watch: Arc<Watch>,
    last_words: Arc<Mutex<Duration>>,
    mender: Option<Mender>,
}

/// A lane that is being connected.
struct HalfLane {
    lane: LaneId,
    receiver: Box<dyn Receiver>,
    channel: Arc<Channel>,
    send_cq: Arc<Cq>,
    receive_cq: Arc<Cq>,
    /// By node; `None` for this node itself. Before the slots that their queue pairs were given.
    peers: Vec<Option<HalfPeer>>,
    send_slots: Slots,
    receive_slots: Slots,
    pd: Arc<Pd>,
}

enum HalfPeer {
    /// Its hello has not come.
    Waits(Half),
    /// The queue pair is connected; whether the peer's is, too.
    Connected(Qp, bool),
}

impl HalfLane {
    fn new(common: &Common<'_>, lane: LaneId) -> Result<HalfLane, FabricError> {
        let (session, place) = (common.session, common.place);
        let Window { receive_slots, depth, .. } = place.window;
        let me = session.node();
        let made = |what: &'static str| {
            move |error: io::Error| match error.raw_os_error() {
                Some(nix::libc::ENOMEM) => unavailable(format!(
                    "there is no memory for {what}, or this process may lock no more: raise the limit with `ulimit -l \
                     unlimited` (LimitMEMLOCK=infinity in a systemd unit)"
                )),
                _ => unavailable(format!("{what} cannot be had ({error})")),
            }
        };
        let channel = Channel::new(&place.context).map_err(made("a completion channel"))?;
        let sends = (session.nodes() - 1) * depth;
        let send_cq = Cq::new(&channel, sends.max(1), SENDS).map_err(made("a completion queue"))?;
        let receive_cq =
            Cq::new(&channel, receive_slots.max(1), RECEIVES).map_err(made("a completion queue"))?;
        let pd = Pd::new(&place.context).map_err(made("a protection domain"))?;
        let send_slots = Slots::new(&pd, SLOT, SEND_SLOTS).map_err(made("memory for what is sent"))?;
        let received =
            Slots::new(&pd, SLOT, receive_slots.max(1)).map_err(made("memory for what arrives"))?;
        let half = |peer| {
            if peer == me {
                return Ok(None);
            }
            let half = Half::new(place, common.port, &pd, (&send_cq, &receive_cq));
            Ok(Some(HalfPeer::Waits(half.map_err(made("a queue pair"))?)))
        };
        let peers = (0..session.nodes() as u16).map(NodeId).map(half).collect::<Result<_, FabricError>>()?;
        let receiver = session.take_receiver(lane).ok_or_else(|| {
            FabricError::Setup(format!("lane {lane} of the session is in use, and RDMA needs it"))
        })?;
        let receive_slots = received;
        Ok(HalfLane { lane, receiver, channel, send_cq, receive_cq, peers, send_slots, receive_slots, pd })
    }

    fn each(&self) -> impl Iterator<Item = (NodeId, &HalfPeer)> {
        (0..).map(NodeId).zip(&self.peers).filter_map(|(node, peer)| Some((node, peer.as_ref()?)))
    }

    /// The peers from which something still has to come.
    fn missing(&self) -> impl Iterator<Item = NodeId> {
        let waits = |peer: &HalfPeer| !matches!(peer, HalfPeer::Connected(_, true));
        self.each().filter(move |(_, peer)| waits(peer)).map(|(node, _)| node)
    }

    fn waits(&self) -> bool {
        self.missing().next().is_some()
    }

    /// Acts on a note; an error is the end of a sentence about the peer.
    fn note(&mut self, common: &Common<'_>, from: NodeId, note: &Note) -> Result<(), String> {
        match note {
            Note::Hello(hello) => self.hello(common, from, hello),
            Note::Ready => match self.peers.get_mut(from.index()) {
                Some(Some(HalfPeer::Connected(_, ready @ false))) => {
                    *ready = true;
                    Ok(())
                }
                _ => Err("it was ready before its hello".into()),
            },
            Note::Goodbye(_) => Err("it gave its RDMA connection up".into()),
        }
    }

    fn hello(&mut self, common: &Common<'_>, from: NodeId, hello: &Hello) -> Result<(), String> {
        let (session, lane) = (common.session, self.lane);
        let Some(peer) = self.peers.get_mut(from.index()) else { return Ok(()) };
        let Some(HalfPeer::Waits(half)) = peer.take() else { return Err("it said hello twice".into()) };
        let place = place_of(session.node(), from);
        // SAFETY: nobody else knows of the slots, and each peer has its own. They are dropped after `peers`.
        let qp = unsafe { half.connect(common.place, hello, &self.receive_slots, place) }?;
        *peer = Some(HalfPeer::Connected(qp, false));
        session
            .send(from, lane, &[&Note::Ready.encode()])
            .map_err(|error| format!("it cannot be told that RDMA is ready ({error})"))
    }

    fn finish(self, common: &Common<'_>) -> Result<Connected, FabricError> {
        let (place, session) = (common.place, common.session);
        let bell = Arc::new(Bell::new()?);
        let connected = |peer| match peer {
            HalfPeer::Connected(qp, _) => Some(qp),
            HalfPeer::Waits(_) => None,
        };
        let qps = self.peers.into_iter().map(|peer| peer.and_then(connected)).collect();
        let sender = Sender::new(
            qps,
            self.send_slots,
            self.send_cq.clone(),
            place.window,
            place.context.library(),
            session.clone(),
            self.lane,
            bell.clone(),
        );
        let lane = Lane {
            sender: Mutex::new(sender),
            done: Mutex::default(),
            mender: common.mender.clone(),
            receive_slots: self.receive_slots,
            pd: self.pd,
            receive_cq: self.receive_cq,
            send_cq: self.send_cq,
            channel: self.channel,
            node: session.node(),
            window: place.window,
            bell,
            counters: Counters::default(),
            watch: common.watch.clone(),
            last_words: common.last_words.clone(),
        };
        Ok((Arc::new(lane), self.receiver))
    }
}

/// Says hello everywhere, and works until every queue pair is connected in both directions.
fn exchange(common: &Common<'_>, lanes: &mut [HalfLane], timeout: Duration) -> Result<(), FabricError> {
    let deadline = Instant::now() + timeout;
    for lane in &*lanes {
        for (node, peer) in lane.each() {
            if let HalfPeer::Waits(half) = peer {
                let hello = Note::Hello(half.hello(common.place)).encode();
                common.session.send(node, lane.lane, &[&hello])?;
            }
        }
    }
    while lanes.iter().any(HalfLane::waits) {
        for lane in lanes.iter_mut().filter(|lane| lane.waits()) {
            receive(common, lane)?;
        }
        wait(lanes, deadline).map_err(|missing| {
            FabricError::Setup(format!(
                "after {:.1} s {} still has no RDMA connection with {missing}; see what is said there",
                timeout.as_secs_f64(),
                common.session.node()
            ))
        })?;
    }
    Ok(())
}

/// Takes what has come on a lane, but nothing beyond what set-up needs: what follows is the lane's.
fn receive(common: &Common<'_>, lane: &mut HalfLane) -> Result<(), FabricError> {
    let mut notes = Vec::new();
    let polled = lane.receiver.poll(&mut |from, frame| notes.push((from, Note::decode(frame))));
    for (from, note) in notes {
        let done = note.and_then(|note| lane.note(common, from, &note));
        done.map_err(|why| FabricError::Setup(format!("RDMA to {from} could not be set up: {why}")))?;
    }
    polled.map(drop)
}

/// Sleeps until something has come; an error names who is missing at the deadline.
fn wait(lanes: &mut [HalfLane], deadline: Instant) -> Result<(), String> {
    let mut waiting = lanes.iter_mut().filter(|lane| lane.waits());
    if waiting.any(|lane| lane.receiver.arm().unwrap_or(true)) {
        return Ok(());
    }
    let waiting = lanes.iter().filter(|lane| lane.waits());
    let mut fds: Vec<_> = waiting.map(|lane| PollFd::new(lane.receiver.fd(), PollFlags::POLLIN)).collect();
    if fds.is_empty() {
        return Ok(());
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(&mut fds, timeout) {
        Ok(0) if left.is_zero() => {
            let mut missing: Vec<NodeId> = lanes.iter().flat_map(HalfLane::missing).collect();
            missing.sort();
            missing.dedup();
            Err(missing.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", "))
        }
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(format!("its peers ({})", error.desc())),
    }
}
