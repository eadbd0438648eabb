//! Mistakes built into the protocol of all nodes: the model checker and the simulator find every [`Mistake`].

use stateright::{Checker, HasDiscoveries, Model};

use super::model::{RUNS, Small, one_home, property};
use crate::cluster::{Cluster, Step};
use crate::page::Page;
use crate::protocol::{Class, Eviction, Mistake, RunPolicy, Shipping};
use crate::simulator::{self, Config};

/// Whether a mistake needs operations, or classes that change often, to show.
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
            | Mistake::PushTooEarly
            | Mistake::GrantWhilePushing
            | Mistake::AnswerPassedGet
            | Mistake::ForgetPushed
            | Mistake::TakePushWhileLeaving
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
        Mistake::PushTooEarly
        | Mistake::GrantWhilePushing
        | Mistake::AnswerPassedGet
        | Mistake::ForgetPushed => Small { evictions: true, ..Small::pushing(Cluster::new(2, 1)) },
        // It needs two nodes beside the home, of which one reads.
        Mistake::TakePushWhileLeaving => {
            let small = Small::pushing(cluster);
            Small { cluster: two_readers(small.cluster.clone()), evictions: true, classes: &[], ..small }
        }
        _ if is_in_shipping(mistake) => Small { evictions: true, reads: true, ..Small::shipping(cluster) },
        _ => plain(cluster),
    }
}

/// A cluster in which two nodes have the home's page, which is pushed, to read.
fn two_readers(mut cluster: Cluster) -> Cluster {
    let page = Page(0);
    cluster.step(Step::Class { page, class: Class::Pushed }).unwrap();
    for node in [1, 2] {
        cluster.step(Step::Access { node, page, write: false }).unwrap();
        cluster.settle().unwrap();
    }
    cluster
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

/// The property that the simulator finds broken, with which seed, and after how many steps.
fn simulate(mistake: Mistake) -> Option<(&'static str, u64, u64)> {
    (1..=8).find_map(|seed| {
        let mut config = Config::new(8, 50_000, seed);
        match is_in_shipping(mistake) {
            true => (config.operations, config.classes) = (500, 100),
            false => config.shipping = Shipping::Off,
        }
        let failure = simulator::run_with(&config, mistake).err()?;
        Some((property(&failure.broken), seed, failure.step))
    })
}

#[test]
fn every_mistake_is_found_by_the_model_checker_and_by_the_simulator() {
    println!("| mistake | model checker | states | steps | simulator, 8 nodes | seed | steps |");
    println!("|---|---|---|---|---|---|---|");
    let mut missed = Vec::new();
    for mistake in Mistake::ALL {
        let (model, simulation) = (model_check(mistake), simulate(mistake));
        let (broken, states, steps) = model.unwrap_or(("missed", 0, 0));
        let (also, seed, later) = simulation.unwrap_or(("missed", 0, 0));
        println!("| {mistake:?} | {broken} | {states} | {steps} | {also} | {seed} | {later} |");
        if model.is_none() || simulation.is_none() {
            missed.push(mistake);
        }
    }
    assert_eq!(missed, []);
}
