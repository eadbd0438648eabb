//! The opened port that all connections of one rail use.

use std::net::IpAddr;
use std::sync::Arc;

use super::RdmaSettings;
use super::notes::Hello;
use super::ports::{Gid, RdmaPort, choose, ports};
use super::verbs::context::{Context, SharedContext};
use super::verbs::ffi::{LINK_LAYER_ETHERNET, PORT_ACTIVE, PortAttr};
use super::verbs::library::library;
use super::verbs::queue::{RAIL_RETRIES, RETRIES, Route};
use super::window::{SLOT, Window};
use crate::FabricError;

/// Why there is no RDMA, as a sentence; `why` is its end.
pub(super) fn unavailable(why: impl std::fmt::Display) -> FabricError {
    FabricError::Setup(format!("RDMA is unavailable because {why}"))
}

/// An opened port, and the way it is used.
pub(super) struct Port {
    pub(super) context: SharedContext,
    pub(super) window: Window,
    /// With the device and the port that were chosen.
    settings: RdmaSettings,
    local: Option<IpAddr>,
    number: u8,
    retries: u8,
    /// The ports that this host has.
    list: fn() -> Vec<RdmaPort>,
}

/// A port's state at some time.
#[derive(Clone, Copy)]
pub(super) struct PortState {
    pub(super) attr: PortAttr,
    pub(super) gid: Option<Gid>,
}

impl Port {
    /// Opens the port that the settings name, or that is chosen well, for so many lanes to so many peers; as
    /// one rail of several, which is given up sooner, if `is_rail`.
    pub(super) fn open(
        settings: &RdmaSettings,
        local: Option<IpAddr>,
        (lanes, peers): (usize, usize),
        is_rail: bool,
    ) -> Result<(Port, PortState), FabricError> {
        library().map_err(unavailable)?;
        let choice = choose(&ports(), settings, local).map_err(unavailable)?;
        let context = Arc::new(Context::open(&choice.device).map_err(unavailable)?);
        let window = Window::new(peers);
        check_limits(&context, (lanes, peers), &window)?;
        let settings =
            RdmaSettings { device: Some(choice.device), port: Some(choice.port), ..settings.clone() };
        let retries = if is_rail { RAIL_RETRIES } else { RETRIES };
        let port = Port { context, window, settings, local, number: choice.port, retries, list: ports };
        let state = port.state().map_err(unavailable)?;
        tracing::info!(
            "RDMA over port {} ({}), MTU {}",
            port.name(),
            state.gid.map_or(format!("LID {}", state.attr.lid), |gid| gid.ip().to_string()),
            128 << state.attr.active_mtu
        );
        Ok((port, state))
    }

    /// The port's number at its device.
    pub(super) fn number(&self) -> u8 {
        self.number
    }

    fn name(&self) -> String {
        format!("{}/{}", self.context.name(), self.number)
    }

    /// Its state now. An error, of which there is one unless it is active, is the end of a sentence.
    pub(super) fn state(&self) -> Result<PortState, String> {
        let gid = choose(&(self.list)(), &self.settings, self.local)?.gid;
        let name = self.name();
        let attr = self.context.port(self.number);
        let attr = attr.map_err(|error| format!("port {name} cannot be asked ({error})"))?;
        if attr.state != PORT_ACTIVE {
            return Err(format!("port {name} is not active: see its cable and `rdma link`"));
        }
        Ok(PortState { attr, gid })
    }

    /// The route from a queue pair that was made when the port was in `state`, and that sends from packet
    /// number `psn` on, to the queue pair of a hello. An error is the end of a sentence about the peer.
    pub(super) fn route(&self, state: &PortState, psn: u32, hello: &Hello) -> Result<Route, String> {
        let kind = |link_layer| if link_layer == LINK_LAYER_ETHERNET { "Ethernet" } else { "InfiniBand" };
        if hello.link_layer != state.attr.link_layer {
            return Err(format!(
                "its RDMA port is {} and this node's is {}: name ports of one network with rdma.device and rdma.port",
                kind(hello.link_layer),
                kind(state.attr.link_layer)
            ));
        }
        if hello.slot as usize != SLOT || hello.credits != self.window.credits {
            return Err("it counts RDMA messages differently: install the same version on every node".into());
        }
        if state.gid.is_some() && hello.gid == [0; 16] {
            return Err(
                "it uses no GID and this node does: set rdma.gid_index at every node or at none".into()
            );
        }
        Ok(Route {
            port: self.number,
            mtu: u32::from(hello.mtu).min(state.attr.active_mtu),
            qpn: hello.qpn,
            lid: hello.lid,
            gid: state.gid.map(|own| (hello.gid, own.index)),
            service_level: self.settings.service_level,
            retries: self.retries,
            receive_psn: hello.psn,
            send_psn: psn,
        })
    }

    /// The only port of a fake device, for so many peers.
    #[cfg(test)]
    pub(super) fn fake(peers: usize) -> (Port, PortState) {
        let list = || {
            let (device, state, gids, addresses) = ("fake0".into(), "ACTIVE".into(), Vec::new(), Vec::new());
            vec![RdmaPort { device, port: 1, state, ethernet: false, gigabits: 1.0, gids, addresses }]
        };
        let (context, window) = (super::verbs::fake::context(), Window::new(peers));
        let settings = RdmaSettings::default();
        let port = Port { context, window, settings, local: None, number: 1, retries: RAIL_RETRIES, list };
        let state = port.state().expect("it is active");
        (port, state)
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
