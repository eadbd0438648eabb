//! A shard's waiting threads and held pages.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;

use super::policy::{Claim, CpuTime, HoldPolicy};
use crate::page::Page;
use crate::protocol::PageMap;

/// A thread that waits for a page.
struct Waiter {
    page: Page,
    thread: u32,
    /// When it began to wait.
    since: u64,
    claim: Claim,
}

/// A page that is held for a thread.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    look_at: u64,
    page: Page,
    claim: Claim,
}

/// Who waits for pages of a shard, and which are held for whom. Times are nanoseconds since the policy's start.
pub struct Holds {
    policy: Arc<HoldPolicy>,
    waiters: Vec<Waiter>,
    /// Pages that were mapped and are not held yet, and for whom.
    won: Vec<(Page, Claim)>,
    /// By when to look at them.
    held: BinaryHeap<Reverse<Held>>,
    /// For how many claims each page is held.
    claims: PageMap<u32>,
    /// Demands that wait for held pages, as told to the policy.
    deferred: i32,
    /// Pages that others took away; a later one has the place of an earlier one.
    taken: Box<[Option<Page>]>,
}

/// Places for pages that others took away.
const TAKEN: usize = 1024;

impl Holds {
    /// Nobody waits, and nothing is held.
    pub fn new(policy: Arc<HoldPolicy>) -> Holds {
        Holds {
            policy,
            waiters: Vec::with_capacity(64),
            won: Vec::new(),
            held: BinaryHeap::with_capacity(1024),
            claims: PageMap::default(),
            deferred: 0,
            taken: vec![None; TAKEN].into(),
        }
    }

    /// The policy of this node.
    pub fn policy(&self) -> &HoldPolicy {
        &self.policy
    }

    /// Whether the thread waits for the page already: it was called out of its wait, for an interrupt, say, and is back.
    pub fn waits_again(&self, page: Page, thread: u32) -> bool {
        self.waiters.iter().any(|waiter| waiter.page == page && waiter.thread == thread)
    }

    /// A thread waits for a page. One that was called out of its wait comes again: that is the same wait.
    pub fn waits(&mut self, page: Page, thread: u32, now: u64, cpu: CpuTime<'_>) -> Claim {
        let same = |waiter: &&mut Waiter| waiter.page == page && waiter.thread == thread;
        if let Some(waiter) = self.waiters.iter_mut().find(same) {
            waiter.claim = self.policy.fault_again(waiter.claim, page, waiter.since);
            return waiter.claim;
        }
        let claim = self.policy.fault(thread, page, now, cpu);
        self.waiters.push(Waiter { page, thread, since: now, claim });
        claim
    }

    /// Whether a thread waits for the page.
    pub fn is_awaited(&self, page: Page) -> bool {
        self.waiters.iter().any(|waiter| waiter.page == page)
    }

    /// The page does not come: who waited for it is called out of the wait, and holds nothing. Their threads.
    pub fn give_up(&mut self, page: Page, now: u64) -> Vec<u32> {
        let Holds { policy, waiters, .. } = self;
        let mut threads = Vec::new();
        waiters.retain(|waiter| {
            if waiter.page == page {
                policy.mapped(waiter.claim, page, now);
                policy.idle(waiter.thread);
                threads.push(waiter.thread);
            }
            waiter.page != page
        });
        threads
    }

    /// The page is mapped: who waited for it goes on.
    pub fn mapped(&mut self, page: Page, now: u64) {
        let Holds { policy, waiters, won, .. } = self;
        won.retain(|(other, _)| *other != page);
        waiters.retain(|waiter| {
            if waiter.page == page {
                won.push((page, policy.mapped(waiter.claim, page, now)));
            }
            waiter.page != page
        });
    }

    /// The page is held from now on, for those who waited for it, or else for `ahead`, who will want it.
    pub fn hold(&mut self, page: Page, ahead: Option<Claim>, now: u64) {
        let mut won = std::mem::take(&mut self.won);
        let for_whom = |(won, claim): (Page, Claim)| (won == page).then_some(claim);
        won.drain(..).filter_map(for_whom).for_each(|claim| self.hold_for(page, claim, now));
        self.won = won;
        if self.claims.get(page).is_none() {
            self.hold_for(page, ahead.unwrap_or(Claim::NONE), now);
        }
    }

    /// The page is held for that claim.
    pub fn hold_for(&mut self, page: Page, claim: Claim, now: u64) {
        let look_at = self.policy.first_look(claim, now);
        self.held.push(Reverse(Held { look_at, page, claim }));
        match self.claims.get_mut(page) {
            Some(claims) => *claims += 1,
            None => drop(self.claims.insert(page, 1)),
        }
    }

    /// A page that was held long enough for all who wanted it, and the last of them: it is held no more.
    pub fn due(&mut self, now: u64) -> Option<(Page, Claim)> {
        while let Some(&Reverse(held)) = self.held.peek().filter(|held| held.0.look_at <= now) {
            self.held.pop();
            let look_at = self.policy.look(held.claim, now);
            if look_at > now {
                self.held.push(Reverse(Held { look_at, ..held }));
                continue;
            }
            match self.claims.get_mut(held.page) {
                Some(claims) if *claims > 1 => *claims -= 1,
                _ => {
                    self.claims.remove(held.page);
                    return Some((held.page, held.claim));
                }
            }
        }
        None
    }

    /// When the next look at a held page is due, if anybody waits for one.
    pub fn next_look(&self) -> Option<u64> {
        self.held.peek().filter(|_| self.deferred > 0).map(|held| held.0.look_at)
    }

    /// A vCPU has gone idle: what was held for it may go earlier than planned.
    pub fn reconsider(&mut self, now: u64) {
        let mut held = std::mem::take(&mut self.held).into_vec();
        held.iter_mut().for_each(|held| held.0.look_at = self.policy.look(held.0.claim, now));
        self.held = held.into();
    }

    /// Another node took the page away.
    pub fn taken(&mut self, page: Page) {
        self.taken[page.0 as usize % TAKEN] = Some(page);
    }

    /// A page came that was asked for so long ago. What others want as well tells nothing of a round trip: they held it.
    pub fn came(&self, page: Page, took: Duration) {
        if self.taken[page.0 as usize % TAKEN] != Some(page) {
            self.policy.took(took);
        }
    }

    /// So many demands wait for held pages.
    pub fn set_deferred(&mut self, deferred: usize) {
        let deferred = deferred as i32;
        if deferred != self.deferred {
            self.policy.count_deferred(deferred - self.deferred);
            self.deferred = deferred;
        }
    }
}

/// The CPU time of a thread of this process, in nanoseconds.
pub fn cpu_time(thread: u32) -> Option<u64> {
    // The clock of a thread, as `linux/posix-timers.h` numbers it: CPUCLOCK_SCHED, CPUCLOCK_PERTHREAD_MASK.
    let clock = !(thread as libc::clockid_t) << 3 | 2 | 4;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes `time`, which outlives it, and nothing else.
    let rc = unsafe { libc::clock_gettime(clock, &mut time) };
    (rc == 0).then_some(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds() -> Holds {
        Holds::new(Arc::new(HoldPolicy::with_salt(Duration::ZERO, 0)))
    }

    const US: u64 = 1000;

    #[test]
    fn a_page_is_held_until_all_who_waited_for_it_had_their_time() {
        let mut holds = holds();
        for (thread, page) in [(1, 7), (2, 6), (2, 7)] {
            holds.waits(Page(page), thread, 0, &|_| Some(0));
            holds.mapped(Page(6), 0);
        }
        holds.mapped(Page(7), 0);
        holds.hold(Page(7), None, 0);
        // Thread 1 needs one page, thread 2 two.
        assert_eq!(holds.due(150 * US), None);
        assert_eq!(holds.due(200 * US).map(|due| due.0), Some(Page(7)));
        assert_eq!(holds.due(300 * US), None);
    }

    #[test]
    fn who_was_called_out_of_a_wait_and_comes_again_waits_once() {
        let mut holds = holds();
        let first = holds.waits(Page(7), 1, 0, &|_| Some(0));
        assert_eq!(holds.waits(Page(7), 1, 50 * US, &|_| Some(30 * US)), first);
        holds.mapped(Page(7), 60 * US);
        assert!(!holds.is_awaited(Page(7)));
        holds.hold(Page(7), None, 60 * US);
        assert!(holds.due(10_000 * US).is_some());
        assert!(holds.due(10_000 * US).is_none());
    }

    #[test]
    fn who_comes_back_to_a_wait_from_an_interrupt_keeps_what_it_gathered_before_and_in_between() {
        let mut holds = holds();
        let cpu = |_| Some(0);
        let win = |holds: &mut Holds, page, now| {
            holds.waits(Page(page), 1, now, &cpu);
            holds.mapped(Page(page), now);
            holds.hold(Page(page), None, now);
        };
        win(&mut holds, 6, 0);
        holds.waits(Page(7), 1, 10 * US, &cpu);
        // An interrupt's handler needs a page of its own, and gets it. Then the thread waits for the one before.
        win(&mut holds, 8, 20 * US);
        holds.waits(Page(7), 1, 30 * US, &cpu);
        assert_eq!(holds.due(180 * US), None);
        // The page for which it waits does not come, and its patience ends, counted from its first fault.
        let late = 10 * US + 2 * 1024 * 100 * US;
        assert!(holds.due(late).is_some());
    }

    #[test]
    fn a_page_that_comes_while_its_thread_waits_for_another_ends_no_other_wait() {
        let mut holds = holds();
        let cpu = |_| Some(0);
        holds.waits(Page(6), 1, 0, &cpu);
        // Called out of that wait, the thread is in a handler now.
        holds.waits(Page(7), 1, 10 * US, &cpu);
        holds.mapped(Page(6), 20 * US);
        holds.hold(Page(6), None, 20 * US);
        assert_eq!(holds.due(180 * US), None);
    }

    #[test]
    fn a_page_that_nobody_waited_for_is_held_for_the_one_that_will_want_it_or_not_at_all() {
        let mut holds = holds();
        holds.hold(Page(7), None, 0);
        assert_eq!(holds.due(0), Some((Page(7), Claim::NONE)));
        let gathers = holds.waits(Page(1), 1, 0, &|_| Some(0));
        holds.hold(Page(8), Some(gathers), 0);
        assert_eq!(holds.due(150 * US), None);
    }

    #[test]
    fn what_others_hold_does_not_make_the_holds_longer() {
        let mut holds = holds();
        holds.taken(Page(7));
        let before = holds.policy().measured();
        holds.came(Page(7), Duration::from_millis(5));
        assert_eq!(holds.policy().measured(), before);
        holds.came(Page(8), Duration::from_millis(5));
        assert!(holds.policy().measured() > before);
    }

    #[test]
    fn looks_are_due_only_while_somebody_waits_for_a_held_page() {
        let mut holds = holds();
        holds.hold(Page(7), None, 5);
        assert_eq!(holds.next_look(), None);
        holds.set_deferred(1);
        assert_eq!(holds.next_look(), Some(5));
    }

    #[test]
    fn the_cpu_time_of_a_thread_is_what_it_ran() {
        let own = nix::unistd::gettid().as_raw() as u32;
        let before = cpu_time(own).unwrap();
        let begin = std::time::Instant::now();
        while begin.elapsed() < Duration::from_millis(2) {}
        let ran = cpu_time(own).unwrap() - before;
        assert!(ran > 0 && ran <= begin.elapsed().as_nanos() as u64 + 10_000_000, "{ran}");
        assert_eq!(cpu_time(u32::MAX / 16), None);
    }
}
