//! Set-up, from a session to queue pairs: each side tells the other how to reach its own, and connects to the
//! other's.
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

use super::async_events::AsyncEvents;
use super::lane::{LAST_WORDS, Lane, RECEIVES, SENDS};
use super::notes::{Hello, Note};
use super::port::{Port, PortState, unavailable};
use super::receiver::LaneReceiver;
use super::reconnect::Outcomes;
use super::reconnect::lane::LaneReconnect;
use super::reconnect::thread::ReconnectThread;
use super::sender::Sender;
use super::unconnected::UnconnectedQp;
use super::verbs::completion::Channel;
use super::verbs::memory::{Pd, Slots};
use super::verbs::queue::{Qp, Queues};
use super::verbs::receive::{ReceiveQueue, Share};
use super::verbs::send::{SendQueue, SendSlot};
use super::window::{SEND_SLOTS, SLOT, Window};
use crate::bell::Bell;
use crate::transport::Counters;
use crate::{FabricError, LaneId, NodeId, Receiver, Transport};

/// A connected lane and its receiver.
pub(super) type Connected = (Arc<Lane>, LaneReceiver);

/// Connects every lane to every peer over `port`, which is in `state`. Lost peers are connected again if
/// `reconnects`.
pub(super) fn connect(
    session: &Arc<dyn Transport>,
    (port, state): (Port, PortState),
    timeout: Duration,
    reconnects: bool,
) -> Result<Vec<Connected>, FabricError> {
    let port = Arc::new(port);
    let events = AsyncEvents::new(port.context.clone(), port.number())?;
    let last_words = Arc::new(Mutex::new(LAST_WORDS));
    let reconnect = if reconnects { Some(ReconnectThread::start(port.clone())?) } else { None };
    let common = Common { port: &port, state, session, events, last_words, reconnect };
    let mut lanes = (0..session.lanes() as LaneId)
        .map(|lane| ConnectingLane::new(&common, lane))
        .collect::<Result<Vec<_>, _>>()?;
    exchange(&common, &mut lanes, timeout)?;
    let connected = lanes
        .into_iter()
        .map(|lane| lane.finish(&common))
        .collect::<Result<Vec<Connected>, FabricError>>()?;
    let senders = connected.iter().map(|(lane, _)| Arc::downgrade(&lane.sender)).collect();
    common.events.start(senders)?;
    Ok(connected)
}

/// What all lanes have in common.
struct Common<'a> {
    port: &'a Port,
    state: PortState,
    session: &'a Arc<dyn Transport>,
    events: Arc<AsyncEvents>,
    last_words: Arc<Mutex<Duration>>,
    reconnect: Option<ReconnectThread>,
}

/// A lane that is being connected.
struct ConnectingLane {
    lane: LaneId,
    session: Box<dyn Receiver>,
    channel: Arc<Channel>,
    queues: Queues,
    /// By node; `None` for this node itself.
    peers: Vec<Option<ConnectingPeer>>,
    send_slots: Vec<SendSlot>,
    receive_queue: ReceiveQueue,
}

enum ConnectingPeer {
    /// Its hello has not come. The slots are for its messages.
    Waits(UnconnectedQp, Share),
    /// The queue pair is connected; whether the peer's is, too.
    Connected(Qp, bool),
}

impl ConnectingLane {
    fn new(common: &Common<'_>, lane: LaneId) -> Result<ConnectingLane, FabricError> {
        let (session, port) = (common.session, common.port);
        let Window { receive_slots, share, depth, .. } = port.window;
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
        let channel = Channel::new(&port.context).map_err(made("a completion channel"))?;
        let sends = (session.nodes() - 1) * depth;
        let send = SendQueue::new(&channel, sends.max(1), SENDS).map_err(made("a completion queue"))?;
        let pd = Pd::new(&port.context).map_err(made("a protection domain"))?;
        let send_slots = Slots::new(&pd, SLOT, SEND_SLOTS).map_err(made("memory for what is sent"))?;
        let received =
            Slots::new(&pd, SLOT, receive_slots.max(1)).map_err(made("memory for what arrives"))?;
        let (receive_queue, shares) =
            ReceiveQueue::new(&channel, RECEIVES, received, share).map_err(made("a completion queue"))?;
        let queues = Queues { pd, send, receive: receive_queue.memory().clone() };
        // In the order of `Lane::peer_of`.
        let mut shares = shares.into_iter();
        let waits = |peer| {
            if peer == me {
                return Ok(None);
            }
            let qp = UnconnectedQp::new(&queues, &port.window, common.state, peer);
            let qp = qp.map_err(made("a queue pair"))?;
            let share = shares.next().ok_or_else(|| unavailable("a peer has no receive slots"))?;
            Ok(Some(ConnectingPeer::Waits(qp, share)))
        };
        let peers = (0..session.nodes() as u16).map(NodeId).map(waits).collect::<Result<_, FabricError>>()?;
        let receiver = session.take_receiver(lane).ok_or_else(|| {
            FabricError::Setup(format!("lane {lane} of the session is in use, and RDMA needs it"))
        })?;
        let send_slots = SendSlot::all(send_slots);
        Ok(ConnectingLane { lane, session: receiver, channel, queues, peers, send_slots, receive_queue })
    }

    fn each(&self) -> impl Iterator<Item = (NodeId, &ConnectingPeer)> {
        (0..).map(NodeId).zip(&self.peers).filter_map(|(node, peer)| Some((node, peer.as_ref()?)))
    }

    /// The peers from which something still has to come.
    fn missing(&self) -> impl Iterator<Item = NodeId> {
        let waits = |peer: &ConnectingPeer| !matches!(peer, ConnectingPeer::Connected(_, true));
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
                Some(Some(ConnectingPeer::Connected(_, ready @ false))) => {
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
        let Some(ConnectingPeer::Waits(qp, share)) = peer.take() else {
            return Err("it said hello twice".into());
        };
        let qp = qp.connect(common.port, hello, share).map_err(|(why, _)| why)?;
        *peer = Some(ConnectingPeer::Connected(qp, false));
        session
            .send(from, lane, &[&Note::Ready.encode()])
            .map_err(|error| format!("it cannot be told that RDMA is ready ({error})"))
    }

    fn finish(self, common: &Common<'_>) -> Result<Connected, FabricError> {
        let (port, session) = (common.port, common.session);
        let bell = Arc::new(Bell::new()?);
        let connected = |peer| match peer {
            ConnectingPeer::Connected(qp, _) => Some(qp),
            ConnectingPeer::Waits(..) => None,
        };
        let qps = self.peers.into_iter().map(|peer| peer.and_then(connected)).collect();
        let sender = Sender::new(
            qps,
            self.send_slots,
            self.queues.send.clone(),
            port.window,
            port.context.library(),
            session.clone(),
            self.lane,
            bell.clone(),
        );
        let lane = Arc::new(Lane {
            sender: Arc::new(Mutex::new(sender)),
            send_queue: self.queues.send.clone(),
            channel: self.channel,
            node: session.node(),
            bell: bell.clone(),
            counters: Counters::default(),
            events: common.events.clone(),
            last_words: common.last_words.clone(),
        });
        let reconnect = LaneReconnect::new(
            common.reconnect.clone(),
            self.queues,
            lane.sender.clone(),
            Arc::new(Outcomes::new(bell)),
            (session.clone(), self.lane),
        );
        let nodes = session.nodes();
        let receiver = LaneReceiver::new(lane.clone(), self.receive_queue, self.session, reconnect, nodes)?;
        Ok((lane, receiver))
    }
}

/// Says hello everywhere, and works until every queue pair is connected in both directions.
fn exchange(common: &Common<'_>, lanes: &mut [ConnectingLane], timeout: Duration) -> Result<(), FabricError> {
    let deadline = Instant::now() + timeout;
    for lane in &*lanes {
        for (node, peer) in lane.each() {
            if let ConnectingPeer::Waits(qp, _) = peer {
                let hello = Note::Hello(qp.hello(&common.port.window)).encode();
                common.session.send(node, lane.lane, &[&hello])?;
            }
        }
    }
    while lanes.iter().any(ConnectingLane::waits) {
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
fn receive(common: &Common<'_>, lane: &mut ConnectingLane) -> Result<(), FabricError> {
    let mut notes = Vec::new();
    let polled = lane.session.poll(&mut |from, frame| notes.push((from, Note::decode(frame))));
    for (from, note) in notes {
        let done = note.and_then(|note| lane.note(common, from, &note));
        done.map_err(|why| FabricError::Setup(format!("RDMA to {from} could not be set up: {why}")))?;
    }
    polled.map(drop)
}

/// Sleeps until something has come; an error names who is missing at the deadline.
fn wait(lanes: &mut [ConnectingLane], deadline: Instant) -> Result<(), String> {
    let mut waiting = lanes.iter_mut().filter(|lane| lane.waits());
    if waiting.any(|lane| lane.session.arm().unwrap_or(true)) {
        return Ok(());
    }
    let waiting = lanes.iter().filter(|lane| lane.waits());
    let mut fds: Vec<_> = waiting.map(|lane| PollFd::new(lane.session.fd(), PollFlags::POLLIN)).collect();
    if fds.is_empty() {
        return Ok(());
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(&mut fds, timeout) {
        Ok(0) if left.is_zero() => {
            let mut missing: Vec<NodeId> = lanes.iter().flat_map(ConnectingLane::missing).collect();
            missing.sort();
            missing.dedup();
            Err(missing.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", "))
        }
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(format!("its peers ({})", error.desc())),
    }
}
