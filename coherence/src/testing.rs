//! Engines of several nodes in one process, each with memory and userfaultfds of its own, for tests and
//! benches of this and other crates. There is no guest: threads that touch a node's guest view stand for its
//! vCPUs.
//!
//! A [`Builder`] says how the engines run, a [`Cluster`] has them until it is dropped. All of this is there
//! only with the feature `testing`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use fabric::{NodeId, Transport, sim};

use crate::engine::{Engine, EngineConfig, EngineError};
use crate::memory::DualMemory;
use crate::page::{Homes, PAGE_SIZE};
use crate::stats::Totals;
use crate::uffd::Uffd;

/// Whether engines can run on this host; says why not, for a test that is then skipped.
pub fn can_run() -> bool {
    Uffd::open().inspect_err(|why| println!("skipped: {why}")).is_ok()
}

/// A word of a node's memory, at a byte offset that is a multiple of 8, as the node's CPUs see it.
///
/// # Panics
/// There is no such word.
pub fn word(memory: &DualMemory, offset: usize) -> &AtomicU64 {
    assert!(offset.is_multiple_of(8) && offset < memory.len(), "there is no word at {offset:#x}");
    // SAFETY: aligned and inside the guest view, which lives as long as the memory; atomics may alias.
    unsafe { &*memory.guest_view().add(offset).cast::<AtomicU64>() }
}

/// Writes bytes as a node's CPUs do, word by word; what is left of the last word becomes zero.
///
/// # Panics
/// `offset` is no multiple of 8, or the memory ends before.
pub fn write(memory: &DualMemory, offset: usize, bytes: &[u8]) {
    for (i, chunk) in bytes.chunks(8).enumerate() {
        let mut value = [0; 8];
        value[..chunk.len()].copy_from_slice(chunk);
        word(memory, offset + i * 8).store(u64::from_le_bytes(value), SeqCst);
    }
}

/// How the engines of a cluster run: unless told otherwise with one shard each, from lane 0 on, without a
/// budget, and sleeping as soon as they have nothing to do.
pub struct Builder {
    /// The same for all nodes but for `node` and `budget`.
    config: EngineConfig,
    budget: Box<dyn Fn(NodeId) -> Option<u64>>,
    fatal: bool,
}

impl Builder {
    /// A machine with such homes.
    pub fn new(homes: Homes) -> Builder {
        let config = EngineConfig {
            node: NodeId(0),
            homes,
            shards: 1,
            first_lane: 0,
            hold: Duration::from_micros(100),
            spin: Duration::ZERO,
            stuck: Duration::from_secs(20),
            budget: None,
        };
        Builder { config, budget: Box::new(|_| None), fatal: false }
    }

    /// Changes how all engines run; which node one is, and its budget, come from elsewhere.
    pub fn with(mut self, change: impl FnOnce(&mut EngineConfig)) -> Builder {
        change(&mut self.config);
        self
    }

    /// So many bytes may a node hold for the guest.
    pub fn budget(mut self, budget: impl Fn(NodeId) -> Option<u64> + 'static) -> Builder {
        self.budget = Box::new(budget);
        self
    }

    /// A failure ends the process, since threads that wait for the engine's pages would never go on. Else it
    /// is kept for [`Cluster::check`].
    pub fn fatal(mut self) -> Builder {
        self.fatal = true;
        self
    }

    /// All nodes, over the in-process transport.
    ///
    /// # Errors
    /// This host's userfaultfd cannot serve.
    pub fn start(self) -> Result<Cluster, EngineError> {
        let lanes = self.config.first_lane + self.config.shards;
        let transports = sim::cluster(self.config.homes.nodes(), lanes)?;
        self.start_over(transports.into_iter().map(|transport| Arc::new(transport) as _))
    }

    /// The nodes whose transports these are, which need not be all.
    ///
    /// # Errors
    /// This host's userfaultfd cannot serve, or a transport lacks a lane.
    pub fn start_over(
        self,
        transports: impl IntoIterator<Item = Arc<dyn Transport>>,
    ) -> Result<Cluster, EngineError> {
        let mut cluster = Cluster { nodes: Vec::new(), failures: Arc::default() };
        for transport in transports {
            let pages = self.config.homes.pages();
            let memory = DualMemory::new(pages)
                .map_err(|error| EngineError::Setup(format!("no memory of {pages} pages: {error}")))?;
            let (memory, node) = (Arc::new(memory), transport.node());
            let config = EngineConfig { node, budget: (self.budget)(node), ..self.config.clone() };
            let (failures, fatal) = (cluster.failures.clone(), self.fatal);
            let on_failure = Arc::new(move |error| failures.note(&error, fatal));
            let engine = Arc::new(Engine::start(config, memory.clone(), transport, on_failure)?);
            cluster.nodes.push(Node { engine, memory });
        }
        Ok(cluster)
    }
}

struct Node {
    engine: Arc<Engine>,
    memory: Arc<DualMemory>,
}

/// Why engines have ended.
#[derive(Default)]
struct Failures {
    all: Mutex<Vec<String>>,
    more: Condvar,
    /// Set when the machine ends: each engine's end is then a loss to the others.
    ending: AtomicBool,
}

impl Failures {
    fn note(&self, error: &EngineError, fatal: bool) {
        if self.ending.load(SeqCst) {
            return;
        }
        if fatal {
            eprintln!("an engine failed: {error}");
            std::process::abort();
        }
        base::lock(&self.all).push(error.to_string());
        self.more.notify_all();
    }
}

/// Engines have failed.
#[derive(Debug, thiserror::Error)]
#[error("the engine failed: {0}")]
pub struct Failed(String);

/// The nodes of one machine, numbered as they were started; they end when this is dropped.
pub struct Cluster {
    nodes: Vec<Node>,
    failures: Arc<Failures>,
}

impl Cluster {
    /// A node's memory.
    pub fn memory(&self, node: usize) -> &Arc<DualMemory> {
        &self.nodes[node].memory
    }

    /// A node's engine.
    pub fn engine(&self, node: usize) -> &Arc<Engine> {
        &self.nodes[node].engine
    }

    /// A word of guest memory, at a byte offset that is a multiple of 8, as a node's CPUs see it.
    pub fn word(&self, node: usize, offset: usize) -> &AtomicU64 {
        word(self.memory(node), offset)
    }

    /// A word of a page, by its number there.
    pub fn word_of(&self, node: usize, page: u64, index: usize) -> &AtomicU64 {
        self.word(node, page as usize * PAGE_SIZE + index * 8)
    }

    /// Each node's counters.
    pub fn totals(&self) -> Vec<Totals> {
        self.nodes.iter().map(|node| node.engine.totals()).collect()
    }

    /// What is under way, a line each. Waits for a node at most `limit`.
    pub fn describe(&self, limit: Duration) -> Vec<String> {
        self.nodes.iter().flat_map(|node| node.engine.describe(limit)).collect()
    }

    /// Whether all engines still run.
    ///
    /// # Errors
    /// Why some do not.
    pub fn check(&self) -> Result<(), Failed> {
        let failures = base::lock(&self.failures.all);
        if failures.is_empty() { Ok(()) } else { Err(Failed(failures.join("; "))) }
    }

    /// Waits at most `limit` until an engine fails; why the first did.
    pub fn failure(&self, limit: Duration) -> Option<String> {
        let failures = base::lock(&self.failures.all);
        let waited = self.failures.more.wait_timeout_while(failures, limit, |failures| failures.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.first().cloned()
    }

    /// The last node is lost. That is no failure, and nothing is from then on.
    pub fn lose_last(&mut self) {
        self.failures.ending.store(true, SeqCst);
        self.nodes.pop();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.failures.ending.store(true, SeqCst);
    }
}
