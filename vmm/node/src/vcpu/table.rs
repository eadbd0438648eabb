//! The table of a node's vCPUs: the part of each that other threads reach, such as its mailbox, state and
//! counters.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

use coherence::page::Page;

use super::Mailbox;
use crate::node_msg::Signal;

/// What a vCPU thread is doing.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Waits for a start-up message.
    WaitForSipi,
    /// Executed HLT and waits for an interrupt.
    Halted,
    /// Runs guest code, or works for it.
    Running,
    /// Cannot go on; the machine ends.
    Failed,
    /// Its thread has ended.
    Gone,
}

impl State {
    fn from_u8(value: u8) -> State {
        match value {
            0 => State::WaitForSipi,
            1 => State::Halted,
            2 => State::Running,
            3 => State::Failed,
            _ => State::Gone,
        }
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// What a vCPU did since its start.
        #[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64),+ }

        /// The same, as its thread counts it: one writer, any readers.
        #[derive(Debug, Default)]
        pub(super) struct LiveCounters { $(pub(super) $name: AtomicU64),+ }

        impl LiveCounters {
            fn read(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed)),+ }
            }
        }

        impl Counters {
            /// Names and values, for reports.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),+]
            }

            /// Adds another vCPU's.
            pub fn add(&mut self, other: &Counters) {
                $(self.$name += other.$name;)+
            }
        }
    };
}

counters! {
    /// Entries into the guest.
    entries,
    /// Port accesses.
    pio_exits,
    /// Device memory accesses.
    mmio_exits,
    /// Accesses to MSRs that are ours.
    msr_exits,
    /// HLT.
    halt_exits,
    /// Exits because an interrupt could be injected at last.
    window_exits,
    /// Exits because of a kick.
    kick_exits,
    /// Interrupts injected.
    injected,
    /// NMIs injected.
    nmis,
    /// Inter-processor interrupts sent.
    ipis,
    /// Interrupts of the local APIC timer.
    timer_interrupts,
    /// Instructions carried out elsewhere.
    shipped,
    /// Instructions that were to be carried out elsewhere, and were not.
    not_shipped,
    /// Nanoseconds halted.
    halted_ns,
}

/// Adds to a counter that only the calling thread writes.
pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

/// Of a note that an instruction is to be shipped: the vCPU has touched the page once more since.
const AGAIN: u64 = 1 << 63;

/// One vCPU's shared side.
#[derive(Debug)]
pub struct Slot {
    /// What others leave for it.
    pub mailbox: Mailbox,
    pub(super) counters: LiveCounters,
    /// Set before entering the guest, cleared after: a step of the clock calls those out that are inside.
    pub(super) in_guest: AtomicBool,
    /// The TSC offset that the vCPU runs with.
    pub(super) offset: AtomicU64,
    /// One more than the page whose accessing instruction is to be shipped, and perhaps [`AGAIN`]; 0: none.
    ship: AtomicU64,
    /// One more than the page that must come the next time that it is touched; 0: none.
    pub(super) wants: AtomicU64,
    pub(super) dump_wanted: AtomicBool,
    pub(super) dump: Mutex<Option<String>>,
    state: AtomicU8,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            mailbox: Mailbox::default(),
            counters: LiveCounters::default(),
            in_guest: AtomicBool::new(false),
            offset: AtomicU64::new(0),
            ship: AtomicU64::new(0),
            wants: AtomicU64::new(0),
            dump_wanted: AtomicBool::new(false),
            dump: Mutex::new(None),
            state: AtomicU8::new(State::WaitForSipi as u8),
        }
    }

    /// What its thread is doing.
    pub fn state(&self) -> State {
        State::from_u8(self.state.load(Ordering::Relaxed))
    }

    /// The page whose accessing instruction is to be shipped, if one is.
    pub(super) fn take_ship(&self) -> Option<Page> {
        match self.ship.load(Ordering::SeqCst) {
            0 => None,
            _ => (self.ship.swap(0, Ordering::SeqCst) & !AGAIN).checked_sub(1).map(Page),
        }
    }

    /// A fault of the vCPU on `page` comes; whether it was called out for that page and cannot leave.
    ///
    /// It may have touched the page, after an interrupt say, before it was called out: such a fault is known
    /// only afterwards, and the vCPU is about to look. A second one is of a vCPU that does not leave: KVM's
    /// emulator waits.
    fn is_stuck(&self, page: Page) -> bool {
        let (note, again) = (page.0 + 1, (page.0 + 1) | AGAIN);
        let swap =
            |old, new| self.ship.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        !swap(note, again) && swap(again, 0)
    }

    pub(super) fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }
}

/// What all vCPU threads of the node are to do.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Wish {
    Park,
    Run,
    Stop,
}

/// The shared sides of all vCPUs of this node, by their number within it. Made before the vCPUs, so that the
/// router can know it.
#[derive(Debug)]
pub struct Table {
    slots: Box<[Slot]>,
    wish: AtomicU8,
    /// How many threads are parked or gone; changes are announced on `changed`.
    pub(super) idle: Mutex<Idle>,
    pub(super) changed: Condvar,
}

/// Threads that do not run guest code.
#[derive(Copy, Clone, Debug, Default)]
pub(super) struct Idle {
    pub(super) parked: usize,
    pub(super) gone: usize,
}

impl Table {
    /// For `cpus` vCPUs.
    pub fn new(cpus: usize) -> Table {
        Table {
            slots: (0..cpus).map(|_| Slot::new()).collect(),
            wish: AtomicU8::new(Wish::Park as u8),
            idle: Mutex::new(Idle::default()),
            changed: Condvar::new(),
        }
    }

    /// How many vCPUs this node has.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// A memory-only node.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// All of them.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Leaves `signal` for vCPU `cpu`; a number that does not exist is ignored.
    pub fn post(&self, cpu: u32, signal: Signal) {
        if let Some(slot) = self.slots.get(cpu as usize) {
            slot.mailbox.post(signal);
        }
    }

    /// Each vCPU's counters.
    pub fn counters(&self) -> Vec<Counters> {
        self.slots.iter().map(|slot| slot.counters.read()).collect()
    }

    /// Calls those vCPUs out of the guest that are in it: the clock was stepped.
    pub fn call_out(&self) {
        for slot in self.slots.iter().filter(|slot| slot.in_guest.load(Ordering::SeqCst)) {
            slot.mailbox.kick();
        }
    }

    /// Whether a fault of `thread` on `page` may be answered by [`Table::ship`]: it is a vCPU's, inside the
    /// guest, where a kick ends a wait, and has not said that it needs the page itself.
    pub fn may_ship(&self, thread: u32, page: Page) -> bool {
        let Some(slot) = self.slot_of(thread) else { return false };
        let stuck = slot.is_stuck(page);
        let wants = slot.wants.compare_exchange(page.0 + 1, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        slot.in_guest.load(Ordering::SeqCst) && !wants && !stuck
    }

    /// Has the vCPU whose thread is `thread` called out of its wait for `page`, to have the instruction that
    /// accesses it shipped. `false` if there is no such vCPU in the guest: then the page must come.
    pub fn ship(&self, thread: u32, page: Page) -> bool {
        let slot = self.slot_of(thread).filter(|slot| slot.in_guest.load(Ordering::SeqCst));
        let Some(slot) = slot else { return false };
        // Order: who is called out finds the page. One that was called out for it already stays marked.
        if slot.ship.load(Ordering::SeqCst) != (page.0 + 1) | AGAIN {
            slot.ship.store(page.0 + 1, Ordering::SeqCst);
        }
        slot.mailbox.kick();
        true
    }

    /// Whether the vCPU was called out for `page` and has not looked yet.
    pub fn is_to_ship(&self, thread: u32, page: Page) -> bool {
        self.slot_of(thread).is_some_and(|slot| slot.ship.load(Ordering::SeqCst) & !AGAIN == page.0 + 1)
    }

    fn slot_of(&self, thread: u32) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.mailbox.is_of(thread))
    }

    pub(super) fn wish(&self) -> Wish {
        match self.wish.load(Ordering::SeqCst) {
            0 => Wish::Park,
            1 => Wish::Run,
            _ => Wish::Stop,
        }
    }

    /// Tells all threads what to do. Stop is final.
    pub(super) fn set_wish(&self, wish: Wish) {
        let idle = self.idle();
        if self.wish() != Wish::Stop {
            self.wish.store(wish as u8, Ordering::SeqCst);
        }
        // Under the lock, so that a thread that is about to park sees the wish or the notice.
        drop(idle);
        self.changed.notify_all();
        self.slots.iter().for_each(|slot| slot.mailbox.kick());
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, Idle> {
        base::lock(&self.idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Page = Page(7);

    /// A vCPU of the calling thread, inside the guest.
    fn inside() -> (Table, u32) {
        crate::vcpu::signal::install_handler().unwrap();
        let table = Table::new(1);
        table.slots[0].mailbox.adopt();
        table.slots[0].in_guest.store(true, Ordering::SeqCst);
        (table, base::thread::id() as u32)
    }

    #[test]
    fn a_page_touched_again_before_its_vcpu_was_called_out_is_still_shipped() {
        let (table, thread) = inside();
        assert!(table.may_ship(thread, PAGE));
        // An interrupt ended the wait, the vCPU touched the page once more, and only then is it called out.
        assert!(table.ship(thread, PAGE));
        assert!(table.may_ship(thread, PAGE));
        assert!(table.is_to_ship(thread, PAGE));
        assert_eq!(table.slots[0].take_ship(), Some(PAGE));
        assert!(!table.is_to_ship(thread, PAGE));
    }

    #[test]
    fn a_page_that_a_vcpu_touches_again_and_again_without_looking_must_come() {
        let (table, thread) = inside();
        assert!(table.ship(thread, PAGE));
        assert!(table.may_ship(thread, PAGE));
        assert!(table.ship(thread, PAGE), "it is told once more");
        assert!(!table.may_ship(thread, PAGE));
        assert!(!table.is_to_ship(thread, PAGE));
        // The next time begins from the beginning.
        assert!(table.ship(thread, PAGE) && table.may_ship(thread, PAGE));
    }

    #[test]
    fn a_page_that_a_vcpu_wants_comes_once() {
        let (table, thread) = inside();
        table.slots[0].wants.store(PAGE.0 + 1, Ordering::SeqCst);
        assert!(!table.may_ship(thread, PAGE) && table.may_ship(thread, PAGE));
        assert!(table.may_ship(thread, Page(8)) && !table.may_ship(thread + 1, PAGE));
    }
}
