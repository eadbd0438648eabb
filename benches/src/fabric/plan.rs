//! The plan of the fabric's bench: the operations that are measured over each transport, and the goal of
//! each.

use std::collections::BTreeMap;

use anyhow::Result;

use super::end::{End, floor, ours};
use super::{measure, rails};
use crate::choice::{Choice, Net};
use crate::fault_path::command::Polling;
use crate::report::Row;

/// Sizes of round trips, in bytes.
const SIZES: [usize; 4] = [64, 256, 1024, 4096];
/// How many small messages are under way.
const OUTSTANDING: [usize; 4] = [1, 4, 16, 64];
/// Round trips, and messages, of one measurement.
const ROUND_TRIPS: usize = 2000;
const MESSAGES: usize = 20_000;

/// At most this many times the floor's latency, and at least this share of its throughput.
const LATENCY_GOAL: f64 = 1.2;
const THROUGHPUT_GOAL: f64 = 0.9;

/// One measurement.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Op {
    RoundTrip(usize),
    OneWay,
    Outstanding(usize),
}

impl Op {
    fn all() -> Vec<Op> {
        let trips = SIZES.map(Op::RoundTrip).into_iter();
        trips.chain([Op::OneWay]).chain(OUTSTANDING.map(Op::Outstanding)).collect()
    }

    fn name(self) -> String {
        match self {
            Op::RoundTrip(size) => format!("round trip, {size} B"),
            Op::OneWay => "one way, 4 KiB, each".into(),
            Op::Outstanding(count) => format!("64 B answered, {count} under way, each"),
        }
    }

    fn goal(self) -> f64 {
        match self {
            Op::RoundTrip(_) => LATENCY_GOAL,
            Op::OneWay | Op::Outstanding(_) => 1.0 / THROUGHPUT_GOAL,
        }
    }

    /// Microseconds, and their 99th percentile where single ones were timed.
    fn measure(self, ends: [Box<dyn End>; 2], cpus: &[usize]) -> Result<(f64, Option<f64>)> {
        Ok(match self {
            Op::RoundTrip(size) => {
                let (median, p99) = measure::round_trip(ends, cpus, size, ROUND_TRIPS)?;
                (median, Some(p99))
            }
            Op::OneWay => (measure::one_way(ends, cpus, 4096, MESSAGES)?, None),
            Op::Outstanding(count) => (measure::outstanding(ends, cpus, 64, count, MESSAGES)?, None),
        })
    }
}

/// What is to be measured.
pub struct Plan {
    /// Over what, waiting how, and how often; of each operation the best round counts, ours and the floor's
    /// in turn.
    pub choice: Choice,
    /// On which CPUs.
    pub cpus: Vec<usize>,
}

impl Plan {
    /// Measures; `say` hears what is going on.
    ///
    /// # Errors
    /// An end fails.
    pub fn run(&self, say: &mut dyn FnMut(String)) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for &net in &self.choice.nets {
            for &polling in &self.choice.pollings {
                say(format!("{}, {}", net.name(), polling.name()));
                let mut best: BTreeMap<Op, [(f64, Option<f64>); 2]> = BTreeMap::new();
                for _ in 0..self.choice.rounds {
                    for op in Op::all() {
                        let now = [
                            op.measure(ours(net, polling)?, &self.cpus)?,
                            op.measure(floor(net, polling)?, &self.cpus)?,
                        ];
                        let sides = best.entry(op).or_insert(now);
                        for (best, now) in sides.iter_mut().zip(now) {
                            if now.0 < best.0 {
                                *best = now;
                            }
                        }
                    }
                }
                if net == Net::TcpRails {
                    rows.extend(self.shaped(polling, say));
                }
                rows.extend(best.into_iter().map(|(op, [ours, floor])| row(op, net, polling, ours, floor.0)));
            }
        }
        Ok(rows)
    }

    /// Two shaped rails beside one; nothing where this host cannot shape them.
    fn shaped(&self, polling: Polling, say: &mut dyn FnMut(String)) -> Option<Row> {
        let measured = rails::best_of(self.choice.rounds, polling, &self.cpus);
        let [two, one] = measured.inspect_err(|why| say(format!("two rails beside one: {why:#}"))).ok()?;
        Some(Row {
            op: format!("one way, 2 rails of {} Mb/s by 1", rails::MEGABITS),
            transport: Net::TcpRails.name().into(),
            polling: polling.name().into(),
            ours_us: two,
            floor_us: one,
            ratio: two / one,
            goal: Some(1.0 / (2.0 * THROUGHPUT_GOAL)),
            ours_p99_us: None,
        })
    }
}

fn row(op: Op, net: Net, polling: Polling, (ours_us, ours_p99_us): (f64, Option<f64>), floor_us: f64) -> Row {
    Row {
        op: op.name(),
        transport: net.name().into(),
        polling: polling.name().into(),
        ours_us,
        floor_us,
        ratio: ours_us / floor_us,
        // In process the floor moves a pointer: it is there for the proportion.
        goal: (net != Net::InProcess).then_some(op.goal()),
        ours_p99_us,
    }
}
