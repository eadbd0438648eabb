//! From a session to queue pairs: each side tells the other how to reach its own, and connects to the other's.
//!
//! ```text
//! hello(queue pair, packet number, address) ──────>
//! <────── hello: connect the own queue pair to that one
//! ready ──────>
//! <────── ready: messages may be sent
//! ```

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::RdmaSettings;
use super::lane::{LAST_WORDS, Lane, RECEIVES, SENDS};
use super::notes::{Hello, Note, random_psn};
use super::ports::{Choice, choose, ports};
use super::sender::{INLINE, Sender};
use super::verbs::completion::{Channel, Cq};
use super::verbs::context::{Context, SharedContext};
use super::verbs::ffi::{LINK_LAYER_ETHERNET, PORT_ACTIVE, PortAttr};
use super::verbs::library::library;
use super::verbs::memory::{Pd, Slots};
use super::verbs::queue::{MOST_RECEIVES, Qp, RAIL_RETRIES, RETRIES, Route, Srq};
use super::watch::Watch;
use super::window::{SEND_SLOTS, SLOT, Window};
use crate::bell::Bell;
use crate::transport::Counters;
use crate::{FabricError, LaneId, NodeId, Receiver, Transport};

/// A lane and the session's receiver for it.
pub(super) type Connected = (Arc<Lane>, Box<dyn Receiver>);

/// Why there is no RDMA, as a sentence; `why` is its end.
pub(super) fn unavailable(why: impl std::fmt::Display) -> FabricError {
    FabricError::Setup(format!("RDMA is unavailable because {why}"))
}

/// Opens the device and connects every lane to every peer; as one rail of several, which is given up sooner, if
/// `is_rail`.
pub(super) fn connect(
    session: &Arc<dyn Transport>,
    settings: &RdmaSettings,
    local: Option<IpAddr>,
    timeout: Duration,
    is_rail: bool,
) -> Result<Vec<Connected>, FabricError> {
    library().map_err(unavailable)?;
    let choice = choose(&ports(), settings, local).map_err(unavailable)?;
    let context = Arc::new(Context::open(&choice.device).map_err(unavailable)?);
    let name = format!("{}/{}", choice.device, choice.port);
    let port = context
        .port(choice.port)
        .map_err(|error| unavailable(format!("port {name} cannot be asked ({error})")))?;
    if port.state != PORT_ACTIVE {
        return Err(unavailable(format!("port {name} is not active: see its cable and `rdma link`")));
    }
    let window = Window::new(session.nodes() - 1);
    check_limits(&context, session, &window)?;
    tracing::info!(
        "RDMA over port {name} ({}), MTU {}",
        choice.gid.map_or(format!("LID {}", port.lid), |gid| gid.ip().to_string()),
        128 << port.active_mtu
    );
    let watch = Watch::new(context.clone(), choice.port)?;
    let last_words = Arc::new(Mutex::new(LAST_WORDS));
    let retries = if is_rail { RAIL_RETRIES } else { RETRIES };
    let place = Place { context, choice, port, window, settings, retries, session, watch, last_words };
    let mut lanes = (0..session.lanes() as LaneId)
        .map(|lane| HalfLane::new(&place, lane))
        .collect::<Result<Vec<_>, _>>()?;
    exchange(&place, &mut lanes, timeout)?;
    let connected =
        lanes.into_iter().map(|lane| lane.finish(&place)).collect::<Result<Vec<Connected>, FabricError>>()?;
    let lanes: Vec<Arc<Lane>> = connected.iter().map(|(lane, _)| lane.clone()).collect();
    place.watch.start(&lanes)?;
    Ok(connected)
}

/// Whether the device can do what is needed; said before something fails half-way.
fn check_limits(
    context: &SharedContext,
    session: &Arc<dyn Transport>,
    window: &Window,
) -> Result<(), FabricError> {
    let device = context.name();
    let limits =
        context.limits().map_err(|error| unavailable(format!("{device} cannot be asked ({error})")))?;
    let peers = session.nodes() - 1;
    let needs = [
        ("shared receive queues", limits.max_srq, session.lanes()),
        ("receive requests in a queue", limits.max_srq_wr, window.receive_slots),
        ("send requests in a queue", limits.max_qp_wr, window.depth),
        ("queue pairs", limits.max_qp, peers * session.lanes()),
        ("completion queues", limits.max_cq, 2 * session.lanes()),
        ("completions in a queue", limits.max_cqe, peers * window.depth),
    ];
    for (what, most, need) in needs {
        if usize::try_from(most).unwrap_or(0) < need {
            return Err(unavailable(format!(
                "{device} allows {most} {what}, and this machine needs {need}: use fewer nodes or shards, another \
                 adapter, or TCP"
            )));
        }
    }
    Ok(())
}

/// What all lanes are made of.
struct Place<'a> {
    context: SharedContext,
    choice: Choice,
    port: PortAttr,
    window: Window,
    settings: &'a RdmaSettings,
    retries: u8,
    session: &'a Arc<dyn Transport>,
    watch: Arc<Watch>,
    last_words: Arc<Mutex<Duration>>,
}

/// A lane that is being connected.
struct HalfLane {
    lane: LaneId,
    receiver: Box<dyn Receiver>,
    channel: Arc<Channel>,
    send_cq: Arc<Cq>,
    receive_cq: Arc<Cq>,
    srq: Arc<Srq>,
    send_slots: Slots,
    receive_slots: Slots,
    /// By node; `None` for this node itself.
    peers: Vec<Option<HalfPeer>>,
}

struct HalfPeer {
    qp: Qp,
    psn: u32,
    /// Its hello came, and the queue pair is connected.
    connected: bool,
    /// It is ready.
    ready: bool,
}

impl HalfLane {
    fn new(place: &Place<'_>, lane: LaneId) -> Result<HalfLane, FabricError> {
        let Window { receive_slots, depth, .. } = place.window;
        let peers = place.session.nodes() - 1;
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
        let send_cq = Cq::new(&channel, (peers * depth).max(1), SENDS).map_err(made("a completion queue"))?;
        let receive_cq =
            Cq::new(&channel, receive_slots.max(1), RECEIVES).map_err(made("a completion queue"))?;
        let pd = Pd::new(&place.context).map_err(made("a protection domain"))?;
        let srq = Srq::new(&pd, receive_slots.max(1) as u32).map_err(made("a shared receive queue"))?;
        let send_slots = Slots::new(&pd, SLOT, SEND_SLOTS).map_err(made("memory for what is sent"))?;
        let received =
            Slots::new(&pd, SLOT, receive_slots.max(1)).map_err(made("memory for what arrives"))?;
        let indexes: Vec<u16> = (0..receive_slots as u16).collect();
        for some in indexes.chunks(MOST_RECEIVES) {
            // SAFETY: nobody else knows of the slots.
            unsafe { srq.post(&received, some) }.map_err(made("the receive queue's slots"))?;
        }
        let me = place.session.node();
        let peers = (0..place.session.nodes() as u16)
            .map(NodeId)
            .map(|peer| {
                if peer == me {
                    return Ok(None);
                }
                let qp = Qp::new(&send_cq, &receive_cq, &srq, depth as u32, INLINE)
                    .map_err(made("a queue pair"))?;
                Ok(Some(HalfPeer { qp, psn: random_psn(), connected: false, ready: false }))
            })
            .collect::<Result<_, FabricError>>()?;
        let receiver = place.session.take_receiver(lane).ok_or_else(|| {
            FabricError::Setup(format!("lane {lane} of the session is in use, and RDMA needs it"))
        })?;
        Ok(HalfLane {
            lane,
            receiver,
            channel,
            send_cq,
            receive_cq,
            srq,
            send_slots,
            receive_slots: received,
            peers,
        })
    }

    fn each(&self) -> impl Iterator<Item = (NodeId, &HalfPeer)> {
        (0..).map(NodeId).zip(&self.peers).filter_map(|(node, peer)| Some((node, peer.as_ref()?)))
    }

    /// Whether something still has to come.
    fn waits(&self) -> bool {
        self.each().any(|(_, peer)| !peer.ready || !peer.connected)
    }

    /// Acts on a note; an error is the end of a sentence about the peer.
    fn note(&mut self, place: &Place<'_>, from: NodeId, note: &Note) -> Result<(), String> {
        let lane = self.lane;
        let Some(peer) = self.peers.get_mut(from.index()).and_then(Option::as_mut) else { return Ok(()) };
        match note {
            Note::Hello(_) if peer.connected => Err("it said hello twice".into()),
            Note::Hello(hello) => {
                peer.qp.connect(&route(place, peer.psn, hello)?)?;
                peer.connected = true;
                place
                    .session
                    .send(from, lane, &[&Note::Ready.encode()])
                    .map_err(|error| format!("it cannot be told that RDMA is ready ({error})"))
            }
            Note::Ready if peer.connected && !peer.ready => {
                peer.ready = true;
                Ok(())
            }
            Note::Ready => Err("it was ready before its hello".into()),
            Note::Goodbye(_) => Err("it gave its RDMA connection up".into()),
        }
    }

    fn finish(self, place: &Place<'_>) -> Result<Connected, FabricError> {
        let bell = Arc::new(Bell::new()?);
        let mut peers: Vec<_> = self.each().map(|(node, peer)| (peer.qp.number(), node)).collect();
        peers.sort_unstable();
        let qps = self.peers.into_iter().map(|peer| peer.map(|peer| peer.qp)).collect();
        let sender = Sender::new(
            qps,
            self.send_slots,
            self.send_cq.clone(),
            place.window,
            place.context.library(),
            place.session.clone(),
            self.lane,
            bell.clone(),
        );
        let lane = Lane {
            sender: Mutex::new(sender),
            srq: self.srq,
            receive_slots: self.receive_slots,
            receive_cq: self.receive_cq,
            send_cq: self.send_cq,
            channel: self.channel,
            peers,
            bell,
            counters: Counters::default(),
            watch: place.watch.clone(),
            last_words: place.last_words.clone(),
        };
        Ok((Arc::new(lane), self.receiver))
    }
}

/// The way to the queue pair of a hello.
fn route(place: &Place<'_>, psn: u32, hello: &Hello) -> Result<Route, String> {
    let ethernet = |link_layer| if link_layer == LINK_LAYER_ETHERNET { "Ethernet" } else { "InfiniBand" };
    if hello.link_layer != place.port.link_layer {
        return Err(format!(
            "its RDMA port is {} and this node's is {}: name ports of one network with rdma.device and rdma.port",
            ethernet(hello.link_layer),
            ethernet(place.port.link_layer)
        ));
    }
    if hello.slot as usize != SLOT || hello.credits != place.window.credits {
        return Err("it counts RDMA messages differently: install the same version on every node".into());
    }
    if place.choice.gid.is_some() && hello.gid == [0; 16] {
        return Err("it uses no GID and this node does: set rdma.gid_index at every node or at none".into());
    }
    Ok(Route {
        port: place.choice.port,
        mtu: u32::from(hello.mtu).min(place.port.active_mtu),
        qpn: hello.qpn,
        lid: hello.lid,
        gid: place.choice.gid.map(|own| (hello.gid, own.index)),
        service_level: place.settings.service_level,
        retries: place.retries,
        receive_psn: hello.psn,
        send_psn: psn,
    })
}

/// Says hello everywhere, and works until every queue pair is connected in both directions.
fn exchange(place: &Place<'_>, lanes: &mut [HalfLane], timeout: Duration) -> Result<(), FabricError> {
    let deadline = Instant::now() + timeout;
    for lane in &*lanes {
        for (node, peer) in lane.each() {
            let hello = Hello {
                link_layer: place.port.link_layer,
                mtu: place.port.active_mtu as u8,
                qpn: peer.qp.number(),
                psn: peer.psn,
                lid: place.port.lid,
                credits: place.window.credits,
                slot: SLOT as u32,
                gid: place.choice.gid.map(|gid| gid.bytes).unwrap_or_default(),
            };
            place.session.send(node, lane.lane, &[&Note::Hello(hello).encode()])?;
        }
    }
    while lanes.iter().any(HalfLane::waits) {
        for lane in lanes.iter_mut().filter(|lane| lane.waits()) {
            receive(place, lane)?;
        }
        wait(lanes, deadline).map_err(|missing| {
            FabricError::Setup(format!(
                "after {:.1} s {} still has no RDMA connection with {missing}; see what is said there",
                timeout.as_secs_f64(),
                place.session.node()
            ))
        })?;
    }
    Ok(())
}

/// Takes what has come on a lane, but nothing beyond what set-up needs: what follows is the lane's.
fn receive(place: &Place<'_>, lane: &mut HalfLane) -> Result<(), FabricError> {
    let mut notes = Vec::new();
    let polled = lane.receiver.poll(&mut |from, frame| notes.push((from, Note::decode(frame))));
    for (from, note) in notes {
        let done = note.and_then(|note| lane.note(place, from, &note));
        done.map_err(|why| FabricError::Setup(format!("RDMA to {from} could not be set up: {why}")))?;
    }
    polled.map(drop)
}

/// Sleeps until something has come; an error names who is missing at the deadline.
fn wait(lanes: &mut [HalfLane], deadline: Instant) -> Result<(), String> {
    let mut fds = Vec::new();
    for lane in lanes.iter_mut().filter(|lane| lane.waits()) {
        if lane.receiver.arm().unwrap_or(true) {
            return Ok(());
        }
        // SAFETY: the receiver keeps its descriptor open and outlives this call.
        let fd = unsafe { BorrowedFd::borrow_raw(lane.receiver.fd()) };
        fds.push(PollFd::new(fd, PollFlags::POLLIN));
    }
    if fds.is_empty() {
        return Ok(());
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    match nix::poll::poll(&mut fds, timeout) {
        Ok(0) if left.is_zero() => {
            let mut missing: Vec<NodeId> = lanes
                .iter()
                .flat_map(|lane| lane.each().filter(|(_, peer)| !peer.ready).map(|(node, _)| node))
                .collect();
            missing.sort();
            missing.dedup();
            Err(missing.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", "))
        }
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(format!("its peers ({})", error.desc())),
    }
}
