//! From an instruction's bytes to the operation that it does to memory, and what completes it.
//!
//! The decoder is a library's; the table of what can be shipped is `plan`. Not in it are:
//! - instructions with two accesses: push, pop, call, ret and strings;
//! - SSE, AVX and x87: wide, and not what CPUs contend for;
//! - shifts, rotations, multiplications, divisions: not on words that CPUs contend for either;
//! - segment, descriptor, control and debug registers.

use coherence::page::PAGE_SIZE;
use coherence::protocol::{Action, Operation, Width};
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::completion::{Alu, Completion, Effect, Side};
use super::condition::condition;
use super::cpu::Cpu;
use super::flags::CF;
use super::refusal::Refusal;
use super::register::Part;

/// Bytes of the longest instruction.
pub const LONGEST: usize = 15;

/// Bytes of a cache line, on every x86-64 CPU.
const CACHE_LINE: u64 = 64;

/// An instruction that may be shipped.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Decoded {
    /// The operand's linear address.
    pub address: u64,
    /// What is done to the operand. It is at the same place in its page as the address.
    pub operation: Operation,
    /// What is done to the CPU.
    pub completion: Completion,
}

/// What an instruction does, without where.
struct Plan {
    action: Action,
    operand: u128,
    expected: u128,
    effect: Effect,
    /// Bytes from the address that the operand names to the one that is accessed: of bt and its kin.
    displacement: i64,
}

/// Decodes the instruction at the CPU's RIP, with whose bytes `code` begins. The CPU's state beyond what the
/// instruction reads, and translations, are not looked at. Nothing is allocated, but for the decoder's tables
/// at a process's first call.
///
/// # Errors
/// [`Refusal::Truncated`] if `code` ends too early; else why it is not shipped.
pub fn decode(code: &[u8], cpu: &Cpu) -> Result<Decoded, Refusal> {
    if !cpu.code64 {
        return Err(Refusal::Mode);
    }
    let mut decoder = Decoder::with_ip(64, code, cpu.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match decoder.last_error() {
        DecoderError::None => {}
        DecoderError::NoMoreBytes => return Err(Refusal::Truncated),
        _ => return Err(Refusal::Undecodable),
    }
    let memory = (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory);
    let memory = memory.ok_or(Refusal::NoOperand)?;
    let width = width(instruction.memory_size()).ok_or(Refusal::Unknown)?;
    let plan = plan(&instruction, memory, width, cpu).ok_or(Refusal::Unknown)?;
    let address = address(&instruction, plan.displacement, cpu).ok_or(Refusal::Unknown)?;
    let bytes = width.bytes() as u64;
    if !address.is_multiple_of(bytes) && (width == Width::Sixteen || cpu.checks_alignment()) {
        return Err(Refusal::Misaligned);
    }
    let changes = !matches!(plan.action, Action::Load | Action::Store);
    if changes && address % CACHE_LINE + bytes > CACHE_LINE {
        return Err(Refusal::SplitLock);
    }
    let offset = (address % PAGE_SIZE as u64) as u16;
    let operation = Operation::new(plan.action, width, offset, plan.operand, plan.expected);
    let completion = Completion { effect: plan.effect, width, next: instruction.next_ip() };
    Ok(Decoded { address, operation: operation.ok_or(Refusal::CrossesPage)?, completion })
}

/// The table. `None` for what is not in it.
fn plan(instruction: &Instruction, memory: u32, width: Width, cpu: &Cpu) -> Option<Plan> {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let (mask, bits) = (width.mask() as u64, 8 * width.bytes() as u32);
    // The operand that is not the memory's, as a register and as a value.
    let other = 1 - memory.min(1);
    let register = || Part::named(instruction.try_op_register(other).ok()?);
    let value = || match instruction.op_kind(other) {
        OpKind::Register => Some(register()?.read(&cpu.general) & mask),
        _ => Some(instruction.try_immediate(other).ok()? & mask),
    };
    let carry = cpu.rflags & CF;
    let load = |effect| Some(plan_of(Action::Load, 0, effect));
    let store = |value| Some(plan_of(Action::Store, value, Effect::Nothing));
    // Of two operands, of which the first one becomes the result, unless there is no `change`, which does
    // that in memory.
    let arithmetic = |alu, change: Option<(Action, u64)>, other| {
        let (old_is, to) = match memory {
            0 => (Side::First, None),
            _ => (Side::Second, change.and_then(|_| register())),
        };
        let (action, operand) = change.filter(|_| memory == 0).unwrap_or((Action::Load, 0));
        Some(plan_of(action, operand & mask, Effect::Arithmetic { alu, old_is, other, to }))
    };
    let bitwise = |alu, action| value().and_then(|other| arithmetic(alu, Some((action, other)), other));
    let add = |other: u64, carry: u64| {
        arithmetic(Alu::Add { carry }, Some((Action::Add, other.wrapping_add(carry))), other)
    };
    let subtract = |other: u64, borrow: u64| {
        let negated = other.wrapping_add(borrow).wrapping_neg();
        arithmetic(Alu::Subtract { borrow }, Some((Action::Add, negated)), other)
    };
    match mnemonic {
        M::Mov | M::Movnti if memory == 0 => store(value()?),
        M::Mov | M::Movzx => load(Effect::Load { to: register()? }),
        M::Movsx | M::Movsxd => load(Effect::LoadSigned { to: register()? }),
        M::Xchg => Some(plan_of(Action::Exchange, value()?, Effect::Load { to: register()? })),
        M::Add => add(value()?, 0),
        M::Adc => add(value()?, carry),
        M::Sub => subtract(value()?, 0),
        M::Sbb => subtract(value()?, carry),
        M::Cmp => arithmetic(Alu::Subtract { borrow: 0 }, None, value()?),
        M::And => bitwise(Alu::And, Action::And),
        M::Or => bitwise(Alu::Or, Action::Or),
        M::Xor => bitwise(Alu::Xor, Action::Xor),
        M::Test => arithmetic(Alu::And, None, value()?),
        M::Inc => Some(plan_of(Action::Add, 1, Effect::Count { alu: Alu::Add { carry: 0 } })),
        M::Dec => Some(plan_of(Action::Add, mask, Effect::Count { alu: Alu::Subtract { borrow: 0 } })),
        M::Not => Some(plan_of(Action::Xor, mask, Effect::Nothing)),
        M::Neg => {
            let alu = Alu::Subtract { borrow: 0 };
            let effect = Effect::Arithmetic { alu, old_is: Side::Second, other: 0, to: None };
            Some(plan_of(Action::Negate, 0, effect))
        }
        M::Xadd => {
            let other = value()?;
            Some(plan_of(Action::Add, other, Effect::ExchangeAdd { to: register()?, other }))
        }
        M::Cmpxchg => {
            let accumulator = Part::low(0, width.bytes()).read(&cpu.general);
            let plan = plan_of(Action::CompareExchange, value()?, Effect::CompareExchange { accumulator });
            Some(Plan { expected: accumulator.into(), ..plan })
        }
        M::Cmpxchg8b | M::Cmpxchg16b => {
            let half = width.bytes() / 2;
            let pair = |high, low| {
                let part = |number| u128::from(Part::low(number, half).read(&cpu.general));
                part(high) << (bits / 2) | part(low)
            };
            // RDX:RAX is compared, RCX:RBX comes.
            let (compared, operand) = (pair(2, 0), pair(1, 3));
            let effect = Effect::CompareExchangePair { pair: compared };
            Some(Plan {
                action: Action::CompareExchange,
                operand,
                expected: compared,
                effect,
                displacement: 0,
            })
        }
        M::Bt | M::Bts | M::Btr | M::Btc => {
            // A register names a bit anywhere before and after the address, an immediate one of the operand
            // (SDM vol. 2, "BT" and 3.1.1.9).
            let place = match instruction.op_kind(other) {
                OpKind::Register => (value()? << (64 - bits)) as i64 >> (64 - bits),
                _ => (value()? % u64::from(bits)) as i64,
            };
            let index = place.rem_euclid(bits.into()) as u32;
            let (action, operand) = match mnemonic {
                M::Bt => (Action::Load, 0),
                M::Bts => (Action::Or, 1 << index),
                M::Btr => (Action::And, !(1 << index) & mask),
                _ => (Action::Xor, 1 << index),
            };
            let displacement = place.div_euclid(bits.into()) * width.bytes() as i64;
            Some(Plan { displacement, ..plan_of(action, operand, Effect::Bit { index }) })
        }
        _ => {
            let holds = condition(mnemonic, cpu.rflags)?;
            match memory {
                0 => store(holds.into()),
                _ => load(Effect::LoadIf { to: register()?, holds }),
            }
        }
    }
}

fn plan_of(action: Action, operand: u64, effect: Effect) -> Plan {
    Plan { action, operand: operand.into(), expected: 0, effect, displacement: 0 }
}

/// The width of an operand of integers.
fn width(size: MemorySize) -> Option<Width> {
    match size {
        MemorySize::UInt8 | MemorySize::Int8 => Some(Width::One),
        MemorySize::UInt16 | MemorySize::Int16 => Some(Width::Two),
        MemorySize::UInt32 | MemorySize::Int32 => Some(Width::Four),
        MemorySize::UInt64 | MemorySize::Int64 => Some(Width::Eight),
        MemorySize::UInt128 => Some(Width::Sixteen),
        _ => None,
    }
}

/// The linear address of the memory operand, plus `displacement` (SDM vol. 1, 3.7.5).
fn address(instruction: &Instruction, displacement: i64, cpu: &Cpu) -> Option<u64> {
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    let register = |register| match register {
        // The decoder has added RIP, or EIP, to the displacement.
        Register::None | Register::RIP | Register::EIP => Some(0),
        _ => Some(Part::named(register)?.read(&cpu.general)),
    };
    let scaled = register(index)?.wrapping_mul(instruction.memory_index_scale().into());
    let offset = register(base)?
        .wrapping_add(scaled)
        .wrapping_add(instruction.memory_displacement64())
        .wrapping_add_signed(displacement);
    let is_short = |register| register == Register::EIP || Part::named(register).is_some_and(Part::is_double);
    let nothing = base == Register::None && index == Register::None;
    let short = is_short(base) || is_short(index) || nothing && instruction.memory_displ_size() == 4;
    let offset = if short { offset & 0xffff_ffff } else { offset };
    Some(offset.wrapping_add(match instruction.memory_segment() {
        Register::FS => cpu.fs_base,
        Register::GS => cpu.gs_base,
        _ => 0,
    }))
}
