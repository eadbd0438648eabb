//! The check can fail: every [`Mistake`], built into all nodes, is found, by the model checker and by the
//! simulator.

use stateright::{Checker, HasDiscoveries, Model};

use super::Cluster;
use super::model::{RUNS, Small, one_home, property};
use crate::protocol::{Eviction, Mistake, RunPolicy};
use crate::simulator::{self, Config};

/// Whether a mistake needs operations to show.
fn is_in_shipping(mistake: Mistake) -> bool {
    matches!(
        mistake,
        Mistake::OperateTwice
            | Mistake::OperateOnPageThatLeft
            | Mistake::OperateAtHome
            | Mistake::OperateOnShared
            | Mistake::OperateAndRefuse
            | Mistake::ForgetRefusal
            | Mistake::DoNotWait
            | Mistake::ForgetToMove
    )
}

/// A small cluster in which a mistake shows.
fn small(mistake: Mistake) -> Small {
    let cluster = match mistake {
        Mistake::RunIntoGivenPages | Mistake::ForgetRestOfRun => one_home(3, 2, RUNS),
        Mistake::IgnoreBudget | Mistake::ForgetParked => {
            one_home(2, 2, RunPolicy::NONE).with_budget(1, Eviction::Clock)
        }
        _ => Cluster::new(3, 1),
    };
    let plain = |cluster| Small { evictions: true, ..Small::plain(cluster) };
    match mistake {
        Mistake::PunchSharedPage | Mistake::PunchWantedPage | Mistake::ForgetDiscarded => {
            Small { discards: 1, ..plain(cluster) }
        }
        Mistake::LoadFromTheHome | Mistake::AnswerStoreAtOnce | Mistake::ForgetStored => {
            Small { directs: 1, ..plain(cluster) }
        }
        Mistake::ForgetToMove => Small { cpus: 2, ..Small::shipping(Cluster::new(2, 1)) },
        _ if is_in_shipping(mistake) => Small { evictions: true, reads: true, ..Small::shipping(cluster) },
        _ => plain(cluster),
    }
}

/// The first property that the model checker finds broken, after how many states, and in how many steps.
fn model_check(mistake: Mistake) -> Option<(&'static str, usize, usize)> {
    let mut small = small(mistake);
    small.cluster = small.cluster.with_mistake(mistake);
    let checker = small.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let (name, path) =
        checker.discoveries().into_iter().min_by_key(|(_, path)| path.clone().into_actions().len())?;
    Some((name, checker.unique_state_count(), path.into_actions().len()))
}

/// The property that the simulator finds broken, and after how many steps.
fn simulate(mistake: Mistake) -> Option<(&'static str, u64)> {
    let mut config = Config::new(8, 50_000, 1);
    if is_in_shipping(mistake) {
        (config.operations, config.classes) = (500, 100);
    }
    let failure = simulator::run_with(&config, mistake).err()?;
    Some((property(&failure.broken), failure.step))
}

#[test]
fn every_mistake_is_found_by_the_model_checker_and_by_the_simulator() {
    println!("| mistake | model checker | states | steps | simulator, 8 nodes | steps |");
    println!("|---|---|---|---|---|---|");
    let mut missed = Vec::new();
    for mistake in Mistake::ALL {
        let (model, simulation) = (model_check(mistake), simulate(mistake));
        let (broken, states, steps) = model.unwrap_or(("missed", 0, 0));
        let (also, later) = simulation.unwrap_or(("missed", 0));
        println!("| {mistake:?} | {broken} | {states} | {steps} | {also} | {later} |");
        if model.is_none() || simulation.is_none() {
            missed.push(mistake);
        }
    }
    assert_eq!(missed, []);
}
