//! Chains: faults of one thread that follow each other closely, and for how long the pages that a chain won
//! are held.
//!
//! One instruction may need many pages at once: its code, its data, and the page tables that lead there (on
//! AMD CPUs, and on Intel's with EPT accessed/dirty bits, a page-table walk needs its pages *writable*). If a
//! node gave up the first of them before the last had come, two nodes could steal from each other without
//! end, and neither would retire an instruction. So the faults of one thread that follow each other closely
//! form a *chain*, and what a chain won is kept together:
//!
//! ```text
//!  fault ── map ── fault ── map ── fault ── map │ the thread runs               │ released
//!  ├───────── gathering, n faults ─────────────┤├── max(hold, n round trips) ───┤
//! ```
//!
//! Keeping for as long as the gathering takes when nobody is in its way makes a node run about half of its
//! time, whatever a fault costs on its hardware. (Not for as long as it *took*: that holds the time for which
//! the other node kept the pages, and the two would drive each other up.) A vCPU that halts keeps nothing.
//! When one page of a chain goes, the others may go as well: the thread has to begin again, and keeping them
//! would only keep the other node from getting on. Two chains may wait for each other: so a thread that has
//! waited for one page for some round trips keeps nothing for it. For how many is drawn for each chain, from
//! [`PATIENCE`]: one of the two gives up long before the other, and not always the same.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// For how many round trips a chain in waiting keeps what it won.
const PATIENCE: [u64; 8] = [2, 4, 4, 8, 8, 16, 32, 64];
/// The longest that anything is kept after the last page of its chain came, and that a chain is patient.
const LONGEST: Duration = Duration::from_millis(200);
/// No instruction needs more pages than this: after so many faults a chain has made progress, and another
/// begins.
const MOST: u32 = 24;
/// Threads that are told apart; what further ones win is kept for the shortest time.
const SLOTS: usize = 4096;

/// The chains of all threads of a node, shared by its shards.
pub struct Chains {
    start: Instant,
    /// Differs from node to node.
    salt: u64,
    hold: u64,
    /// Demands that wait for pages that are kept.
    deferred: AtomicI32,
    /// What a page costs that nobody keeps, in nanoseconds: the lower quartile of all misses, followed step
    /// by step.
    round_trip: AtomicU64,
    slots: Box<[Slot]>,
}

/// One thread. Times are nanoseconds since the engine's start. Shards may write it at the same time; a mix of
/// two writes only makes a page be kept for a little too long or too short.
#[derive(Default)]
struct Slot {
    thread: AtomicU32,
    /// Counts chains.
    number: AtomicU32,
    /// When the chain's first fault came.
    since: AtomicU64,
    /// When its last fault came or was answered.
    last: AtomicU64,
    /// Faults that wait. More than one: the thread was called out of a wait, for an interrupt's handler, say.
    waiting: AtomicU32,
    /// Faults of the chain so far.
    faults: AtomicU32,
    /// `last` when the thread was idle last.
    idle_at: AtomicU64,
}

/// A chain of some thread.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    slot: u32,
    number: u32,
}

impl Chain {
    /// The chain of nobody known.
    pub const NONE: Chain = Chain { slot: u32::MAX, number: 0 };

    /// Whether both are of one thread.
    pub fn same_thread(self, other: Chain) -> bool {
        self.slot == other.slot
    }
}

impl Chains {
    /// `hold` is the shortest time for which anything is kept.
    pub fn new(hold: Duration) -> Chains {
        let slots = (0..SLOTS).map(|_| Slot::default()).collect();
        Chains {
            start: Instant::now(),
            salt: RandomState::new().hash_one(0),
            hold: hold.as_nanos() as u64,
            deferred: AtomicI32::new(0),
            round_trip: AtomicU64::new(hold.as_nanos() as u64),
            slots,
        }
    }

    /// A miss took so long.
    pub fn took(&self, miss: Duration) {
        let old = self.round_trip.load(Relaxed);
        let step = (old / 64).max(1);
        let below = (miss.as_nanos() as u64) < old;
        // Three steps down for each up: in balance where three times as many misses take longer.
        let new = if below { old.saturating_sub(3 * step) } else { old + step };
        self.round_trip.store(new.clamp(1000, LONGEST.as_nanos() as u64), Relaxed);
    }

    /// Nanoseconds since the engine's start.
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// A fault of a thread came: the chain that it belongs to.
    pub fn fault(&self, thread: u32, now: u64) -> Chain {
        let Some(index) = self.find(thread) else { return Chain::NONE };
        let slot = &self.slots[index];
        let last = slot.last.swap(now, Relaxed);
        let faults = slot.faults.load(Relaxed);
        let waiting = slot.waiting.load(Relaxed) > 0;
        let paused = now.saturating_sub(last) > self.keep(faults);
        if !waiting && (paused || faults >= MOST) {
            slot.number.fetch_add(1, Relaxed);
            slot.since.store(now, Relaxed);
            slot.faults.store(0, Relaxed);
        }
        slot.faults.fetch_add(1, Relaxed);
        slot.waiting.fetch_add(1, Relaxed);
        Chain { slot: index as u32, number: slot.number.load(Relaxed) }
    }

    /// A thread that was called out of a wait is back at it: the chain that it belongs to now. Nothing begins
    /// again, its patience least of all: else two threads that are called out again and again would wait for
    /// each other without end.
    pub fn resumed(&self, chain: Chain) -> Chain {
        let slot = self.slots.get(chain.slot as usize);
        slot.map_or(chain, |slot| Chain { number: slot.number.load(Relaxed), ..chain })
    }

    /// A fault of the chain's thread was answered. Once for each [`Chains::fault`].
    pub fn answered(&self, chain: Chain, now: u64) {
        if let Some(slot) = self.slots.get(chain.slot as usize) {
            slot.last.store(now, Relaxed);
            // Never below zero, whatever order shards come in.
            let _ = slot.waiting.fetch_update(Relaxed, Relaxed, |waiting| waiting.checked_sub(1));
        }
    }

    /// The calling thread's vCPU has nothing to do: it keeps nothing. Whether somebody may be waiting for
    /// what it kept; the shards must be woken then.
    pub fn idle(&self, thread: u32) -> bool {
        let Some(slot) = self.find(thread).map(|index| &self.slots[index]) else { return false };
        let last = slot.last.load(Relaxed);
        // One that has not faulted since it was idle last keeps nothing already.
        if slot.idle_at.swap(last, Relaxed) == last {
            return false;
        }
        slot.number.fetch_add(1, Relaxed);
        slot.faults.store(0, Relaxed);
        self.deferred.load(Relaxed) > 0
    }

    /// A demand waits for a page of this node that is kept, or (`-1`) waits no more.
    pub fn count_deferred(&self, change: i32) {
        self.deferred.fetch_add(change, Relaxed);
    }

    /// A page of the chain was given up: what else it won is of no use without it, and the thread will begin
    /// again with that page.
    pub fn broken(&self, chain: Chain) {
        if let Some(slot) = self.slots.get(chain.slot as usize) {
            let next = chain.number.wrapping_add(1);
            if slot.number.compare_exchange(chain.number, next, Relaxed, Relaxed).is_ok() {
                slot.since.store(self.now(), Relaxed);
                slot.faults.store(0, Relaxed);
            }
        }
    }

    /// When a page that the chain won at `won` may be given up: now if that is not after `now`, else look
    /// again then.
    pub fn release_at(&self, chain: Chain, won: u64, now: u64) -> u64 {
        let Some(slot) = self.slots.get(chain.slot as usize) else { return won + self.hold };
        let (last, since) = (slot.last.load(Relaxed), slot.since.load(Relaxed));
        if slot.number.load(Relaxed) != chain.number {
            return won + self.hold;
        }
        if slot.waiting.load(Relaxed) > 0 {
            let patient = now.saturating_sub(last) < self.patience(chain);
            // Looking costs time as well: seldom, compared to how long this has been going on.
            let pause = (now.saturating_sub(since) / 4).clamp(self.hold, self.patience(chain).max(self.hold));
            return if patient { now + pause } else { now };
        }
        last + self.keep(slot.faults.load(Relaxed))
    }

    /// How long after its last page a chain of so many faults keeps its pages.
    fn keep(&self, faults: u32) -> u64 {
        (u64::from(faults) * self.round_trip.load(Relaxed)).min(LONGEST.as_nanos() as u64).max(self.hold)
    }

    fn patience(&self, chain: Chain) -> u64 {
        // Nodes count their chains differently, and start theirs at different times.
        let draw = u64::from(chain.number).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.salt;
        let round_trips = PATIENCE[(draw >> 40) as usize % PATIENCE.len()];
        (round_trips * self.round_trip.load(Relaxed)).min(LONGEST.as_nanos() as u64)
    }

    fn find(&self, thread: u32) -> Option<usize> {
        let first = thread as usize % SLOTS;
        (0..8).map(|i| (first + i) % SLOTS).find(|&i| {
            let taken = self.slots[i].thread.compare_exchange(0, thread, Relaxed, Relaxed);
            taken.is_ok() || taken == Err(thread)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1000;

    fn chains() -> Chains {
        Chains::new(Duration::from_micros(100))
    }

    #[test]
    fn a_single_page_is_kept_for_the_hold() {
        let chains = chains();
        let chain = chains.fault(7, 0);
        chains.answered(chain, 20 * US);
        assert_eq!(chains.release_at(chain, 20 * US, 30 * US), 120 * US);
    }

    #[test]
    fn pages_of_a_chain_are_kept_until_the_last_came_and_a_round_trip_for_each() {
        let chains = chains();
        let first = chains.fault(7, 0);
        for i in 1..=10 {
            chains.answered(first, i * 90 * US);
            assert_eq!(chains.fault(7, i * 90 * US + 10 * US), first);
            assert!(chains.release_at(first, 90 * US, i * 90 * US + 20 * US) > i * 90 * US + 20 * US);
        }
        chains.answered(first, 1000 * US);
        assert_eq!(chains.release_at(first, 90 * US, 1100 * US), 2100 * US);
    }

    #[test]
    fn a_fault_long_after_the_last_begins_a_chain_and_frees_the_old_one() {
        let chains = chains();
        let old = chains.fault(7, 0);
        chains.answered(old, 20 * US);
        let new = chains.fault(7, 500 * US);
        assert_ne!(new, old);
        assert!(chains.release_at(old, 20 * US, 500 * US) <= 500 * US);
    }

    #[test]
    fn a_thread_that_faults_for_ever_gives_up_what_it_won_first() {
        let chains = chains();
        let first = chains.fault(7, 0);
        for i in 1..=u64::from(MOST) {
            chains.answered(first, i * 20 * US);
            chains.fault(7, i * 20 * US);
        }
        assert!(chains.release_at(first, 20 * US, 480 * US) <= 480 * US);
    }

    #[test]
    fn threads_have_chains_of_their_own_even_where_their_numbers_collide() {
        let chains = chains();
        let (a, b) = (chains.fault(1, 0), chains.fault(1 + SLOTS as u32, 0));
        assert_ne!(a, b);
        chains.answered(a, 10 * US);
        assert_eq!(chains.release_at(a, 10 * US, 20 * US), 110 * US);
        assert!(chains.release_at(b, 10 * US, 190 * US) > 190 * US);
    }

    #[test]
    fn when_a_page_of_a_chain_goes_the_others_may_go() {
        let chains = chains();
        let chain = chains.fault(7, 0);
        chains.answered(chain, 10 * US);
        chains.fault(7, 20 * US);
        assert!(chains.release_at(chain, 10 * US, 200 * US) > 200 * US);
        chains.broken(chain);
        assert!(chains.release_at(chain, 10 * US, 200 * US) <= 200 * US);
    }

    #[test]
    fn a_vcpu_without_work_keeps_nothing_and_wakes_only_if_somebody_waits() {
        let chains = chains();
        let chain = chains.fault(7, 0);
        chains.answered(chain, 10 * US);
        assert!(chains.release_at(chain, 0, 50 * US) > 100 * US);
        chains.count_deferred(1);
        assert!(chains.idle(7));
        assert_eq!(chains.release_at(chain, 0, 50 * US), 100 * US);
        assert!(!chains.idle(7));
        chains.count_deferred(-1);
        chains.fault(7, 200 * US);
        assert!(!chains.idle(7));
    }

    #[test]
    fn the_round_trip_is_what_a_page_costs_that_nobody_keeps() {
        let chains = chains();
        for _ in 0..1000 {
            chains.took(Duration::from_micros(500));
            chains.took(Duration::from_micros(530));
            chains.took(Duration::from_millis(130));
        }
        let found = chains.round_trip.load(Relaxed) / US;
        assert!((450..=560).contains(&found), "{found}");
    }

    #[test]
    fn who_is_called_out_of_a_wait_and_comes_back_keeps_what_it_has_but_is_not_patient_anew() {
        let chains = chains();
        let chain = chains.fault(7, 0);
        chains.answered(chain, 10 * US);
        let waits = chains.fault(7, 20 * US);
        // The handler of an interrupt needs a page, and has it.
        let handler = chains.fault(7, 30 * US);
        chains.answered(handler, 40 * US);
        assert_eq!(chains.resumed(waits), chain);
        assert!(chains.release_at(chain, 10 * US, 200 * US) > 200 * US);
        let late = 40 * US + PATIENCE[PATIENCE.len() - 1] * 100 * US;
        chains.resumed(waits);
        assert_eq!(chains.release_at(chain, 10 * US, late), late);
    }

    #[test]
    fn a_page_that_comes_while_its_thread_waits_for_another_does_not_end_the_other_wait() {
        let chains = chains();
        let chain = chains.fault(7, 0);
        chains.fault(7, 20 * US);
        chains.answered(chain, 30 * US);
        assert!(chains.release_at(chain, 30 * US, 230 * US) > 230 * US);
    }

    #[test]
    fn a_chain_that_waits_too_long_keeps_nothing() {
        let chains = chains();
        let chain = chains.fault(7, 0);
        chains.answered(chain, 10 * US);
        assert_eq!(chains.fault(7, 20 * US), chain);
        let late = 20 * US + PATIENCE[PATIENCE.len() - 1] * 100 * US;
        assert_eq!(chains.release_at(chain, 10 * US, late), late);
    }
}
