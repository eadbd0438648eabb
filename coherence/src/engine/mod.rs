//! The engine: threads that drive the protocol with the kernel's faults and the peers' messages.
//!
//! One thread a shard. It owns the shard's protocol, userfaultfd and lane, so two faults never share a lock:
//! faults of different shards meet different threads, faults of one shard are batched. Between faults a
//! thread spins for a while, then sleeps on its descriptors. [`chains`] says how long a page that was won is
//! kept; `recall` asks for pages that were needed together before, `ahead` for those that a reader will need
//! next; messages that can leave together do (`outbox`). A node with a `budget` gives copies back;
//! [`Engine::discard`] gives up content that nobody needs; [`Engine::load`] and [`Engine::store`] are for
//! devices, whose buffers are `lent`; [`ship`] is for instructions whose page stays where it is, and asks
//! [`vcpus`] to leave their waits for that.

mod ahead;
mod budget;
pub mod chains;
mod direct;
mod discard;
mod lent;
mod outbox;
mod recall;
mod request;
mod shard;
pub mod ship;
pub mod vcpus;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded, unbounded};
use fabric::{FabricError, LaneId, NodeId, Transport};
use nix::sys::eventfd::{EfdFlags, EventFd};

pub use self::budget::{budget_for, check_budget};
use self::chains::Chains;
pub use self::direct::{Load, Store};
pub use self::discard::DiscardError;
use self::request::Request;
use self::shard::Shard;
use crate::memory::DualMemory;
use crate::page::{Homes, Shards};
use crate::protocol::Violation;
use crate::stats::{ShardStats, Totals};
use crate::uffd::Uffd;

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// This node.
    pub node: NodeId,
    /// Whose pages are whose; the same at every node.
    pub homes: Homes,
    /// Threads that share the pages; the same at every node.
    pub shards: u16,
    /// Lane of shard 0; shard `s` uses `first_lane + s`.
    pub first_lane: LaneId,
    /// How long a page that was just won is kept at least ([`chains`]).
    pub hold: Duration,
    /// How long an idle shard polls before it sleeps.
    pub spin: Duration,
    /// A fault that is not answered for this long ends the machine.
    pub stuck: Duration,
    /// What this node may hold for the guest at most, in bytes: its own memory, copies of the others', and
    /// what it takes to keep them. No limit if there is none. See `engine/budget.rs`.
    pub budget: Option<u64>,
}

/// What ends an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The kernel cannot do what is needed here.
    #[error("{0}")]
    Setup(String),
    /// A peer is gone.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// A peer broke the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// A system call failed that cannot fail unless this program is wrong.
    #[error("{what} of page {page:#x} failed: {source}")]
    Page {
        /// What was being done.
        what: &'static str,
        /// The page's number.
        page: u64,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A system call of the engine's loop failed.
    #[error("the coherence engine could not {what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A shard's thread panicked; standard error says where.
    #[error("a thread of the coherence engine panicked, which is a mistake in this program")]
    Panic,
    /// Something that waits got no answer.
    #[error("{what} got no answer for {seconds} s: {state}")]
    Stuck {
        /// What waits.
        what: &'static str,
        /// How long.
        seconds: u64,
        /// The page's state here.
        state: String,
    },
}

/// Called once by each shard that cannot go on.
pub type OnFailure = Arc<dyn Fn(EngineError) + Send + Sync>;

/// A running engine; dropping it stops its threads. Faults are answered no more then, so vCPUs must have
/// left the guest, or the process must be about to end.
pub struct Engine {
    stats: Vec<Arc<ShardStats>>,
    handles: Vec<ShardHandle>,
    homes: Homes,
    shards: Shards,
    /// Whoever discards pages has this: so nobody asks for a page to be discarded while it is.
    discarding: Mutex<()>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    chains: Arc<Chains>,
    /// Kept open even when a shard has failed: a guest that cannot be served must stand still.
    uffds: Vec<Arc<Uffd>>,
}

/// A shard's thread, as others reach it.
struct ShardHandle {
    requests: Sender<Request>,
    bell: Arc<EventFd>,
}

impl ShardHandle {
    /// Asks something of the shard; whether its thread is still there.
    fn ask(&self, request: Request) -> bool {
        let sent = self.requests.send(request).is_ok();
        if sent {
            self.wake();
        }
        sent
    }

    /// Has the shard look for requests, and whether it is to stop.
    fn wake(&self) {
        // A full eventfd wakes as well.
        let _ = self.bell.write(1);
    }
}

impl Engine {
    /// Watches the guest view of `memory` and starts the shards.
    ///
    /// # Errors
    /// [`EngineError::Setup`] when this host's userfaultfd cannot serve.
    pub fn start(
        config: EngineConfig,
        memory: Arc<DualMemory>,
        transport: Arc<dyn Transport>,
        on_failure: OnFailure,
    ) -> Result<Engine, EngineError> {
        let shards = Shards::new(config.shards, config.homes.pages());
        let stop = Arc::new(AtomicBool::new(false));
        let mut engine = Engine {
            stats: Vec::new(),
            handles: Vec::new(),
            homes: config.homes.clone(),
            shards,
            discarding: Mutex::new(()),
            threads: Vec::new(),
            stop,
            chains: Arc::new(Chains::new(config.hold)),
            uffds: Vec::new(),
        };
        for id in 0..shards.count() {
            let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|e| EngineError::Setup(format!("eventfd: {e}")))?;
            let bell = Arc::new(bell);
            let (requests, inbox) = unbounded();
            let stats = Arc::new(ShardStats::default());
            let shard = Shard::new(
                &config,
                shards,
                id,
                memory.clone(),
                transport.clone(),
                stats.clone(),
                engine.chains.clone(),
            )?;
            let uffd = shard.uffd();
            let (bell2, stop, on_failure) = (bell.clone(), engine.stop.clone(), on_failure.clone());
            let thread = std::thread::Builder::new()
                .name(format!("shard{id}"))
                .spawn(move || {
                    let run = AssertUnwindSafe(|| shard.run(&inbox, &bell2, &stop));
                    if let Err(error) = catch_unwind(run).unwrap_or(Err(EngineError::Panic)) {
                        on_failure(error);
                    }
                })
                .map_err(|e| EngineError::Setup(format!("cannot start a shard's thread: {e}")))?;
            engine.uffds.push(uffd);
            engine.stats.push(stats);
            engine.handles.push(ShardHandle { requests, bell });
            engine.threads.push(thread);
        }
        Ok(engine)
    }

    /// The calling thread's vCPU has nothing to do until somebody wakes it: what was kept for it may go.
    pub fn idle(&self, thread: u32) {
        if self.chains.idle(thread) {
            self.handles.iter().for_each(|shard| _ = shard.ask(Request::Reconsider));
        }
    }

    /// Counters so far.
    pub fn totals(&self) -> Totals {
        Totals::of(self.stats.iter().map(|s| &**s))
    }

    /// What is under way in every shard, a line a page, for the failure dump. Waits at most `limit`; a shard
    /// that does not answer by then is named.
    pub fn describe(&self, limit: Duration) -> Vec<String> {
        let deadline = Instant::now() + limit;
        let mut lines = Vec::new();
        for (id, handle) in self.handles.iter().enumerate() {
            let (reply, answer) = bounded(1);
            let asked = handle.ask(Request::Describe(reply));
            match asked.then(|| answer.recv_deadline(deadline)) {
                Some(Ok(shard)) => lines.extend(shard.into_iter().map(|line| format!("shard {id}: {line}"))),
                _ => lines.push(format!("shard {id}: its thread does not answer")),
            }
        }
        lines
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Release);
        self.handles.iter().for_each(ShardHandle::wake);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
