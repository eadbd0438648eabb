//! A cluster of protocols in one thread: messages wait in lanes and are delivered in any order that the
//! lanes allow, pages carry version numbers, and the invariants are checked after every step.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use fabric::NodeId;
use proptest::prelude::*;

use super::*;
use crate::page::Homes;

/// What one guest view and one file of memory hold of a page.
#[derive(Copy, Clone, Default)]
struct Frame {
    version: u64,
    rights: Rights,
}

struct Cluster {
    nodes: Vec<Protocol>,
    homes: Arc<Homes>,
    lanes: BTreeMap<(u16, u16), VecDeque<(Message, u64)>>,
    frames: Vec<Vec<Frame>>,
    held: Vec<(usize, Page)>,
    /// Accesses that wait for their page.
    waiting: Vec<(usize, Page, bool)>,
    /// The last version written of each page.
    latest: Vec<u64>,
    sent: usize,
}

impl Cluster {
    fn new(nodes: usize, pages: u64) -> Cluster {
        let share = |n| pages / nodes as u64 + u64::from((n as u64) < pages % nodes as u64);
        let homes = Arc::new(Homes::new((0..nodes).map(share)));
        let frame = |n, p| Frame {
            version: 0,
            rights: if homes.home(Page(p)) == NodeId(n as u16) { Rights::Exclusive } else { Rights::None },
        };
        Cluster {
            nodes: (0..nodes).map(|n| Protocol::new(NodeId(n as u16), homes.clone(), 4)).collect(),
            lanes: BTreeMap::new(),
            frames: (0..nodes).map(|n| (0..pages).map(|p| frame(n, p)).collect()).collect(),
            held: Vec::new(),
            waiting: Vec::new(),
            latest: vec![0; pages as usize],
            homes,
            sent: 0,
        }
    }

    fn apply(&mut self, n: usize, effects: Vec<Effect>, body: u64) {
        for effect in effects {
            match effect {
                Effect::Send { to, message } => {
                    let version = self.frames[n][message.page.0 as usize].version;
                    self.lanes.entry((n as u16, to.0)).or_default().push_back((message, version));
                    self.sent += 1;
                }
                Effect::Land(page) => {
                    let frame = &mut self.frames[n][page.0 as usize];
                    assert_eq!(frame.rights, Rights::None, "bytes land under a mapping");
                    frame.version = body;
                }
                Effect::Map(page, rights) => self.frames[n][page.0 as usize].rights = rights,
                Effect::Unprotect(page) => self.frames[n][page.0 as usize].rights = Rights::Exclusive,
                Effect::Protect(page) => self.frames[n][page.0 as usize].rights = Rights::Shared,
                Effect::Unmap(page, _) => self.frames[n][page.0 as usize].rights = Rights::None,
                Effect::Free(page) => {
                    assert_ne!(self.homes.home(page).index(), n, "a home frame was freed");
                    assert_eq!(self.frames[n][page.0 as usize].rights, Rights::None);
                    self.frames[n][page.0 as usize].version = u64::MAX;
                }
                Effect::Hold(page) => self.held.push((n, page)),
                Effect::Deferred(_) => {}
            }
            self.check_single_writer();
        }
        self.retry_waiting(n);
    }

    fn check_single_writer(&self) {
        for page in 0..self.latest.len() {
            let readers = self.frames.iter().filter(|f| f[page].rights != Rights::None).count();
            let writers = self.frames.iter().filter(|f| f[page].rights == Rights::Exclusive).count();
            assert!(writers == 0 || readers == 1, "page {page}: {writers} writers among {readers} readers");
        }
    }

    fn retry_waiting(&mut self, n: usize) {
        let (mut ready, mut rest) = (Vec::new(), Vec::new());
        for (node, page, write) in std::mem::take(&mut self.waiting) {
            let need = if write { Rights::Exclusive } else { Rights::Shared };
            let can = node == n && self.frames[n][page.0 as usize].rights >= need;
            if can { &mut ready } else { &mut rest }.push((node, page, write));
        }
        self.waiting = rest;
        for (node, page, write) in ready {
            self.touch(node, page, write);
        }
    }

    /// The access itself, with its rights: a read must see the last write.
    fn touch(&mut self, n: usize, page: Page, write: bool) {
        let frame = &mut self.frames[n][page.0 as usize];
        assert_eq!(frame.version, self.latest[page.0 as usize], "node {n} saw an old page {page:?}");
        if write {
            frame.version += 1;
            self.latest[page.0 as usize] = frame.version;
        }
    }

    fn access(&mut self, n: usize, page: Page, write: bool) {
        let need = if write { Rights::Exclusive } else { Rights::Shared };
        if self.frames[n][page.0 as usize].rights >= need {
            return self.touch(n, page, write);
        }
        self.waiting.push((n, page, write));
        let mut out = Vec::new();
        self.nodes[n].fault(page, write, &mut out);
        self.apply(n, out, 0);
    }

    fn evict(&mut self, n: usize, page: Page) {
        let mut out = Vec::new();
        self.nodes[n].evict(page, &mut out);
        self.apply(n, out, 0);
    }

    /// Delivers the head of the `pick`th lane that has one, or ends the `pick`th hold.
    fn step(&mut self, pick: usize) -> bool {
        let lanes: Vec<_> = self.lanes.iter().filter(|(_, q)| !q.is_empty()).map(|(&k, _)| k).collect();
        let choices = lanes.len() + self.held.len();
        if choices == 0 {
            return false;
        }
        let (mut out, pick) = (Vec::new(), pick % choices);
        if let Some(&(from, to)) = lanes.get(pick) {
            let (message, version) = self.lanes.get_mut(&(from, to)).unwrap().pop_front().unwrap();
            self.nodes[to as usize].message(NodeId(from), message, &mut out).unwrap();
            self.apply(to as usize, out, version);
        } else {
            let (n, page) = self.held.remove(pick - lanes.len());
            self.nodes[n].release(page, &mut out);
            self.apply(n, out, 0);
        }
        true
    }

    fn settle(&mut self) {
        for i in 0..1_000_000 {
            if !self.step(i) {
                break;
            }
        }
        assert!(self.waiting.is_empty(), "never answered: {:?}", self.waiting);
        self.check_directory();
    }

    /// With nothing under way, the directory is what the nodes have.
    fn check_directory(&self) {
        for p in 0..self.latest.len() as u64 {
            let page = Page(p);
            let having = |rights| -> NodeSet {
                let has = |n: &usize| self.nodes[*n].rights(page) == rights;
                (0..self.nodes.len()).filter(has).map(|n| NodeId(n as u16)).collect()
            };
            for (n, node) in self.nodes.iter().enumerate() {
                assert!(node.is_quiet(), "node {n}: {:?}", node.describe());
                let mapped = self.frames[n][p as usize].rights;
                // What came home unmapped may be mapped again without asking anybody.
                let lazily = self.homes.home(page).index() == n && mapped == Rights::None;
                assert!(node.rights(page) == mapped || lazily);
            }
            match self.nodes[self.homes.home(page).index()].entry(page) {
                Entry::Exclusive(owner) => {
                    assert_eq!(having(Rights::Exclusive), [owner].into_iter().collect())
                }
                Entry::Shared(set) => assert_eq!(having(Rights::Shared), set),
            }
        }
    }
}

use crate::node_set::NodeSet;

#[derive(Clone, Debug)]
enum Op {
    Access(usize, u64, bool),
    Evict(usize, u64),
    Step(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0usize..8, 0u64..8, any::<bool>()).prop_map(|(n, p, w)| Op::Access(n, p, w)),
        1 => (0usize..8, 0u64..8).prop_map(|(n, p)| Op::Evict(n, p)),
        9 => any::<usize>().prop_map(Op::Step),
    ];
    proptest::collection::vec(op, 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_schedule_keeps_single_writer_last_write_and_an_exact_directory(
        nodes in 1usize..6, pages in 1u64..4, ops in ops()
    ) {
        let mut cluster = Cluster::new(nodes, pages);
        for op in ops {
            match op {
                Op::Access(n, p, w) => cluster.access(n % nodes, Page(p % pages), w),
                Op::Evict(n, p) => cluster.evict(n % nodes, Page(p % pages)),
                Op::Step(pick) => { cluster.step(pick); }
            }
        }
        cluster.settle();
    }
}

fn messages(cluster: &mut Cluster, act: impl FnOnce(&mut Cluster)) -> usize {
    let before = cluster.sent;
    act(cluster);
    cluster.settle();
    cluster.sent - before
}

#[test]
fn a_clean_miss_is_one_round_trip() {
    let mut cluster = Cluster::new(3, 3);
    assert_eq!(messages(&mut cluster, |c| c.access(1, Page(0), false)), 2);
    assert_eq!(messages(&mut cluster, |c| c.access(2, Page(0), false)), 2);
}

#[test]
fn a_write_miss_on_a_page_at_home_is_one_round_trip() {
    let mut cluster = Cluster::new(3, 3);
    assert_eq!(messages(&mut cluster, |c| c.access(1, Page(0), true)), 2);
}

#[test]
fn a_page_dirty_at_a_third_node_is_handed_on_in_three_messages() {
    let mut cluster = Cluster::new(3, 3);
    cluster.access(1, Page(0), true);
    cluster.settle();
    assert_eq!(messages(&mut cluster, |c| c.access(2, Page(0), true)), 3);
    // A reader's miss is three messages as well; the fourth is the writeback, which nobody waits for.
    assert_eq!(messages(&mut cluster, |c| c.access(1, Page(0), false)), 4);
}

#[test]
fn an_upgrade_costs_a_round_trip_and_two_messages_a_sharer() {
    for sharers in 0..6u16 {
        let mut cluster = Cluster::new(9, 9);
        for n in 0..=sharers {
            cluster.access(usize::from(n + 1), Page(0), false);
        }
        // The home gives up its own mapping, and one ack for it.
        cluster.settle();
        let count = messages(&mut cluster, |c| c.access(1, Page(0), true));
        assert_eq!(count, 2 + 1 + 2 * usize::from(sharers));
    }
}

#[test]
fn what_no_sound_peer_sends_is_a_violation_and_never_a_panic() {
    let kinds = [
        Kind::GetShared,
        Kind::GetExclusive,
        Kind::Data { rights: Rights::Shared, acks: 0, body: true },
        Kind::Data { rights: Rights::Exclusive, acks: 9, body: false },
        Kind::Invalidate { requester: NodeId(2) },
        Kind::Ack,
        Kind::ForwardShared { requester: NodeId(2) },
        Kind::ForwardExclusive { requester: NodeId(1) },
        Kind::Writeback { body: true },
        Kind::PutShared,
        Kind::PutExclusive,
        Kind::PutAck,
    ];
    let mut violations = 0;
    for first in kinds {
        for second in kinds {
            for page in [0, 1, 2] {
                let homes = Arc::new(Homes::new([1, 1, 1]));
                let mut node = Protocol::new(NodeId(0), homes, 4);
                let mut out = Vec::new();
                node.fault(Page(1), true, &mut out);
                for kind in [first, second] {
                    let message = Message { page: Page(page), kind };
                    if node.message(NodeId(1), message, &mut out).is_err() {
                        violations += 1;
                        break;
                    }
                }
            }
        }
    }
    assert!(violations > 200, "only {violations} of 432 pairs were refused");
}
