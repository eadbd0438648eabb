//! The check can fail: every [`Mistake`], built into all nodes of a small cluster, is found.

use stateright::{Checker, HasDiscoveries, Model};

use super::Cluster;
use super::model::{Small, one_home};
use crate::protocol::Mistake;

/// The first property that the model checker finds broken, after how many states and steps.
fn model_check(mistake: Mistake) -> Option<(&'static str, usize, usize)> {
    let cluster = match mistake {
        Mistake::RunIntoGivenPages | Mistake::ForgetRestOfRun => one_home(3, 2),
        _ => Cluster::new(3, 1),
    };
    let cluster = cluster.with_mistake(mistake);
    let small = Small { cluster, evictions: true, prefetches: false };
    let checker = small.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let (name, path) =
        checker.discoveries().into_iter().min_by_key(|(_, path)| path.clone().into_actions().len())?;
    Some((name, checker.unique_state_count(), path.into_actions().len()))
}

#[test]
fn every_mistake_is_found() {
    println!("{:<22} {:<45} {:>8} {:>6}", "mistake", "model checker: property", "states", "steps");
    let mut missed = Vec::new();
    for mistake in Mistake::ALL {
        let name = format!("{mistake:?}");
        match model_check(mistake) {
            Some((property, states, steps)) => println!("{name:<22} {property:<45} {states:>8} {steps:>6}"),
            None => missed.push(mistake),
        }
    }
    assert_eq!(missed, []);
}
