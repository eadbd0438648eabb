//! Frames over RDMA: InfiniBand or RoCE, through libibverbs.
//!
//! An RDMA transport is put on top of another one, the *session*, usually [`crate::tcp`]: peers find and know
//! each other there, and tell each other over it how to connect their queue pairs. Then frames travel over
//! RDMA, and the session stays open to say goodbye on, and to notice at once that a peer's process has ended.
//!
//! ```text
//! thread ── Transport::send ──> Sender ── queue pair ~~~ wire ~~~> receive slot ──> LaneReceiver ── sink(peer, frame)
//!                 │ no credit      ^                                                     │
//!                 └── backlog ─────┴──── credits, in the next message or alone <─────────┘
//! ```
//!
//! - `verbs`: the part of libibverbs that is used, behind safe types.
//! - `ports`, `port`: the ports that there are, and the one that is used. `unconnected`: queue pairs on it.
//!   `setup`, `notes`: connecting over the session.
//! - `reconnect`: connecting again what was lost, where there are several rails.
//! - `window`: credits and the sizes that follow from them. `stream`: frames to messages and back. All pure.
//! - `sender`, `receiver`, `lane`: the two sides of a lane and what they share.
//! - [`RdmaTransport::connect_rails`]: several ports, each a transport of its own, which `crate::rails` makes
//!   one.
//! - `async_events`: the device's own news.
//!
//! # Choices
//!
//! A reliable-connected queue pair for each peer and lane keeps a lane's order without further ado. The
//! receive slots of a lane are shared out to its peers, so that memory does not grow with the square of the
//! nodes (`window`). Each queue pair has its own, rather than all of them one queue: when one fails, it is
//! certain which slots it had.
//!
//! Data travels by SEND into such a slot and is delivered from it. RDMA writes to where the page is wanted
//! would save one copy of 4 KiB (0.1 to 0.9 us), but that place would have to be registered, and guest memory
//! is not: its frames come and go, and registering pins them. Writes into a pool would gain nothing over
//! SEND: they need a receive request for their notification all the same. As it is no node hands out a remote
//! key: a peer can fill receive slots, and reach no other byte.
//!
//! A message is copied once into a send slot, or, if it is short, into the send queue itself.
//!
//! # What is protected
//!
//! Who may connect is the session's business, and packet numbers are drawn at random. What travels over RDMA
//! is neither encrypted nor authenticated: use a network that is the machine's own.

mod async_events;
mod lane;
mod notes;
mod port;
mod ports;
mod receiver;
mod reconnect;
mod sender;
mod setup;
mod stream;
#[cfg(test)]
mod tests;
mod unconnected;
mod verbs;
mod window;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::rails::{self, RailsTransport};
use crate::transport::{ENVELOPE, Receivers, check_frame};
use crate::{FabricError, LaneId, MAX_FRAME, NodeId, Receiver, Transport, TransportStats};
use lane::Lane;
use port::{Port, PortState, unavailable};
use receiver::LaneReceiver;

#[cfg(fuzzing)]
pub use notes::fuzz as fuzz_note;
pub use ports::{Gid, RdmaPort, ports};
#[cfg(fuzzing)]
pub use stream::fuzz as fuzz_stream;

/// Which port to use, and how. What is `None` is chosen well.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RdmaSettings {
    /// The device, such as `mlx5_0`. Default: the one whose port has the fabric's own address, or else the
    /// fastest that is active.
    pub device: Option<String>,
    /// The port, from 1. Default: as for the device.
    pub port: Option<u8>,
    /// Index in the port's GID table. Default: on RoCE the fabric's own address, or else the first one for
    /// RoCE version 2 and IPv4; on InfiniBand none, which serves inside one subnet.
    pub gid_index: Option<u8>,
    /// InfiniBand service level or RoCE priority, 0 to 15.
    pub service_level: u8,
}

/// Whether the library for RDMA is there.
///
/// # Errors
/// Why not, as the end of a sentence that begins with "RDMA is unavailable because".
pub fn check_library() -> Result<(), String> {
    verbs::library::library().map(drop)
}

/// The active MTU in bytes of a port of an RDMA device.
///
/// # Errors
/// Why it cannot be asked, as the end of a sentence.
pub fn active_mtu(device: &str, port: u8) -> Result<u32, String> {
    let context = verbs::context::Context::open(device)?;
    let attr = context.port(port).map_err(|error| format!("{device}/{port} cannot be asked ({error})"))?;
    Ok(128 << attr.active_mtu)
}

/// The fabric of one node over RDMA.
///
/// The connections of a lane close when both the transport and that lane's receiver have been dropped; what
/// was posted before reaches the peers.
pub struct RdmaTransport {
    session: Arc<dyn Transport>,
    /// The longest frame.
    most: usize,
    lanes: Vec<Arc<Lane>>,
    receivers: Receivers<LaneReceiver>,
}

impl RdmaTransport {
    /// Connects this node to every other over RDMA, with the help of `session`, of which no receiver was
    /// taken and whose other nodes do the same. `local` is this node's own address in the fabric, if it has
    /// one; `timeout` is for the whole set-up.
    ///
    /// # Errors
    /// [`FabricError::Setup`], which begins "RDMA is unavailable because" if this host cannot do it;
    /// [`FabricError::PeerLost`] when a peer leaves meanwhile.
    pub fn connect(
        session: Arc<dyn Transport>,
        settings: &RdmaSettings,
        local: Option<IpAddr>,
        timeout: Duration,
    ) -> Result<RdmaTransport, FabricError> {
        RdmaTransport::connect_as(session, settings, local, timeout, false)
    }

    /// The same over one port for each of `rails`, which gives what to use there and the node's own address.
    /// `session` has lanes for each of them, one rail's after the other's. Each lane uses one rail at a time,
    /// and moves to the next one when that loses the peer: nothing is lost, doubled or reordered. A rail that
    /// was lost is connected again, and lanes return to theirs.
    ///
    /// # Errors
    /// As [`RdmaTransport::connect`]; also if two rails would use one port, or the session's lanes cannot be
    /// shared out evenly.
    pub fn connect_rails(
        session: Arc<dyn Transport>,
        rails: &[(RdmaSettings, Option<IpAddr>)],
        timeout: Duration,
    ) -> Result<Box<dyn Transport>, FabricError> {
        let deadline = Instant::now() + timeout;
        ports::distinct(&ports(), rails).map_err(unavailable)?;
        let shares = rails::share(&session, rails.len())?;
        let connect = |(share, (settings, local)): (Arc<dyn Transport>, &(RdmaSettings, _))| {
            let left = deadline.saturating_duration_since(Instant::now());
            let rail = RdmaTransport::connect_as(share, settings, *local, left, true)?;
            Ok(Box::new(rail) as Box<dyn Transport>)
        };
        let made = shares.into_iter().zip(rails).map(connect).collect::<Result<Vec<_>, FabricError>>()?;
        Ok(Box::new(RailsTransport::new(made)?))
    }

    fn connect_as(
        session: Arc<dyn Transport>,
        settings: &RdmaSettings,
        local: Option<IpAddr>,
        timeout: Duration,
        is_rail: bool,
    ) -> Result<RdmaTransport, FabricError> {
        if settings.service_level > 15 {
            return Err(FabricError::Setup(format!(
                "the RDMA service level {} is not possible: choose 0 to 15",
                settings.service_level
            )));
        }
        let port = Port::open(settings, local, (session.lanes(), session.nodes() - 1), is_rail)?;
        RdmaTransport::connect_over(session, port, timeout, is_rail)
    }

    fn connect_over(
        session: Arc<dyn Transport>,
        port: (Port, PortState),
        timeout: Duration,
        is_rail: bool,
    ) -> Result<RdmaTransport, FabricError> {
        let connected = setup::connect(&session, port, timeout, is_rail)?;
        let (lanes, receivers): (Vec<_>, Vec<_>) = connected.into_iter().unzip();
        let most = if is_rail { MAX_FRAME + ENVELOPE } else { MAX_FRAME };
        Ok(RdmaTransport { session, most, lanes, receivers: receivers.into_iter().collect() })
    }
}

impl Transport for RdmaTransport {
    fn node(&self) -> NodeId {
        self.session.node()
    }

    fn nodes(&self) -> usize {
        self.session.nodes()
    }

    fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let len = check_frame(self.node(), to, lane, self.nodes(), self.lanes.len(), self.most, parts)?;
        self.lanes[usize::from(lane)].send(to, len, parts)
    }

    fn send_all(&self, to: NodeId, lane: LaneId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        for frame in frames {
            check_frame(self.node(), to, lane, self.nodes(), self.lanes.len(), self.most, frame)?;
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
        self.lanes.iter().for_each(|lane| lane.counters.add_to(&mut stats));
        stats
    }
}
