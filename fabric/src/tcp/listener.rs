//! The listener: this node's bound addresses, and the configuration with which it joins the mesh.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use nix::sys::socket::Backlog;

use super::connecting::Connecting;
use super::handshake::Credentials;
use super::hello::{Identity, MAX_VERSION, is_version};
use super::mesh;
use super::sockets::set_buffers;
use super::transport::TcpTransport;
use crate::secure::{PrivateKey, PublicKey};
use crate::{FabricError, MAX_NODES, NodeId};

/// The most rails that a node may have.
pub const MAX_RAILS: usize = 8;

/// Everything a node needs to know to join its machine's mesh.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// This node.
    pub node: NodeId,
    /// Every node's fabric addresses, by node and rail, this one's included: 1 to [`MAX_NODES`] nodes, each
    /// with as many rails as this node's [`Listener`].
    pub addresses: Vec<Vec<SocketAddr>>,
    /// Lanes to each peer, at least 1; the same on every node.
    pub lanes: u16,
    /// Random id of this run of this machine: connections with another one are strangers.
    pub machine: [u8; 16],
    /// Version of the software, which must be exactly the same on every node: 1 to 64 visible ASCII
    /// characters.
    pub version: String,
    /// How the nodes of this run know each other.
    pub keys: MeshKeys,
    /// Whether frames travel in the clear, unprotected but for the handshake; the same on every node.
    pub plaintext: bool,
    /// How long the whole mesh may take.
    pub timeout: Duration,
    /// With one rail: how long a peer may leave what was sent to it unacknowledged before it is lost. It may
    /// take nothing for ten times as long.
    pub silence: Duration,
}

/// The keys of one run of one machine.
#[derive(Clone, Debug)]
pub struct MeshKeys {
    /// This node's.
    pub own: PrivateKey,
    /// Every node's, by node, this one's included.
    pub nodes: Vec<PublicKey>,
}

/// Bound and listening fabric addresses, one for each rail, from which [`Listener::mesh`] makes the
/// transport.
///
/// Peers may connect as soon as it is bound; they are answered in [`Listener::mesh`].
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
}

impl Listener {
    /// Binds one address for each rail and listens there; port 0 takes any free port.
    ///
    /// # Errors
    /// [`FabricError::Setup`] when an address is in use or is not one of this host, and when there is none,
    /// or more than [`MAX_RAILS`].
    pub fn bind(addresses: &[SocketAddr]) -> Result<Listener, FabricError> {
        if addresses.is_empty() || addresses.len() > MAX_RAILS {
            let count = addresses.len();
            return Err(FabricError::Setup(format!("a node has 1 to {MAX_RAILS} rails, this one {count}")));
        }
        let (mut sockets, mut bound) = (Vec::new(), Vec::new());
        for address in addresses {
            let (socket, address) = Listener::bind_one(*address)?;
            sockets.push(socket);
            bound.push(address);
        }
        Ok(Listener { sockets, addresses: bound })
    }

    fn bind_one(address: SocketAddr) -> Result<(TcpListener, SocketAddr), FabricError> {
        let setup = |error: std::io::Error| {
            FabricError::Setup(match error.kind() {
                ErrorKind::AddrInUse => format!(
                    "the address {address} is in use: end the process that listens there, or choose another port"
                ),
                ErrorKind::AddrNotAvailable => {
                    format!("the address {address} is not one of this host: choose one that `ip addr` shows")
                }
                _ => format!("cannot listen on {address}: {error}"),
            })
        };
        let socket = TcpListener::bind(address).map_err(setup)?;
        // A machine of hundreds of nodes connects all at once; std listens with a short queue.
        nix::sys::socket::listen(&socket, Backlog::MAXCONN).map_err(|e| setup(e.into()))?;
        socket.set_nonblocking(true).map_err(setup)?;
        // Accepted connections inherit the sizes, and the window scale depends on them.
        set_buffers(&socket);
        let address = socket.local_addr().map_err(setup)?;
        Ok((socket, address))
    }

    /// The bound addresses by rail, with the ports that were taken.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Connects this node to every other, with one connection per lane, the lanes spread over the rails. With
    /// one rail it then closes the listening socket; with several it keeps them, to move lanes when a rail
    /// dies.
    ///
    /// The node with the higher id connects. Connections that do not belong here (another machine, another
    /// key, another version, a replay, garbage, silence, a lane that is connected already) are closed with a
    /// warning in the log and disturb nothing. On return every connection of this node is up; other nodes may
    /// still be connecting among themselves.
    ///
    /// # Errors
    /// [`FabricError::Setup`] when the time is over (naming the missing peers and what was last seen of them,
    /// such as another version), and when `config` is out of range.
    pub fn mesh(self, config: MeshConfig) -> Result<TcpTransport, FabricError> {
        let nodes = config.addresses.len();
        let rails = self.sockets.len();
        let wrong = if nodes == 0 || nodes > MAX_NODES {
            Some(format!("a machine has 1 to {MAX_NODES} nodes, this one {nodes}"))
        } else if config.node.index() >= nodes {
            Some(format!("this is {}, but the machine has {nodes} nodes", config.node))
        } else if let Some(other) = config.addresses.iter().find(|addresses| addresses.len() != rails) {
            Some(format!("this node has {rails} rails and another {}: give all as many", other.len()))
        } else if config.keys.nodes.len() != nodes {
            Some(format!("the machine has {nodes} nodes, and keys of {}", config.keys.nodes.len()))
        } else if config.keys.nodes[config.node.index()] != config.keys.own.public() {
            Some(format!("the key of {} is not the one that its peers know", config.node))
        } else if config.lanes == 0 {
            Some("a machine needs at least one lane".to_owned())
        } else if !is_version(config.version.as_bytes()) {
            Some(format!(
                "the version {:?} is not 1 to {MAX_VERSION} visible ASCII characters",
                config.version
            ))
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(FabricError::Setup(wrong));
        }
        let identity = Identity {
            machine: config.machine,
            node: config.node,
            nodes: nodes as u16,
            lanes: config.lanes,
            version: config.version,
            plaintext: config.plaintext,
        };
        let own = Credentials { identity, own: config.keys.own, nodes: config.keys.nodes };
        let mut connecting = Connecting::new(self.sockets, own, config.addresses, config.silence);
        let connections = mesh::build(&mut connecting, config.timeout)?;
        TcpTransport::new(config.node, config.plaintext, connections, connecting)
    }
}
