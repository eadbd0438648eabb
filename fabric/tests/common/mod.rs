//! What the fabric's tests share: clusters of every kind, and a receiver that waits with an end.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use fabric::rdma::{RdmaSettings, RdmaTransport};
use fabric::tcp::{Listener, MeshConfig, TcpTransport};
use fabric::{FabricError, LaneId, NodeId, Receiver, Transport, sim};
use nix::poll::{PollFd, PollFlags, PollTimeout};

/// No test waits longer than this for anything that must come.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The version that test nodes run.
pub const VERSION: &str = "0.1.0-test";

/// A transport under test.
#[derive(Copy, Clone, Debug)]
pub enum Kind {
    /// TCP over loopback.
    Tcp,
    /// In process.
    Sim,
    /// RDMA through one device of this host, set up over TCP. Ask [`rdma_is_there`] first.
    Rdma,
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

impl Kind {
    /// A connected machine, by node.
    pub fn cluster(self, nodes: usize, lanes: u16) -> Vec<Box<dyn Transport>> {
        match self {
            Kind::Tcp => {
                let (listeners, addresses) = listeners(nodes);
                mesh_all(listeners, |node| config(node, &addresses, lanes))
                    .into_iter()
                    .map(|made| Box::new(made.unwrap()) as Box<dyn Transport>)
                    .collect()
            }
            Kind::Rdma => rdma_all(Kind::Tcp.cluster(nodes, lanes), &RdmaSettings::default()),
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
    thread::scope(|scope| {
        let connect = |session: Box<dyn Transport>| {
            RdmaTransport::connect(session.into(), settings, None, PATIENCE).unwrap()
        };
        let running: Vec<_> =
            sessions.into_iter().map(|session| scope.spawn(move || connect(session))).collect();
        running.into_iter().map(|node| Box::new(node.join().unwrap()) as Box<dyn Transport>).collect()
    })
}

/// Listeners on free loopback ports, and their addresses.
pub fn listeners(nodes: usize) -> (Vec<Listener>, Vec<SocketAddr>) {
    let listeners: Vec<_> =
        (0..nodes).map(|_| Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap()).collect();
    let addresses = listeners.iter().map(Listener::local_addr).collect();
    (listeners, addresses)
}

/// A sound configuration of `node`.
pub fn config(node: usize, addresses: &[SocketAddr], lanes: u16) -> MeshConfig {
    MeshConfig {
        node: NodeId(node as u16),
        addresses: addresses.to_vec(),
        lanes,
        machine: [0x5a; 16],
        version: VERSION.to_owned(),
        timeout: PATIENCE,
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
pub fn readable(fd: RawFd, milliseconds: u16) -> bool {
    // SAFETY: the receiver that owns the descriptor is borrowed or owned by the calling test meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
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
    pub fn fd(&self) -> RawFd {
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
            // News of what was taken by an earlier poll may still arrive, but not for ever.
            assert!(Instant::now() < deadline, "the descriptor says that there is work");
        }
        assert!(self.losses.is_empty(), "{:?}", self.losses);
        assert!(self.arrived.is_empty(), "{} more frames", self.arrived.len());
    }

    fn sleep(&mut self, deadline: Instant) {
        // Checked even when there is work: a descriptor that is wrongly readable must not spin for ever.
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as u16;
        assert!(left > 0 && (self.arm() || readable(self.fd(), left)), "nothing came in time");
    }
}
