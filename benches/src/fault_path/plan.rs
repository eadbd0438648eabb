//! The plan: the operations that are measured, and how.

use std::collections::BTreeMap;

use anyhow::Result;

use super::cell::{Cell, Kind};
use super::command::{Op, Polling, Side, Times};
use crate::choice::{Choice, Net};
use crate::report::Row;

/// Operations of a row in one round.
const SAMPLES: u64 = 768;
/// Pages of the stream.
const STREAM: u64 = 4096;
/// Copies of a node that has to give some back.
const COPIES: u64 = 512;
/// Turns of each node in the ping-pong.
const TURNS: u64 = 300;
/// How long production keeps a page that it won, in microseconds.
const HOLD_US: u64 = 100;

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Over what, waiting how, and how often; of each operation the best round counts, ours and the floor's
    /// in turn.
    pub choice: Choice,
    /// On which CPUs.
    pub cpus: Vec<usize>,
}

/// The best of several rounds, by row.
#[derive(Default)]
struct Best {
    /// By row: time, and 99th percentile if single operations were timed.
    rows: BTreeMap<Key, (f64, Option<f64>)>,
}

/// A row's place in the report, and its name.
type Key = (usize, String);

impl Best {
    fn note(&mut self, place: usize, op: impl Into<String>, time: f64, p99: Option<f64>) {
        let best = self.rows.entry((place, op.into())).or_insert((f64::MAX, p99));
        if time < best.0 {
            *best = (time, p99);
        }
    }

    fn single(&mut self, place: usize, op: impl Into<String>, times: &Times) {
        self.note(place, op, times.median_us, Some(times.p99_us));
    }
}

impl Plan {
    /// Measures. `progress` hears of each cell; the second result says what was left out, and why.
    ///
    /// # Errors
    /// What a node says.
    pub fn run(&self, progress: &mut dyn FnMut(&str)) -> Result<(Vec<Row>, Vec<String>)> {
        let (mut rows, mut left_out) = (Vec::new(), Vec::new());
        for &net in &self.choice.nets {
            for &polling in &self.choice.pollings {
                let mut best = [Best::default(), Best::default()];
                for round in 1..=self.choice.rounds {
                    progress(&format!(
                        "{}, {}, round {round} of {}",
                        net.name(),
                        polling.name(),
                        self.choice.rounds
                    ));
                    for (side, best) in [Side::Ours, Side::Floor].into_iter().zip(&mut best) {
                        self.round(
                            Kind {
                                side,
                                net,
                                polling,
                                nodes: 2,
                                hold_us: HOLD_US,
                                ship: false,
                                copies: None,
                            },
                            best,
                        )?;
                    }
                }
                rows.extend(compare(&best, net, polling));
                if polling == Polling::Busy && self.cpus.len() < 9 {
                    left_out.push(format!(
                        "{}, busy: rows whose nodes are more than the {} CPUs here, and ping-pong on fewer than 4, \
                         since a thread that polls needs a CPU",
                        net.name(),
                        self.cpus.len()
                    ));
                }
            }
        }
        Ok((rows, left_out))
    }

    /// Everything once, for one side.
    fn round(&self, kind: Kind, best: &mut Best) -> Result<()> {
        self.two_nodes(kind, best)?;
        // The floor keeps nothing for anybody, and its ping-pong is a write miss.
        let room = kind.polling == Polling::Blocking || self.cpus.len() >= 4;
        if kind.side == Side::Ours && room {
            for (place, hold_us, name) in [(11, 0, "ping-pong, nothing kept"), (12, HOLD_US, "ping-pong")] {
                let mut cell = Cell::start(Kind { hold_us, ..kind }, &self.cpus)?;
                let page = cell.fresh(1)?.first;
                best.note(place, name, cell.ping_pong(page, TURNS)?.each_us, None);
            }
        }
        for sharers in [2, 4, 8] {
            let kind = Kind { nodes: sharers + 1, ..kind };
            if kind.polling == Polling::Blocking || self.cpus.len() >= kind.nodes {
                self.more_nodes(kind, best)?;
            }
        }
        Ok(())
    }

    fn two_nodes(&self, kind: Kind, best: &mut Best) -> Result<()> {
        let mut cell = Cell::start(kind, &self.cpus)?;
        let pages = cell.filled(SAMPLES)?;
        best.single(0, "read miss", &cell.touch(Op::Read, pages, 1)?);
        best.single(2, "upgrade, 1 sharer", &cell.touch(Op::Upgrade, pages, 1)?);
        let pages = cell.filled(SAMPLES)?;
        let write = cell.touch(Op::Write, pages, 1)?;
        best.single(1, "write miss", &write);
        if kind.side == Side::Floor {
            best.single(11, "ping-pong, nothing kept", &write);
            best.single(12, "ping-pong", &write);
        }
        for (i, threads) in [1, 2, 4, 8].into_iter().enumerate() {
            let pages = cell.filled(SAMPLES)?;
            let name = format!("read misses of {threads} threads");
            best.note(13 + i, name, cell.touch(Op::Read, pages, threads)?.each_us, None);
        }
        drop(cell);
        for (place, op, name) in [
            (21, Op::Read, "read miss, a clean copy goes"),
            (22, Op::Write, "write miss, a modified copy goes"),
        ] {
            // The floor gives nothing back: what goes should go beside the miss, not before it.
            let mut cell = Cell::start(Kind { copies: Some(COPIES), ..kind }, &self.cpus)?;
            let before = cell.filled(COPIES)?;
            cell.touch(op, before, 1)?;
            let pages = cell.filled(SAMPLES)?;
            let times = cell.touch(op, pages, 1)?;
            best.single(place, name, &times);
            // Pages one after the other would wait for those that go.
            best.note(place + 2, format!("{name}, each of many"), times.each_us, None);
        }
        let mut cell = Cell::start(kind, &self.cpus)?;
        let pages = cell.filled(STREAM)?;
        best.note(20, "sequential stream, a page", cell.stream(pages)?.each_us, None);
        Ok(())
    }

    fn more_nodes(&self, kind: Kind, best: &mut Best) -> Result<()> {
        let mut cell = Cell::start(kind, &self.cpus)?;
        let sharers = kind.nodes - 1;
        let pages = cell.shared(SAMPLES / 2)?;
        cell.touch(Op::Read, pages, 1)?;
        let place = 3 + sharers.trailing_zeros() as usize;
        best.single(place, format!("upgrade, {sharers} sharers"), &cell.touch(Op::Upgrade, pages, 1)?);
        if sharers == 2 {
            for (place, op, name) in [
                (8, Op::ReadDirty, "read miss, dirty at a third"),
                (9, Op::WriteDirty, "write miss, dirty at a third"),
            ] {
                let pages = cell.fresh(SAMPLES / 2)?;
                cell.tell(2, super::command::Command::Fill(pages))?;
                best.single(place, name, &cell.touch(op, pages, 1)?);
            }
        }
        Ok(())
    }
}

/// The goals of the project's plan, as the most that the ratio may be. They are for nodes that are processes:
/// in one process each unmapping interrupts the CPUs of all nodes, which the floor does without.
fn goal(net: Net, op: &str) -> Option<f64> {
    match op {
        _ if net == Net::InProcess => None,
        "read miss" | "write miss" => Some(1.3),
        "read miss, a clean copy goes" | "write miss, a modified copy goes" => Some(1.3),
        op if op.starts_with("upgrade") => Some(1.3),
        op if op.starts_with("sequential stream") => Some(1.0 / 0.8),
        "eight to one" => Some(2.0),
        _ => None,
    }
}

fn compare(best: &[Best; 2], net: Net, polling: Polling) -> Vec<Row> {
    let [ours, floor] = best;
    let row = |(key, &(ours_us, ours_p99_us)): (&Key, &(f64, Option<f64>))| {
        let floor_us = floor.rows.get(key)?.0;
        Some(Row {
            op: key.1.clone(),
            transport: net.name().into(),
            polling: polling.name().into(),
            ours_us,
            floor_us,
            ratio: ours_us / floor_us,
            goal: goal(net, &key.1),
            ours_p99_us,
        })
    };
    let mut rows: Vec<Row> = ours.rows.iter().filter_map(row).collect();
    let time = |op: &str| ours.rows.iter().find(|(key, _)| key.1 == op).map(|(_, time)| time.0);
    if let Some((eight, one)) = time("upgrade, 8 sharers").zip(time("upgrade, 1 sharer")) {
        rows.push(Row {
            op: "upgrade, 8 sharers, to that with 1".into(),
            transport: net.name().into(),
            polling: polling.name().into(),
            ours_us: eight,
            floor_us: one,
            ratio: eight / one,
            goal: goal(net, "eight to one"),
            ours_p99_us: None,
        });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_round_counts_and_is_compared_with_the_floors() {
        let mut best = [Best::default(), Best::default()];
        for time in [30.0, 20.0, 25.0] {
            best[0].note(0, "read miss", time, Some(time * 2.0));
            best[1].note(0, "read miss", time / 2.0, None);
        }
        let rows = compare(&best, Net::Tcp, Polling::Busy);
        assert_eq!((rows[0].ours_us, rows[0].ours_p99_us, rows[0].ratio), (20.0, Some(40.0), 2.0));
        assert!(rows[0].misses_goal());
    }
}
