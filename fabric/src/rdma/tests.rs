//! Lanes over a fake adapter: the code that runs over a real one, on any host.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::RdmaTransport;
use super::port::Port;
use super::verbs::context::SharedContext;
use super::verbs::fake::{self, Usage};
use crate::{FabricError, NodeId, Receiver, Transport, sim};

/// No test waits longer than this for anything that must come.
const PATIENCE: Duration = Duration::from_secs(30);

/// One node with one lane, and what has come to it.
struct Node {
    device: SharedContext,
    transport: RdmaTransport,
    receiver: Box<dyn Receiver>,
    frames: Vec<Vec<u8>>,
    losses: usize,
    returned: usize,
}

/// Two nodes that are connected; lost connections are made again if `reconnects`.
fn two_nodes(reconnects: bool) -> [Node; 2] {
    let connect = |session: sim::SimTransport| {
        let (port, state) = Port::fake(1);
        let device = port.context.clone();
        let transport =
            RdmaTransport::connect_over(Arc::new(session), (port, state), PATIENCE, reconnects).unwrap();
        let receiver = transport.take_receiver(0).unwrap();
        Node { device, transport, receiver, frames: Vec::new(), losses: 0, returned: 0 }
    };
    thread::scope(|scope| {
        let sessions = sim::cluster(2, 1).unwrap().into_iter();
        let running: Vec<_> = sessions.map(|session| scope.spawn(move || connect(session))).collect();
        let nodes: Vec<Node> = running.into_iter().map(|node| node.join().unwrap()).collect();
        nodes.try_into().ok().unwrap()
    })
}

impl Node {
    fn peer(&self) -> NodeId {
        NodeId(1 - self.transport.node().0)
    }

    fn poll(&mut self) {
        let frames = &mut self.frames;
        match self.receiver.poll(&mut |_, frame| frames.push(frame.to_vec())) {
            Ok(_) => {}
            Err(FabricError::PeerLost { .. }) => self.losses += 1,
            Err(other) => panic!("{other}"),
        }
        self.returned += self.receiver.returned().iter().count();
    }
}

/// Both nodes work until it is `done`.
fn work_until(nodes: &mut [Node; 2], what: &str, done: impl Fn(&[Node; 2]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done(nodes) {
        assert!(Instant::now() < deadline, "in vain: {what}");
        let mut asleep = true;
        for node in nodes.iter_mut() {
            node.poll();
            asleep &= !node.receiver.arm().unwrap();
        }
        if asleep {
            let mut fds = nodes.each_ref().map(|node| PollFd::new(node.receiver.fd(), PollFlags::POLLIN));
            poll(&mut fds, PollTimeout::from(50u16)).unwrap();
        }
    }
}

/// Frames of many lengths go both ways and arrive whole and in order.
fn exchange(nodes: &mut [Node; 2]) {
    let frames: Vec<Vec<u8>> =
        (0..600usize).map(|i| vec![i as u8; [1, 16, 300, 4112, 20_000, 65_536][i % 6]]).collect();
    nodes.iter_mut().for_each(|node| node.frames.clear());
    for frame in &frames {
        for node in nodes.iter_mut() {
            let (head, body) = frame.split_at(frame.len().min(16));
            node.transport.send(node.peer(), 0, &[head, body]).unwrap();
        }
    }
    work_until(nodes, "frames", |nodes| nodes.iter().all(|node| node.frames.len() >= frames.len()));
    for node in nodes {
        assert!(node.frames == frames, "other frames than were sent");
    }
}

/// The first node finds that its connection has failed, and both report it.
fn fail(nodes: &mut [Node; 2]) {
    let before = nodes.each_ref().map(|node| node.losses);
    nodes[0].transport.lanes[0].lock().lose(NodeId(1), "the test says so");
    work_until(nodes, "losses", |nodes| nodes.iter().zip(before).all(|(node, before)| node.losses > before));
}

/// Drops the nodes: everything of their devices is given back, and no memory before the queue pairs that were
/// given it.
fn expect_nothing_left(nodes: [Node; 2]) {
    let devices = nodes.each_ref().map(|node| node.device.clone());
    for device in &devices {
        let used = fake::usage(device);
        assert!(used.memory > 0 && used.pairs > 0, "{used:?}");
    }
    drop(nodes);
    let (deadline, nothing) =
        (Instant::now() + PATIENCE, Usage { memory: 0, pairs: 0, dangling: Vec::new() });
    for device in &devices {
        let is_used = |usage: &Usage| usage.memory > 0 || usage.pairs > 0;
        while is_used(&fake::usage(device)) {
            assert!(Instant::now() < deadline, "never given back: {:?}", fake::usage(device));
            thread::yield_now();
        }
        assert_eq!(fake::usage(device), nothing);
    }
}

#[test]
fn frames_arrive_whole_and_in_order_over_a_fake_adapter() {
    let mut nodes = two_nodes(false);
    exchange(&mut nodes);
    expect_nothing_left(nodes);
}

#[test]
fn a_connection_that_failed_is_made_again_and_carries_frames() {
    let mut nodes = two_nodes(true);
    exchange(&mut nodes);
    for times in 1..=2 {
        // Frames under way, whose slots come back with the queue pairs.
        for _ in 0..50 {
            nodes.iter_mut().for_each(|node| node.transport.send(node.peer(), 0, &[&[7; 5000]]).unwrap());
        }
        fail(&mut nodes);
        work_until(&mut nodes, "returns", |nodes| nodes.iter().all(|node| node.returned == times));
        exchange(&mut nodes);
    }
    expect_nothing_left(nodes);
}

/// The lane goes while the queue pair that failed still waits for the reconnecting thread.
#[test]
fn memory_outlives_a_failed_queue_pair_that_waits_when_its_lane_is_dropped() {
    let mut nodes = two_nodes(true);
    fail(&mut nodes);
    expect_nothing_left(nodes);
}
