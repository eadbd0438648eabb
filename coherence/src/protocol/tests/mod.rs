//! The protocol in a cluster under random schedules, and the messages of each operation counted. Beside that
//! [`hostile`] peers, and what the protocol's [`metadata`] costs.

mod hostile;
mod metadata;

use std::sync::Arc;

use fabric::NodeId;
use proptest::prelude::*;

use super::classes::tests::classes;
use super::*;
use crate::cluster::{Cluster, Seen, Step};
use crate::page::Homes;

#[derive(Clone, Debug)]
enum Op {
    Access(usize, u64, bool),
    Evict(usize, u64),
    Prefetch(usize, u64, bool),
    Discard(usize, u64),
    Operate(usize, u32, u64, bool),
    Class(u64, Class),
    Pending(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0usize..8, 0u64..8, any::<bool>()).prop_map(|(n, p, w)| Op::Access(n, p, w)),
        1 => (0usize..8, 0u64..8).prop_map(|(n, p)| Op::Evict(n, p)),
        1 => (0usize..8, 0u64..8, any::<bool>()).prop_map(|(n, p, w)| Op::Prefetch(n, p, w)),
        1 => (0usize..8, 0u64..8).prop_map(|(n, p)| Op::Discard(n, p)),
        3 => (0usize..8, 0u32..3, 0u64..8, any::<bool>())
            .prop_map(|(n, cpu, p, w)| Op::Operate(n, cpu, p, w)),
        1 => (0u64..8, classes()).prop_map(|(p, class)| Op::Class(p, class)),
        12 => any::<usize>().prop_map(Op::Pending),
    ];
    proptest::collection::vec(op, 1..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_schedule_keeps_single_writer_last_write_and_an_exact_directory(
        nodes in 1usize..6, pages in 1u64..8, first in 0u8..4, most in 0u8..6, frames in 1usize..9,
        random: bool, ships in 0u8..4, ops in ops()
    ) {
        let share = |n| pages / nodes as u64 + u64::from((n as u64) < pages % nodes as u64);
        let homes = Homes::new((0..nodes).map(share));
        let eviction = if random { Eviction::Random(1) } else { Eviction::Clock };
        let mut cluster = Cluster::with_homes(homes, RunPolicy { first, most })
            .with_budget(frames, eviction)
            .with_shipping(
                [Shipping::Off, Shipping::Manual, Shipping::Always, Shipping::Auto(Rules::default())]
                    [usize::from(ships)],
            );
        for op in ops {
            let step = match op {
                Op::Access(n, p, write) => Step::Access { node: n % nodes, page: Page(p % pages), write },
                Op::Evict(n, p) => Step::Evict { node: n % nodes, page: Page(p % pages) },
                Op::Prefetch(n, p, write) => Step::Prefetch { node: n % nodes, page: Page(p % pages), write },
                Op::Discard(n, p) => Step::Discard { node: n % nodes, page: Page(p % pages) },
                Op::Operate(n, cpu, p, write) => {
                    Step::Operate { node: n % nodes, cpu, page: Page(p % pages), write }
                }
                Op::Class(p, class) => Step::Class { page: Page(p % pages), class },
                Op::Pending(pick) => {
                    let pending: Vec<_> = cluster.pending().collect();
                    match pending.len() {
                        0 => continue,
                        len => pending[pick % len],
                    }
                }
            };
            cluster.step(step).unwrap();
        }
        cluster.settle().unwrap();
    }
}

fn add() -> Operation {
    Operation::new(Action::Add, Width::Eight, 8, 1, 0).unwrap()
}

fn access(cluster: &mut Cluster, node: usize, write: bool) -> u64 {
    let mut seen = Vec::new();
    cluster.step_seen(Step::Access { node, page: Page(0), write }, &mut seen).unwrap();
    while let Some(step) = { cluster.pending().next() } {
        cluster.step_seen(step, &mut seen).unwrap();
    }
    cluster.check_rest().unwrap();
    seen.iter().filter(|seen| matches!(seen, Seen::Sent { .. })).count() as u64
}

#[test]
fn a_clean_miss_is_one_round_trip() {
    let mut cluster = Cluster::new(3, 3);
    access(&mut cluster, 0, true);
    assert_eq!(access(&mut cluster, 1, false), 2);
    assert_eq!(access(&mut cluster, 2, false), 2);
}

#[test]
fn a_write_miss_on_a_page_at_home_is_one_round_trip() {
    let mut cluster = Cluster::new(3, 3);
    assert_eq!(access(&mut cluster, 1, true), 2);
}

#[test]
fn a_page_dirty_at_a_third_node_is_handed_on_in_three_messages() {
    let mut cluster = Cluster::new(3, 3);
    access(&mut cluster, 1, true);
    assert_eq!(access(&mut cluster, 2, true), 3);
    // A reader's miss is three messages as well; the fourth is the writeback, which nobody waits for.
    assert_eq!(access(&mut cluster, 1, false), 4);
}

#[test]
fn an_upgrade_costs_a_round_trip_and_two_messages_a_sharer() {
    for sharers in 0..6 {
        let mut cluster = Cluster::new(9, 9);
        access(&mut cluster, 0, true);
        for n in 0..=sharers {
            access(&mut cluster, n + 1, false);
        }
        // The home is a sharer too, and needs only the ack.
        assert_eq!(access(&mut cluster, 1, true), 2 + 1 + 2 * sharers as u64);
    }
}

#[test]
fn an_untouched_page_that_is_read_may_be_written_at_once() {
    let mut cluster = Cluster::new(3, 3);
    assert_eq!(access(&mut cluster, 1, false), 2);
    assert_eq!(access(&mut cluster, 1, true), 0);
}

/// Messages of an operation of a CPU of the node, which is shipped if it may be, and what the byte was
/// before.
fn operate(cluster: &mut Cluster, node: usize) -> (u64, u8) {
    let mut seen = Vec::new();
    cluster.step_seen(Step::Operate { node, cpu: 5, page: Page(0), write: true }, &mut seen).unwrap();
    let ships = |step: &Step| !matches!(step, Step::Move { .. });
    while let Some(step) = { cluster.pending().find(ships) } {
        cluster.step_seen(step, &mut seen).unwrap();
    }
    cluster.check_rest().unwrap();
    let old = seen.iter().find_map(|seen| match seen {
        Seen::Operated { cpu: 5, old, .. } => Some(*old / 64),
        _ => None,
    });
    (seen.iter().filter(|seen| matches!(seen, Seen::Sent { .. })).count() as u64, old.unwrap())
}

#[test]
fn an_operation_is_one_round_trip_once_it_is_known_where_to_send_it() {
    let mut cluster = Cluster::new(4, 4).with_shipping(Shipping::Manual);
    cluster.step(Step::Class { page: Page(0), class: Class::Delegated }).unwrap();
    assert_eq!(operate(&mut cluster, 1), (4, 0), "the first time it asks for the page");
    assert_eq!(operate(&mut cluster, 1), (2, 1));
    assert_eq!(operate(&mut cluster, 0), (0, 2), "the owner's own");
    // What cannot be shipped moves the page, and its class stays.
    assert_eq!(access(&mut cluster, 2, true), 2);
    assert_eq!(operate(&mut cluster, 2), (0, 3));
    assert_eq!(operate(&mut cluster, 1), (3, 0), "at a third node, by way of the home");
    assert_eq!(operate(&mut cluster, 0), (2, 1), "the home's own, which asks itself first");
}

#[test]
fn when_a_page_is_not_delegated_any_more_who_believes_so_is_refused_once() {
    let mut cluster = Cluster::new(3, 3).with_shipping(Shipping::Manual);
    cluster.step(Step::Class { page: Page(0), class: Class::Delegated }).unwrap();
    operate(&mut cluster, 1);
    cluster.step(Step::Class { page: Page(0), class: Class::Moving }).unwrap();
    assert_eq!(operate(&mut cluster, 1), (4, 1), "refused, asked for, here");
    assert_eq!(operate(&mut cluster, 1), (0, 2));
    assert_eq!(operate(&mut cluster, 2), (3, 3), "moved as any page");
}

#[test]
fn where_all_is_shipped_a_page_still_goes_to_the_first_node_that_wants_it() {
    let mut cluster = Cluster::new(4, 4).with_shipping(Shipping::Always);
    assert_eq!(operate(&mut cluster, 0), (0, 0), "its home's own");
    assert_eq!(operate(&mut cluster, 1), (2, 1), "moved as any page");
    assert_eq!(operate(&mut cluster, 1), (0, 2));
    assert_eq!(operate(&mut cluster, 2), (5, 3), "asked for, shipped to its owner by way of the home");
    assert_eq!(operate(&mut cluster, 2), (3, 0));
    // It has left its home, to which it comes back.
    cluster.step(Step::Evict { node: 1, page: Page(0) }).unwrap();
    cluster.settle().unwrap();
    assert_eq!(operate(&mut cluster, 2), (2, 1), "shipped to its home");
}

#[test]
fn readers_of_a_pushed_page_have_what_was_written_without_asking() {
    for readers in 1..5 {
        let mut cluster = Cluster::new(9, 9).with_shipping(Shipping::Manual);
        cluster.step(Step::Class { page: Page(0), class: Class::Pushed }).unwrap();
        access(&mut cluster, 1, true);
        for n in 0..readers {
            access(&mut cluster, 2 + n, false);
        }
        for _ in 0..3 {
            // The grant, an invalidation and its answer for each reader and the home, which then asks for the
            // page and pushes it, and is answered.
            let home = access(&mut cluster, 1, true) - 4 * readers as u64;
            assert!((4..=5).contains(&home), "{home}");
            for n in 0..readers {
                assert_eq!(access(&mut cluster, 2 + n, false), 0);
            }
        }
    }
}

#[test]
fn what_the_home_itself_writes_is_pushed_when_it_lets_go_of_it() {
    let mut cluster = Cluster::new(4, 4).with_shipping(Shipping::Manual);
    cluster.step(Step::Class { page: Page(0), class: Class::Pushed }).unwrap();
    access(&mut cluster, 0, true);
    access(&mut cluster, 1, true);
    access(&mut cluster, 0, false);
    access(&mut cluster, 2, false);
    assert_eq!(access(&mut cluster, 0, true), 2 * 4);
    assert_eq!(access(&mut cluster, 1, false) + access(&mut cluster, 2, false), 0);
}

/// Messages of a discard by node `by`, after which the page is as at power-on.
fn discard(cluster: &mut Cluster, by: usize) -> u64 {
    let mut seen = Vec::new();
    cluster.step_seen(Step::Discard { node: by, page: Page(0) }, &mut seen).unwrap();
    while let Some(step) = { cluster.pending().next() } {
        cluster.step_seen(step, &mut seen).unwrap();
    }
    cluster.check_rest().unwrap();
    assert!(cluster.is_untouched(Page(0)));
    assert_eq!(cluster.node(0).entry(Page(0)), Entry::Exclusive(NodeId(0)));
    assert_eq!(seen.iter().filter(|seen| matches!(seen, Seen::Discarded { .. })).count(), 1);
    seen.iter().filter(|seen| matches!(seen, Seen::Sent { .. })).count() as u64
}

#[test]
fn a_discarded_page_is_as_at_power_on_whoever_had_it() {
    let mut cluster = Cluster::new(4, 4);
    for by in 0..3 {
        let ask = if by == 0 { 0 } else { 2 };
        access(&mut cluster, 0, true);
        assert_eq!(discard(&mut cluster, by), ask, "at its home only");
        access(&mut cluster, 1, true);
        assert_eq!(discard(&mut cluster, by), ask + 2, "dirty at another node");
        access(&mut cluster, 3, true);
        access(&mut cluster, 0, false);
        access(&mut cluster, 1, false);
        assert_eq!(discard(&mut cluster, by), ask + 4, "shared by two others and the home");
        assert_eq!(access(&mut cluster, 1, false), 2);
        assert_eq!(access(&mut cluster, 1, true), 0, "granted like memory that nobody touched");
    }
}

#[test]
fn an_access_during_a_discard_finds_the_page_before_or_after_it() {
    for by in 0..3 {
        let mut cluster = Cluster::new(3, 3);
        access(&mut cluster, 1, true);
        cluster.step(Step::Discard { node: by, page: Page(0) }).unwrap();
        for node in [0, 2] {
            cluster.step(Step::Access { node, page: Page(0), write: true }).unwrap();
        }
        cluster.settle().unwrap();
        assert!(!cluster.is_untouched(Page(0)));
    }
}

#[test]
fn a_run_is_discarded_in_one_message_and_its_parts_in_their_own() {
    let homes = Arc::new(Homes::new([8, 8]));
    let mut home = Protocol::new(NodeId(0), homes, 512, RunPolicy::NONE);
    let mut out = Vec::new();
    let said = |page, kind| Message { page: Page(page), kind };
    home.message(NodeId(1), said(3, Kind::GetExclusive { run: 0, may_ship: false }), 0, &mut out).unwrap();
    out.clear();
    home.message(NodeId(1), said(1, Kind::Discard { run: 5 }), 0, &mut out).unwrap();
    let sent = |page, kind| Effect::Send { to: NodeId(1), message: said(page, kind) };
    let expected = [
        Effect::Punch(Page(1), 2),
        sent(1, Kind::Discarded { run: 1 }),
        sent(3, Kind::Reclaim),
        Effect::Punch(Page(4), 3),
        sent(4, Kind::Discarded { run: 2 }),
    ];
    assert_eq!(out, expected);
    assert!(home.message(NodeId(1), said(6, Kind::Discard { run: 2 }), 0, &mut out).is_err());
}

#[test]
fn untouched_neighbours_come_with_one_round_trip() {
    let mut cluster = Cluster::with_homes(Homes::new([32, 1]), RunPolicy { first: 15, most: 15 });
    assert_eq!(access(&mut cluster, 1, false), 2);
    let mut seen = Vec::new();
    for page in (0..16).map(Page) {
        cluster.step_seen(Step::Access { node: 1, page, write: true }, &mut seen).unwrap();
        assert_eq!(std::mem::take(&mut seen), [Seen::Done { node: 1, page, write: true }]);
    }
}

#[test]
fn what_no_sound_peer_sends_is_a_violation_and_never_a_panic() {
    let kinds = [
        Kind::GetShared { run: 0, may_ship: false },
        Kind::GetExclusive { run: 1, may_ship: false },
        Kind::Data { rights: Rights::Shared, acks: 0, body: true, run: 0 },
        Kind::Data { rights: Rights::Exclusive, acks: 9, body: false, run: 2 },
        Kind::Invalidate { requester: NodeId(2) },
        Kind::Ack,
        Kind::ForwardShared { requester: NodeId(2) },
        Kind::ForwardExclusive { requester: NodeId(1) },
        Kind::Writeback { body: true },
        Kind::PutShared,
        Kind::PutExclusive,
        Kind::PutAck,
        Kind::Discard { run: 1 },
        Kind::Reclaim,
        Kind::Discarded { run: 0 },
        Kind::Ship,
        Kind::Operate { token: 1, operation: add() },
        Kind::OperateAt { requester: NodeId(2), token: 1, operation: add() },
        Kind::Operated { token: 1, old: Some(0.into()) },
        Kind::Push,
        Kind::Pushed { taken: true },
    ];
    let mut violations = 0;
    for first in kinds {
        for second in kinds {
            for page in [0, 1, 2] {
                let homes = Arc::new(Homes::new([1, 1, 1]));
                let mut node = Protocol::new(NodeId(0), homes, 4, RunPolicy::NONE);
                let mut out = Vec::new();
                node.fault(Page(1), true, &mut out);
                for kind in [first, second] {
                    let message = Message { page: Page(page), kind };
                    if node.message(NodeId(1), message, 0, &mut out).is_err() {
                        violations += 1;
                        break;
                    }
                }
            }
        }
    }
    assert!(violations > 400, "only {violations} of 1323 pairs were refused");
}

/// A home that still holds the page which it has promised to another node.
fn a_home_that_promised_its_page() -> (Protocol, Vec<Effect>) {
    let mut home = Protocol::new(NodeId(0), Arc::new(Homes::new([1, 1, 1])), 4, RunPolicy::NONE);
    let mut out = Vec::new();
    home.hold(Page(0));
    let get = Message { page: Page(0), kind: Kind::GetExclusive { run: 0, may_ship: false } };
    home.message(NodeId(1), get, 0, &mut out).unwrap();
    assert_eq!(out, [Effect::Deferred(Page(0))]);
    (home, Vec::new())
}

#[test]
fn nobody_gives_back_a_page_that_the_home_still_has() {
    let (mut home, mut out) = a_home_that_promised_its_page();
    let put = Message { page: Page(0), kind: Kind::PutExclusive };
    assert!(home.message(NodeId(1), put, 0, &mut out).is_err());

    let (mut home, mut out) = a_home_that_promised_its_page();
    let read = Message { page: Page(0), kind: Kind::GetShared { run: 0, may_ship: false } };
    home.message(NodeId(2), read, 0, &mut out).unwrap();
    let writeback = Message { page: Page(0), kind: Kind::Writeback { body: true } };
    assert!(home.message(NodeId(1), writeback, 0, &mut out).is_err());
    assert!(!out.contains(&Effect::Land(Page(0))));
}

#[test]
fn no_copy_is_demanded_for_the_node_that_has_it() {
    let mut node = Protocol::new(NodeId(1), Arc::new(Homes::new([1, 1, 1])), 4, RunPolicy::NONE);
    let mut out = Vec::new();
    node.fault(Page(0), true, &mut out);
    let forward = Message { page: Page(0), kind: Kind::ForwardShared { requester: NodeId(1) } };
    assert!(node.message(NodeId(0), forward, 0, &mut out).is_err());
}

#[test]
fn a_page_that_is_on_its_way_is_not_asked_for_again() {
    let (mut home, mut out) = a_home_that_promised_its_page();
    let mut get = |node, kind| home.message(NodeId(node), Message { page: Page(0), kind }, 0, &mut out);
    get(2, Kind::GetShared { run: 0, may_ship: false }).unwrap();
    assert!(get(2, Kind::GetShared { run: 0, may_ship: false }).is_err());
    get(2, Kind::GetExclusive { run: 0, may_ship: false }).unwrap();
    assert!(get(2, Kind::GetExclusive { run: 0, may_ship: false }).is_err());
}

#[test]
fn acks_that_nobody_waits_for_are_refused() {
    let node = |write| {
        let mut node = Protocol::new(NodeId(1), Arc::new(Homes::new([1, 1, 1])), 4, RunPolicy::NONE);
        node.fault(Page(0), write, &mut Vec::new());
        node
    };
    let ack = Message { page: Page(0), kind: Kind::Ack };
    let grant = |acks| {
        let kind = Kind::Data { rights: Rights::Exclusive, acks, body: true, run: 0 };
        Message { page: Page(0), kind }
    };
    let mut out = Vec::new();
    assert!(node(false).message(NodeId(2), ack, 0, &mut out).is_err());
    let mut writer = node(true);
    writer.message(NodeId(2), ack, 0, &mut out).unwrap();
    assert!(writer.clone().message(NodeId(0), grant(0), 0, &mut out).is_err());
    writer.message(NodeId(0), grant(1), 0, &mut out).unwrap();
    assert!(writer.message(NodeId(2), ack, 0, &mut out).is_err());
}
