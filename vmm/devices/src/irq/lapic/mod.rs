//! One CPU's local APIC, always in x2APIC mode (SDM vol. 3, ch. 11, above all 11.12; APM vol. 2, ch. 16).
//!
//! The vCPU's own thread owns it; no one else touches it. Others hand that thread what arrives ([`Mode`]) and
//! kick it. Around each entry into the guest the thread does:
//!
//! 1. [`Lapic::expire_timer`] with the current guest TSC, and [`Lapic::post`] for every vector in the
//!    mailbox;
//! 2. if the CPU can take an interrupt now, [`Lapic::acknowledge`] and inject the vector; otherwise, while
//!    [`Lapic::pending`] is some, ask KVM for the interrupt window;
//! 3. `kvm_run.cr8 = lapic.cr8()`, enter the guest, then `lapic.set_cr8(kvm_run.cr8)`.
//!
//! An idle (halted) CPU wakes when [`Lapic::pending`] is some, and no later than [`Lapic::timer_deadline`].
//!
//! ```text
//!            post, timer, self-IPI            acknowledge                EOI write
//!   (absent) --------------------> IRR ------------------------> ISR ---------------> (done; Effect::Eoi if level)
//!                                   highest class above PPR = max(TPR, highest ISR)
//! ```
//!
//! The version register says: six LVT entries (no CMCI), no suppression of EOI broadcasts. The mode in
//! IA32_APIC_BASE is fixed, because the guest starts in x2APIC mode and there is no MMIO page to fall back
//! to.

use super::timer::{Timer, TimerMode};
use super::vectors::Vectors;
use super::{Destination, Effect, Gp, Ipi, Mode, route};

/// Register numbers (MSR addresses).
pub mod msr {
    /// The x2APIC registers' MSRs, all of which belong into the MSR filter.
    pub const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
    /// IA32_APIC_BASE.
    pub const APIC_BASE: u32 = 0x1b;
    /// IA32_TSC_DEADLINE.
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// Local APIC id, read-only.
    pub const ID: u32 = 0x802;
    /// Version, read-only.
    pub const VERSION: u32 = 0x803;
    /// Task priority.
    pub const TPR: u32 = 0x808;
    /// Processor priority, read-only.
    pub const PPR: u32 = 0x80a;
    /// End of interrupt, write-only.
    pub const EOI: u32 = 0x80b;
    /// Logical destination, read-only.
    pub const LDR: u32 = 0x80d;
    /// Spurious interrupt vector.
    pub const SIVR: u32 = 0x80f;
    /// In-service vectors, eight read-only registers.
    pub const ISR: u32 = 0x810;
    /// Trigger modes, eight read-only registers.
    pub const TMR: u32 = 0x818;
    /// Requested vectors, eight read-only registers.
    pub const IRR: u32 = 0x820;
    /// Error status.
    pub const ESR: u32 = 0x828;
    /// Interrupt command, 64 bits.
    pub const ICR: u32 = 0x830;
    /// Local vector table: timer.
    pub const LVT_TIMER: u32 = 0x832;
    /// Local vector table: thermal sensor.
    pub const LVT_THERMAL: u32 = 0x833;
    /// Local vector table: performance counters.
    pub const LVT_PERF: u32 = 0x834;
    /// Local vector table: LINT0 pin.
    pub const LVT_LINT0: u32 = 0x835;
    /// Local vector table: LINT1 pin.
    pub const LVT_LINT1: u32 = 0x836;
    /// Local vector table: errors.
    pub const LVT_ERROR: u32 = 0x837;
    /// Timer: initial count.
    pub const TIMER_INITIAL: u32 = 0x838;
    /// Timer: current count, read-only.
    pub const TIMER_CURRENT: u32 = 0x839;
    /// Timer: divide configuration.
    pub const TIMER_DIVIDE: u32 = 0x83e;
    /// Self-IPI, write-only.
    pub const SELF_IPI: u32 = 0x83f;
}

/// Version 0x14, six LVT entries, no EOI-broadcast suppression.
const VERSION: u64 = 0x0005_0014;
/// IA32_APIC_BASE: page 0xfee00000, enabled, x2APIC mode; the bootstrap CPU has bit 8 as well.
const APIC_BASE: u64 = 0xfee0_0000 | 1 << 11 | 1 << 10;
const APIC_BASE_BSP: u64 = 1 << 8;

const SIVR_ENABLED: u32 = 1 << 8;
/// Vector, enable, and the focus-check bit, which nothing looks at.
const SIVR_WRITABLE: u32 = 0x3ff;

const LVT_MASKED: u32 = 1 << 16;
/// Delivery status and remote IRR: read-only, ignored on write.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;
const LVT_MODE: u32 = 7 << 8;
const LVT_MODE_NMI: u32 = 4 << 8;
const LVT_TIMER_MODE_SHIFT: u32 = 17;
/// What may be written into each LVT entry, from the timer's on.
const LVT_WRITABLE: [u32; 6] = [
    0xff | LVT_MASKED | 3 << LVT_TIMER_MODE_SHIFT,
    0xff | LVT_MASKED | LVT_MODE,
    0xff | LVT_MASKED | LVT_MODE,
    0xff | LVT_MASKED | LVT_MODE | 1 << 13 | 1 << 15,
    0xff | LVT_MASKED | LVT_MODE | 1 << 13 | 1 << 15,
    0xff | LVT_MASKED,
];
const TIMER: usize = 0;
const LINT1: usize = 4;
const ERROR: usize = 5;

/// Divide configuration: bits 3, 1 and 0.
const TIMER_DIVIDE_WRITABLE: u64 = 0b1011;

const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
/// Vectors below this cannot be interrupts.
const FIRST_LEGAL_VECTOR: u8 = 16;

/// Vector, delivery mode, destination mode, level, trigger mode, shorthand, destination; bit 12 (delivery
/// status, always idle) may be written and is dropped, as AMD has it.
const ICR_WRITABLE: u64 = 0xffff_ffff_000c_dfff;
const ICR_BUSY: u64 = 1 << 12;
const ICR_BROADCAST: u32 = 0xffff_ffff;

/// One local APIC. Times are guest TSC ticks.
#[derive(Clone, Debug)]
pub struct Lapic {
    apic_id: u32,
    bsp: bool,
    tpr: u8,
    sivr: u32,
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    /// Errors seen since the last write to ESR.
    errors: u32,
    /// What ESR reads as: the errors up to the last write to it.
    esr: u32,
    icr: u64,
    lvt: [u32; 6],
    timer: Timer,
}

impl Lapic {
    /// A local APIC as power-on leaves it: software-disabled, everything masked. `bsp` says whether it is the
    /// bootstrap CPU's, of which a machine has one.
    pub fn new(apic_id: u32, bsp: bool) -> Self {
        Self {
            apic_id,
            bsp,
            tpr: 0,
            sivr: 0xff,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            errors: 0,
            esr: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            timer: Timer::default(),
        }
    }

    /// What an INIT does: all as after power-on, the id and the x2APIC mode stay (SDM vol. 3, 11.12.5.1).
    pub fn init_reset(&mut self) {
        *self = Self::new(self.apic_id, self.bsp);
    }

    /// The x2APIC id.
    pub fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// What IA32_APIC_BASE reads as; KVM's `sregs.apic_base` must say the same.
    pub fn apic_base(&self) -> u64 {
        APIC_BASE | if self.bsp { APIC_BASE_BSP } else { 0 }
    }

    /// Whether an access to `msr` is for this module: the x2APIC range, IA32_TSC_DEADLINE, IA32_APIC_BASE.
    pub fn handles(msr: u32) -> bool {
        msr::X2APIC.contains(&msr) || msr == msr::TSC_DEADLINE || msr == msr::APIC_BASE
    }

    /// The guest reads `msr` at TSC `now`.
    ///
    /// # Errors
    /// [`Gp`] for write-only and absent registers.
    pub fn read_msr(&self, msr: u32, now: u64) -> Result<u64, Gp> {
        Ok(u64::from(match msr {
            msr::APIC_BASE => return Ok(self.apic_base()),
            msr::TSC_DEADLINE => return Ok(self.timer.deadline(now)),
            msr::VERSION => return Ok(VERSION),
            msr::ICR => return Ok(self.icr),
            msr::ID => self.apic_id,
            msr::TPR => u32::from(self.tpr),
            msr::PPR => u32::from(self.ppr()),
            msr::LDR => route::logical_id(self.apic_id),
            msr::SIVR => self.sivr,
            msr::ISR..msr::TMR => self.isr.register(msr - msr::ISR),
            msr::TMR..msr::IRR => self.tmr.register(msr - msr::TMR),
            msr::IRR..msr::ESR => self.irr.register(msr - msr::IRR),
            msr::ESR => self.esr,
            msr::LVT_TIMER..=msr::LVT_ERROR => self.lvt[(msr - msr::LVT_TIMER) as usize],
            msr::TIMER_INITIAL => self.timer.initial(),
            msr::TIMER_CURRENT => self.timer.current(now),
            msr::TIMER_DIVIDE => self.timer.divide(),
            _ => return Err(Gp),
        }))
    }

    /// The guest writes `value` to `msr` at TSC `now`. At most one effect comes of it.
    ///
    /// # Errors
    /// [`Gp`] for read-only and absent registers and for reserved bits; nothing has changed then.
    pub fn write_msr(&mut self, msr: u32, value: u64, now: u64) -> Result<Option<Effect>, Gp> {
        match msr {
            msr::APIC_BASE if value == self.apic_base() => {}
            msr::TSC_DEADLINE => {
                self.expire_timer(now);
                self.timer.set_deadline(value);
                return Ok(Some(Effect::TimerChanged));
            }
            msr::TPR => self.tpr = u8::try_from(value).map_err(|_| Gp)?,
            msr::EOI if value == 0 => return Ok(self.eoi()),
            msr::SIVR => return self.write_sivr(only(value, SIVR_WRITABLE)?, now),
            msr::ESR if value == 0 => {
                self.esr = self.errors;
                self.errors = 0;
            }
            msr::ICR => return self.write_icr(value),
            msr::LVT_TIMER..=msr::LVT_ERROR => {
                return self.write_lvt((msr - msr::LVT_TIMER) as usize, value, now);
            }
            msr::TIMER_INITIAL => {
                let count = u32::try_from(value).map_err(|_| Gp)?;
                self.expire_timer(now);
                self.timer.set_initial(count, now);
                return Ok(Some(Effect::TimerChanged));
            }
            msr::TIMER_DIVIDE => {
                let divide = only(value, TIMER_DIVIDE_WRITABLE as u32)?;
                self.expire_timer(now);
                self.timer.set_divide(divide, now);
                return Ok(Some(Effect::TimerChanged));
            }
            msr::SELF_IPI => self.send_to_self(u8::try_from(value).map_err(|_| Gp)?),
            _ => return Err(Gp),
        }
        Ok(None)
    }

    /// An interrupt arrives ([`Mode::Fixed`] or [`Mode::LowestPriority`]). True if it was accepted, which
    /// includes merging with one that already waits; false if the APIC is software-disabled or the vector
    /// illegal.
    pub fn post(&mut self, vector: u8, level: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if vector < FIRST_LEGAL_VECTOR {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        true
    }

    /// The vector that the CPU would take now if its interrupt flag allowed: the highest requested one whose
    /// priority class is above the processor priority. None while the APIC is software-disabled.
    pub fn pending(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| self.enabled() && vector >> 4 > self.ppr() >> 4)
    }

    /// The CPU takes [`Lapic::pending`]: the vector, now in service, that must be injected.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// The task priority as CR8 shows it, 0..=15: what `kvm_run.cr8` must hold at entry.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// The guest may have written CR8: `kvm_run.cr8` after an exit. An unchanged value keeps the subclass
    /// bits that only the TPR register has.
    pub fn set_cr8(&mut self, cr8: u64) {
        if cr8 != self.cr8() {
            self.tpr = ((cr8 & 0xf) as u8) << 4;
        }
    }

    /// The guest TSC at which the timer's next interrupt is due; it may have passed already. None if the
    /// timer stands still or its interrupt is masked.
    pub fn timer_deadline(&self) -> Option<u64> {
        self.timer.next().filter(|_| self.lvt[TIMER] & LVT_MASKED == 0)
    }

    /// The vector of the timer's interrupt.
    pub fn timer_vector(&self) -> u8 {
        self.lvt[TIMER] as u8
    }

    /// The vector whose handler the next end-of-interrupt ends.
    pub fn in_service(&self) -> Option<u8> {
        self.isr.highest()
    }

    /// Lets the timer fire if it is due at TSC `now`. True if it posted its interrupt.
    pub fn expire_timer(&mut self, now: u64) -> bool {
        self.timer.expire(now) && self.fire_lvt(TIMER)
    }

    /// Whether a pulse on LINT1 (the machine's NMI button) would be an NMI on this CPU. Linux lets one CPU
    /// have it.
    pub fn lint1_is_nmi(&self) -> bool {
        self.lvt[LINT1] & (LVT_MASKED | LVT_MODE) == LVT_MODE_NMI
    }

    /// Software-enabled: SIVR bit 8.
    pub fn enabled(&self) -> bool {
        self.sivr & SIVR_ENABLED != 0
    }

    /// Processor priority (SDM vol. 3, 11.8.3.1).
    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    fn eoi(&mut self) -> Option<Effect> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        self.tmr.contains(vector).then_some(Effect::Eoi { vector })
    }

    fn write_sivr(&mut self, value: u32, now: u64) -> Result<Option<Effect>, Gp> {
        // What was due before the APIC went off still counts.
        self.expire_timer(now);
        self.sivr = value;
        if self.enabled() {
            return Ok(None);
        }
        // Software-disabled: every LVT entry is masked and stays so (11.4.7.2).
        self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        Ok(Some(Effect::TimerChanged))
    }

    fn write_lvt(&mut self, index: usize, value: u64, now: u64) -> Result<Option<Effect>, Gp> {
        let mut value = only(value, LVT_WRITABLE[index] | LVT_READ_ONLY)? & LVT_WRITABLE[index];
        if !self.enabled() {
            value |= LVT_MASKED;
        }
        if index != TIMER {
            self.lvt[index] = value;
            return Ok(None);
        }
        let mode = match value >> LVT_TIMER_MODE_SHIFT & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::Deadline,
            _ => return Err(Gp),
        };
        // What was due under the old entry fires (or, masked, is lost) under the old entry.
        self.expire_timer(now);
        self.timer.set_mode(mode);
        self.lvt[TIMER] = value;
        Ok(Some(Effect::TimerChanged))
    }

    /// SDM vol. 3, 11.6.1 and 11.12.9. The trigger mode only tells INIT from the old INIT level de-assert,
    /// which does nothing; every other inter-processor interrupt is an edge.
    fn write_icr(&mut self, value: u64) -> Result<Option<Effect>, Gp> {
        if value & !ICR_WRITABLE != 0 {
            return Err(Gp);
        }
        self.icr = value & !ICR_BUSY;
        let vector = value as u8;
        let target = (value >> 32) as u32;
        let shorthand = value >> 18 & 3;
        let logical = value & 1 << 11 != 0;
        let de_assert = value & (1 << 15 | 1 << 14) == 1 << 15;
        let mode = match value >> 8 & 7 {
            0 | 1 if vector < FIRST_LEGAL_VECTOR => {
                self.error(ESR_SEND_ILLEGAL_VECTOR);
                return Ok(None);
            }
            0 | 1 if shorthand == 1 => {
                self.post(vector, false);
                return Ok(None);
            }
            0 => Mode::Fixed { vector, level: false },
            1 => Mode::LowestPriority { vector, level: false },
            4 => Mode::Nmi,
            // A CPU cannot reset or start itself; the manual calls these combinations invalid.
            5 | 6 if shorthand == 1 || shorthand == 2 => return Ok(None),
            5 if de_assert => return Ok(None),
            5 => Mode::Init,
            6 => Mode::Sipi { vector },
            // SMI, for which this machine has no mode, and what is reserved.
            _ => return Ok(None),
        };
        let dest = match shorthand {
            1 => Destination::Physical(self.apic_id),
            2 => Destination::All,
            3 => Destination::AllButSelf,
            _ if target == ICR_BROADCAST => Destination::All,
            _ if logical => Destination::Logical(target),
            _ => Destination::Physical(target),
        };
        Ok(Some(Effect::Ipi(Ipi { dest, mode, from: self.apic_id })))
    }

    fn send_to_self(&mut self, vector: u8) {
        if vector < FIRST_LEGAL_VECTOR {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
        } else {
            self.post(vector, false);
        }
    }

    /// Posts the interrupt of an LVT entry that has no delivery mode (timer, error), unless masked.
    fn fire_lvt(&mut self, index: usize) -> bool {
        self.lvt[index] & LVT_MASKED == 0 && self.post(self.lvt[index] as u8, false)
    }

    /// Notes an error for ESR and raises the error interrupt. An illegal vector in that entry itself is
    /// noted, not raised.
    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        if self.lvt[ERROR] as u8 >= FIRST_LEGAL_VECTOR {
            self.fire_lvt(ERROR);
        } else if self.lvt[ERROR] & LVT_MASKED == 0 {
            self.errors |= ESR_RECEIVE_ILLEGAL_VECTOR;
        }
    }
}

/// `value` if it has only bits of `writable`.
fn only(value: u64, writable: u32) -> Result<u32, Gp> {
    if value & !u64::from(writable) == 0 { Ok(value as u32) } else { Err(Gp) }
}

#[cfg(test)]
mod tests;
