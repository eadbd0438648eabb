//! The phases of a miss and the time of each, from the traces that the engines write anyhow. All processes
//! run on one host and read one time stamp counter.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use base::trace;
use serde::Serialize;

use super::cell::{Cell, Kind};
use super::command::{Command, Op, Reply};

/// Operations looked at.
const SAMPLES: u64 = 512;

/// One step of an operation and its median.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// The operation.
    pub op: String,
    /// From what to what.
    pub step: String,
    /// In microseconds.
    pub median_us: f64,
}

/// Measures the steps of read misses, upgrades and write misses between two engines.
///
/// # Errors
/// What a node says.
pub fn measure(kind: Kind, cpus: &[usize]) -> Result<Vec<Phase>> {
    let ticks = ticks_per_us();
    let mut cell = Cell::start(kind, cpus)?;
    let shared = cell.filled(SAMPLES)?;
    let written = cell.filled(SAMPLES)?;
    let mut phases = Vec::new();
    for (name, op, pages) in [
        ("read miss", Op::Read, shared),
        ("upgrade", Op::Upgrade, shared),
        ("write miss", Op::Write, written),
    ] {
        let times = cell.touch(op, pages, 1)?;
        let near = events(cell.tell(0, Command::Trace)?)?;
        let far = events(cell.tell(1, Command::Trace)?)?;
        let mut steps: Vec<(String, Vec<f64>)> = Vec::new();
        for &(page, begin, end) in &times.stamps {
            let mut path = vec![(begin, "touch".to_owned())];
            for (node, events) in [("", &near), ("home: ", &far)] {
                let of_page = events.get(&page).into_iter().flatten();
                let during = of_page.filter(|(tsc, _)| (begin..=end).contains(tsc));
                path.extend(during.map(|(tsc, what)| (*tsc, format!("{node}{what}"))));
            }
            path.push((end, "goes on".to_owned()));
            path.sort();
            for (i, pair) in path.windows(2).enumerate() {
                let step = format!("{:2}. {} -> {}", i + 1, pair[0].1, pair[1].1);
                let time = (pair[1].0 - pair[0].0) as f64 / ticks;
                match steps.iter_mut().find(|(known, _)| *known == step) {
                    Some((_, times)) => times.push(time),
                    None => steps.push((step, vec![time])),
                }
            }
        }
        for (step, mut times) in steps {
            // What happened seldom is another operation's.
            if times.len() >= times_needed(SAMPLES) {
                times.sort_by(f64::total_cmp);
                phases.push(Phase { op: name.into(), step, median_us: times[times.len() / 2] });
            }
        }
    }
    Ok(phases)
}

fn times_needed(samples: u64) -> usize {
    samples as usize / 3
}

/// The trace's events by page: when, and what.
fn events(reply: Reply) -> Result<HashMap<u64, Vec<(u64, String)>>> {
    let Reply::Trace(text) = reply else { bail!("a node answered {reply:?} instead of its trace") };
    let mut events: HashMap<u64, Vec<(u64, String)>> = HashMap::new();
    for line in text.lines() {
        // "number tsc thread kind: page word (meaning)"
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[_, tsc, _, kind, page, ..] = words.as_slice() else { continue };
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        if let (Ok(tsc), Some(page)) = (tsc.parse(), number(page)) {
            events.entry(page).or_default().push((tsc, kind.trim_end_matches(':').to_lowercase()));
        }
    }
    Ok(events)
}

fn ticks_per_us() -> f64 {
    let (begin, first) = (Instant::now(), trace::now());
    while begin.elapsed() < Duration::from_millis(20) {}
    (trace::now() - first) as f64 / (begin.elapsed().as_nanos() as f64 / 1000.0)
}

/// The steps as a table.
pub fn table(phases: &[Phase]) -> String {
    let lines = phases.iter().map(|p| format!("{:12} {:48} {:8.2} us\n", p.op, p.step, p.median_us));
    lines.collect()
}
