//! The simulator: the production protocol at hundreds of nodes, in virtual time, reproducible by seed.
//!
//! Every node has a few CPUs that access memory one access at a time; messages take time, in order on a lane
//! and in any order across lanes; some nodes are slow; pages are evicted, prefetched, discarded, and used by
//! devices; operations are shipped to pages whose classes come and go. One seed gives one run, to the last
//! step, on every machine: what breaks breaks again.
//!
//! After every step the [`Cluster`](crate::cluster::Cluster) checks that there is a single writer or many
//! readers, that each access finds the last write and that no correct node is called faulty; here is checked
//! that no access waits without end. Several times in a run the CPUs pause until nothing is under way, and
//! the directory is compared with the nodes.
//!
//! ```text
//! CPU ── access ──> Cluster::step ──> Seen::Sent ──> Deliver, after the lane's delay
//!  ▲                                  Seen::Held ──> Release, after the hold
//!  │                                  Seen::Called ──> Ship or Move, after the call-out
//!  └── think ── Seen::Done <───────────────┘
//! ```

mod random;
mod report;
mod workload;
mod world;

use crate::protocol::{Eviction, Rules, Shipping};

pub use self::random::{Random, Zipf};
pub use self::report::{Failure, Report, Told};
use self::world::World;

/// What is simulated. Times are virtual nanoseconds; chances are out of a thousand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Decides everything that the rest leaves open.
    pub seed: u64,
    /// Nodes, `1..=512`.
    pub nodes: usize,
    /// CPUs of each node; every eighth node has none, memory only.
    pub cpus: usize,
    /// Pages of each node.
    pub pages_per_node: u64,
    /// Accesses to do.
    pub ops: u64,
    /// Accesses that are writes.
    pub writes: u16,
    /// Accesses to the node's own memory; the others go where everybody goes.
    pub locality: u16,
    /// Copies of other nodes' pages for which a node has memory.
    pub copies: usize,
    /// Which of them go when there are too many.
    pub eviction: Eviction,
    /// Accesses after which a node evicts one more.
    pub evictions: u16,
    /// Accesses after which a node prefetches a page.
    pub prefetches: u16,
    /// Accesses after which a node discards a page.
    pub discards: u16,
    /// Accesses after which a device of a node reads or overwrites a page.
    pub directs: u16,
    /// Whether operations are shipped.
    pub shipping: Shipping,
    /// Accesses that are operations of an instruction, which may be shipped.
    pub operations: u16,
    /// Of these, those that turn out not to be shippable when they are looked at.
    pub unshippable: u16,
    /// Accesses after which the class of a page changes.
    pub classes: u16,
    /// How long it takes to call a CPU out of its wait.
    pub call_out: u64,
    /// Nodes whose messages take twenty times as long.
    pub slow_nodes: u16,
    /// How long a message takes, in the mean.
    pub delay: u64,
    /// How long a page that was won is kept.
    pub hold: u64,
    /// How often the CPUs pause and the directory is compared with the nodes; also at the end.
    pub rests: u64,
    /// An access that waits for longer than this is a failure.
    pub patience: u64,
}

/// When pages are delegated, as fast as messages are here.
pub const RULES: Rules = Rules { quick: 200, changes: 6, window: 64, cold: 50_000, most: 256 };

impl Config {
    /// Sensible values for the rest.
    pub fn new(nodes: usize, ops: u64, seed: u64) -> Config {
        Config {
            seed,
            nodes,
            cpus: 4,
            pages_per_node: 512,
            ops,
            writes: 300,
            locality: 500,
            copies: 64,
            eviction: Eviction::Clock,
            evictions: 3,
            prefetches: 10,
            discards: 3,
            directs: 20,
            shipping: Shipping::Auto(RULES),
            operations: 300,
            unshippable: 50,
            classes: 20,
            call_out: 2_000,
            slow_nodes: 30,
            delay: 8_000,
            hold: 20_000,
            rests: 16,
            patience: 10_000_000_000,
        }
    }
}

/// Runs a simulation to its end.
///
/// # Errors
/// What broke, with the steps that led to it.
pub fn run(config: &Config) -> Result<Report, Box<Failure>> {
    World::new(config).run()
}

/// As [`run`], with a mistake built into every node.
///
/// # Errors
/// Hopefully.
#[cfg(test)]
pub(crate) fn run_with(config: &Config, mistake: crate::protocol::Mistake) -> Result<Report, Box<Failure>> {
    let mut world = World::new(config);
    world.cluster = world.cluster.with_mistake(mistake);
    world.run()
}

#[cfg(test)]
mod tests;
