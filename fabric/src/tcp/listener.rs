//! This node's address, and what it needs to know to join the mesh.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

use super::TcpTransport;
use super::doors::Doors;
use super::handshake::Credentials;
use super::hello::{Identity, MAX_VERSION, is_version};
use super::mesh;
use crate::secure::{PrivateKey, PublicKey};
use crate::{FabricError, MAX_NODES, NodeId};

/// Socket buffer asked for in each direction, in bytes: 256 pages in flight before a sender has to keep a
/// backlog. Without CAP_NET_ADMIN the kernel grants at most `net.core.{w,r}mem_max`.
const SOCKET_BUFFER: usize = 1 << 20;

/// A silent connection is probed after this many seconds, then every second.
const PROBE_AFTER: u32 = 2;

/// That many probes without an answer end the connection.
const PROBES: u32 = 3;

/// The most rails that a node may have.
pub const MAX_RAILS: usize = 8;

/// What a peer does not acknowledge for so many milliseconds, it does not get over this rail.
const RAIL_SILENCE: u32 = 1000;

/// Everything a node needs to know to join its machine's mesh.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// This node.
    pub node: NodeId,
    /// Every node's fabric addresses, by node and rail, this one's included: 1 to [`MAX_NODES`] nodes, each with
    /// as many rails as this node's [`Listener`].
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
}

/// The keys of one run of one machine.
#[derive(Clone, Debug)]
pub struct MeshKeys {
    /// This node's.
    pub own: PrivateKey,
    /// Every node's, by node, this one's included.
    pub nodes: Vec<PublicKey>,
}

/// Bound and listening fabric addresses, one for each rail, from which [`Listener::mesh`] makes the transport.
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
    /// [`FabricError::Setup`] when an address is in use or is not one of this host, and when there is none, or more
    /// than [`MAX_RAILS`].
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

    /// Connects this node to every other, with one connection per lane, the lanes spread over the rails. With one
    /// rail it then closes the listening socket; with several it keeps them, to move lanes when a rail dies.
    ///
    /// The node with the higher id connects. Connections that do not belong here (another machine, another key,
    /// another version, a replay, garbage, silence, a lane that is connected already) are closed with a warning in
    /// the log and disturb nothing.
    /// On return every connection of this node is up; other nodes may still be connecting among themselves.
    ///
    /// # Errors
    /// [`FabricError::Setup`] when the time is over (naming the missing peers and what was last seen of them, such as
    /// another version), and when `config` is out of range.
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
        let mut doors = Doors::new(self.sockets, own, config.addresses);
        let sessions = mesh::build(&mut doors, config.timeout)?;
        TcpTransport::new(config.node, config.plaintext, sessions, doors)
    }
}

/// Begins to connect to `address`; the socket becomes writable when it is connected or has failed.
pub(super) fn begin_connect(address: SocketAddr) -> nix::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = nix::sys::socket::socket(family, SockType::Stream, flags, None)?;
    set_buffers(&socket);
    match nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(nix::errno::Errno::EINPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error),
    }
}

/// Sets a connection up for greetings and frames. Where there are `several` rails a dead one must show sooner than
/// the users above take the peer for lost.
pub(super) fn tune(socket: &TcpStream, several: bool) -> std::io::Result<()> {
    // Every frame is wanted at once: never wait for an acknowledgement to fill a segment.
    socket.set_nodelay(true)?;
    // A host that died sends no FIN. Data in flight is covered by the heartbeats of the users above; an
    // idle connection is covered here.
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, if several { &1 } else { &PROBE_AFTER })?;
    if several {
        setsockopt(socket, sockopt::TcpUserTimeout, &RAIL_SILENCE)?;
    }
    setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
    setsockopt(socket, sockopt::TcpKeepCount, &PROBES)?;
    Ok(())
}

/// Asks for large socket buffers. Smaller ones only cost speed, so what cannot be had is left.
fn set_buffers(socket: &impl AsFd) {
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &SOCKET_BUFFER);
    }
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &SOCKET_BUFFER);
    }
}
