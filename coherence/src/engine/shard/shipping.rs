//! Shipping in a shard: vCPUs that were called out of their faults because the page stays at another node,
//! and the operations on it that are under way for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::EngineError;
use super::super::vcpus::Vcpus;
use super::Core;
use crate::page::Page;
use crate::protocol::{self, Body, Operation};
use crate::stats::ShardStats;

/// How long a vCPU that was called out may take to look. It takes microseconds, and on a busy host until it
/// has a CPU.
pub const PATIENCE: Duration = Duration::from_millis(50);

/// What a shard ships. Nothing until it is told of vCPUs.
#[derive(Default)]
pub struct Shipping {
    vcpus: Option<Arc<dyn Vcpus>>,
    /// Those that were called out and have not looked yet, and since when.
    called: Vec<(Page, u32, Instant)>,
    /// Operations under way, by page and token, and since when.
    asked: Vec<(Page, u32, Instant)>,
    /// Pages that must come though they were to stay where they are.
    unshippable: Vec<Page>,
}

impl Shipping {
    /// Whether anything may be shipped.
    pub fn is_on(&self) -> bool {
        self.vcpus.is_some()
    }

    /// Whether a thread that waits for the page is a vCPU's that can do without it.
    pub fn may_ship(&self, thread: u32, page: Page) -> bool {
        self.vcpus.as_ref().is_some_and(|vcpus| vcpus.may_ship(thread, page))
    }

    /// Whether nobody is waited for who was called out.
    pub fn is_at_rest(&self) -> bool {
        self.called.is_empty()
    }

    /// The page stays where it is: those of `threads`, which waited for it, that can do without are called
    /// out. If one cannot the page must come.
    fn call_out(&mut self, page: Page, threads: impl IntoIterator<Item = u32>) {
        for thread in threads {
            if self.vcpus.as_ref().is_some_and(|vcpus| vcpus.call_out(thread, page)) {
                self.called.push((page, thread, Instant::now()));
            } else if !self.unshippable.contains(&page) {
                self.unshippable.push(page);
            }
        }
    }

    /// A page that must come though it was to stay, one after the other: those of vCPUs that were called out
    /// and do not look are among them.
    fn must_come(&mut self) -> Option<Page> {
        if let Some(vcpus) = self.vcpus.as_ref().filter(|_| !self.called.is_empty()) {
            let unshippable = &mut self.unshippable;
            self.called.retain(|&(page, thread, since)| {
                let waits = vcpus.is_called(thread, page);
                let stuck = waits && since.elapsed() > PATIENCE;
                if stuck && !unshippable.contains(&page) {
                    unshippable.push(page);
                }
                waits && !stuck
            });
        }
        self.unshippable.pop()
    }

    /// The page of an operation that was asked for at a time of that kind.
    pub fn find(&self, when: impl Fn(Instant) -> bool) -> Option<Page> {
        self.asked.iter().find(|(_, _, since)| when(*since)).map(|(page, ..)| *page)
    }
}

impl Core {
    /// From now on faults of `vcpus` may be answered by shipping.
    pub(super) fn ship_for(&mut self, vcpus: Arc<dyn Vcpus>, shipping: protocol::Shipping) {
        self.protocol.set_shipping(shipping);
        self.shipping.vcpus = Some(vcpus);
    }

    /// A vCPU does this with a page.
    pub(super) fn operate(
        &mut self,
        page: Page,
        token: u32,
        operation: Operation,
    ) -> Result<(), EngineError> {
        ShardStats::count(&self.stats.operations);
        self.shipping.asked.push((page, token, Instant::now()));
        if self.protocol.operate(page, token, operation, &mut self.effects) {
            self.apply(Body::Absent)?;
        } else {
            self.operated(page, token, None);
        }
        Ok(())
    }

    /// A vCPU's operation was done, or was not.
    pub(super) fn operated(&mut self, page: Page, token: u32, old: Option<u128>) {
        self.shipping.asked.retain(|asked| (asked.0, asked.1) != (page, token));
        ShardStats::count(match old {
            Some(_) => &self.stats.operations_done,
            None => &self.stats.operations_refused,
        });
        if let Some(vcpus) = &self.shipping.vcpus {
            vcpus.answered(token, old);
        }
    }

    /// The page stays where it is: who waits for it waits no more.
    pub(super) fn ship(&mut self, page: Page) {
        self.misses.end(page);
        let threads = self.holds.give_up(page, self.holds.now());
        self.shipping.call_out(page, threads);
    }

    /// Lets the pages come that cannot be done without after all. Rare: so they come to be written, which
    /// serves who reads as well.
    pub(super) fn fetch_unshippable(&mut self) -> Result<(), EngineError> {
        while let Some(page) = self.shipping.must_come() {
            self.protocol.fault(page, true, &mut self.effects);
            self.apply(Body::Absent)?;
            if self.protocol.is_missing(page) && !self.misses.has(page) {
                self.misses.begin(page);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// vCPUs of even threads can be called out, and look when they are told.
    #[derive(Default)]
    struct EvenThreads(Mutex<Vec<(u32, Page)>>);

    impl Vcpus for EvenThreads {
        fn may_ship(&self, thread: u32, _: Page) -> bool {
            thread.is_multiple_of(2)
        }

        fn call_out(&self, thread: u32, page: Page) -> bool {
            self.0.lock().unwrap().push((thread, page));
            thread.is_multiple_of(2)
        }

        fn is_called(&self, thread: u32, page: Page) -> bool {
            self.0.lock().unwrap().contains(&(thread, page))
        }

        fn answered(&self, _: u32, _: Option<u128>) {}
    }

    #[test]
    fn a_page_comes_if_one_that_waits_cannot_do_without() {
        let mut shipping = Shipping { vcpus: Some(Arc::new(EvenThreads::default())), ..Shipping::default() };
        assert!(shipping.may_ship(2, Page(1)) && !shipping.may_ship(3, Page(1)));
        shipping.call_out(Page(1), [2, 4]);
        assert_eq!(shipping.must_come(), None);
        shipping.call_out(Page(2), [2, 3]);
        assert_eq!((shipping.must_come(), shipping.must_come()), (Some(Page(2)), None));
    }

    #[test]
    fn who_is_called_out_and_does_not_look_gets_the_page_once() {
        let vcpus = Arc::new(EvenThreads::default());
        let mut shipping = Shipping { vcpus: Some(vcpus.clone()), ..Shipping::default() };
        shipping.call_out(Page(1), [2]);
        shipping.call_out(Page(2), [4]);
        vcpus.0.lock().unwrap().retain(|called| called.0 == 2);
        let long_ago = Instant::now().checked_sub(2 * PATIENCE).unwrap();
        shipping.called.iter_mut().for_each(|called| called.2 = long_ago);
        assert_eq!((shipping.must_come(), shipping.must_come()), (Some(Page(1)), None));
        assert!(shipping.is_at_rest());
    }

    #[test]
    fn nothing_is_shipped_before_there_are_vcpus() {
        let mut shipping = Shipping::default();
        assert!(!shipping.may_ship(2, Page(1)));
        shipping.call_out(Page(1), [2]);
        assert_eq!(shipping.must_come(), Some(Page(1)));
    }
}
