//! Short simulations: correct nodes pass, a failure is found, and its seed fails again in the same way.

mod traces;

use super::*;

#[test]
fn sixteen_nodes_keep_their_promises() {
    let report = run(&Config::new(16, 60_000, 1)).unwrap();
    println!("{report}");
    assert!(report.ops >= 60_000 && report.rests == 16);
    // Each way a miss can take was taken.
    assert!(report.messages[1..].iter().all(|&count| count > 0), "{:?}", report.messages);
    assert!(report.deferred > 0 && report.evictions > 0 && report.discarded > 0);
}

#[test]
fn a_seed_gives_the_same_run_and_another_seed_another() {
    let run = |seed| run(&Config::new(5, 5_000, seed)).unwrap();
    assert_eq!(run(7), run(7));
    assert_ne!(run(7).fingerprint, run(8).fingerprint);
}

#[test]
fn a_failure_names_its_seed_and_its_seed_fails_the_same_way_again() {
    let config = Config::new(8, 20_000, 5);
    let run = || run_with(&config, crate::protocol::Mistake::IgnoreEvictionRace).unwrap_err();
    let failure = run();
    println!("{failure}");
    assert!(failure.to_string().contains("--seed 5"));
    assert!(failure.history.len() > 3);
    assert_eq!(failure.history.last().map(|told| told.number), Some(failure.step));
    assert_eq!(failure, run());
}

#[test]
fn five_hundred_and_twelve_nodes_keep_their_promises() {
    run(&Config { pages_per_node: 16, cpus: 1, ..Config::new(512, 20_000, 3) }).unwrap();
}

/// Accesses that find no copy, and those that find one that was only unmapped, out of a thousand.
fn misses(copies: usize, eviction: Eviction) -> (u64, u64) {
    let config = Config {
        copies,
        eviction,
        evictions: 0,
        prefetches: 0,
        discards: 0,
        directs: 0,
        writes: 5,
        locality: 0,
        slow_nodes: 0,
        ..Config::new(8, 100_000, 11)
    };
    let report = run(&config).unwrap();
    let of = |n| n * 1000 / report.ops;
    (of(report.ops - report.hits - report.soft), of(report.soft))
}

#[test]
fn the_clock_keeps_what_is_used_better_than_chance_does() {
    println!("8 nodes x 512 pages, Zipf; out of 1000 accesses");
    println!("| copies | random: misses | clock: misses | clock: remapped |");
    println!("|---|---|---|---|");
    for copies in [64, 128, 256, 512, 1024, 2048] {
        let ((random, _), (clock, remapped)) =
            (misses(copies, Eviction::Random(1)), misses(copies, Eviction::Clock));
        println!("| {copies} | {random} | {clock} | {remapped} |");
        assert!(clock < random, "with memory for {copies} copies");
    }
}
