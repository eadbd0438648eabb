//! Shipping at a node, between a vCPU that was called out of its wait, the decoder of instructions, and the
//! coherence engine.
//!
//! ```text
//!  engine: the page stays ── call_out ──> the vCPU leaves KVM_RUN
//!                                         begin: instruction::ship ─> Engine::operate
//!  engine: answered ───────── kick ─────> poll: Completion::finish ─> registers
//! ```
//! What the decoder reads of the guest, page tables and code, it reads from pages that this node maps at that
//! moment. One that has just gone is as good as one that a CPU has in its TLB: the vCPU stands still and has
//! answered no shootdown since. So it is enough that a page was mapped during the whole of the reading, which
//! the shard's count of pages that it took away shows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use coherence::engine::Engine;
use coherence::engine::vcpus::Vcpus;
use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use firmware::layout::RamRange;

use crate::instruction::{self, Completion, Cpu, GuestPhysical, Refusal};
use crate::vcpu::ship::{Shipment, Shipped, Stopped};
use crate::vcpu::{Shipper, Table};

/// Where the answer to a vCPU's operation is left.
#[derive(Default)]
struct Answer {
    /// 0: none yet, 1: done, 2: not done.
    state: AtomicU32,
    old: [AtomicU64; 2],
}

const NONE: u32 = 0;
const DONE: u32 = 1;
const NOT_DONE: u32 = 2;

impl Answer {
    fn put(&self, old: Option<u128>) {
        let value = old.unwrap_or(0);
        self.old[0].store(value as u64, Ordering::Relaxed);
        self.old[1].store((value >> 64) as u64, Ordering::Relaxed);
        self.state.store(if old.is_some() { DONE } else { NOT_DONE }, Ordering::Release);
    }

    /// `None` if there is none; else what was there before, if it was done.
    fn take(&self) -> Option<Option<u128>> {
        match self.state.swap(NONE, Ordering::Acquire) {
            NONE => None,
            DONE => {
                let half = |i: usize| u128::from(self.old[i].load(Ordering::Relaxed));
                Some(Some(half(0) | half(1) << 64))
            }
            _ => Some(None),
        }
    }
}

/// How much of what was to be shipped was, and why the rest was not.
#[derive(Debug, Default)]
pub struct Refusals([AtomicU64; REASONS.len()]);

/// What refusals are counted as.
pub const REASONS: [&str; 8] = [
    "not_shipped_mode",
    "not_shipped_event",
    "not_shipped_debugged",
    "not_shipped_code",
    "not_shipped_instruction",
    "not_shipped_operand",
    "not_shipped_other_page",
    "not_shipped_marks",
];

impl Refusals {
    fn count(&self, refusal: Refusal) {
        let reason = match refusal {
            Refusal::Mode => 0,
            Refusal::Event => 1,
            Refusal::SingleStep | Refusal::Breakpoint => 2,
            Refusal::Fetch(_) | Refusal::CodeAbsent | Refusal::Truncated => 3,
            Refusal::Undecodable | Refusal::Unknown | Refusal::NoOperand => 4,
            Refusal::CrossesPage | Refusal::SplitLock | Refusal::Misaligned | Refusal::Operand(_) => 5,
            Refusal::OtherPage => 6,
            Refusal::Marks => 7,
        };
        self.0[reason].fetch_add(1, Ordering::Relaxed);
    }

    /// Names and numbers, for reports.
    pub fn list(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.into_iter().zip(&self.0).map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

/// What all vCPUs of a node have in common for shipping.
pub struct Shipping {
    engine: Arc<Engine>,
    memory: Arc<DualMemory>,
    ranges: Vec<RamRange>,
    physical_bits: u8,
    desk: Arc<Desk>,
    refusals: Refusals,
}

/// The side of it that the engine calls.
pub struct Desk {
    table: Arc<Table>,
    /// Whether this host can call vCPUs out of their waits.
    can_call_out: bool,
    answers: Box<[Answer]>,
}

impl Desk {
    /// For the vCPUs of `table`, which ship nothing unless this host `can_call_out`.
    pub fn new(table: Arc<Table>, can_call_out: bool) -> Desk {
        let answers = (0..table.len()).map(|_| Answer::default()).collect();
        Desk { table, can_call_out, answers }
    }
}

impl Vcpus for Desk {
    fn may_ship(&self, thread: u32, page: Page) -> bool {
        self.can_call_out && self.table.may_ship(thread, page)
    }

    fn call_out(&self, thread: u32, page: Page) -> bool {
        self.table.ship(thread, page)
    }

    fn is_called(&self, thread: u32, page: Page) -> bool {
        self.table.is_to_ship(thread, page)
    }

    fn answered(&self, token: u32, old: Option<u128>) {
        if let Some((answer, slot)) =
            self.answers.get(token as usize).zip(self.table.slots().get(token as usize))
        {
            answer.put(old);
            slot.mailbox.kick();
        }
    }
}

impl Shipping {
    /// For the vCPUs of `desk`, whose guest has RAM at `ranges` and so many bits of a physical address.
    pub fn new(
        engine: Arc<Engine>,
        memory: Arc<DualMemory>,
        ranges: &[RamRange],
        physical_bits: u8,
        desk: Arc<Desk>,
    ) -> Shipping {
        let ranges = ranges.to_vec();
        Shipping { engine, memory, ranges, physical_bits, desk, refusals: Refusals::default() }
    }

    /// Why instructions were not shipped, and how often.
    pub fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    fn address(&self, page: Page) -> Option<u64> {
        let offset = page.0 * PAGE_SIZE as u64;
        let range =
            self.ranges.iter().find(|range| (range.offset..range.offset + range.len).contains(&offset))?;
        Some(range.gpa + (offset - range.offset))
    }

    /// The RAM page at a guest-physical address, and where in it that is.
    fn place(&self, gpa: u64) -> Option<(Page, usize)> {
        let range = self.ranges.iter().find(|range| (range.gpa..range.gpa + range.len).contains(&gpa))?;
        let offset = range.offset + (gpa - range.gpa);
        Some((Page(offset / PAGE_SIZE as u64), (offset % PAGE_SIZE as u64) as usize))
    }
}

impl GuestPhysical for Shipping {
    fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let Some((page, offset)) = self.place(address) else { return false };
        // Order: mapped after the count was taken, and the count the same after the reading: mapped all the
        // while.
        let before = self.engine.withdrawals(page);
        let read = self.memory.is_mapped(page) && self.memory.read_at(page, offset, bytes);
        fence(Ordering::Acquire);
        read && self.engine.withdrawals(page) == before
    }
}

impl Shipper for Shipping {
    fn begin(&self, cpu: u32, stopped: &Stopped, page: Page) -> Option<Box<dyn Shipment>> {
        let Stopped { regs, sregs, events, dr7 } = stopped;
        let state = Cpu::from_kvm(regs, sregs, events, *dr7, self.physical_bits);
        match instruction::ship(&state, self, self.address(page)?) {
            Ok(instruction::Shipment { operation, completion }) => {
                let desk = self.desk.clone();
                // Nothing of an operation whose vCPU was reset meanwhile may be taken for this one's.
                desk.answers.get(cpu as usize)?.take();
                self.engine.operate(page, cpu, operation);
                Some(Box::new(UnderWay { desk, cpu, state, completion }))
            }
            Err(refusal) => {
                self.refusals.count(refusal);
                None
            }
        }
    }
}

/// An instruction whose operation was sent.
struct UnderWay {
    desk: Arc<Desk>,
    cpu: u32,
    state: Cpu,
    completion: Completion,
}

impl Shipment for UnderWay {
    fn poll(&mut self) -> Option<Shipped> {
        let answer = self.desk.answers.get(self.cpu as usize)?.take()?;
        Some(match answer {
            Some(old) => {
                self.completion.finish(old, &mut self.state);
                Shipped::Done(Box::new(self.state.to_kvm()))
            }
            None => Shipped::NotDone,
        })
    }
}
