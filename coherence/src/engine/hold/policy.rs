//! The hold policy: how long a page that a thread won is kept from other nodes.
//!
//! The guarantee is that every thread retires instructions and none starves, and no more: a CPU that won a page only to see
//! that it is not its turn costs the others as much as moving the page costs, and not more.
//!
//! ```text
//!  fault ── mapped ── fault ── mapped │ the thread runs      │ released
//!  ├── it gathers n pages ───────────┤├── n round trips ─────┤
//! ```
//!
//! A *round trip* is what a page costs here that nobody else wants: the lower quartile of such misses. (If it were that of
//! all misses, two nodes that want one page would drive each other's holds up.) A thread that was woken
//! gets on in less, since a miss wakes threads several times; and whoever keeps a page for as long as it takes to move it
//! makes use of about half of the time, whatever that takes on its hardware.
//!
//! One instruction may need many pages at once: its code, its data, and the page tables that lead there (on AMD CPUs, and
//! on Intel's with EPT accessed/dirty bits, a page-table walk needs its pages *writable*). If a node gave up the first of
//! them before the last had come, two nodes could steal from each other without end and neither would retire an
//! instruction. So while a thread gathers, it keeps what it has: a fault belongs to the gathering of the one before if the
//! thread had too little **CPU time** in between to get on, less than half a round trip; the same page, to write it after
//! it was read, counts once. When one page of a gathering goes, the others may go as well: the thread needs that one again
//! before it can get on. A thread that halts, or is called out of its wait, keeps nothing.
//!
//! # Two that wait for each other
//! A thread that has waited for one page for some round trips keeps nothing for it. For how many is drawn for each
//! gathering: two for every second, four for every fourth, eight for every eighth, and so on. So one of the two gives up
//! long before the other, and not always the same; and of many that want the same pages one has about as much patience as
//! all others together, however many they are.
//!
//! # Where that is too short
//! A thread that lost a page before it had its CPU time (its host is busy) keeps the next for twice as long, each time
//! until it gets on, and then half as long again. And every sixteenth time in a row that a thread wants the same page it
//! keeps it for twice as long, every 256th time for four times, and so on: in the mean that is a tenth more, and no thread
//! whose instruction takes longer than was measured starves.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::page::Page;

/// For how many round trips a gathering keeps what it won while it waits, at least.
const PATIENCE: u64 = 2;
/// The longest that anything is kept after the last page of its gathering came, and that a gathering is patient.
const LONGEST: u64 = 200_000_000;
/// No instruction needs more pages than this: after so many a thread has got on, and a gathering begins.
const MOST: u32 = 24;
/// Threads that are told apart; what further ones win is not kept.
const SLOTS: usize = 4096;
/// The shortest time between two looks at a page that somebody waits for, in nanoseconds.
const LOOK: u64 = 2_000;
/// How often a doubling may be doubled.
const DOUBLINGS: u32 = 10;

/// CPU time that a thread has used, in nanoseconds; `None` if there is no such thread.
pub type CpuTime<'a> = &'a dyn Fn(u32) -> Option<u64>;

/// What is known of all threads of a node, shared by its shards.
pub struct HoldPolicy {
    start: Instant,
    /// Differs from node to node.
    salt: u64,
    least: u64,
    /// Demands that wait for pages that are kept.
    deferred: AtomicI32,
    /// What a page costs that nobody else wants, in nanoseconds: the lower quartile of such misses, followed step by
    /// step.
    round_trip: AtomicU64,
    slots: Box<[Slot]>,
}

/// One thread. Times are nanoseconds since the engine's start. Shards may write it at the same time; a mix of
/// two writes only makes a page be kept for a little too long or too short.
#[derive(Default)]
struct Slot {
    thread: AtomicU32,
    /// Counts gatherings.
    number: AtomicU32,
    /// When the gathering's first fault came.
    since: AtomicU64,
    /// When its last fault came or was answered.
    last: AtomicU64,
    /// Its CPU time then.
    cpu: AtomicU64,
    /// 1 while a fault waits.
    waiting: AtomicU32,
    /// Pages of the gathering so far.
    pages: AtomicU32,
    /// The page of the last fault, and how often in a row it was wanted.
    page: AtomicU64,
    again: AtomicU32,
    /// 1 if a page went since the last fault was answered.
    lost: AtomicU32,
    /// How often it lost a page before it got on, less how often it got on.
    failures: AtomicU32,
    /// `last` when the thread was idle last.
    idle_at: AtomicU64,
}

/// A gathering of some thread.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    slot: u32,
    number: u32,
}

impl Claim {
    /// That of nobody known.
    pub const NONE: Claim = Claim { slot: u32::MAX, number: 0 };

    /// Whether both are of one thread.
    pub fn same_thread(self, other: Claim) -> bool {
        self.slot == other.slot
    }
}

impl HoldPolicy {
    /// What a thread won is kept for `least`, even if less would do by what was measured.
    pub fn new(least: Duration) -> HoldPolicy {
        HoldPolicy::with_salt(least, RandomState::new().hash_one(0))
    }

    /// The same, with a salt that decides what is drawn.
    pub fn with_salt(least: Duration, salt: u64) -> HoldPolicy {
        let slots = (0..SLOTS).map(|_| Slot::default()).collect();
        HoldPolicy {
            start: Instant::now(),
            salt,
            least: least.as_nanos() as u64,
            deferred: AtomicI32::new(0),
            round_trip: AtomicU64::new(100_000),
            slots,
        }
    }

    /// The miss of a page that nobody else wants took so long.
    pub fn took(&self, miss: Duration) {
        let old = self.round_trip.load(Relaxed);
        let step = (old / 64).max(1);
        let below = (miss.as_nanos() as u64) < old;
        // Three steps down for each up: in balance where three times as many misses take longer.
        let new = if below { old.saturating_sub(3 * step) } else { old + step };
        self.round_trip.store(new.clamp(1000, LONGEST), Relaxed);
    }

    /// Nanoseconds since the engine's start.
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// A thread waits for a page: the gathering to which that belongs.
    pub fn fault(&self, thread: u32, page: Page, now: u64, cpu: CpuTime<'_>) -> Claim {
        let Some(index) = self.find(thread) else { return Claim::NONE };
        let slot = &self.slots[index];
        let cpu = cpu(thread).unwrap_or(0);
        let ran = cpu.saturating_sub(slot.cpu.swap(cpu, Relaxed));
        slot.last.store(now, Relaxed);
        let same_page = slot.page.swap(page.0, Relaxed) == page.0;
        if slot.waiting.swap(1, Relaxed) == 0 {
            let lost = slot.lost.swap(0, Relaxed) > 0;
            let pages = slot.pages.load(Relaxed);
            let got_on = ran >= self.enough();
            let failures = slot.failures.load(Relaxed);
            if got_on {
                slot.failures.store(failures.saturating_sub(1), Relaxed);
            } else if lost {
                slot.failures.store((failures + 1).min(DOUBLINGS), Relaxed);
            }
            if got_on || pages >= MOST || pages == 0 {
                self.begin(slot, now);
            }
            let again = if same_page { slot.again.load(Relaxed).wrapping_add(1) } else { 0 };
            slot.again.store(again, Relaxed);
            if !same_page || slot.pages.load(Relaxed) == 0 {
                slot.pages.fetch_add(1, Relaxed);
            }
        }
        Claim { slot: index as u32, number: slot.number.load(Relaxed) }
    }

    /// A thread that was called out of its wait for the page, which began at `since`, waits for it again: the gathering to
    /// which that belongs now. Faults in between, of an interrupt's handler, were faults of the same thread.
    pub fn fault_again(&self, claim: Claim, page: Page, since: u64) -> Claim {
        let Some(slot) = self.slots.get(claim.slot as usize) else { return Claim::NONE };
        slot.page.store(page.0, Relaxed);
        slot.last.store(since, Relaxed);
        slot.waiting.store(1, Relaxed);
        Claim { number: slot.number.load(Relaxed), ..claim }
    }

    /// The page that the thread of `claim` waits for is mapped: the claim with which it is kept.
    pub fn mapped(&self, claim: Claim, page: Page, now: u64) -> Claim {
        let Some(slot) = self.slots.get(claim.slot as usize) else { return Claim::NONE };
        // One that was called out of this wait may wait for another page meanwhile.
        if slot.page.load(Relaxed) == page.0 {
            slot.last.store(now, Relaxed);
            slot.waiting.store(0, Relaxed);
        }
        if slot.pages.load(Relaxed) == 0 {
            // What it had gathered went meanwhile.
            slot.pages.store(1, Relaxed);
        }
        Claim { number: slot.number.load(Relaxed), ..claim }
    }

    /// The thread's vCPU has nothing to do, or was called out of its wait: it keeps nothing. Whether somebody may be
    /// waiting for what it kept; the shards must be woken then.
    pub fn idle(&self, thread: u32) -> bool {
        let Some(slot) = self.find(thread).map(|index| &self.slots[index]) else { return false };
        let last = slot.last.load(Relaxed);
        // One that has not faulted since it was idle last keeps nothing already.
        if slot.idle_at.swap(last, Relaxed) == last {
            return false;
        }
        self.begin(slot, last);
        self.deferred.load(Relaxed) > 0
    }

    /// A demand waits for a page of this node that is kept, or (`-1`) waits no more.
    pub fn count_deferred(&self, change: i32) {
        self.deferred.fetch_add(change, Relaxed);
    }

    /// A page of the gathering was given up: what else it won is of no use without it, and the thread will begin
    /// with that page.
    pub fn lost(&self, claim: Claim, now: u64) {
        if let Some(slot) = self.slots.get(claim.slot as usize)
            && slot.number.load(Relaxed) == claim.number
        {
            if slot.waiting.load(Relaxed) == 0 {
                slot.lost.store(1, Relaxed);
            }
            self.begin(slot, now);
        }
    }

    /// When a page that was won with the claim may be given up: now if that is not after `now`, else look again then.
    pub fn look(&self, claim: Claim, now: u64) -> u64 {
        let Some(slot) = self.slots.get(claim.slot as usize) else { return now };
        if slot.number.load(Relaxed) != claim.number {
            return now;
        }
        let kept = now.saturating_sub(slot.last.load(Relaxed));
        if slot.waiting.load(Relaxed) > 0 {
            let patience = self.patience(claim);
            // Looking costs time as well: seldom, compared to how long this has been going on.
            let pause = (now.saturating_sub(slot.since.load(Relaxed)) / 4).clamp(LOOK, patience.max(LOOK));
            return if kept < patience { now + pause } else { now };
        }
        now + self.grant(slot).saturating_sub(kept)
    }

    /// The CPU time after which a thread has got on with what it has, and what a page costs that nobody keeps.
    pub fn measured(&self) -> (Duration, Duration) {
        (Duration::from_nanos(self.enough()), Duration::from_nanos(self.round_trip.load(Relaxed)))
    }

    /// When a page that was won now is worth a first look.
    pub fn first_look(&self, claim: Claim, now: u64) -> u64 {
        self.slots.get(claim.slot as usize).map_or(now, |slot| now + self.grant(slot))
    }

    /// How long a thread keeps what it gathered after the last page of it came, in nanoseconds.
    fn grant(&self, slot: &Slot) -> u64 {
        let pages = u64::from(slot.pages.load(Relaxed).max(1));
        let again = slot.again.load(Relaxed);
        // Every 16th time twice, every 256th four times, ...
        let doublings = if again == 0 { 0 } else { again.trailing_zeros() / 4 };
        let doublings = (doublings + slot.failures.load(Relaxed)).min(DOUBLINGS);
        ((pages * self.round_trip.load(Relaxed)).max(self.least) << doublings).min(LONGEST)
    }

    /// The CPU time after which a thread has got on with what it has, in nanoseconds.
    pub fn enough(&self) -> u64 {
        self.round_trip.load(Relaxed) / 2
    }

    fn patience(&self, claim: Claim) -> u64 {
        // Nodes count their gatherings differently, and start theirs at different times.
        let draw = u64::from(claim.number).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.salt;
        let draw = (draw ^ draw >> 32).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
        let round_trips = PATIENCE << draw.trailing_zeros().min(DOUBLINGS);
        (round_trips * self.round_trip.load(Relaxed)).min(LONGEST)
    }

    /// A gathering begins.
    fn begin(&self, slot: &Slot, now: u64) {
        slot.number.fetch_add(1, Relaxed);
        slot.since.store(now, Relaxed);
        slot.pages.store(0, Relaxed);
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

    /// CPU time `cpu` of thread 7.
    fn at(cpu: u64) -> impl Fn(u32) -> Option<u64> {
        move |_| Some(cpu)
    }

    /// A round trip is 100 us, and 50 us of CPU time are enough.
    fn policy() -> HoldPolicy {
        HoldPolicy::with_salt(Duration::ZERO, 0)
    }

    fn win(policy: &HoldPolicy, page: u64, now: u64, cpu: u64) -> Claim {
        let claim = policy.fault(7, Page(page), now, &at(cpu));
        policy.mapped(claim, Page(page), now)
    }

    #[test]
    fn a_page_that_came_alone_is_kept_for_a_round_trip() {
        let policy = policy();
        let claim = win(&policy, 1, 0, 0);
        assert_eq!(policy.first_look(claim, 0), 100 * US);
        assert_eq!(policy.look(claim, 50 * US), 100 * US);
        assert_eq!(policy.look(claim, 110 * US), 110 * US);
    }

    #[test]
    fn a_thread_that_had_no_cpu_keeps_a_page_for_longer_until_it_gets_on() {
        let policy = policy();
        let mut cpu = 0;
        let mut keeps = |cpu_before: u64| {
            cpu += cpu_before;
            let claim = win(&policy, 1, 0, cpu);
            policy.lost(claim, 0);
            policy.first_look(claim, 0) / (100 * US)
        };
        assert_eq!([0, 0, 0, 60 * US, 60 * US, 60 * US, 60 * US].map(&mut keeps), [1, 2, 4, 2, 1, 1, 1]);
    }

    #[test]
    fn what_is_gathered_is_kept_while_the_thread_waits_and_a_round_trip_for_each_page() {
        let policy = policy();
        let first = win(&policy, 1, 0, 0);
        for page in 2..=5 {
            let claim = policy.fault(7, Page(page), page * 90 * US, &at(page * 20 * US));
            assert_eq!(claim, first);
            assert!(policy.look(first, page * 90 * US + 50 * US) > page * 90 * US + 50 * US);
            policy.mapped(claim, Page(page), page * 90 * US + 80 * US);
        }
        assert_eq!(policy.first_look(first, 600 * US), 600 * US + 5 * 100 * US);
    }

    #[test]
    fn a_thread_that_had_time_to_get_on_begins_to_gather_and_keeps_no_longer_what_it_had() {
        let policy = policy();
        let old = win(&policy, 1, 0, 0);
        let new = win(&policy, 2, 60 * US, 55 * US);
        assert_ne!(new, old);
        assert_eq!(policy.look(old, 60 * US), 60 * US);
        assert_eq!(policy.first_look(new, 60 * US), 160 * US);
    }

    #[test]
    fn the_same_page_to_write_after_reading_it_counts_once() {
        let policy = policy();
        win(&policy, 1, 0, 0);
        let claim = win(&policy, 1, 100 * US, US);
        assert_eq!(policy.first_look(claim, 100 * US), 200 * US);
    }

    #[test]
    fn a_thread_that_gathers_without_end_gives_up_what_it_won_first() {
        let policy = policy();
        let first = win(&policy, 1, 0, 0);
        for page in 2..=u64::from(MOST) + 1 {
            win(&policy, page, page * 90 * US, page * 2 * US);
        }
        assert_eq!(policy.look(first, 9000 * US), 9000 * US);
    }

    #[test]
    fn threads_gather_apart_even_where_their_numbers_collide() {
        let policy = policy();
        let a = policy.fault(1, Page(1), 0, &at(0));
        let b = policy.fault(1 + SLOTS as u32, Page(2), 0, &at(0));
        assert!(!a.same_thread(b));
    }

    #[test]
    fn when_a_page_goes_the_others_of_its_gathering_may_go() {
        let policy = policy();
        let claim = win(&policy, 1, 0, 0);
        policy.fault(7, Page(2), 20 * US, &at(US));
        assert!(policy.look(claim, 40 * US) > 40 * US);
        policy.lost(claim, 40 * US);
        assert_eq!(policy.look(claim, 40 * US), 40 * US);
    }

    #[test]
    fn a_page_that_comes_after_another_went_is_kept_all_the_same() {
        let policy = policy();
        let claim = win(&policy, 1, 0, 0);
        let waits = policy.fault(7, Page(2), 20 * US, &at(US));
        policy.lost(claim, 40 * US);
        let claim = policy.mapped(waits, Page(2), 60 * US);
        assert_eq!(policy.look(claim, 61 * US), 160 * US);
    }

    #[test]
    fn a_vcpu_without_work_keeps_nothing_and_wakes_only_if_somebody_waits() {
        let policy = policy();
        let claim = win(&policy, 1, 10 * US, 0);
        policy.count_deferred(1);
        assert!(policy.idle(7));
        assert_eq!(policy.look(claim, 11 * US), 11 * US);
        assert!(!policy.idle(7));
        policy.count_deferred(-1);
        win(&policy, 2, 200 * US, 0);
        assert!(!policy.idle(7));
    }

    #[test]
    fn a_page_wanted_again_and_again_is_kept_longer_now_and_then() {
        let policy = policy();
        let grants: Vec<u64> = (0..1024)
            .map(|i| policy.first_look(win(&policy, 1, i * 200 * US, i * 100 * US), 0) / (100 * US))
            .collect();
        assert_eq!(
            (grants[0], grants[1], grants[15], grants[16], grants[17], grants[256]),
            (1, 1, 1, 2, 1, 4)
        );
        assert!(grants.iter().sum::<u64>() < 1024 * 11 / 10);
    }

    #[test]
    fn the_round_trip_is_what_a_page_costs_that_nobody_keeps() {
        let policy = policy();
        for _ in 0..1000 {
            policy.took(Duration::from_micros(500));
            policy.took(Duration::from_micros(530));
            policy.took(Duration::from_millis(130));
        }
        let found = policy.round_trip.load(Relaxed) / US;
        assert!((450..=560).contains(&found), "{found}");
    }

    #[test]
    fn a_gathering_that_waits_too_long_keeps_nothing() {
        let policy = policy();
        let claim = win(&policy, 1, 0, 0);
        policy.fault(7, Page(2), 20 * US, &at(US));
        let late = 20 * US + (PATIENCE << DOUBLINGS) * 100 * US;
        assert_eq!(policy.look(claim, late), late);
    }
}
