//! `cargo xtask simulate`: the coherence protocol at many nodes in virtual time ([`coherence::simulator`]).

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use coherence::node_set::MAX_NODES;
use coherence::protocol::Eviction;
use coherence::simulator::{self, Config};

/// Flags of the task.
#[derive(Args)]
pub struct Simulate {
    /// Nodes, up to 512; every eighth has no CPUs
    #[arg(long, default_value_t = 64)]
    nodes: usize,
    /// Accesses to memory
    #[arg(long, default_value_t = 1_000_000)]
    ops: u64,
    /// The run: one seed always gives the same
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs, with seeds that follow each other; ends with the first that fails
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// CPUs of each node
    #[arg(long, default_value_t = 4)]
    cpus: usize,
    /// Pages of each node
    #[arg(long, default_value_t = 512)]
    pages_per_node: u64,
    /// Copies of other nodes' pages for which a node has memory
    #[arg(long, default_value_t = 64)]
    copies: usize,
    /// Evict copies at random, to compare with the clock
    #[arg(long)]
    random_eviction: bool,
    /// Writes among a thousand accesses
    #[arg(long, default_value_t = 300)]
    writes: u16,
    /// Accesses to the node's own memory among a thousand
    #[arg(long, default_value_t = 500)]
    locality: u16,
}

impl Simulate {
    /// Does the task.
    ///
    /// # Errors
    /// What broke, and how it came to that; or flags that make no machine.
    pub fn run(&self) -> Result<()> {
        ensure!((1..=MAX_NODES).contains(&self.nodes), "--nodes must be from 1 to {MAX_NODES}");
        ensure!(
            self.cpus > 0 && self.pages_per_node > 0 && self.copies > 0,
            "--cpus, --pages-per-node and --copies must be at least 1"
        );
        ensure!(self.writes <= 1000 && self.locality <= 1000, "--writes and --locality are out of 1000");
        for seed in (self.seed..).take(self.runs as usize) {
            let config = Config {
                cpus: self.cpus,
                pages_per_node: self.pages_per_node,
                copies: self.copies,
                eviction: if self.random_eviction { Eviction::Random(seed) } else { Eviction::Clock },
                writes: self.writes,
                locality: self.locality,
                ..Config::new(self.nodes, self.ops, seed)
            };
            println!("seed {seed}: {} nodes, {} accesses", self.nodes, self.ops);
            let begin = Instant::now();
            let report = simulator::run(&config)?;
            let seconds = begin.elapsed().as_secs_f64();
            println!("{report}");
            println!("{seconds:.1} s, {:.0} accesses a second", report.ops as f64 / seconds);
        }
        Ok(())
    }
}
