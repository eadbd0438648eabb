//! Litmus tests on real KVM: what x86 forbids is never seen, on CPUs of one node and of several.
//!
//! The long run, with the report in `target/report/litmus.json`:
//! `cargo test --release -p tests --test litmus -- --ignored --nocapture`

use std::path::PathBuf;

use serde::Serialize;
use tests::litmus::catalogue::{ALL, Litmus, Outcome, Variant, Verdict};
use tests::litmus::guest::host;
use tests::litmus::run::{Counts, Placement, outcomes};
use vmm::kvm::HostCpu;

#[derive(Serialize)]
struct Row {
    test: String,
    placement: String,
    /// What x86-TSO says of the outcome that the test is about.
    verdict: &'static str,
    iterations: u64,
    seen: u64,
    outcomes: Vec<(String, u64)>,
}

fn text(test: &Litmus, outcome: &Outcome) -> String {
    let loads =
        test.threads.iter().zip(outcome.loads).enumerate().filter_map(|(thread, (accesses, loads))| {
            let count =
                accesses.iter().filter(|access| matches!(access, tests::litmus::catalogue::Access::R(_)));
            let count = count.count();
            (count > 0).then(|| format!("{thread}:{:?}", &loads[..count]))
        });
    format!("{} x={} y={}", loads.collect::<Vec<_>>().join(" "), outcome.last[0], outcome.last[1])
}

fn row(test: &Litmus, variant: Variant, placement: Placement, counts: &Counts) -> Row {
    let verdict = match test.verdict(variant) {
        Verdict::Forbidden => "forbidden",
        Verdict::Relaxed => "relaxed",
    };
    Row {
        test: test.title(variant),
        placement: placement.title(),
        verdict,
        iterations: counts.values().sum(),
        seen: counts.iter().filter(|(outcome, _)| (test.about)(outcome)).map(|(_, count)| count).sum(),
        outcomes: counts.iter().map(|(outcome, count)| (text(test, outcome), *count)).collect(),
    }
}

/// Runs every test with every placement; `iterations` on one node and on several.
fn all(host: &HostCpu, iterations: [usize; 2], mut each: impl FnMut(&Row)) -> Vec<Row> {
    let mut rows = Vec::new();
    for test in ALL {
        for &variant in test.variants() {
            for placement in Placement::ALL {
                let most = iterations[usize::from(placement.nodes)];
                let counts = outcomes(host, test, variant, placement, most).unwrap();
                let row = row(test, variant, placement, &counts);
                each(&row);
                rows.push(row);
            }
        }
    }
    rows
}

fn check(rows: &[Row]) {
    for row in rows.iter().filter(|row| row.verdict == "forbidden") {
        assert_eq!(row.seen, 0, "{} ({}): {:?}", row.test, row.placement, row.outcomes);
    }
}

#[test]
#[should_panic(expected = "SB+mfences (a node each, two pages)")]
fn one_forbidden_outcome_among_many_fails() {
    let sb = &ALL[0];
    let placement = Placement { nodes: true, pages: true, delegated: None };
    let fine = Outcome { loads: [[1, 0]; 4], last: [1, 1] };
    let counts = Counts::from([(fine, 99_999), (Outcome::default(), 1)]);
    // Plain, the store buffers may make it.
    check(&[row(sb, Variant::Plain, placement, &counts)]);
    check(&[row(sb, Variant::Fenced, placement, &counts)]);
}

#[test]
fn what_tso_forbids_is_never_seen() {
    let Some(host) = host() else { return };
    check(&all(&host, [8192, 2048], |_| ()));
}

#[test]
#[ignore = "minutes: the report of 100,000 iterations and more of each test"]
fn report() {
    let Some(host) = host() else { return };
    let rows = all(&host, [1 << 20, 100_000], |row| {
        println!(
            "{:14} {:37} {:9} seen {:6} of {:8}, {} outcomes",
            row.test,
            row.placement,
            row.verdict,
            row.seen,
            row.iterations,
            row.outcomes.len()
        );
        for (outcome, count) in &row.outcomes {
            println!("    {count:9}  {outcome}");
        }
    });
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
    let folder = workspace.join("target/report");
    std::fs::create_dir_all(&folder).unwrap();
    let json = serde_json::to_string_pretty(&rows).unwrap();
    std::fs::write(folder.join("litmus.json"), json).unwrap();
    check(&rows);
    // CPUs that run at the same time do show what their store buffers make of "SB".
    if std::thread::available_parallelism().map_or(1, usize::from) > 1 {
        let plain = rows.iter().find(|row| row.test == "SB" && row.placement == "one node, two pages");
        assert!(plain.unwrap().seen > 0, "the two CPUs never met");
    }
}
