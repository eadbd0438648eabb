//! Shipping in the engine, between the threads of vCPUs, which know what an instruction would do with a page,
//! and the shards, which know that the page stays where it is.
//!
//! ```text
//!  vCPU's thread                          its shard                            the owner's shard
//!  waits for a page ────────────────────> fault_may_ship ── Get, may ship ...
//!    Vcpus::call_out <─────────────────── Effect::Ship <─── ...
//!  Engine::operate ── Request::Operate ─> Protocol::operate ── Operate ───> Effect::Operate: DualMemory::operate
//!    Vcpus::answered <─────────────────── Effect::Operated <── Operated ─────┘
//! ```
//! A vCPU that is called out and does not look, because it waits in a part of the kernel that a signal does
//! not end, gets its page after some time (`shard/shipping.rs`).

use std::sync::Arc;

use super::Engine;
use super::request::Request;
use super::vcpus::Vcpus;
use crate::page::Page;
use crate::protocol::{Class, Operation, Shipping};

impl Engine {
    /// From now on faults of `vcpus` may be answered by shipping, and this node's pages have classes. Until
    /// then all pages move; nodes need not begin at the same moment.
    pub fn ship(&self, vcpus: &Arc<dyn Vcpus>, shipping: Shipping) {
        for shard in &self.handles {
            shard.ask(Request::Ship(vcpus.clone(), shipping));
        }
    }

    /// Has an operation carried out where the page is, for a vCPU that was called out. [`Vcpus::answered`]
    /// with the token follows, once; the token tells a vCPU from others, which has one operation under way at
    /// most.
    pub fn operate(&self, page: Page, token: u32, operation: Operation) {
        self.handles[usize::from(self.shards.shard(page))].ask(Request::Operate { page, token, operation });
    }

    /// Gives a page of this node a class, where [`Shipping::Manual`] is asked for: for tests.
    pub fn set_class(&self, page: Page, class: Class) {
        self.handles[usize::from(self.shards.shard(page))].ask(Request::SetClass(page, class));
    }

    /// How often the shard of `page` has taken pages away from this node's guest view so far, counted when
    /// they have gone and before their frames change: if it is the same before a look at a page that is
    /// mapped and after it, what was read is what was mapped.
    pub fn withdrawals(&self, page: Page) -> u64 {
        self.stats[usize::from(self.shards.shard(page))].withdrawals()
    }
}
