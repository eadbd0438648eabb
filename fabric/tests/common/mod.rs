//! Common parts of the fabric's tests: clusters of every kind, and a receiver that waits with an end.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use fabric::rdma::{RdmaSettings, RdmaTransport};
use fabric::secure::{Handshake, Opener, Pattern, PrivateKey, Sealer, SecureChannel, TAG};
use fabric::tcp::{Listener, MeshConfig, MeshKeys, TcpTransport};
use fabric::{FabricError, LaneId, NodeId, Receiver, Transport, sim};
use nix::poll::{PollFd, PollFlags, PollTimeout};

/// No test waits longer than this for anything that must come.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The version that test nodes run.
pub const VERSION: &str = "0.1.0-test";

/// A transport under test.
#[derive(Copy, Clone, Debug)]
pub enum Kind {
    /// TCP over loopback, sealed.
    Tcp,
    /// TCP over loopback in the clear.
    TcpPlain,
    /// TCP over two addresses of the loopback device, sealed.
    TcpRails,
    /// In process.
    Sim,
    /// RDMA through one device of this host, set up over TCP. Ask [`rdma_is_there`] first.
    Rdma,
    /// RDMA through two devices of this host as two rails. Ask [`two_rdma_devices`] first.
    RdmaRails,
}

/// Whether this host has an RDMA device that can be used; prints why not.
pub fn rdma_is_there() -> bool {
    let why = match fabric::rdma::check_library() {
        Err(why) => why,
        Ok(()) if fabric::rdma::ports().iter().any(|port| port.is_active()) => return true,
        Ok(()) => "this host has no active RDMA port".to_owned(),
    };
    println!("skipped: {why}");
    false
}

/// Two RDMA devices of this host, if it has them; prints why not.
pub fn two_rdma_devices() -> Option<[String; 2]> {
    if !rdma_is_there() {
        return None;
    }
    let active = fabric::rdma::ports().into_iter().filter(|port| port.is_active());
    let mut devices: Vec<String> = active.map(|port| port.device).collect();
    devices.dedup();
    let two = devices.first_chunk().cloned();
    if two.is_none() {
        println!("skipped: this host has no two active RDMA devices");
    }
    two
}

impl Kind {
    /// A connected machine, by node.
    pub fn cluster(self, nodes: usize, lanes: u16) -> Vec<Box<dyn Transport>> {
        match self {
            Kind::Tcp | Kind::TcpPlain => {
                let (listeners, addresses) = listeners(nodes);
                let plaintext = matches!(self, Kind::TcpPlain);
                mesh_all(listeners, |node| MeshConfig { plaintext, ..config(node, &addresses, lanes) })
                    .into_iter()
                    .map(|made| Box::new(made.unwrap()) as Box<dyn Transport>)
                    .collect()
            }
            Kind::Rdma => rdma_all(Kind::Tcp.cluster(nodes, lanes), &RdmaSettings::default()),
            Kind::RdmaRails => {
                let devices = two_rdma_devices().expect("it was asked for");
                rdma_rails(Kind::Tcp.cluster(nodes, 2 * lanes), &devices)
            }
            Kind::TcpRails => {
                let (listeners, addresses) = rail_listeners(nodes, 2);
                mesh_all(listeners, |node| rail_config(node, &addresses, lanes))
                    .into_iter()
                    .map(|made| Box::new(made.unwrap()) as Box<dyn Transport>)
                    .collect()
            }
            Kind::Sim => sim::cluster(nodes, lanes)
                .unwrap()
                .into_iter()
                .map(|node| Box::new(node) as Box<dyn Transport>)
                .collect(),
        }
    }
}

/// Connects all nodes of a machine over RDMA at once, as processes would.
pub fn rdma_all(sessions: Vec<Box<dyn Transport>>, settings: &RdmaSettings) -> Vec<Box<dyn Transport>> {
    connect_all(sessions, |session| {
        Box::new(RdmaTransport::connect(session, settings, None, PATIENCE).unwrap())
    })
}

/// The same over a rail for each of `devices`; the sessions have lanes for all of them.
pub fn rdma_rails(sessions: Vec<Box<dyn Transport>>, devices: &[String; 2]) -> Vec<Box<dyn Transport>> {
    let rail = |device: &String| (RdmaSettings { device: Some(device.clone()), ..Default::default() }, None);
    let rails = devices.each_ref().map(rail);
    connect_all(sessions, |session| RdmaTransport::connect_rails(session, &rails, PATIENCE).unwrap())
}

fn connect_all(
    sessions: Vec<Box<dyn Transport>>,
    connect: impl Fn(Arc<dyn Transport>) -> Box<dyn Transport> + Sync,
) -> Vec<Box<dyn Transport>> {
    let connect = &connect;
    thread::scope(|scope| {
        let sessions = sessions.into_iter();
        let running: Vec<_> = sessions.map(|session| scope.spawn(move || connect(session.into()))).collect();
        running.into_iter().map(|node| node.join().unwrap()).collect()
    })
}

/// Frame `i` of a lane, of one of many lengths.
fn frame(i: u64) -> Vec<u8> {
    let mut frame = vec![i as u8; 8 + (i * 7919 % 6000) as usize];
    frame[..8].copy_from_slice(&i.to_le_bytes());
    frame
}

/// Frames that the slowest of all receivers may be behind its sender.
const WINDOW: u64 = 200;

/// Two nodes exchange `frames` frames on each of two lanes in each direction, and check that each comes once
/// and in order. `meanwhile` runs beside; what it is given says how many frames the slowest receiver has, and
/// panics when all takes too long. With `u64::MAX` frames they go on for some more when it has returned.
pub fn traffic(nodes: [&dyn Transport; 2], frames: u64, meanwhile: impl FnOnce(&dyn Fn() -> u64)) {
    // By receiving node and lane: how many frames have come.
    let come: [[AtomicU64; 2]; 2] = Default::default();
    let total = AtomicU64::new(frames);
    let deadline = Instant::now() + 3 * PATIENCE;
    thread::scope(|scope| {
        for (me, lane) in [(0usize, 0u16), (0, 1), (1, 0), (1, 1)] {
            let (transport, peer, come, total) = (nodes[me], NodeId(1 - me as u16), &come, &total);
            scope.spawn(move || {
                let (mut tap, mut sent) = (Tap::new(transport, lane), 0);
                let here = &come[me][usize::from(lane)];
                let there = &come[1 - me][usize::from(lane)];
                while here.load(SeqCst) < total.load(SeqCst) || there.load(SeqCst) < total.load(SeqCst) {
                    while sent < total.load(SeqCst) && sent < there.load(SeqCst) + WINDOW {
                        transport.send(peer, lane, &[&frame(sent)]).unwrap();
                        sent += 1;
                    }
                    // Until something comes, or a moment later: what the other end has received frees the
                    // window.
                    if !tap.arm() {
                        readable(tap.fd(), 1);
                    }
                    for (_, got) in tap.poll_some() {
                        let next = here.load(SeqCst);
                        assert!(got == frame(next), "lane {lane} at node {me}: not frame {next}");
                        here.store(next + 1, SeqCst);
                    }
                    assert!(Instant::now() < deadline, "lane {lane} at node {me}: {sent} sent");
                }
            });
        }
        meanwhile(&|| {
            assert!(Instant::now() < deadline, "it takes too long: {come:?}");
            thread::park_timeout(Duration::from_millis(1));
            come.iter().flatten().map(|count| count.load(SeqCst)).min().unwrap()
        });
        if frames == u64::MAX {
            let most = come.iter().flatten().map(|count| count.load(SeqCst)).max().unwrap();
            total.store(most + 10 * WINDOW, SeqCst);
        }
    });
}

/// Listeners on free loopback ports, and their addresses.
pub fn listeners(nodes: usize) -> (Vec<Listener>, Vec<SocketAddr>) {
    let listeners: Vec<_> =
        (0..nodes).map(|_| Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap()).collect();
    let addresses = listeners.iter().map(|listener| listener.local_addrs()[0]).collect();
    (listeners, addresses)
}

/// Listeners of several rails each, and their addresses by node and rail.
pub fn rail_listeners(nodes: usize, rails: usize) -> (Vec<Listener>, Vec<Vec<SocketAddr>>) {
    let any: Vec<SocketAddr> = (1..=rails as u8).map(|rail| ([127, 0, 0, rail], 0).into()).collect();
    let listeners: Vec<_> = (0..nodes).map(|_| Listener::bind(&any).unwrap()).collect();
    let addresses = listeners.iter().map(|listener| listener.local_addrs().to_vec()).collect();
    (listeners, addresses)
}

/// A valid configuration of `node` with these addresses by node and rail.
pub fn rail_config(node: usize, addresses: &[Vec<SocketAddr>], lanes: u16) -> MeshConfig {
    let first: Vec<SocketAddr> = addresses.iter().map(|rails| rails[0]).collect();
    MeshConfig { addresses: addresses.to_vec(), ..config(node, &first, lanes) }
}

/// A valid configuration of `node`.
pub fn config(node: usize, addresses: &[SocketAddr], lanes: u16) -> MeshConfig {
    MeshConfig {
        node: NodeId(node as u16),
        addresses: addresses.iter().map(|address| vec![*address]).collect(),
        lanes,
        machine: [0x5a; 16],
        version: VERSION.to_owned(),
        keys: MeshKeys {
            own: key(node),
            nodes: (0..addresses.len()).map(|node| key(node).public()).collect(),
        },
        plaintext: false,
        timeout: PATIENCE,
        silence: PATIENCE,
    }
}

/// The private key of a test node.
pub fn key(node: usize) -> PrivateKey {
    PrivateKey::from_bytes([node as u8 + 1; 32])
}

/// A hello as this version of the protocol defines it, byte by byte, and not by the code under test.
pub fn hello(from: u16, to: u16, lane: u16, lanes: u16, nodes: u16) -> Vec<u8> {
    let mut bytes = b"GESTALTF".to_vec();
    bytes.extend(2u32.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend([0x5a; 16]);
    for short in [from, to, lane, lanes, nodes, VERSION.len() as u16] {
        bytes.extend(short.to_le_bytes());
    }
    bytes.extend(VERSION.as_bytes());
    bytes.resize(108, 0);
    bytes.push(1);
    bytes.resize(128, 0);
    bytes
}

/// The same for frames in the clear.
pub fn plain_hello(from: u16, to: u16, lane: u16, lanes: u16, nodes: u16) -> Vec<u8> {
    let mut bytes = hello(from, to, lane, lanes, nodes);
    bytes[108] = 2;
    bytes
}

/// Connects with a time limit for whatever is read.
pub fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A peer made by hand, on one lane.
pub struct Raw {
    /// Its connection.
    pub socket: TcpStream,
    /// Seals what it sends.
    pub sealer: Sealer,
    /// Opens what it gets.
    pub opener: Opener,
}

impl Raw {
    /// Says `hello` with the key of test node `from` to test node `to` at `address`, and shakes hands.
    pub fn connect(address: SocketAddr, from: usize, to: usize, hello: &[u8]) -> Raw {
        let mut raw = Raw::half(connect(address), from, to, hello);
        raw.confirm();
        raw
    }

    /// The same up to the other side's proof, without the confirmation.
    pub fn half(mut socket: TcpStream, from: usize, to: usize, hello: &[u8]) -> Raw {
        let to = key(to).public();
        let mut shake = Handshake::call(Pattern::BothKnown, &key(from), &to, hello).unwrap();
        socket.write_all(&[hello, &shake.write().unwrap()].concat()).unwrap();
        let mut accept = [0; 128];
        socket.read_exact(&mut accept).unwrap();
        assert_eq!((&accept[..8], accept[12]), (&b"GESTALTF"[..], 2), "an accept");
        let mut proof = [0; 48];
        socket.read_exact(&mut proof).unwrap();
        shake.read(&proof).unwrap();
        let SecureChannel { sealer, opener } = shake.finish().unwrap();
        Raw { socket, sealer, opener }
    }

    /// Confirms that it is there, and takes the other side's confirmation.
    pub fn confirm(&mut self) {
        let mut none = [0; 8];
        let tag = self.sealer.seal(b"gestalt lane", &mut none).unwrap();
        self.socket.write_all(&[&none[..], &tag].concat()).unwrap();
        let mut theirs = [0; 8 + TAG];
        self.socket.read_exact(&mut theirs).unwrap();
        assert_eq!(self.opener.open(b"gestalt lane", &mut theirs).unwrap(), [0; 8]);
    }

    /// A sealed frame as it travels.
    pub fn frame(&mut self, text: &[u8]) -> Vec<u8> {
        let header = (text.len() as u32).to_le_bytes();
        let mut body = text.to_vec();
        let tag = self.sealer.seal(&header, &mut body).unwrap();
        [&header[..], &body, &tag].concat()
    }

    /// The next frame that arrives.
    pub fn take(&mut self) -> Vec<u8> {
        let mut header = [0; 4];
        self.socket.read_exact(&mut header).unwrap();
        let mut body = vec![0; u32::from_le_bytes(header) as usize + TAG];
        self.socket.read_exact(&mut body).unwrap();
        self.opener.open(&header, &mut body).unwrap().to_vec()
    }
}

/// Meshes all listeners at once, as processes would, each with its configuration.
pub fn mesh_all(
    listeners: Vec<Listener>,
    config: impl Fn(usize) -> MeshConfig,
) -> Vec<Result<TcpTransport, FabricError>> {
    thread::scope(|scope| {
        let running: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(node, listener)| {
                let config = config(node);
                scope.spawn(move || listener.mesh(config))
            })
            .collect();
        running.into_iter().map(|node| node.join().unwrap()).collect()
    })
}

/// Whether `fd` becomes readable within `milliseconds`.
pub fn readable(fd: BorrowedFd<'_>, milliseconds: u16) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    nix::poll::poll(&mut fds, PollTimeout::from(milliseconds)).unwrap() > 0
}

/// A lane's receiver that keeps what arrives.
pub struct Tap {
    receiver: Box<dyn Receiver>,
    arrived: Vec<(NodeId, Vec<u8>)>,
    losses: Vec<FabricError>,
}

impl Tap {
    /// Takes the receiver of `lane`.
    pub fn new(transport: &dyn Transport, lane: LaneId) -> Tap {
        let receiver = transport.take_receiver(lane).expect("the receiver is there and was not taken");
        Tap { receiver, arrived: Vec::new(), losses: Vec::new() }
    }

    /// The receiver's descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.receiver.fd()
    }

    /// The receiver's `arm`.
    pub fn arm(&mut self) -> bool {
        self.receiver.arm().unwrap()
    }

    /// Polls once.
    pub fn poll(&mut self) {
        let mut count = 0;
        let arrived = &mut self.arrived;
        let polled = self.receiver.poll(&mut |from, frame| {
            count += 1;
            arrived.push((from, frame.to_vec()));
        });
        match polled {
            Ok(frames) => assert_eq!(frames, count, "poll returns how many frames it delivered"),
            Err(error) => self.losses.push(error),
        }
    }

    /// Polls once, and gives what has come.
    pub fn poll_some(&mut self) -> Vec<(NodeId, Vec<u8>)> {
        self.poll();
        assert!(self.losses.is_empty(), "{:?}", self.losses);
        std::mem::take(&mut self.arrived)
    }

    /// The next `count` frames; sleeps on the descriptor, and panics when they do not come. A loss that is
    /// reported behind them is kept for [`Tap::expect_loss`].
    pub fn take(&mut self, count: usize) -> Vec<(NodeId, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        while self.arrived.len() < count {
            self.sleep(deadline);
            self.poll();
            assert!(self.losses.is_empty() || self.arrived.len() >= count, "{:?}", self.losses);
        }
        self.arrived.drain(..count).collect()
    }

    /// The next `count` frames; calls `meanwhile` in between instead of sleeping.
    pub fn take_with(&mut self, count: usize, mut meanwhile: impl FnMut()) -> Vec<(NodeId, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        while self.arrived.len() < count {
            meanwhile();
            self.poll();
            assert!(self.losses.is_empty(), "{:?}", self.losses);
            assert!(Instant::now() < deadline, "{} of {count} frames came", self.arrived.len());
        }
        self.arrived.drain(..count).collect()
    }

    /// The next loss; frames before it are kept.
    pub fn expect_loss(&mut self) -> FabricError {
        let deadline = Instant::now() + PATIENCE;
        while self.losses.is_empty() {
            self.sleep(deadline);
            self.poll();
        }
        self.losses.remove(0)
    }

    /// Nothing has arrived, and nothing has been lost.
    pub fn expect_silence(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.poll();
            if !self.arm() && !readable(self.fd(), 0) {
                break;
            }
            // News of what was taken by an earlier poll may still arrive, but there is an end to it.
            assert!(Instant::now() < deadline, "the descriptor says that there is work");
        }
        assert!(self.losses.is_empty(), "{:?}", self.losses);
        assert!(self.arrived.is_empty(), "{} more frames", self.arrived.len());
    }

    fn sleep(&mut self, deadline: Instant) {
        // Checked even when there is work: a descriptor that is wrongly readable must not spin without end.
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u16;
        assert!(left > 0 && (self.arm() || readable(self.fd(), left)), "nothing came in time");
    }
}
