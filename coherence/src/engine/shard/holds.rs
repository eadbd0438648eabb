//! Holds: the threads that wait for pages of a shard, and the pages that are kept for a while after they were
//! won.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;

use super::super::chains::{Chain, Chains};
use crate::page::Page;

/// A thread that waits for a page. One that is called out of its wait stays in the list until the page comes:
/// most likely it will touch the page again.
struct Waiter {
    page: Page,
    thread: u32,
    chain: Chain,
    since: u64,
}

/// A page that was won, and for which chain of faults.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    look_at: u64,
    page: Page,
    won: u64,
    chain: Chain,
}

/// A shard's waiting threads and held pages. Times are nanoseconds since the chains' start.
pub struct Holds {
    chains: Arc<Chains>,
    waiters: Vec<Waiter>,
    /// The chain for which the last page was mapped.
    winner: Chain,
    /// Pages that are kept, by when to look at them.
    held: BinaryHeap<Reverse<Held>>,
    /// Demands that wait for some of them, as told to `chains`.
    deferred: i32,
}

impl Holds {
    /// Nobody waits, and nothing is held.
    pub fn new(chains: Arc<Chains>) -> Holds {
        Holds {
            chains,
            waiters: Vec::with_capacity(64),
            winner: Chain::NONE,
            held: BinaryHeap::with_capacity(1024),
            deferred: 0,
        }
    }

    /// The time.
    pub fn now(&self) -> u64 {
        self.chains.now()
    }

    /// The chain of a thread that waits for the page already: it was called out of its wait, for an
    /// interrupt, say, and is back. It is the same wait.
    pub fn waits_again(&mut self, page: Page, thread: u32) -> Option<Chain> {
        let same = |waiter: &&mut Waiter| waiter.page == page && waiter.thread == thread;
        let waiter = self.waiters.iter_mut().find(same)?;
        waiter.chain = self.chains.resumed(waiter.chain);
        Some(waiter.chain)
    }

    /// A thread waits for a page; as part of which chain.
    pub fn waits(&mut self, page: Page, thread: u32, now: u64) -> Chain {
        let chain = self.chains.fault(thread, now);
        self.waiters.push(Waiter { page, thread, chain, since: now });
        chain
    }

    /// Whether a thread waits for the page.
    pub fn is_awaited(&self, page: Page) -> bool {
        self.waiters.iter().any(|waiter| waiter.page == page)
    }

    /// A page for which a thread has waited for longer than `limit`.
    pub fn waits_for_longer_than(&self, limit: Duration, now: u64) -> Option<Page> {
        let waits = |waiter: &&Waiter| u128::from(now.saturating_sub(waiter.since)) > limit.as_nanos();
        self.waiters.iter().find(waits).map(|waiter| waiter.page)
    }

    /// The page is mapped: who waited for it goes on, and one of them is the winner.
    pub fn mapped(&mut self, page: Page, now: u64) {
        self.winner = Chain::NONE;
        let mut i = 0;
        while i < self.waiters.len() {
            if self.waiters[i].page == page {
                self.winner = self.waiters.swap_remove(i).chain;
                self.chains.answered(self.winner, now);
            } else {
                i += 1;
            }
        }
    }

    /// The page does not come: who waited for it waits no more. Their threads. They keep what they have,
    /// which their instruction needs if it cannot be shipped after all.
    pub fn give_up(&mut self, page: Page, now: u64) -> Vec<u32> {
        let Holds { chains, waiters, .. } = self;
        let mut threads = Vec::new();
        waiters.retain(|waiter| {
            if waiter.page == page {
                chains.answered(waiter.chain, now);
                threads.push(waiter.thread);
            }
            waiter.page != page
        });
        threads
    }

    /// A miss was answered after so long.
    pub fn took(&self, miss: Duration) {
        self.chains.took(miss);
    }

    /// The page is held from now on: for nobody if it came `ahead` of its need, else for who waited for the
    /// page that was mapped last, which is this one.
    pub fn hold(&mut self, page: Page, ahead: bool, now: u64) {
        let chain = if ahead { Chain::NONE } else { std::mem::replace(&mut self.winner, Chain::NONE) };
        self.hold_for(page, chain, now);
    }

    /// The page is held for that chain.
    pub fn hold_for(&mut self, page: Page, chain: Chain, now: u64) {
        let look_at = self.chains.release_at(chain, now, now);
        self.held.push(Reverse(Held { look_at, page, won: now, chain }));
    }

    /// A page that was kept long enough, and its chain: it is held no more.
    pub fn due(&mut self) -> Option<(Page, Chain)> {
        while let Some(&Reverse(held)) = self.held.peek() {
            let now = self.chains.now();
            if held.look_at > now {
                break;
            }
            self.held.pop();
            let look_at = self.chains.release_at(held.chain, held.won, now);
            if look_at <= now {
                return Some((held.page, held.chain));
            }
            self.held.push(Reverse(Held { look_at, ..held }));
        }
        None
    }

    /// A page of the chain was given up to who demanded it.
    pub fn broken(&self, chain: Chain) {
        self.chains.broken(chain);
    }

    /// When the next look at a held page is due, if anybody waits for one.
    pub fn next_look(&self) -> Option<u64> {
        self.held.peek().filter(|_| self.deferred > 0).map(|held| held.0.look_at)
    }

    /// A vCPU has gone idle: what was kept for it may go earlier than planned.
    pub fn reconsider(&mut self, now: u64) {
        let mut held = std::mem::take(&mut self.held).into_vec();
        for Reverse(held) in &mut held {
            held.look_at = self.chains.release_at(held.chain, held.won, now);
        }
        self.held = held.into();
    }

    /// So many demands wait for held pages.
    pub fn set_deferred(&mut self, deferred: usize) {
        let deferred = deferred as i32;
        if deferred != self.deferred {
            self.chains.count_deferred(deferred - self.deferred);
            self.deferred = deferred;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: u64 = 100_000_000;

    fn holds() -> Holds {
        Holds::new(Arc::new(Chains::new(Duration::from_nanos(HOLD))))
    }

    #[test]
    fn a_page_is_held_for_who_waited_for_it_unless_it_came_ahead_of_its_need() {
        let mut holds = holds();
        let chain = holds.waits(Page(1), 7, 0);
        assert!(holds.is_awaited(Page(1)) && !holds.is_awaited(Page(2)));
        holds.mapped(Page(1), 10);
        assert!(!holds.is_awaited(Page(1)));
        holds.hold(Page(2), true, 10);
        holds.hold(Page(1), false, 20);
        holds.hold(Page(3), false, 30);
        let mut held: Vec<_> = holds.held.iter().map(|Reverse(held)| (held.page, held.chain)).collect();
        held.sort();
        assert_eq!(held, [(Page(1), chain), (Page(2), Chain::NONE), (Page(3), Chain::NONE)]);
    }

    #[test]
    fn a_thread_that_comes_back_to_its_wait_waits_once() {
        let mut holds = holds();
        assert_eq!(holds.waits_again(Page(1), 7), None);
        let chain = holds.waits(Page(1), 7, 0);
        assert_eq!(holds.waits_again(Page(1), 7), Some(chain));
        assert_eq!((holds.waits_again(Page(2), 7), holds.waits_again(Page(1), 8)), (None, None));
        // And has waited since it came first.
        let limit = Duration::from_nanos(50);
        assert_eq!(holds.waits_for_longer_than(limit, 50), None);
        assert_eq!(holds.waits_for_longer_than(limit, 51), Some(Page(1)));
        assert_eq!(holds.waiters.len(), 1);
    }

    #[test]
    fn a_page_that_does_not_come_is_awaited_no_more_and_its_threads_keep_what_they_have() {
        let mut holds = holds();
        let chain = holds.waits(Page(1), 7, 0);
        holds.mapped(Page(1), 10);
        holds.hold_for(Page(1), chain, 10);
        holds.waits(Page(2), 7, 20);
        holds.waits(Page(2), 8, 30);
        holds.waits(Page(3), 9, 40);
        assert_eq!(holds.give_up(Page(2), 50), [7, 8]);
        assert!(!holds.is_awaited(Page(2)) && holds.is_awaited(Page(3)));
        assert!(holds.chains.release_at(chain, 10, HOLD + 10) > HOLD + 10);
    }

    #[test]
    fn a_page_is_due_when_it_was_kept_long_enough() {
        let mut holds = Holds::new(Arc::new(Chains::new(Duration::ZERO)));
        assert_eq!(holds.due(), None);
        holds.hold_for(Page(2), Chain::NONE, u64::MAX / 2);
        holds.hold_for(Page(1), Chain::NONE, 0);
        assert_eq!(holds.due(), Some((Page(1), Chain::NONE)));
        assert_eq!((holds.due(), holds.held.len()), (None, 1));
    }

    #[test]
    fn holds_are_looked_at_in_time_only_where_somebody_waits() {
        let mut holds = holds();
        holds.hold_for(Page(1), Chain::NONE, 50);
        assert_eq!(holds.next_look(), None);
        holds.set_deferred(1);
        assert_eq!(holds.next_look(), Some(50 + HOLD));
        holds.set_deferred(0);
        assert_eq!(holds.next_look(), None);
    }

    #[test]
    fn what_is_kept_for_a_vcpu_that_goes_idle_is_looked_at_again_at_once() {
        let mut holds = holds();
        holds.set_deferred(1);
        let chain = holds.waits(Page(1), 7, 0);
        // It waits for another page: what it has is kept for longer.
        holds.waits(Page(2), 7, 0);
        holds.mapped(Page(1), 10);
        holds.hold_for(Page(1), chain, 10);
        holds.reconsider(HOLD / 2);
        assert!(holds.next_look() > Some(10 + HOLD));
        assert!(holds.chains.idle(7));
        holds.reconsider(HOLD / 2);
        assert_eq!(holds.next_look(), Some(10 + HOLD));
    }
}
