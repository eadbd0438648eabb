//! Waits that get no answer: each ends the engine with a sentence, also while the engine is busy.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread::JoinHandle;
use std::time::Duration;

use coherence::engine::{Engine, Load};
use coherence::page::{Homes, PAGE_SIZE, Page};
use coherence::protocol::Message;
use coherence::testing::{Builder, Cluster, can_run, word};
use fabric::sim::SimTransport;
use fabric::{FabricError, LaneId, NodeId, Receiver, Transport, TransportStats};

const STUCK: Duration = Duration::from_millis(300);
/// Far more than a test takes.
const PATIENCE: Duration = Duration::from_secs(60);
const EACH: u64 = 32;

/// Loses all messages about some pages.
struct Loses {
    inner: SimTransport,
    pages: Range<u64>,
    /// Whether its receivers say each time that they had something.
    busy: bool,
}

/// A receiver that says each time that it had something, so that whoever polls it is never idle.
struct Busy(Box<dyn Receiver>);

impl Receiver for Busy {
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        self.0.poll(sink).map(|frames| frames + 1)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        self.0.arm()
    }
}

impl Transport for Loses {
    fn node(&self) -> NodeId {
        self.inner.node()
    }

    fn nodes(&self) -> usize {
        self.inner.nodes()
    }

    fn lanes(&self) -> usize {
        self.inner.lanes()
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let frame = parts.concat();
        let (message, _) = Message::parse(&frame, 2, 2 * EACH).unwrap();
        if self.pages.contains(&message.page.0) {
            return Ok(());
        }
        self.inner.send(to, lane, parts)
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        let receiver = self.inner.take_receiver(lane)?;
        Some(if self.busy { Box::new(Busy(receiver)) } else { receiver })
    }

    fn stats(&self) -> TransportStats {
        self.inner.stats()
    }
}

/// Node 0 of two, whose messages about some pages of node 1 get lost.
struct Node {
    cluster: Cluster,
    /// Node 1's transport, if it has no engine.
    _peer: Option<Arc<dyn Transport>>,
}

impl Node {
    fn new(lost: Range<u64>, peer_answers: bool, busy: bool) -> Node {
        let [inner, peer] = <[SimTransport; 2]>::try_from(fabric::sim::cluster(2, 2).unwrap()).ok().unwrap();
        let (own, peer): (Arc<dyn Transport>, Arc<dyn Transport>) =
            (Arc::new(Loses { inner, pages: lost, busy }), Arc::new(peer));
        let builder = Builder::new(Homes::new([EACH, EACH]));
        let builder = builder
            .with(|config| (config.first_lane, config.hold, config.stuck) = (1, Duration::ZERO, STUCK));
        if !peer_answers {
            return Node { cluster: builder.start_over([own]).unwrap(), _peer: Some(peer) };
        }
        let cluster = builder.start_over([own, peer]).unwrap();
        // Pages of zeroes would come several at a time.
        (EACH..2 * EACH).for_each(|page| cluster.word_of(1, page, 0).store(page, SeqCst));
        Node { cluster, _peer: None }
    }

    fn engine(&self) -> Arc<Engine> {
        self.cluster.engine(0).clone()
    }

    /// A thread that reads a page. It ends when nobody watches the memory any more.
    fn read(&self, page: u64) -> JoinHandle<u64> {
        let memory = self.cluster.memory(0).clone();
        std::thread::spawn(move || word(&memory, page as usize * PAGE_SIZE).load(SeqCst))
    }

    fn failure(&self) -> String {
        self.cluster.failure(PATIENCE).expect("the engine goes on as if nothing were wrong")
    }
}

#[test]
fn a_fault_on_a_page_that_was_asked_for_ahead_and_does_not_come_ends_the_engine() {
    if !can_run() {
        return;
    }
    // Pages come as asked for, and alone, up to the first that is read ahead.
    let node = Node::new(EACH + 2..2 * EACH, true, false);
    for page in EACH..EACH + 2 {
        assert_eq!(node.read(page).join().unwrap(), page);
    }
    let totals = node.engine().totals();
    let missing = EACH + 3;
    let reader = node.read(missing);
    let why = node.failure();
    assert!(why.starts_with(&format!("a page fault got no answer for 0 s: page {missing:#x}")), "{why}");
    assert!(totals.prefetches > 0, "nothing was read ahead: {totals:?}");
    drop(node);
    reader.join().unwrap();
}

#[test]
fn pages_that_nobody_needs_and_that_are_not_given_up_end_the_engine() {
    if !can_run() {
        return;
    }
    let node = Node::new(0..0, false, false);
    let engine = node.engine();
    let pages = EACH..EACH + 4;
    let discard = std::thread::spawn(move || engine.discard(std::slice::from_ref(&pages)));
    let why = node.failure();
    assert!(why.starts_with("the giving up of pages that nobody needs got no answer for 0 s"), "{why}");
    assert!(discard.join().unwrap().is_err());
}

#[test]
fn a_device_that_waits_for_its_pages_ends_the_engine() {
    if !can_run() {
        return;
    }
    let node = Node::new(0..0, false, false);
    let engine = node.engine();
    let load = std::thread::spawn(move || {
        let mut bytes = [0; 8];
        engine.load(vec![Load { page: Page(EACH), offset: 0, to: &mut bytes }])
    });
    let why = node.failure();
    assert!(why.starts_with("a device's access to memory got no answer for 0 s"), "{why}");
    assert_eq!(load.join().unwrap(), [false]);
}

#[test]
fn a_shard_that_is_never_idle_notices_as_well() {
    if !can_run() {
        return;
    }
    let node = Node::new(0..0, false, true);
    let reader = node.read(EACH);
    let why = node.failure();
    assert!(why.starts_with("a page fault got no answer for 0 s"), "{why}");
    drop(node);
    reader.join().unwrap();
}
