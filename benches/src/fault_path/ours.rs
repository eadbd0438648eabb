//! The node as it is in production: the coherence engine over the fabric.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use coherence::engine::{Engine, EngineConfig, EngineError, budget_for};
use coherence::memory::DualMemory;
use coherence::page::Homes;
use fabric::Transport;

use super::command::{Polling, Setup};

/// A node with an engine.
pub struct Ours {
    memory: Arc<DualMemory>,
    engine: Engine,
    transport: Arc<dyn Transport>,
    failure: Arc<Mutex<Option<String>>>,
}

impl Ours {
    /// Starts the engine, with one shard on lane 0.
    ///
    /// # Errors
    /// This host's userfaultfd cannot serve.
    pub fn start(setup: &Setup, memory: Arc<DualMemory>, transport: Arc<dyn Transport>) -> Result<Ours> {
        let homes = Homes::new(setup.pages.iter().copied());
        let config = EngineConfig {
            node: transport.node(),
            shards: 1,
            first_lane: 0,
            hold: Duration::from_micros(setup.hold_us),
            spin: match setup.polling {
                Polling::Busy => Duration::MAX,
                Polling::Blocking => Duration::ZERO,
            },
            stuck: Duration::from_secs(10),
            budget: setup.copies.map(|copies| budget_for(copies, &homes, transport.node())),
            homes,
        };
        let failure = Arc::new(Mutex::new(None));
        let tell = failure.clone();
        let on_failure = Arc::new(move |error: EngineError| {
            *base::lock(&tell) = Some(error.to_string());
        });
        let engine = Engine::start(config, memory.clone(), transport.clone(), on_failure)?;
        Ok(Ours { memory, engine, transport, failure })
    }

    /// The node's memory.
    pub fn memory(&self) -> &Arc<DualMemory> {
        &self.memory
    }

    /// What the engine's messages travel over.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// The calling thread's vCPU has nothing to do.
    pub fn idle(&self) {
        self.engine.idle(nix::unistd::gettid().as_raw() as u32);
    }

    /// The engine's counters, and what its hold policy has measured.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let (enough, round_trip) = self.engine.measured();
        let measured = [("enough_ns", enough), ("round_trip_ns", round_trip)];
        let measured = measured.map(|(name, time)| (name.to_owned(), time.as_nanos() as u64));
        let counters = self.engine.totals().list().into_iter().map(|(name, n)| (name.to_owned(), n));
        counters.chain(measured).collect()
    }

    /// Whether the engine still runs.
    ///
    /// # Errors
    /// Why it does not.
    pub fn check(&self) -> Result<()> {
        match &*base::lock(&self.failure) {
            Some(why) => bail!("the engine failed: {why}"),
            None => Ok(()),
        }
    }
}
