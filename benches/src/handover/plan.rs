//! The plan: the rows, and how they are measured.

use anyhow::{Result, bail};
use serde::Serialize;

use super::code::{PAGES, Program};
use super::guest::Job;
use crate::choice::Choice;
use crate::fault_path::cell::{Cell, Kind};
use crate::fault_path::command::{Command, Polling, Reply, Side};
use crate::report::Row;

/// For how long a program runs, in microseconds.
const RUN_US: u64 = 300_000;
/// Round trips of the floor.
const ROUND_TRIPS: u64 = 2000;
/// How long production keeps a page that it won at least, in microseconds.
const HOLD_US: u64 = 100;

/// One way to treat the words that nodes share.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// What a row's name says of it, if anything.
    pub name: &'static str,
    /// How long a page that was won is kept at least, in microseconds.
    pub hold_us: u64,
    /// Whether instructions go to pages that stay elsewhere (`ship = "auto"`).
    pub ship: bool,
}

/// What is measured unless told otherwise: pages move, as is the default, and instructions are shipped.
pub const VARIANTS: [Variant; 2] = [
    Variant { name: "", hold_us: HOLD_US, ship: false },
    Variant { name: "shipped", hold_us: HOLD_US, ship: true },
];

/// What the CPUs of a row do.
#[derive(Copy, Clone, Debug)]
struct Task {
    op: &'static str,
    program: Program,
    /// Own work after each operation, in microseconds.
    work_us: u64,
    own: Own,
    /// The most that the ratio should be.
    goal: Option<f64>,
}

/// Where a CPU's own part is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Own {
    /// It has none: what it changes is everybody's.
    Shared,
    /// A line of the shared page.
    Line,
    /// Pages, whose home is node 1.
    Pages(u64),
}

const fn task(op: &'static str, program: Program, work_us: u64, own: Own, goal: Option<f64>) -> Task {
    Task { op, program, work_us, own, goal }
}

/// What several CPUs do at one page.
const CONTENDED: [Task; 12] = [
    task("word, exchanged", Program::Exchange, 0, Own::Shared, Some(3.0)),
    task("word, read and written", Program::Turn, 0, Own::Shared, Some(3.0)),
    task("wake-up", Program::Wake, 0, Own::Shared, None),
    task("ticket lock", Program::Ticket, 0, Own::Shared, None),
    task("MCS lock", Program::Mcs, 0, Own::Pages(1), None),
    task("counter", Program::Count, 0, Own::Shared, None),
    task("counter, 10 us of own work", Program::Count, 10, Own::Shared, None),
    task("counter, 100 us of own work", Program::Count, 100, Own::Shared, None),
    task("counter, 1 ms of own work", Program::Count, 1000, Own::Shared, None),
    task("false sharing", Program::Count, 0, Own::Line, None),
    task("false sharing, 10 us of own work", Program::Count, 10, Own::Line, None),
    task("false sharing, 100 us of own work", Program::Count, 100, Own::Line, None),
];

/// What CPUs do that share nothing; the floor is the same at the memory's home, alone.
const APART: [Task; 2] = [
    task("uncontended word", Program::Count, 0, Own::Pages(1), None),
    task("partitioned pages", Program::Walk, 0, Own::Pages(PAGES), None),
];

/// What a row took besides time, for each operation.
#[derive(Clone, Debug, Serialize)]
pub struct Detail {
    /// The row's operation.
    pub op: String,
    /// The row's transport.
    pub transport: String,
    /// How threads waited.
    pub polling: String,
    /// Operations of all CPUs a second.
    pub per_second: f64,
    /// What the CPU with the fewest operations did, by an equal share.
    pub fewest: f64,
    /// Faults that another node had to answer.
    pub remote_faults: f64,
    /// Instructions carried out for another node.
    pub shipped: f64,
    /// Messages of the coherence protocol.
    pub messages: f64,
    /// Demands that waited because a page was kept.
    pub deferred: f64,
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Over what, waiting how, and how often; of each row the best round counts, ours and the floor's in
    /// turn.
    pub choice: Choice,
    /// On which CPUs.
    pub cpus: Vec<usize>,
    /// How what is shared is treated.
    pub variants: Vec<Variant>,
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Times and floors.
    pub rows: Vec<Row>,
    /// What the rows took besides.
    pub details: Vec<Detail>,
    /// What was not measured, and why.
    pub left_out: Vec<String>,
}

impl Measured {
    fn note(&mut self, row: Row, detail: Detail) {
        let same =
            |old: &Row| old.op == row.op && old.transport == row.transport && old.polling == row.polling;
        match self.rows.iter().position(same) {
            Some(at) if self.rows[at].ours_us <= row.ours_us => {}
            Some(at) => (self.rows[at], self.details[at]) = (row, detail),
            None => {
                self.rows.push(row);
                self.details.push(detail);
            }
        }
    }
}

impl Plan {
    /// Measures. `progress` hears of each cell.
    ///
    /// # Errors
    /// What a node says.
    pub fn run(&self, progress: &mut dyn FnMut(&str)) -> Result<Measured> {
        let mut measured = Measured::default();
        for &net in &self.choice.nets {
            for &polling in &self.choice.pollings {
                for nodes in [2, 4] {
                    if polling == Polling::Busy && self.cpus.len() < 2 * nodes {
                        measured.left_out.push(format!(
                            "{}, busy, {nodes} nodes on {} CPUs: a thread that polls needs one, and so does a CPU that waits",
                            net.name(),
                            self.cpus.len()
                        ));
                        continue;
                    }
                    if self.cpus.len() < nodes {
                        measured.left_out.push(format!(
                            "{}, {nodes} nodes on {} CPUs: what shares nothing",
                            net.name(),
                            self.cpus.len()
                        ));
                    }
                    for round in 1..=self.choice.rounds {
                        let (name, of) = (net.name(), self.choice.rounds);
                        progress(&format!(
                            "{name}, {}, {nodes} nodes, round {round} of {of}",
                            polling.name()
                        ));
                        let kind = Kind {
                            side: Side::Ours,
                            net,
                            polling,
                            nodes,
                            hold_us: HOLD_US,
                            ship: false,
                            copies: None,
                        };
                        self.round(kind, &mut measured)?;
                    }
                }
            }
        }
        Ok(measured)
    }

    fn round(&self, kind: Kind, measured: &mut Measured) -> Result<()> {
        let round_trip = {
            let mut cell = Cell::start(Kind { side: Side::Floor, nodes: 2, ..kind }, &self.cpus)?;
            match cell.tell(0, Command::RoundTrips(ROUND_TRIPS))? {
                Reply::Times(times) => times.median_us,
                other => bail!("a node answered {other:?} instead of times"),
            }
        };
        for variant in &self.variants {
            let mut cell =
                Cell::start(Kind { hold_us: variant.hold_us, ship: variant.ship, ..kind }, &self.cpus)?;
            let all: Vec<usize> = (0..kind.nodes).collect();
            for task in &CONTENDED {
                let done = run(&mut cell, task, &all)?;
                let each_us = RUN_US as f64 / done.operations();
                measured
                    .note(row(task, variant, kind, each_us, round_trip), done.detail(task, variant, kind));
            }
            // CPUs that do not wait would only take turns.
            for task in APART.iter().filter(|_| kind.nodes <= self.cpus.len()) {
                let alone = run(&mut cell, task, &[1])?;
                let done = run(&mut cell, task, &all)?;
                // The time of each CPU, since they do not wait for each other.
                let [alone_us, each_us] = [(&alone, 1), (&done, kind.nodes)]
                    .map(|(done, cpus)| (cpus as u64 * RUN_US) as f64 / done.operations());
                measured.note(row(task, variant, kind, each_us, alone_us), done.detail(task, variant, kind));
            }
        }
        Ok(())
    }
}

/// What the CPUs of a row did.
struct Done {
    counts: Vec<u64>,
    remote_faults: u64,
    shipped: u64,
    messages: u64,
    deferred: u64,
}

impl Done {
    fn operations(&self) -> f64 {
        self.counts.iter().sum::<u64>().max(1) as f64
    }

    fn detail(&self, task: &Task, variant: &Variant, kind: Kind) -> Detail {
        let each = |count: u64| count as f64 / self.operations();
        let fewest = self.counts.iter().min().copied().unwrap_or(0);
        Detail {
            op: name(task, variant, kind),
            transport: kind.net.name().into(),
            polling: kind.polling.name().into(),
            per_second: self.operations() * 1e6 / RUN_US as f64,
            fewest: each(fewest) * self.counts.len() as f64,
            remote_faults: each(self.remote_faults),
            shipped: each(self.shipped),
            messages: each(self.messages),
            deferred: each(self.deferred),
        }
    }
}

/// Has the vCPUs of `nodes` do a task, on fresh pages.
fn run(cell: &mut Cell, task: &Task, nodes: &[usize]) -> Result<Done> {
    let address = |page: u64| page * coherence::page::PAGE_SIZE as u64;
    cell.tell(0, Command::Code(task.program))?;
    let shared = address(cell.fresh(1)?.first);
    let mut jobs = Vec::new();
    for (i, &node) in nodes.iter().enumerate() {
        let own = match task.own {
            Own::Shared => shared,
            Own::Line => shared + 64 * i as u64,
            Own::Pages(count) => address(cell.fresh(count)?.first),
        };
        jobs.push(Job {
            shared,
            own,
            // Behind the page tables and the code, at node 0.
            count: address(Cell::own_page(node) + 64),
            turns: [node as u16, nodes[(i + 1) % nodes.len()] as u16],
            run_us: RUN_US,
            work_us: task.work_us,
        });
    }
    let counters = |cell: &mut Cell| -> Result<[u64; 4]> {
        let mut sums = [0; 4];
        for &node in nodes {
            let Reply::Counters(counters) = cell.tell(node, Command::Counters)? else {
                bail!("a node did not answer with its counters");
            };
            for (name, count) in counters {
                match name.as_str() {
                    "remote_read_faults" | "remote_write_faults" => sums[0] += count,
                    "messages_sent" => sums[1] += count,
                    "deferred" => sums[2] += count,
                    "operations_done" => sums[3] += count,
                    _ => {}
                }
            }
        }
        Ok(sums)
    };
    let before = counters(cell)?;
    let replies = match (nodes, &jobs[..]) {
        (&[node], &[job]) => vec![cell.tell(node, Command::Run(job))?],
        _ => cell.tell_all(&jobs.into_iter().map(Command::Run).collect::<Vec<_>>())?,
    };
    let after = counters(cell)?;
    let counts = replies.into_iter().map(|reply| match reply {
        Reply::Count(count) => Ok(count),
        other => bail!("a node answered {other:?} instead of its count"),
    });
    let [remote_faults, messages, deferred, shipped] = [0, 1, 2, 3].map(|i| after[i] - before[i]);
    Ok(Done { counts: counts.collect::<Result<_>>()?, remote_faults, shipped, messages, deferred })
}

fn name(task: &Task, variant: &Variant, kind: Kind) -> String {
    let variant = if variant.name.is_empty() { String::new() } else { format!(", {}", variant.name) };
    format!("{}, {} nodes{variant}", task.op, kind.nodes)
}

fn row(task: &Task, variant: &Variant, kind: Kind, ours_us: f64, floor_us: f64) -> Row {
    Row {
        op: name(task, variant, kind),
        transport: kind.net.name().into(),
        polling: kind.polling.name().into(),
        ours_us,
        floor_us,
        ratio: ours_us / floor_us,
        goal: task.goal,
        ours_p99_us: None,
    }
}

/// The details as a table.
pub fn table(details: &[Detail]) -> String {
    let mut text = format!(
        "{:52} {:10} {:>12} {:>7} {:>9} {:>9} {:>9} {:>9}\n",
        "operation", "transport", "a second", "fewest", "faults", "shipped", "messages", "deferred"
    );
    for detail in details {
        text += &format!(
            "{:52} {:10} {:12.0} {:7.2} {:9.3} {:9.3} {:9.3} {:9.3}\n",
            detail.op,
            detail.transport,
            detail.per_second,
            detail.fewest,
            detail.remote_faults,
            detail.shipped,
            detail.messages,
            detail.deferred
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::Net;

    #[test]
    fn the_best_round_of_a_row_counts_with_its_detail() {
        let kind = Kind {
            side: Side::Ours,
            net: Net::Tcp,
            polling: Polling::Blocking,
            nodes: 2,
            hold_us: 0,
            ship: false,
            copies: None,
        };
        let mut measured = Measured::default();
        for operations in [100, 300, 200] {
            let done = Done {
                counts: vec![operations, 3 * operations],
                remote_faults: 800,
                shipped: 0,
                messages: 0,
                deferred: 0,
            };
            let row = row(&CONTENDED[0], &VARIANTS[0], kind, RUN_US as f64 / done.operations(), 50.0);
            measured.note(row, done.detail(&CONTENDED[0], &VARIANTS[0], kind));
        }
        assert_eq!((measured.rows.len(), measured.details.len()), (1, 1));
        assert_eq!((measured.rows[0].ours_us, measured.rows[0].ratio), (250.0, 5.0));
        assert_eq!((measured.details[0].fewest, measured.details[0].remote_faults), (0.5, 2.0 / 3.0));
        assert!(measured.rows[0].misses_goal());
    }
}
