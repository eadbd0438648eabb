//! Faults: the threads that are stopped at pages of a shard, and since when it has asked other nodes for
//! these pages.

use std::time::Instant;

use super::super::EngineError;
use super::Core;
use crate::page::Page;
use crate::protocol::{Body, Rights};
use crate::stats::ShardStats;
use crate::trace::{self, Event};
use crate::uffd::Fault;

/// Faults that need another node, and when they began; one at most for a page.
pub struct Misses(Vec<(Page, Instant)>);

impl Misses {
    /// None yet.
    pub fn new() -> Misses {
        Misses(Vec::with_capacity(64))
    }

    /// A miss of the page begins.
    pub fn begin(&mut self, page: Page) {
        self.0.push((page, Instant::now()));
    }

    /// The page is here: when its miss began, if there was one.
    pub fn end(&mut self, page: Page) -> Option<Instant> {
        let at = self.0.iter().position(|(other, _)| *other == page)?;
        Some(self.0.swap_remove(at).1)
    }

    /// A page whose miss began at a time of that kind.
    pub fn find(&self, when: impl Fn(Instant) -> bool) -> Option<Page> {
        self.0.iter().find(|(_, since)| when(*since)).map(|(page, _)| *page)
    }

    /// Whether the page has a miss under way.
    pub fn has(&self, page: Page) -> bool {
        self.0.iter().any(|(other, _)| *other == page)
    }
}

impl Core {
    /// Takes on what the kernel reports; how many faults that is.
    pub(super) fn take_faults(&mut self) -> Result<usize, EngineError> {
        let (mut faults, mut n) = ([None; 16], 0);
        let count = self
            .mapping
            .uffd()
            .read(|fault: Fault| {
                faults[n] = Some(fault);
                n += 1;
            })
            .map_err(|source| EngineError::System { what: "read faults", source })?;
        for fault in faults.into_iter().flatten() {
            self.fault(fault)?;
        }
        Ok(count)
    }

    fn fault(&mut self, fault: Fault) -> Result<(), EngineError> {
        // The kernel only reports what was registered.
        let Some(page) = self.mapping.memory().page_at(fault.address) else { return Ok(()) };
        ShardStats::count(&self.stats.events);
        trace::event(Event::Fault, page.0, fault.flags());
        let chain = match self.holds.waits_again(page, fault.thread) {
            Some(chain) => {
                ShardStats::count(&self.stats.resumed_waits);
                chain
            }
            None => self.holds.waits(page, fault.thread, self.holds.now()),
        };
        let want = if fault.write { Rights::Exclusive } else { Rights::Shared };
        if fault.write {
            self.prefetch.wanted(page, chain);
        }
        if self.prefetch.used(page) {
            ShardStats::count(&self.stats.prefetches_used);
            if self.protocol.rights(page) >= want {
                self.protocol.hold(page);
                self.holds.hold_for(page, chain, self.holds.now());
            }
        }
        let window = if fault.write { None } else { self.prefetch.touched(page) };
        let upgrade = fault.write && self.protocol.rights(page) == Rights::Shared;
        let was_missing = self.protocol.is_missing(page);
        if self.shipping.may_ship(fault.thread, page) {
            self.set_time();
            self.protocol.fault_may_ship(page, fault.write, &mut self.effects);
        } else {
            self.protocol.fault(page, fault.write, &mut self.effects);
        }
        self.apply(Body::Absent)?;
        match (was_missing, self.protocol.is_missing(page)) {
            (false, false) => ShardStats::count(&self.stats.local_faults),
            (false, true) => {
                let counter = if fault.write {
                    &self.stats.remote_write_faults
                } else {
                    &self.stats.remote_read_faults
                };
                ShardStats::count(counter);
                if upgrade {
                    ShardStats::count(&self.stats.upgrades);
                }
                self.misses.begin(page);
                if fault.write {
                    self.prefetch_companions(page)?;
                } else if !self.mapping.is_home(page) {
                    self.prefetch.missed(page);
                }
            }
            _ => {}
        }
        self.fetch(window)
    }

    /// A write that came while a read of the page was under way goes on as a miss of its own. (What was asked
    /// for ahead of its need is no miss: nobody waits for it, and when it comes it may not even be mapped.)
    pub(super) fn miss_again(&mut self, page: Page) {
        if self.holds.is_awaited(page) && self.protocol.is_missing(page) && !self.misses.has(page) {
            ShardStats::count(&self.stats.remote_write_faults);
            self.misses.begin(page);
        }
    }

    /// The page is mapped, or is about to be: who waited for it goes on.
    pub(super) fn finish_miss(&mut self, page: Page) {
        self.holds.mapped(page, self.holds.now());
        if let Some(since) = self.misses.end(page) {
            let took = since.elapsed();
            self.holds.took(took);
            self.stats.record(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_miss_is_under_way_until_its_page_comes() {
        let mut misses = Misses::new();
        misses.begin(Page(1));
        let between = Instant::now();
        misses.begin(Page(2));
        assert!(misses.has(Page(1)) && misses.has(Page(2)) && !misses.has(Page(3)));
        assert!(misses.end(Page(1)).is_some_and(|since| since <= between));
        assert_eq!(misses.find(|_| true), Some(Page(2)));
        assert!(!misses.has(Page(1)) && misses.end(Page(1)).is_none());
        assert!(misses.has(Page(2)));
    }
}
