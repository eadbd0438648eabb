//! What the connections of one rail are made of: an opened port, and queue pairs on it.

use std::net::IpAddr;
use std::sync::Arc;

use super::RdmaSettings;
use super::notes::{Hello, random_psn};
use super::ports::{Gid, choose, ports};
use super::sender::INLINE;
use super::verbs::completion::Cq;
use super::verbs::context::{Context, SharedContext};
use super::verbs::ffi::{LINK_LAYER_ETHERNET, PORT_ACTIVE, PortAttr};
use super::verbs::library::library;
use super::verbs::memory::{Pd, Slots};
use super::verbs::queue::{MOST_RECEIVES, Qp, RAIL_RETRIES, RETRIES, Route};
use super::window::{SLOT, Window};
use crate::FabricError;

/// Why there is no RDMA, as a sentence; `why` is its end.
pub(super) fn unavailable(why: impl std::fmt::Display) -> FabricError {
    FabricError::Setup(format!("RDMA is unavailable because {why}"))
}

/// An opened port, and how it is used.
pub(super) struct Place {
    pub(super) context: SharedContext,
    pub(super) window: Window,
    /// With the device and the port that were chosen.
    settings: RdmaSettings,
    local: Option<IpAddr>,
    number: u8,
    retries: u8,
}

/// The port as it was found.
#[derive(Clone, Copy)]
pub(super) struct Port {
    attr: PortAttr,
    gid: Option<Gid>,
}

impl Place {
    /// Opens the port that the settings name, or that is chosen well, for so many lanes to so many peers; as one rail of
    /// several, which is given up sooner, if `is_rail`.
    pub(super) fn open(
        settings: &RdmaSettings,
        local: Option<IpAddr>,
        (lanes, peers): (usize, usize),
        is_rail: bool,
    ) -> Result<(Place, Port), FabricError> {
        library().map_err(unavailable)?;
        let choice = choose(&ports(), settings, local).map_err(unavailable)?;
        let context = Arc::new(Context::open(&choice.device).map_err(unavailable)?);
        let window = Window::new(peers);
        check_limits(&context, (lanes, peers), &window)?;
        let settings =
            RdmaSettings { device: Some(choice.device), port: Some(choice.port), ..settings.clone() };
        let retries = if is_rail { RAIL_RETRIES } else { RETRIES };
        let place = Place { context, window, settings, local, number: choice.port, retries };
        let port = place.look().map_err(unavailable)?;
        tracing::info!(
            "RDMA over port {} ({}), MTU {}",
            place.name(),
            port.gid.map_or(format!("LID {}", port.attr.lid), |gid| gid.ip().to_string()),
            128 << port.attr.active_mtu
        );
        Ok((place, port))
    }

    /// The port's number at its device.
    pub(super) fn number(&self) -> u8 {
        self.number
    }

    fn name(&self) -> String {
        format!("{}/{}", self.context.name(), self.number)
    }

    /// The port as it is now. An error is the end of a sentence.
    pub(super) fn look(&self) -> Result<Port, String> {
        let gid = choose(&ports(), &self.settings, self.local)?.gid;
        let name = self.name();
        let attr = self.context.port(self.number);
        let attr = attr.map_err(|error| format!("port {name} cannot be asked ({error})"))?;
        if attr.state != PORT_ACTIVE {
            return Err(format!("port {name} is not active: see its cable and `rdma link`"));
        }
        Ok(Port { attr, gid })
    }

    /// The way from `half` to the queue pair of a hello.
    fn route(&self, half: &Half, hello: &Hello) -> Result<Route, String> {
        let port = &half.port;
        let kind = |link_layer| if link_layer == LINK_LAYER_ETHERNET { "Ethernet" } else { "InfiniBand" };
        if hello.link_layer != port.attr.link_layer {
            return Err(format!(
                "its RDMA port is {} and this node's is {}: name ports of one network with rdma.device and rdma.port",
                kind(hello.link_layer),
                kind(port.attr.link_layer)
            ));
        }
        if hello.slot as usize != SLOT || hello.credits != self.window.credits {
            return Err("it counts RDMA messages differently: install the same version on every node".into());
        }
        if port.gid.is_some() && hello.gid == [0; 16] {
            return Err(
                "it uses no GID and this node does: set rdma.gid_index at every node or at none".into()
            );
        }
        Ok(Route {
            port: self.number,
            mtu: u32::from(hello.mtu).min(port.attr.active_mtu),
            qpn: hello.qpn,
            lid: hello.lid,
            gid: port.gid.map(|own| (hello.gid, own.index)),
            service_level: self.settings.service_level,
            retries: self.retries,
            receive_psn: hello.psn,
            send_psn: half.psn,
        })
    }
}

/// Whether the device can do what is needed; said before something fails half-way.
fn check_limits(
    context: &SharedContext,
    (lanes, peers): (usize, usize),
    window: &Window,
) -> Result<(), FabricError> {
    let device = context.name();
    let limits =
        context.limits().map_err(|error| unavailable(format!("{device} cannot be asked ({error})")))?;
    let needs = [
        ("requests in a queue", limits.max_qp_wr, window.depth),
        ("queue pairs", limits.max_qp, peers * lanes),
        ("completion queues", limits.max_cq, 2 * lanes),
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

/// A queue pair that is not connected yet.
pub(super) struct Half {
    qp: Qp,
    psn: u32,
    port: Port,
}

impl Half {
    /// One of the protection domain and the queues of a lane. An error is what the kernel says.
    pub(super) fn new(
        place: &Place,
        port: Port,
        pd: &Arc<Pd>,
        (send, receive): (&Arc<Cq>, &Arc<Cq>),
    ) -> std::io::Result<Half> {
        let Window { depth, share, .. } = place.window;
        let qp = Qp::new(pd, send, receive, depth as u32, share as u32, INLINE)?;
        Ok(Half { qp, psn: random_psn(), port })
    }

    /// How the peer reaches it.
    pub(super) fn hello(&self, place: &Place) -> Hello {
        Hello {
            link_layer: self.port.attr.link_layer,
            mtu: self.port.attr.active_mtu as u8,
            qpn: self.qp.number(),
            psn: self.psn,
            lid: self.port.attr.lid,
            credits: place.window.credits,
            slot: SLOT as u32,
            gid: self.port.gid.map(|gid| gid.bytes).unwrap_or_default(),
        }
    }

    /// Gives it its slots and connects it to the queue pair of a hello. An error is the end of a sentence about the
    /// peer.
    ///
    /// # Safety
    /// The slots of the peer in that place are the caller's.
    pub(super) unsafe fn connect(
        self,
        place: &Place,
        hello: &Hello,
        slots: &Slots,
        peer: usize,
    ) -> Result<Qp, String> {
        let route = place.route(&self, hello)?;
        self.qp.bind(route.port)?;
        let indexes: Vec<u16> = place.window.slots_of(peer).collect();
        for some in indexes.chunks(MOST_RECEIVES) {
            // SAFETY: the caller's promise; each is given once.
            unsafe { self.qp.give(slots, some) }
                .map_err(|error| format!("a queue pair takes no slot ({error})"))?;
        }
        self.qp.connect(&route)?;
        Ok(self.qp)
    }
}
