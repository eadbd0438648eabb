//! The report of a simulation, whether it ended well or badly.

use std::fmt;

use super::Config;
use crate::cluster::{Broken, Step};
use crate::page::Page;
use crate::protocol::Kind;

/// What was done and checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Accesses done, each compared with the last write.
    pub ops: u64,
    /// Of these, without waiting.
    pub hits: u64,
    /// Of the others, those whose page was here and only not mapped.
    pub soft: u64,
    /// Everything that happened: accesses, messages, releases, evictions.
    pub steps: u64,
    /// Messages, by [`Kind::code`].
    pub messages: [u64; Kind::CODES],
    /// Demands that waited for a held page.
    pub deferred: u64,
    /// Pages that were unmapped to see whether they are used.
    pub probes: u64,
    /// Pages that were discarded.
    pub discarded: u64,
    /// Pages that devices read or overwrote where they were.
    pub direct: u64,
    /// Pages that they could not, because something was under way on them.
    pub not_direct: u64,
    /// Operations among the accesses.
    pub operations: u64,
    /// Of these, those that were carried out where the page was.
    pub shipped: u64,
    /// How often one was refused because something was under way on the page, or it was not delegated any
    /// more.
    pub refused: u64,
    /// How often a CPU that was called out wanted the page after all.
    pub moved: u64,
    /// Pages that were given up to make room.
    pub evictions: u64,
    /// How often nothing was under way and the whole directory was compared with the nodes.
    pub rests: u64,
    /// Virtual nanoseconds.
    pub time: u64,
    /// Half of the accesses that waited did so for less than this, in virtual nanoseconds.
    pub wait_p50: u64,
    /// All but one in a hundred.
    pub wait_p99: u64,
    /// All of them.
    pub wait_max: u64,
    /// A fingerprint of all that happened: two runs of one seed are equal in this.
    pub fingerprint: u64,
}

impl Report {
    /// Messages of all kinds.
    pub fn messages(&self) -> u64 {
        self.messages.iter().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |n: u64, all: u64| n as f64 / all.max(1) as f64;
        let misses = self.ops - self.hits - self.soft;
        writeln!(
            f,
            "{} accesses: {:.1} % hits, {:.1} % remapped, {:.1} % misses; {} steps in {:.3} s of virtual time",
            self.ops,
            100.0 * of(self.hits, self.ops),
            100.0 * of(self.soft, self.ops),
            100.0 * of(misses, self.ops),
            self.steps,
            self.time as f64 / 1e9
        )?;
        writeln!(f, "{:<18} {:>10} {:>12} {:>12}", "messages", "count", "per access", "per miss")?;
        for (code, &count) in self.messages.iter().enumerate().filter(|(_, count)| **count > 0) {
            let (per_op, per_miss) = (of(count, self.ops), of(count, misses));
            writeln!(f, "{:<18} {count:>10} {per_op:>12.4} {per_miss:>12.4}", Kind::name_of(code as u8))?;
        }
        let all = self.messages();
        let (per_op, per_miss) = (of(all, self.ops), of(all, misses));
        writeln!(f, "{:<18} {all:>10} {per_op:>12.4} {per_miss:>12.4}", "all")?;
        writeln!(
            f,
            "{} demands waited for a held page; {} copies were evicted, {} probed; {} pages were discarded; devices \
             used {} pages where they were and {} not",
            self.deferred, self.evictions, self.probes, self.discarded, self.direct, self.not_direct
        )?;
        writeln!(
            f,
            "{} operations: {} shipped; {} times refused, {} times the page moved after all",
            self.operations, self.shipped, self.refused, self.moved
        )?;
        let us = |ns: u64| ns as f64 / 1e3;
        writeln!(
            f,
            "waits: p50 {:.1} us, p99 {:.1} us, longest {:.1} us",
            us(self.wait_p50),
            us(self.wait_p99),
            us(self.wait_max)
        )?;
        write!(
            f,
            "checked: {} accesses against the last write, a single writer at every mapping, every answer true \
             when given, {} times the whole directory, no access unanswered; fingerprint {:016x}",
            self.ops, self.rests, self.fingerprint
        )
    }
}

/// A step that led to a failure.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Counted from 0.
    pub number: u64,
    /// What was done.
    pub step: Step,
    /// To which page.
    pub page: Option<Page>,
    /// What a delivery brought.
    pub message: Option<Kind>,
}

/// What broke, and how it came to that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The run: the same again breaks again.
    pub config: Config,
    /// The step that broke it, counted from 0.
    pub step: u64,
    /// When, in virtual nanoseconds.
    pub time: u64,
    /// What broke.
    pub broken: Broken,
    /// The last steps on the page that it is about, with their numbers.
    pub history: Vec<Told>,
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seed, time) = (self.config.seed, self.time as f64 / 1e3);
        writeln!(f, "seed {seed}, step {}, at {time:.3} us: {}", self.step, self.broken)?;
        for Told { number, step, message, .. } in &self.history {
            match message {
                Some(kind) => writeln!(f, "  step {number}: {step:?} {kind:?}")?,
                None => writeln!(f, "  step {number}: {step:?}")?,
            }
        }
        write!(f, "the same flags and --seed {seed} break it again")
    }
}
