//! Carrying an instruction out elsewhere, while its vCPU waits for the page that it accesses.
//!
//! ```text
//!  the page is to stay where it is: Table::ship ──> slot, kick
//!    KVM_RUN returns, RIP on the instruction ──> Shipper::begin
//!      ├─ None ──> the page moves after all; the vCPU enters again and waits
//!      └─ under way ── Shipment::poll, after each kick ──> done: the registers are set
//!                                                     └──> not done: the vCPU enters again
//! ```
//! The registers change only when the answer is here. Until then the vCPU stands still: it shows its
//! registers to who asks and ends if it must; a pause waits for the answer, so that nobody sees the
//! instruction done in memory and not in the registers. Interrupts are taken at the next entry, before the
//! instruction or after it, as they come.
//!
//! A node has a [`Shipper`] only where the machine ships (`ship` in the machine file).

use std::sync::atomic::Ordering;

use coherence::page::Page;
use kvm_bindings::{KVM_VCPUEVENT_VALID_SHADOW, kvm_regs, kvm_sregs, kvm_vcpu_events};

use super::run::{Cpu, End, LONGEST_SLEEP};
use super::signal;
use super::table::{State, Wish, count};
use crate::kvm::KvmError;

/// So many instructions in a row that were not done elsewhere, since their pages were just moving, and the
/// next has its page.
const TRIES: u32 = 4;

/// A vCPU outside the guest, between two instructions as far as the guest can tell.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// What is on its way to the guest.
    pub events: kvm_vcpu_events,
    /// Debug register 7.
    pub dr7: u64,
}

/// Carries instructions out where their operands are.
pub trait Shipper: Send + Sync {
    /// Begins to carry out the instruction at which vCPU `cpu` (its number within this node) stands, waiting
    /// for `page`. When there is an answer the vCPU is kicked. `None`: the page moves instead, or has come.
    fn begin(&self, cpu: u32, stopped: &Stopped, page: Page) -> Option<Box<dyn Shipment>>;
}

/// An instruction under way.
pub trait Shipment: Send {
    /// What became of it, once that is known.
    fn poll(&mut self) -> Option<Shipped>;
}

/// What became of an instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Shipped {
    /// It is done, once; these are the registers after it.
    Done(Box<kvm_regs>),
    /// It was not done and will not be.
    NotDone,
}

impl Cpu {
    /// Ships the instruction at which the vCPU stands, if somebody asked for that.
    pub(super) fn ship_if_asked(&mut self) -> Result<(), End> {
        let Some(page) = self.slot().take_ship() else { return Ok(()) };
        // One that does not run, or whose instruction is half done, does not wait for a page any more.
        if self.state != State::Running || self.incomplete {
            return Ok(());
        }
        let Some(shipper) = self.env.shipper.clone() else { return Ok(()) };
        let stopped = self.stopped()?;
        let Some(shipment) = shipper.begin(self.local, &stopped, page) else {
            count(&self.slot().counters.not_shipped, 1);
            self.want(page);
            return Ok(());
        };
        match self.await_answer(shipment)? {
            Shipped::Done(regs) => {
                self.kvm.set_regs_at_entry(&regs)?;
                if stopped.events.interrupt.shadow != 0 {
                    // STI's or MOV SS's shadow is one instruction long.
                    let mut events = stopped.events;
                    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
                    events.interrupt.shadow = 0;
                    self.kvm.set_events(&events)?;
                }
                count(&self.slot().counters.shipped, 1);
                self.in_vain = 0;
            }
            Shipped::NotDone => {
                count(&self.slot().counters.not_shipped, 1);
                self.in_vain += 1;
                if self.in_vain >= TRIES {
                    self.want(page);
                }
            }
        }
        Ok(())
    }

    /// The page must come the next time that the vCPU touches it.
    fn want(&mut self, page: Page) {
        self.slot().wants.store(page.0 + 1, Ordering::SeqCst);
        self.in_vain = 0;
    }

    fn stopped(&mut self) -> Result<Stopped, KvmError> {
        let regs = match self.kvm.regs_at_exit() {
            Some(regs) => regs,
            None => self.kvm.regs()?,
        };
        Ok(Stopped { regs, sregs: self.kvm.sregs()?, events: self.kvm.events()?, dr7: self.kvm.dr7()? })
    }

    fn await_answer(&mut self, mut shipment: Box<dyn Shipment>) -> Result<Shipped, End> {
        loop {
            // Order: from here on whoever has news kicks; then look for what is there already.
            self.slot().mailbox.doze();
            if let Some(shipped) = shipment.poll() {
                return Ok(shipped);
            }
            if self.table.wish() == Wish::Stop {
                return Err(End::Stopped);
            }
            self.answer_dump();
            if signal::wait(LONGEST_SLEEP) == signal::Woken::Timer {
                self.armed = None;
            }
        }
    }
}
