//! The exits: what is done about each reason to leave the guest.

use super::Space;
use super::msr::{self, Answer};
use super::report;
use super::run::{Cpu, End};
use super::table::{State, count};
use crate::kvm::Exit;
use crate::trace;
use devices::irq::Effect;
use devices::irq::lapic::{self, Lapic};

/// Refused MSR accesses that are logged, for each vCPU.
const LOGGED_MSRS: u32 = 32;

impl Cpu {
    /// Handles an exit. Afterwards the vCPU may be entered again, unless it halts.
    pub(super) fn handle(&mut self, exit: Exit) -> Result<(), End> {
        trace::event(
            trace::Event::Exit,
            u64::from(self.vcpu) << 32 | u64::from(exit.reason()),
            exit.detail(),
        );
        self.remember(exit);
        self.incomplete = exit.needs_completion();
        match exit {
            Exit::Pio { port, size, count: times, write } => {
                count(&self.slot().counters.pio_exits, u64::from(times));
                self.pio(port, size, write);
            }
            Exit::Mmio { addr, len, data } => {
                count(&self.slot().counters.mmio_exits, 1);
                self.mmio(addr, usize::from(len), data);
            }
            Exit::ReadMsr { index } => {
                count(&self.slot().counters.msr_exits, 1);
                self.read_msr(index);
            }
            Exit::WriteMsr { index, value } => {
                count(&self.slot().counters.msr_exits, 1);
                self.write_msr(index, value);
            }
            Exit::Halt => {
                count(&self.slot().counters.halt_exits, 1);
                self.halted_enabled = self.kvm.interrupt_flag();
                self.state = State::Halted;
                self.slot().set_state(State::Halted);
            }
            Exit::WindowOpen => count(&self.slot().counters.window_exits, 1),
            Exit::Interrupted | Exit::TaskPriority => {}
            Exit::Shutdown
            | Exit::FailEntry { .. }
            | Exit::InternalError { .. }
            | Exit::SystemEvent { .. }
            | Exit::Other(_) => return Err(End::Failed { why: report::reason(&exit, &mut self.kvm) }),
        }
        Ok(())
    }

    fn pio(&mut self, port: u16, size: u8, write: bool) {
        let devices = &self.env.devices;
        for data in self.kvm.pio_data().chunks_exact_mut(usize::from(size.max(1))) {
            if write {
                devices.write(self.local, Space::Port, port.into(), data);
            } else {
                devices.read(self.local, Space::Port, port.into(), data);
            }
        }
    }

    fn mmio(&mut self, addr: u64, len: usize, data: Option<[u8; 8]>) {
        match data {
            Some(data) => self.env.devices.write(self.local, Space::Memory, addr, &data[..len]),
            None => {
                let mut data = [0; 8];
                self.env.devices.read(self.local, Space::Memory, addr, &mut data[..len]);
                self.kvm.set_mmio_data(data);
            }
        }
    }

    fn read_msr(&mut self, index: u32) {
        let answer = if Lapic::handles(index) {
            self.lapic.read_msr(index, self.now()).map_or(Answer::Refuse, Answer::Value)
        } else {
            msr::read(index)
        };
        match answer {
            Answer::Value(value) => self.kvm.finish_msr_read(value),
            Answer::Ignore | Answer::Refuse => self.refuse(index, None),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) {
        if Lapic::handles(index) {
            let now = self.now();
            if index == lapic::msr::EOI {
                self.pace.finished(self.lapic.in_service(), now);
            }
            match self.lapic.write_msr(index, value, now) {
                Ok(effect) => self.apply(effect),
                Err(_) => self.refuse(index, Some(value)),
            }
        } else if msr::write(index) == Answer::Refuse {
            self.refuse(index, Some(value));
        }
    }

    fn apply(&mut self, effect: Option<Effect>) {
        match effect {
            Some(Effect::Ipi(ipi)) => {
                count(&self.slot().counters.ipis, 1);
                self.env.interrupts.ipi(ipi);
            }
            Some(Effect::Eoi { vector }) => self.env.interrupts.eoi(vector),
            // The timer is armed before each entry, if its deadline changed.
            Some(Effect::TimerChanged) | None => {}
        }
    }

    fn refuse(&mut self, index: u32, value: Option<u64>) {
        self.kvm.refuse_msr();
        self.refused_msrs = self.refused_msrs.saturating_add(1);
        if self.refused_msrs <= LOGGED_MSRS {
            match value {
                Some(value) => {
                    tracing::debug!(vcpu = self.vcpu, "#GP for a write of {value:#x} to MSR {index:#x}");
                }
                None => tracing::debug!(vcpu = self.vcpu, "#GP for a read of MSR {index:#x}"),
            }
        }
    }
}
