//! The production protocol, model-checked: every reachable state of small clusters, none left out.
//!
//! Messages arrive in order on a lane and in any order across lanes; any CPU may access, any node may
//! prefetch and evict any page in any state; a hold may end at any moment. A state is found again by a
//! 64-bit fingerprint of all that a [`Cluster`] is, so the chance that one was taken for another is below
//! `n² / 2^65`: one in ten thousand for the largest run here.
//!
//! | run | states | in `cargo test` |
//! |---|---|---|
//! | 2 nodes x 1 page; evictions, prefetches | 2,502 | yes |
//! | 3 nodes x 1 page; evictions | 146,822 | yes |
//! | 3 nodes x 1 page; evictions, prefetches | 1,091,160 | `--ignored` |
//! | 2 nodes x 1 page; evictions, prefetches, discards | 25,500 | yes |
//! | 3 nodes x 1 page; discards by one node | 464,175 | yes |
//! | 2 nodes x 1 page; evictions, prefetches, devices of both | 15,598 | yes |
//! | 3 nodes x 1 page; devices of one | 380,325 | yes |
//! | 3 nodes x 1 page; evictions, devices of one | 966,901 | `--ignored` |
//! | 2 nodes x 2 pages of one home, runs; devices of one | 2,545,556 | `--ignored` |
//! | 2 nodes x 2 pages of one home, runs | 116,127 | yes |
//! | 2 nodes x 2 pages of one home, runs; discards by one node | 3,790,852 | `--ignored` |
//! | 2 nodes x 2 pages of one home, runs; evictions | 1,256,057 | `--ignored` |
//! | 2 nodes x 2 pages, each home to one | 107,629 | yes |
//! | 2 nodes x 2 pages, each home to one; evictions | 1,072,796 | `--ignored` |
//! | 2 nodes x 2 pages of one home; memory for one copy | 53,410 | yes |
//! | 2 nodes x 2 pages of one home; memory for one copy, prefetches | 298,588 | `--ignored` |
//! | 2 nodes x 3 pages of one home; memory for one copy | 6,676,264 | `--ignored` |
//! | shipping, 2 nodes x 1 page; accesses | 143,244 | yes |
//! | shipping, 2 nodes x 1 page; 2 CPUs each, evictions | 127,638 | yes |
//! | shipping, 3 nodes x 1 page; evictions | 69,074 | yes |
//! | shipping, 2 nodes x 1 page; evictions, discards | 18,702 | yes |
//! | shipping, 2 nodes x 1 page; evictions, devices of both | 7,926 | yes |
//! | shipping, 2 nodes x 2 pages of one home, runs | 184,164 | yes |
//! | shipping, 2 nodes x 2 pages of one home; memory for one copy | 604,420 | `--ignored` |
//! | shipping always, 3 nodes x 1 page | 7,784 | yes |
//! | shipping always, 2 nodes x 1 page; evictions, discards | 8,301 | yes |
//! | shipping always, 2 nodes x 2 pages of one home, runs | 25,862 | yes |
//! | pushing, 2 nodes x 1 page; evictions, prefetches | 15,127 | yes |
//! | pushing, 3 nodes x 1 page | 464,561 | yes |
//! | pushing, 2 nodes x 1 page; evictions, discards | 42,880 | yes |
//! | pushing, 2 nodes x 1 page; evictions, devices of both | 25,694 | yes |
//! | shipping and pushing, 2 nodes x 1 page; evictions | 27,806 | yes |
//!
//! "Shipping" is one CPU of each node that adds to the pages, with pages whose classes begin and end at any
//! moment and CPUs that may want the page instead; "pushing" is CPUs that read and write, with pages that are
//! pushed at times.
//!
//! The larger ones: `cargo test --release -p coherence --lib model -- --ignored --nocapture`, half a minute
//! to two minutes each.

use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::cluster::{Broken, Cluster, Step};
use crate::page::{Homes, Page};
use crate::protocol::{Class, Eviction, RunPolicy, Shipping};

/// A cluster whose CPUs read and write any page at any time, and whose nodes prefetch, evict, discard and use
/// for their devices what they like.
#[derive(Clone)]
pub(super) struct Small {
    pub cluster: Cluster,
    pub evictions: bool,
    pub prefetches: bool,
    /// Nodes that discard pages.
    pub discards: usize,
    /// Nodes whose devices load and store pages.
    pub directs: usize,
    /// CPUs of each node that operate on pages.
    pub cpus: u32,
    /// Whether they read as well as write.
    pub reads: bool,
    /// Whether other accesses happen, which cannot be shipped, beside those of called-out CPUs.
    pub accesses: bool,
    /// Classes that pages get, and leave for others of these.
    pub classes: &'static [Class],
}

impl Small {
    /// Nodes that do nothing but what their CPUs need.
    pub fn plain(cluster: Cluster) -> Small {
        Small {
            cluster,
            evictions: false,
            prefetches: false,
            discards: 0,
            directs: 0,
            cpus: 0,
            reads: false,
            accesses: true,
            classes: &[],
        }
    }

    /// Nodes whose pages are pushed at times.
    pub fn pushing(cluster: Cluster) -> Small {
        let cluster = cluster.with_shipping(Shipping::Manual);
        Small { classes: &[Class::Moving, Class::Pushed], ..Small::plain(cluster) }
    }

    /// Nodes with one CPU each that adds to the pages, and nothing else; classes begin and end.
    pub fn shipping(cluster: Cluster) -> Small {
        let cluster = cluster.with_shipping(Shipping::Manual);
        Small {
            cpus: 1,
            accesses: false,
            classes: &[Class::Moving, Class::Delegated],
            ..Small::plain(cluster)
        }
    }
}

/// A state, or what broke on the way to it.
type State = Result<Cluster, Broken>;

pub(super) const SINGLE_WRITER: &str = "single writer or many readers";
pub(super) const LAST_WRITE: &str = "a read returns the last write";
pub(super) const ONCE: &str = "an operation is done once, before its answer";
pub(super) const ANSWERED: &str = "every request is answered";
pub(super) const DIRECTORY: &str = "the directory agrees with the nodes at rest";
pub(super) const BUDGET: &str = "frames are within the budget and none is kept for nothing";
pub(super) const CORRECT: &str = "no correct node is called faulty";

/// Which property a finding is against.
pub(super) fn property(broken: &Broken) -> &'static str {
    match broken {
        Broken::TwoWriters(..) | Broken::AnsweredTooEarly(..) => SINGLE_WRITER,
        Broken::StaleRead(..) | Broken::LandedUnderMapping(..) | Broken::Freed(..) => LAST_WRITE,
        Broken::LostOperation(..) | Broken::NotAsked(..) | Broken::WrongAnswer(..) => ONCE,
        Broken::Unanswered(..) | Broken::NotQuiet(..) => ANSWERED,
        Broken::Directory(..) => DIRECTORY,
        Broken::OverBudget(..) | Broken::Leaked(..) => BUDGET,
        Broken::Violation(_) => CORRECT,
    }
}

/// Whether a state has nothing against a property.
fn keeps(name: &str, state: &State) -> bool {
    let broken = match state {
        Ok(cluster) => cluster.check_rest().err(),
        Err(broken) => Some(broken.clone()),
    };
    broken.is_none_or(|broken| property(&broken) != name)
}

impl Model for Small {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![Ok(self.cluster.clone())]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        let Ok(cluster) = state else { return };
        actions.extend(cluster.pending());
        for page in (0..cluster.pages()).map(Page) {
            for &class in self.classes {
                if cluster.class(page) != class {
                    actions.push(Step::Class { page, class });
                }
            }
        }
        for node in 0..cluster.nodes() {
            for cpu in (0..self.cpus).filter(|&cpu| !cluster.is_operating(node, cpu)) {
                for page in (0..cluster.pages()).map(Page) {
                    let writes = if self.reads { &[false, true][..] } else { &[true] };
                    actions.extend(writes.iter().map(|&write| Step::Operate { node, cpu, page, write }));
                }
            }
            for page in (0..cluster.pages()).map(Page) {
                for write in [false, true] {
                    if self.accesses && !cluster.is_waiting(node, page, write) {
                        actions.push(Step::Access { node, page, write });
                    }
                    if self.prefetches {
                        actions.push(Step::Prefetch { node, page, write });
                    }
                }
                if self.evictions {
                    actions.push(Step::Evict { node, page });
                }
                // One at a time: they are as independent of each other as pages are.
                if node + self.discards >= cluster.nodes() && cluster.node(node).discarding() == 0 {
                    actions.push(Step::Discard { node, page });
                }
                if node + self.directs >= cluster.nodes() && cluster.node(node).direct() == 0 {
                    actions.push(Step::Load { node, page });
                    actions.push(Step::Store { node, page });
                }
            }
        }
    }

    fn next_state(&self, state: &State, action: Step) -> Option<State> {
        let mut cluster = state.clone().ok()?;
        Some(cluster.step(action).map(|()| cluster))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SINGLE_WRITER, |_, s| keeps(SINGLE_WRITER, s)),
            Property::always(LAST_WRITE, |_, s| keeps(LAST_WRITE, s)),
            Property::always(ONCE, |_, s| keeps(ONCE, s)),
            Property::always(ANSWERED, |_, s| keeps(ANSWERED, s)),
            Property::always(DIRECTORY, |_, s| keeps(DIRECTORY, s)),
            Property::always(BUDGET, |_, s| keeps(BUDGET, s)),
            Property::always(CORRECT, |_, s| keeps(CORRECT, s)),
        ]
    }
}

/// Visits every state; fails with the shortest way to a broken one. How many states there are is part of
/// what is checked: a change of the protocol that adds or loses some is seen.
fn exhaust(small: Small, states: usize) {
    let checker = small.checker().threads(2).finish_when(HasDiscoveries::Any).spawn_bfs().join();
    println!("{} states, at most {} steps from power-on", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
    assert!(checker.is_done());
    assert_eq!(checker.unique_state_count(), states);
}

/// One node is the home of all pages.
pub(super) fn one_home(nodes: usize, pages: u64, runs: RunPolicy) -> Cluster {
    let homes = [pages].into_iter().chain(std::iter::repeat_n(0, nodes - 1));
    Cluster::with_homes(Homes::new(homes), runs)
}

/// A miss asks for the next page as well.
pub(super) const RUNS: RunPolicy = RunPolicy { first: 1, most: 1 };

#[test]
fn two_nodes_and_one_page_with_evictions_and_prefetches() {
    exhaust(Small { evictions: true, prefetches: true, ..Small::plain(Cluster::new(2, 1)) }, 2_502);
}

#[test]
fn three_nodes_and_one_page_with_evictions() {
    exhaust(Small { evictions: true, ..Small::plain(Cluster::new(3, 1)) }, 146_822);
}

#[test]
#[ignore = "half a minute"]
fn three_nodes_and_one_page_with_evictions_and_prefetches() {
    exhaust(Small { evictions: true, prefetches: true, ..Small::plain(Cluster::new(3, 1)) }, 1_091_160);
}

#[test]
fn two_nodes_and_a_run_of_two_pages() {
    exhaust(Small::plain(one_home(2, 2, RUNS)), 116_127);
}

#[test]
#[ignore = "half a minute"]
fn two_nodes_and_a_run_of_two_pages_with_evictions() {
    exhaust(Small { evictions: true, ..Small::plain(one_home(2, 2, RUNS)) }, 1_256_057);
}

#[test]
fn two_nodes_and_two_homes() {
    exhaust(Small::plain(Cluster::new(2, 2)), 107_629);
}

#[test]
#[ignore = "half a minute"]
fn two_nodes_and_two_homes_with_evictions() {
    exhaust(Small { evictions: true, ..Small::plain(Cluster::new(2, 2)) }, 1_072_796);
}

/// Everything with which a discard may meet, with the discarding node at home and elsewhere.
#[test]
fn two_nodes_and_one_page_that_either_discards() {
    exhaust(
        Small { evictions: true, prefetches: true, discards: 2, ..Small::plain(Cluster::new(2, 1)) },
        25_500,
    );
}

#[test]
fn three_nodes_and_one_page_that_one_discards() {
    exhaust(Small { discards: 1, ..Small::plain(Cluster::new(3, 1)) }, 464_175);
}

#[test]
#[ignore = "a minute"]
fn two_nodes_and_a_run_of_two_pages_that_one_discards() {
    exhaust(Small { discards: 1, ..Small::plain(one_home(2, 2, RUNS)) }, 3_790_852);
}

/// Everything with which a device's accesses may meet, with the device at the home and elsewhere.
#[test]
fn two_nodes_and_one_page_that_devices_of_both_use() {
    exhaust(
        Small { evictions: true, prefetches: true, directs: 2, ..Small::plain(Cluster::new(2, 1)) },
        15_598,
    );
}

#[test]
fn three_nodes_and_one_page_that_a_device_of_one_uses() {
    exhaust(Small { directs: 1, ..Small::plain(Cluster::new(3, 1)) }, 380_325);
}

#[test]
#[ignore = "ten seconds"]
fn three_nodes_and_one_page_that_a_device_of_one_uses_with_evictions() {
    exhaust(Small { evictions: true, directs: 1, ..Small::plain(Cluster::new(3, 1)) }, 966_901);
}

#[test]
#[ignore = "half a minute"]
fn two_nodes_and_a_run_of_two_pages_that_a_device_of_one_uses() {
    exhaust(Small { directs: 1, ..Small::plain(one_home(2, 2, RUNS)) }, 2_545_556);
}

/// Other CPUs' accesses, which cannot be shipped, beside those of the CPUs that operate.
#[test]
fn two_nodes_and_one_page_that_is_delegated_at_times() {
    let small = Small::shipping(Cluster::new(2, 1));
    exhaust(Small { accesses: true, ..small }, 143_244);
}

#[test]
fn two_nodes_with_two_cpus_each_and_one_page_that_is_delegated_at_times() {
    exhaust(Small { evictions: true, cpus: 2, ..Small::shipping(Cluster::new(2, 1)) }, 127_638);
}

#[test]
fn three_nodes_and_one_page_that_is_delegated_at_times() {
    exhaust(Small { evictions: true, ..Small::shipping(Cluster::new(3, 1)) }, 69_074);
}

/// With discards and devices, of the home and of the other node.
#[test]
fn two_nodes_and_one_page_that_is_delegated_at_times_and_discarded() {
    exhaust(Small { evictions: true, discards: 2, ..Small::shipping(Cluster::new(2, 1)) }, 18_702);
}

#[test]
fn two_nodes_and_one_page_that_is_delegated_at_times_and_used_by_devices() {
    exhaust(Small { evictions: true, directs: 2, ..Small::shipping(Cluster::new(2, 1)) }, 7_926);
}

/// An operation in a run of pages that nobody has touched.
#[test]
fn two_nodes_and_a_run_of_two_pages_that_are_delegated_at_times() {
    exhaust(Small::shipping(one_home(2, 2, RUNS)), 184_164);
}

#[test]
#[ignore = "half a minute"]
fn two_nodes_and_two_pages_that_are_delegated_at_times_with_memory_for_one_copy() {
    let cluster = one_home(2, 2, RunPolicy::NONE).with_budget(1, Eviction::Clock);
    exhaust(Small::shipping(cluster), 604_420);
}

#[test]
fn two_nodes_and_one_page_that_is_pushed_at_times() {
    let small = Small::pushing(Cluster::new(2, 1));
    exhaust(Small { evictions: true, prefetches: true, ..small }, 15_127);
}

#[test]
fn three_nodes_and_one_page_that_is_pushed_at_times() {
    exhaust(Small::pushing(Cluster::new(3, 1)), 464_561);
}

/// With discards and devices, of the home and of the other node.
#[test]
fn two_nodes_and_one_page_that_is_pushed_at_times_and_discarded() {
    exhaust(Small { evictions: true, discards: 2, ..Small::pushing(Cluster::new(2, 1)) }, 42_880);
}

#[test]
fn two_nodes_and_one_page_that_is_pushed_at_times_and_used_by_devices() {
    exhaust(Small { evictions: true, directs: 2, ..Small::pushing(Cluster::new(2, 1)) }, 25_694);
}

/// Any class may follow any other.
#[test]
fn two_nodes_and_one_page_of_all_classes() {
    let classes = &[Class::Moving, Class::Delegated, Class::Pushed];
    let small = Small::shipping(Cluster::new(2, 1));
    exhaust(Small { evictions: true, reads: true, classes, ..small }, 27_806);
}

/// Nodes with one CPU each that adds to the pages; all is shipped that can be.
fn always(cluster: Cluster) -> Small {
    let small = Small::shipping(cluster);
    let cluster = small.cluster.clone().with_shipping(Shipping::Always);
    Small { cluster, classes: &[], ..small }
}

#[test]
fn three_nodes_and_a_page_that_is_delegated_once_it_has_left_its_home() {
    exhaust(always(Cluster::new(3, 1)), 7_784);
}

/// A discarded page is as at power-on, and so moves to the first who wants it.
#[test]
fn two_nodes_and_a_page_that_is_delegated_once_it_has_left_its_home_and_discarded() {
    exhaust(Small { evictions: true, discards: 2, ..always(Cluster::new(2, 1)) }, 8_301);
}

/// Pages that nobody has touched go as a run, and are delegated from then on.
#[test]
fn two_nodes_and_a_run_of_two_pages_that_are_delegated_once_they_have_left_their_home() {
    exhaust(always(one_home(2, 2, RUNS)), 25_862);
}

/// With room for one copy at a time, who wants two pages makes the other go.
fn crowded(cluster: Cluster, prefetches: bool, states: usize) {
    let cluster = cluster.with_budget(1, Eviction::Clock);
    exhaust(Small { prefetches, ..Small::plain(cluster) }, states);
}

#[test]
fn two_nodes_and_two_pages_with_memory_for_one_copy() {
    crowded(one_home(2, 2, RunPolicy::NONE), false, 53_410);
}

#[test]
#[ignore = "ten seconds"]
fn two_nodes_and_two_pages_with_memory_for_one_copy_and_prefetches() {
    crowded(one_home(2, 2, RunPolicy::NONE), true, 298_588);
}

#[test]
#[ignore = "two minutes"]
fn two_nodes_and_three_pages_with_memory_for_one_copy() {
    crowded(one_home(2, 3, RunPolicy::NONE), false, 6_676_264);
}

/// Wherever the machine is, and whatever is under way there: if nobody asks for more, all is answered in a
/// bounded number of steps.
#[test]
fn what_is_under_way_comes_to_an_end_from_every_state() {
    let drains = |small: Small| {
        let visitor = |path: stateright::Path<State, Step>| {
            let mut cluster = path.last_state().clone().expect("nothing breaks");
            let mut steps = 0;
            while let Some(step) = { cluster.pending().next() } {
                cluster.step(step).expect("nothing breaks");
                steps += 1;
                assert!(steps < 100, "it does not come to an end");
            }
            cluster.check_rest().expect("all is answered");
        };
        small.checker().visitor(visitor).spawn_bfs().join().assert_properties();
    };
    drains(Small { evictions: true, prefetches: true, ..Small::plain(Cluster::new(2, 1)) });
    let classes = &[Class::Moving, Class::Delegated, Class::Pushed];
    drains(Small { evictions: true, reads: true, classes, ..Small::shipping(Cluster::new(2, 1)) });
}
