//! The node as it is in production: the coherence engine over the fabric.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use coherence::engine::{Engine, budget_for};
use coherence::memory::DualMemory;
use coherence::page::Homes;
use coherence::testing::{Builder, Cluster};
use fabric::Transport;

use super::command::{Polling, Setup};

/// A node with an engine.
pub struct Ours {
    /// This node alone: others are elsewhere.
    node: Cluster,
    transport: Arc<dyn Transport>,
    ships: bool,
}

impl Ours {
    /// Starts the engine, with one shard on lane 0.
    ///
    /// # Errors
    /// This host's userfaultfd cannot serve.
    pub fn start(setup: &Setup, transport: Arc<dyn Transport>) -> Result<Ours> {
        let homes = Homes::new(setup.pages.iter().copied());
        let (copies, shares) = (setup.copies, homes.clone());
        let builder = Builder::new(homes).with(|config| {
            config.hold = Duration::from_micros(setup.hold_us);
            config.spin = match setup.polling {
                Polling::Busy => Duration::MAX,
                Polling::Blocking => Duration::ZERO,
            };
        });
        let builder = builder.budget(move |node| copies.map(|copies| budget_for(copies, &shares, node)));
        Ok(Ours { node: builder.start_over([transport.clone()])?, transport, ships: setup.ship })
    }

    /// The node's memory.
    pub fn memory(&self) -> &Arc<DualMemory> {
        self.node.memory(0)
    }

    /// What the engine's messages travel over.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// The node's engine.
    pub fn engine(&self) -> &Arc<Engine> {
        self.node.engine(0)
    }

    /// Whether instructions of its guest go to pages that stay elsewhere.
    pub fn ships(&self) -> bool {
        self.ships
    }

    /// The engine's counters.
    pub fn counters(&self) -> Vec<(String, u64)> {
        self.engine().totals().list().into_iter().map(|(name, n)| (name.to_owned(), n)).collect()
    }

    /// Whether the engine still runs.
    ///
    /// # Errors
    /// Why it does not.
    pub fn check(&self) -> Result<()> {
        Ok(self.node.check()?)
    }
}
