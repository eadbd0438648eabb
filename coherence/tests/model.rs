//! The production protocol, model-checked: every reachable state of small clusters, none left out.

use coherence::cluster::{Broken, Cluster, Step};
use coherence::page::{Homes, Page};
use coherence::protocol::RunPolicy;
use stateright::{Checker, Model, Property};

/// A cluster whose CPUs read and write any page at any time, and whose nodes evict what they like.
struct Small {
    cluster: Cluster,
    evictions: bool,
    prefetches: bool,
}

/// A state, or what broke on the way to it.
type State = Result<Cluster, Broken>;

impl Model for Small {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![Ok(self.cluster.clone())]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        let Ok(cluster) = state else { return };
        actions.extend(cluster.pending());
        for node in 0..cluster.nodes() {
            for page in (0..cluster.pages()).map(Page) {
                for write in [false, true] {
                    if !cluster.is_waiting(node, page, write) {
                        actions.push(Step::Access { node, page, write });
                    }
                }
                if self.prefetches {
                    actions.push(Step::Prefetch { node, page, write: true });
                    actions.push(Step::Prefetch { node, page, write: false });
                }
                if self.evictions {
                    actions.push(Step::Evict { node, page });
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
            Property::always(
                "nothing breaks: single writer, last write, no false violation",
                |_, s: &State| s.is_ok(),
            ),
            Property::always("at rest all is answered and the directory is exact", |_, s: &State| {
                s.as_ref().is_ok_and(|c| c.check_rest().is_ok())
            }),
        ]
    }
}

fn exhaust(name: &str, cluster: Cluster, evictions: bool, prefetches: bool) {
    let checker = Small { cluster, evictions, prefetches }.checker().threads(2).spawn_bfs().join();
    println!("{name}: {} states", checker.unique_state_count());
    checker.assert_properties();
    assert!(checker.is_done());
}

#[test]
fn two_nodes_and_one_page_with_evictions() {
    exhaust("2 nodes x 1 page, evictions", Cluster::new(2, 1), true, true);
}

#[test]
fn three_nodes_and_one_page() {
    exhaust("3 nodes x 1 page", Cluster::new(3, 1), false, false);
}

#[test]
fn two_nodes_and_a_run_of_two_pages() {
    let one_home = Homes::new([2, 0]);
    exhaust(
        "2 nodes x 2 pages of one home, runs",
        Cluster::with_homes(one_home, RunPolicy { first: 1, most: 1 }),
        false,
        false,
    );
}
