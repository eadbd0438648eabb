//! Shipping for the litmus tests' vCPUs: what they do with pages that are delegated is carried out at the
//! pages' owners.
//!
//! It is production's but for the vCPU's loop, which here has no interrupts and no stops: a [`Desk`] for each
//! node, at which its engine leaves notes, and a [`Shipper`] for each vCPU, which looks for them when it was
//! kicked.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coherence::engine::Engine;
use coherence::engine::vcpus::Vcpus;
use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use vmm::instruction::{self, Cpu, GuestPhysical, Shipment};
use vmm::kvm::{HostCpu, Vcpu};
use vmm::vcpu::signal;

/// An operation that is not answered for this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// So many instructions in a row that were not done elsewhere, and the next has its page.
const TRIES: u32 = 4;

/// What a node's engine and its vCPUs tell each other.
pub struct Desk(Vec<Slot>);

/// One vCPU's part of it.
#[derive(Default)]
struct Slot {
    /// Its thread's id; 0 before it runs.
    thread: AtomicI32,
    /// One more than the page whose accessing instruction is to be shipped; 0: none.
    note: AtomicU64,
    /// One more than the page that must come the next time that it is touched; 0: none.
    wants: AtomicU64,
    answer: Mutex<Option<Option<u128>>>,
    answered: Condvar,
}

impl Desk {
    /// For so many vCPUs.
    pub fn new(cpus: usize) -> Desk {
        Desk((0..cpus).map(|_| Slot::default()).collect())
    }

    fn slot(&self, thread: u32) -> Option<&Slot> {
        self.0.iter().find(|slot| slot.thread.load(SeqCst) as u32 == thread)
    }
}

impl Vcpus for Desk {
    fn may_ship(&self, thread: u32, page: Page) -> bool {
        let wants = |slot: &Slot| slot.wants.compare_exchange(page.0 + 1, 0, SeqCst, SeqCst).is_ok();
        self.slot(thread).is_some_and(|slot| !wants(slot))
    }

    fn call_out(&self, thread: u32, page: Page) -> bool {
        let Some(slot) = self.slot(thread) else { return false };
        // Order: who is called out finds the note.
        slot.note.store(page.0 + 1, SeqCst);
        signal::send(thread as i32);
        true
    }

    fn is_called(&self, thread: u32, page: Page) -> bool {
        self.slot(thread).is_some_and(|slot| slot.note.load(SeqCst) == page.0 + 1)
    }

    fn answered(&self, token: u32, old: Option<u128>) {
        if let Some(slot) = self.0.get(token as usize) {
            *slot.answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(old);
            slot.answered.notify_all();
        }
    }
}

/// Ships what one vCPU does.
pub struct Shipper {
    desk: Arc<Desk>,
    /// The vCPU's number on its node.
    cpu: usize,
    engine: Arc<Engine>,
    memory: Arc<DualMemory>,
    physical_bits: u8,
    in_vain: u32,
}

impl Shipper {
    /// For vCPU `cpu` of a node, which is the calling thread's from now on.
    ///
    /// # Errors
    /// The host does not say how wide its addresses are.
    pub fn new(
        host: &HostCpu,
        desk: Arc<Desk>,
        cpu: usize,
        engine: Arc<Engine>,
        memory: Arc<DualMemory>,
    ) -> Result<Shipper> {
        let sizes = host.cpuid.iter().find(|entry| entry.leaf == 0x8000_0008);
        let physical_bits = sizes.context("CPUID does not say how wide addresses are")?.eax as u8;
        desk.0[cpu].thread.store(base::thread::id(), SeqCst);
        Ok(Shipper { desk, cpu, engine, memory, physical_bits, in_vain: 0 })
    }

    /// The vCPU was kicked: ships the instruction at which it stands, if that is what it was kicked for.
    ///
    /// # Errors
    /// What KVM says, or no answer comes.
    pub fn look(&mut self, vcpu: &mut Vcpu) -> Result<()> {
        let slot = &self.desk.0[self.cpu];
        let Some(page) = slot.note.swap(0, SeqCst).checked_sub(1).map(Page) else { return Ok(()) };
        let (regs, sregs, events) = (vcpu.regs()?, vcpu.sregs()?, vcpu.events()?);
        let mut state = Cpu::from_kvm(&regs, &sregs, &events, vcpu.dr7()?, self.physical_bits);
        let Ok(Shipment { operation, completion }) =
            instruction::ship(&state, &*self, page.0 * PAGE_SIZE as u64)
        else {
            slot.wants.store(page.0 + 1, SeqCst);
            return Ok(());
        };
        *slot.answer.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.engine.operate(page, self.cpu as u32, operation);
        let answer = slot.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut answer, _) = slot
            .answered
            .wait_timeout_while(answer, PATIENCE, |answer| answer.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match answer.take() {
            Some(Some(old)) => {
                completion.finish(old, &mut state);
                vcpu.set_regs(&state.to_kvm())?;
                self.in_vain = 0;
            }
            Some(None) => {
                self.in_vain += 1;
                if self.in_vain >= TRIES {
                    slot.wants.store(page.0 + 1, SeqCst);
                    self.in_vain = 0;
                }
            }
            None => bail!("an operation on page {:#x} got no answer for {PATIENCE:?}", page.0),
        }
        Ok(())
    }
}

impl GuestPhysical for Shipper {
    fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let (page, offset) = (Page(address / PAGE_SIZE as u64), address as usize % PAGE_SIZE);
        if page.offset() >= self.memory.len() {
            return false;
        }
        // Mapped after the count was taken, and the count the same after the reading: mapped all the while.
        let before = self.engine.withdrawals(page);
        let read = self.memory.is_mapped(page) && self.memory.read_at(page, offset, bytes);
        fence(SeqCst);
        read && self.engine.withdrawals(page) == before
    }
}
