//! The completion of an instruction: what it does to the CPU once its operand's old value is known.

use coherence::protocol::Width;

use super::cpu::Cpu;
use super::flags::{self, CF, RF, STATUS, ZF};
use super::register::Part;

/// The second half of a shipped instruction: everything but its access to memory.
///
/// It holds the registers' values that the instruction used, so it must be given the same CPU that was
/// decoded for.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Completion {
    pub(super) effect: Effect,
    pub(super) width: Width,
    /// RIP of the next instruction.
    pub(super) next: u64,
}

/// What becomes of registers and flags. `old` is the operand's old value, the completion's width wide.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) enum Effect {
    /// Nothing.
    Nothing,
    /// `to` becomes `old`, zero-extended: mov, movzx, xchg.
    Load { to: Part },
    /// `to` becomes `old`, sign-extended: movsx, movsxd.
    LoadSigned { to: Part },
    /// As [`Effect::Load`] if the condition holds; else `to` becomes itself, which clears the upper half if
    /// it is 4 bytes long.
    LoadIf { to: Part, holds: bool },
    /// `sum = old + other`: xadd. `to` becomes `old`.
    ExchangeAdd { to: Part, other: u64 },
    /// The result of two operands, one of them `old`.
    Arithmetic { alu: Alu, old_is: Side, other: u64, to: Option<Part> },
    /// Adds or subtracts 1, and CF stays: inc, dec.
    Count { alu: Alu },
    /// CF becomes a bit of `old`. Manuals leave the other flags but ZF undefined; they stay.
    Bit { index: u32 },
    /// The accumulator was compared with `old`, and becomes `old` if they differ.
    CompareExchange { accumulator: u64 },
    /// RDX:RAX, or their lower halves, were compared with `old`, and become `old` if they differ. Only ZF
    /// changes.
    CompareExchangePair { pair: u128 },
}

/// An operation of two operands.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) enum Alu {
    /// With a carry of 0 or 1 added.
    Add { carry: u64 },
    /// With a borrow of 0 or 1 subtracted.
    Subtract { borrow: u64 },
    /// Bitwise.
    And,
    /// Bitwise.
    Or,
    /// Bitwise.
    Xor,
}

/// Which operand of two.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) enum Side {
    First,
    Second,
}

impl Alu {
    /// The result and the status flags.
    fn result(self, bits: u32, a: u64, b: u64) -> (u64, u64) {
        let bitwise = |result| (result, flags::of_result(bits, result));
        match self {
            Alu::Add { carry } => flags::add(bits, a, b, carry),
            Alu::Subtract { borrow } => flags::subtract(bits, a, b, borrow),
            Alu::And => bitwise(a & b),
            Alu::Or => bitwise(a | b),
            Alu::Xor => bitwise(a ^ b),
        }
    }
}

impl Completion {
    /// Where the next instruction begins.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Completes the instruction on the CPU: registers, flags and RIP are set as it sets them, RFLAGS.RF is
    /// cleared, and the shadow in which interrupts wait ends. `answer` is the operation's. All of it must
    /// reach the vCPU: the registers, and the end of a shadow (`KVM_VCPUEVENT_VALID_SHADOW`).
    pub fn finish(&self, answer: u128, cpu: &mut Cpu) {
        let bits = 8 * self.width.bytes() as u32;
        let old = (answer & self.width.mask()) as u64;
        match self.effect {
            Effect::Nothing => {}
            Effect::Load { to } => to.write(&mut cpu.general, old),
            Effect::LoadSigned { to } => {
                let unused = 64 - bits;
                to.write(&mut cpu.general, ((old << unused) as i64 >> unused) as u64);
            }
            Effect::LoadIf { to, holds } => {
                let value = if holds { old } else { to.read(&cpu.general) };
                to.write(&mut cpu.general, value);
            }
            Effect::ExchangeAdd { to, other } => {
                set_flags(cpu, STATUS, flags::add(bits, old, other, 0).1);
                to.write(&mut cpu.general, old);
            }
            Effect::Arithmetic { alu, old_is, other, to } => {
                let (a, b) = if old_is == Side::First { (old, other) } else { (other, old) };
                let (result, flags) = alu.result(bits, a, b);
                set_flags(cpu, STATUS, flags);
                if let Some(to) = to {
                    to.write(&mut cpu.general, result);
                }
            }
            Effect::Count { alu } => set_flags(cpu, STATUS & !CF, alu.result(bits, old, 1).1),
            Effect::Bit { index } => set_flags(cpu, CF, old >> index & 1),
            Effect::CompareExchange { accumulator } => {
                set_flags(cpu, STATUS, flags::subtract(bits, accumulator, old, 0).1);
                if accumulator != old {
                    Part::low(0, self.width.bytes()).write(&mut cpu.general, old);
                }
            }
            Effect::CompareExchangePair { pair } => {
                let equal = answer & self.width.mask() == pair;
                set_flags(cpu, ZF, if equal { ZF } else { 0 });
                if !equal {
                    let half = self.width.bytes() / 2;
                    Part::low(0, half).write(&mut cpu.general, answer as u64);
                    Part::low(2, half).write(&mut cpu.general, (answer >> (bits / 2)) as u64);
                }
            }
        }
        cpu.rip = self.next;
        cpu.rflags &= !RF;
        cpu.interrupt_shadow = false;
    }
}

fn set_flags(cpu: &mut Cpu, which: u64, flags: u64) {
    cpu.rflags = cpu.rflags & !which | flags & which;
}
