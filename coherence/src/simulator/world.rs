//! The simulated world: events in the order of virtual time, and the steps of the cluster that follow from
//! them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use hdrhistogram::Histogram;

use super::Config;
use super::random::Random;
use super::report::{Failure, Report, Told};
use super::workload::{Access, Workload};
use crate::cluster::{Broken, Cluster, Seen, Step};
use crate::page::{Homes, Page};
use crate::protocol::{Class, Kind, Rights, RunPolicy};

/// Steps that are remembered, to say how a failure came about.
const HISTORY: usize = 1 << 16;

/// Of these, steps on the page that a failure is about, to print.
const TOLD: usize = 60;

/// How much longer a slow node's messages take.
const SLOW: u64 = 20;

/// Something planned.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A CPU does its next access.
    Cpu { node: usize, cpu: usize },
    /// The oldest message of a lane arrives.
    Deliver { from: fabric::NodeId, to: fabric::NodeId },
    /// A hold ends.
    Release { node: usize, page: Page },
    /// A CPU that was called out of its wait has looked at its instruction.
    Decide { node: usize, cpu: usize },
}

/// A CPU's access that waits.
struct Wait {
    cpu: usize,
    page: Page,
    write: bool,
    since: u64,
}

/// An operation of a CPU that waits.
#[derive(Copy, Clone, Default)]
struct Operating {
    since: u64,
    refusals: u32,
}

/// Refusals after which a CPU wants the page.
const REFUSALS: u32 = 3;

/// A simulation under way.
pub(super) struct World {
    config: Config,
    pub(super) cluster: Cluster,
    workload: Workload,
    random: Random,
    now: u64,
    planned: BinaryHeap<Reverse<(u64, u64, Event)>>,
    /// Orders events of one time by when they were planned.
    plans: u64,
    /// By sender and receiver: when the last message arrives; none arrives before it.
    lanes: Vec<u64>,
    slow: Vec<bool>,
    /// By node and CPU.
    next: Vec<Access>,
    /// By node.
    waits: Vec<Vec<Wait>>,
    /// By node and CPU.
    operating: Vec<Operating>,
    /// CPUs whose next access waits until the rest is over.
    paused: Vec<(usize, usize)>,
    resting: bool,
    latency: Histogram<u64>,
    history: VecDeque<Told>,
    seen: Vec<Seen>,
    report: Report,
}

impl World {
    pub(super) fn new(config: &Config) -> World {
        let mut random = Random::new(config.seed);
        let homes = Homes::new((0..config.nodes).map(|_| config.pages_per_node));
        let workload = Workload::new(config, &homes, &mut random);
        let nodes = config.nodes;
        let idle = Access { page: Page(0), write: false, operates: false, think: 0 };
        World {
            config: config.clone(),
            cluster: Cluster::with_homes(homes, RunPolicy::default())
                .with_budget(config.copies, config.eviction)
                .with_shipping(config.shipping),
            workload,
            now: 0,
            planned: BinaryHeap::new(),
            plans: 0,
            lanes: vec![0; nodes * nodes],
            slow: (0..nodes).map(|_| random.per_mille(config.slow_nodes)).collect(),
            next: vec![idle; nodes * config.cpus],
            waits: (0..nodes).map(|_| Vec::new()).collect(),
            operating: vec![Operating::default(); nodes * config.cpus],
            paused: Vec::new(),
            resting: false,
            latency: Histogram::new_with_bounds(1, config.patience.max(2), 3)
                .expect("the bounds are in order"),
            history: VecDeque::with_capacity(HISTORY),
            seen: Vec::new(),
            report: Report::default(),
            random,
        }
    }

    pub(super) fn run(mut self) -> Result<Report, Box<Failure>> {
        for node in 0..self.config.nodes {
            // Every eighth node is memory only.
            let cpus = if node % 8 == 7 { 0 } else { self.config.cpus };
            (0..cpus).for_each(|cpu| self.think(node, cpu));
        }
        for part in 1..=self.config.rests {
            let until = self.config.ops * part / self.config.rests;
            self.work(until)?;
            self.rest()?;
        }
        self.report.time = self.now;
        self.report.wait_p50 = self.latency.value_at_quantile(0.5);
        self.report.wait_p99 = self.latency.value_at_quantile(0.99);
        self.report.wait_max = self.latency.max();
        Ok(self.report)
    }

    /// Goes on until so many accesses are done.
    fn work(&mut self, until: u64) -> Result<(), Box<Failure>> {
        self.resting = false;
        for (node, cpu) in std::mem::take(&mut self.paused) {
            self.think(node, cpu);
        }
        while self.report.ops < until && self.happen()? {}
        Ok(())
    }

    /// Lets what is under way come to its end, and compares the directory with the nodes.
    fn rest(&mut self) -> Result<(), Box<Failure>> {
        self.resting = true;
        while self.happen()? {}
        self.report.rests += 1;
        self.cluster.check_rest().map_err(|broken| self.failure(broken))
    }

    /// The next event; false if there is none.
    fn happen(&mut self) -> Result<bool, Box<Failure>> {
        let Some(Reverse((time, _, event))) = self.planned.pop() else { return Ok(false) };
        self.now = time;
        self.cluster.set_time(time / 1000);
        match event {
            Event::Cpu { node, cpu } if self.resting => self.paused.push((node, cpu)),
            Event::Cpu { node, cpu } => self.access(node, cpu)?,
            Event::Deliver { from, to } => self.step(Step::Deliver { from, to }, None)?,
            Event::Release { node, page } => self.step(Step::Release { node, page }, Some(page))?,
            Event::Decide { node, cpu } => self.decide(node, cpu)?,
        }
        Ok(true)
    }

    fn access(&mut self, node: usize, cpu: usize) -> Result<(), Box<Failure>> {
        let Access { page, write, operates, .. } = self.next[node * self.config.cpus + cpu];
        let need = if write { Rights::Exclusive } else { Rights::Shared };
        if self.cluster.mapped(node, page) >= need {
            self.report.hits += 1;
        } else if self.cluster.node(node).rights(page) >= need {
            self.report.soft += 1;
        }
        if operates {
            self.operating[node * self.config.cpus + cpu] = Operating { since: self.now, refusals: 0 };
            let cpu = cpu as u32;
            self.step(Step::Operate { node, cpu, page, write }, Some(page))?;
        } else {
            self.waits[node].push(Wait { cpu, page, write, since: self.now });
            self.step(Step::Access { node, page, write }, Some(page))?;
        }
        if self.random.per_mille(self.config.prefetches) {
            let page = self.workload.popular(&mut self.random);
            let write = self.random.per_mille(self.config.writes);
            self.step(Step::Prefetch { node, page, write }, Some(page))?;
        }
        if self.random.per_mille(self.config.evictions) {
            self.evict(node)?;
        }
        if self.random.per_mille(self.config.discards) {
            let page = self.workload.popular(&mut self.random);
            self.step(Step::Discard { node, page }, Some(page))?;
        }
        if self.random.per_mille(self.config.directs) {
            let page = self.workload.popular(&mut self.random);
            let step = match self.random.per_mille(self.config.writes) {
                true => Step::Store { node, page },
                false => Step::Load { node, page },
            };
            self.step(step, Some(page))?;
        }
        if self.random.per_mille(self.config.classes) {
            let page = self.workload.popular(&mut self.random);
            let classes = [Class::Moving, Class::Delegated, Class::Pushed];
            let class = classes[self.random.below(3) as usize];
            self.step(Step::Class { page, class }, Some(page))?;
        }
        Ok(())
    }

    /// A CPU that was called out ships, if it can and that is of use.
    fn decide(&mut self, node: usize, cpu: usize) -> Result<(), Box<Failure>> {
        let at = node * self.config.cpus + cpu;
        let page = self.next[at].page;
        let moves = self.operating[at].refusals >= REFUSALS || self.random.per_mille(self.config.unshippable);
        let cpu = cpu as u32;
        self.report.moved += u64::from(moves);
        let step = if moves { Step::Move { node, cpu } } else { Step::Ship { node, cpu } };
        self.step(step, Some(page))
    }

    /// Evicts a popular page, if one is found that is here.
    fn evict(&mut self, node: usize) -> Result<(), Box<Failure>> {
        let here = |page: &Page| self.cluster.mapped(node, *page) != Rights::None;
        let found = (0..64).map(|_| self.workload.popular(&mut self.random)).find(here);
        match found {
            Some(page) => self.step(Step::Evict { node, page }, Some(page)),
            None => Ok(()),
        }
    }

    fn step(&mut self, step: Step, page: Option<Page>) -> Result<(), Box<Failure>> {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        let message = self.cluster.arriving(step);
        let page = page.or(message.map(|message| message.page));
        let told = Told { number: self.report.steps, step, page, message: message.map(|m| m.kind) };
        self.history.push_back(told);
        let mut seen = std::mem::take(&mut self.seen);
        let result = self.cluster.step_seen(step, &mut seen);
        result.map_err(|broken| self.failure(broken))?;
        self.report.steps += 1;
        for &what in &seen {
            self.note(what)?;
        }
        seen.clear();
        self.seen = seen;
        Ok(())
    }

    /// What a step brought about is planned and counted.
    fn note(&mut self, seen: Seen) -> Result<(), Box<Failure>> {
        match seen {
            Seen::Sent { from, to, kind } => {
                self.report.messages[usize::from(kind.code())] += 1;
                self.report.evictions += u64::from(matches!(kind, Kind::PutShared | Kind::PutExclusive));
                let lane = from.index() * self.config.nodes + to.index();
                let time = (self.now + self.delay(from.index(), to.index())).max(self.lanes[lane] + 1);
                self.lanes[lane] = time;
                self.plan(time, Event::Deliver { from, to });
            }
            Seen::Held { node, page } => {
                let hold = self.random.around(self.config.hold);
                self.plan(self.now + hold, Event::Release { node, page });
            }
            Seen::Done { node, page, write } => {
                let mut i = 0;
                while i < self.waits[node].len() {
                    let wait = &self.waits[node][i];
                    if wait.page != page || wait.write != write {
                        i += 1;
                        continue;
                    }
                    let Wait { cpu, since, .. } = self.waits[node].swap_remove(i);
                    self.done(node, cpu, page, since)?;
                }
            }
            Seen::Called { node, cpu } => {
                let time = self.now + self.random.around(self.config.call_out);
                self.plan(time, Event::Decide { node, cpu: cpu as usize });
            }
            Seen::Refused { node, cpu } => {
                self.report.refused += 1;
                self.operating[node * self.config.cpus + cpu as usize].refusals += 1;
            }
            Seen::Operated { node, cpu, page, shipped, .. } => {
                self.report.operations += 1;
                self.report.shipped += u64::from(shipped);
                let since = self.operating[node * self.config.cpus + cpu as usize].since;
                self.done(node, cpu as usize, page, since)?;
            }
            Seen::Deferred { .. } => self.report.deferred += 1,
            Seen::Discarded { .. } => self.report.discarded += 1,
            Seen::Direct { done, .. } => {
                self.report.direct += u64::from(done);
                self.report.not_direct += u64::from(!done);
            }
            Seen::Probed { .. } => self.report.probes += 1,
        }
        Ok(())
    }

    fn done(&mut self, node: usize, cpu: usize, page: Page, since: u64) -> Result<(), Box<Failure>> {
        let waited = self.now - since;
        self.report.ops += 1;
        if waited > 0 {
            self.latency.saturating_record(waited);
        }
        if waited > self.config.patience {
            return Err(self.failure(Broken::Unanswered(node, page)));
        }
        // A fingerprint of the order of all accesses (FNV-1a over words).
        for word in [self.now, page.0 << 32 | (node as u64) << 16 | cpu as u64] {
            self.report.fingerprint = (self.report.fingerprint ^ word).wrapping_mul(0x0100_0000_01b3);
        }
        self.think(node, cpu);
        Ok(())
    }

    /// Plans a CPU's next access.
    fn think(&mut self, node: usize, cpu: usize) {
        let access = self.workload.next(node, cpu, &mut self.random);
        self.next[node * self.config.cpus + cpu] = access;
        self.plan(self.now + 1 + access.think, Event::Cpu { node, cpu });
    }

    fn plan(&mut self, time: u64, event: Event) {
        self.plans += 1;
        self.planned.push(Reverse((time, self.plans, event)));
    }

    /// How long a message takes: a little, a little more, and rarely much more.
    fn delay(&mut self, from: usize, to: usize) -> u64 {
        let delay = self.config.delay / 2 + self.random.around(self.config.delay / 2);
        let spike = if self.random.per_mille(2) { 50 } else { 1 };
        let slow = if self.slow[from] || self.slow[to] { SLOW } else { 1 };
        delay * spike * slow
    }

    fn failure(&self, broken: Broken) -> Box<Failure> {
        let page = broken.page();
        let told = self.history.iter().rev().filter(|told| page.is_none() || told.page == page);
        let mut history: Vec<_> = told.take(TOLD).copied().collect();
        history.reverse();
        Box::new(Failure {
            config: self.config.clone(),
            step: self.report.steps,
            time: self.now,
            broken,
            history,
        })
    }
}
