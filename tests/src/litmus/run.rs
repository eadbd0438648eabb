//! Iterations of a test, and its outcomes counted.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use std::ops::Range;

use anyhow::{Result, ensure};
use coherence::page::PAGE_SIZE;
use kvm_bindings::kvm_regs;
use vmm::kvm::HostCpu;

use super::catalogue::{Litmus, Outcome, Var, Variant};
use super::code;
use super::guest::{Machine, NODE_PAGES};

/// Iterations of one batch: a thread's results then fill two pages.
const BATCH: usize = 2048;
/// First page of the variables.
const VARIABLES: usize = 16;

/// Where the threads run, and where the variables are.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Each thread on a node of its own, instead of all on one.
    pub nodes: bool,
    /// `x` and `y` on different pages, instead of different lines of one.
    pub pages: bool,
    /// The variable whose pages are delegated, if one's are: nodes that do not own them ship what they do with
    /// it. Only where both are on pages of their own, and nodes too.
    pub delegated: Option<Var>,
}

impl Placement {
    /// All there are.
    pub const ALL: [Placement; 6] = [
        Placement { nodes: false, pages: false, delegated: None },
        Placement { nodes: false, pages: true, delegated: None },
        Placement { nodes: true, pages: false, delegated: None },
        Placement { nodes: true, pages: true, delegated: None },
        Placement { nodes: true, pages: true, delegated: Some(Var::X) },
        Placement { nodes: true, pages: true, delegated: Some(Var::Y) },
    ];

    /// As reports call it.
    pub fn title(self) -> String {
        let nodes = if self.nodes { "a node each" } else { "one node" };
        let pages = if self.pages { "two pages" } else { "one page" };
        let delegated = match self.delegated {
            None => "",
            Some(Var::X) => ", x delegated",
            Some(Var::Y) => ", y delegated",
        };
        format!("{nodes}, {pages}{delegated}")
    }

    /// The pages that are delegated.
    fn delegated_pages(self, nodes: usize) -> Range<u64> {
        let (to_y, step) = self.layout(nodes);
        let first = VARIABLES * PAGE_SIZE;
        let bytes = match self.delegated {
            None => 0..0,
            Some(Var::X) => first..first + BATCH * step,
            Some(Var::Y) => first + to_y..first + to_y + BATCH * step,
        };
        (bytes.start / PAGE_SIZE) as u64..(bytes.end / PAGE_SIZE) as u64
    }

    /// Bytes from the first `x` to the first `y`, and from one iteration's variables to the next's.
    fn layout(self, nodes: usize) -> (usize, usize) {
        match (self.pages, nodes) {
            (false, _) => (64, 128),
            (true, 1) => (BATCH * 64, 64),
            // At the same place of node 1's memory.
            (true, _) => (NODE_PAGES as usize * PAGE_SIZE, 64),
        }
    }
}

/// How often each outcome was seen.
pub type Counts = BTreeMap<Outcome, u64>;

/// Runs `iterations` iterations, rounded up to whole batches.
///
/// # Errors
/// The machine failed.
pub fn outcomes(
    host: &HostCpu,
    test: &Litmus,
    variant: Variant,
    placement: Placement,
    iterations: usize,
) -> Result<Counts> {
    let threads = test.threads.len();
    let nodes: Vec<usize> = (0..threads).map(|thread| if placement.nodes { thread } else { 0 }).collect();
    // Nothing is kept longer than needed: what is wanted here is that pages change hands.
    let delegated = placement.delegated_pages(if placement.nodes { threads } else { 1 });
    let machine = Machine::with_delegated(host, &nodes, Duration::ZERO, delegated)?;
    let mut counts = Counts::new();
    for batch in 0..iterations.div_ceil(BATCH) {
        let pauses = placement.nodes && batch % 4 != 0;
        let code = |accesses: &&[_]| code::thread(accesses, variant, pauses);
        machine.load(&test.threads.iter().map(code).collect::<Vec<_>>());
        one_batch(host, &machine, placement, threads, batch, &mut counts)?;
    }
    let shipped: u64 = machine.engines().totals().iter().map(|totals| totals.operations_done).sum();
    let uses =
        |var| test.threads.iter().flat_map(|accesses| accesses.iter()).any(|access| access.var() == var);
    ensure!(placement.delegated.is_none_or(|var| shipped > 0 || !uses(var)), "nothing was shipped");
    Ok(counts)
}

fn one_batch(
    host: &HostCpu,
    machine: &Machine,
    placement: Placement,
    threads: usize,
    batch: usize,
    counts: &mut Counts,
) -> Result<()> {
    let engines = machine.engines();
    let nodes = if placement.nodes { threads } else { 1 };
    let (to_y, step) = placement.layout(nodes);
    let first = VARIABLES * PAGE_SIZE;
    let variables = move |i: usize| [first + i * step, first + to_y + i * step];
    // Another node begins with the pages each time, now alone and now with copies everywhere.
    for i in 0..BATCH {
        variables(i).into_iter().for_each(|offset| engines.word(batch % nodes, offset).store(0, Relaxed));
    }
    for node in (0..nodes).filter(|_| batch / nodes % 2 == 1) {
        (0..BATCH).for_each(|i| _ = variables(i).map(|offset| engines.word(node, offset).load(Relaxed)));
    }
    let ticks = |ns: u64| ns * u64::from(host.tsc_khz) / 1_000_000;
    // Time enough for a page to come and go; and delays up to half of it.
    let period = ticks(match (placement.nodes, placement.delegated) {
        (false, _) => 600,
        (true, None) => 40_000,
        (true, Some(_)) => 100_000,
    });
    let delay = if placement.nodes { period } else { period / 4 };
    let begin = base::trace::now() + ticks(300_000);
    let registers: Vec<kvm_regs> = (0..threads)
        .map(|thread| kvm_regs {
            rsi: variables(0)[0] as u64,
            rdi: variables(0)[1] as u64,
            rbx: machine.results(thread) as u64,
            rcx: u64::from(delay.max(2).leading_zeros()) + 1,
            r11: step as u64,
            r12: BATCH as u64,
            r13: begin,
            r14: period,
            r15: ((batch * 8 + thread) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            ..Default::default()
        })
        .collect();
    machine.run(&registers)?;
    for i in 0..BATCH {
        let mut outcome = Outcome::default();
        for (thread, loads) in outcome.loads.iter_mut().enumerate().take(threads) {
            let node = if placement.nodes { thread } else { 0 };
            // Two results share a word of this process's accesses.
            let word = engines.word(node, machine.results(thread) + i / 2 * 8).load(Relaxed);
            let result = (word >> (i % 2 * 32)) as u16;
            *loads = result.to_le_bytes();
        }
        outcome.last = variables(i).map(|offset| engines.word(batch % nodes, offset).load(Relaxed) as u8);
        *counts.entry(outcome).or_default() += 1;
    }
    Ok(())
}
