//! Encodings of all that is in the table: opcodes by hand from the SDM, vol. 2, everything else at random.

use super::random::Random;
use crate::instruction::flags::{AF, OF, PF, SF, STATUS};

/// The size of a row's operand.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Operand {
    /// 1 byte.
    Byte,
    /// 2 bytes, whatever the destination's size.
    Word,
    /// 4 bytes, whatever the destination's size.
    Double,
    /// 2, 4 or 8 bytes by prefix.
    Any,
    /// 4 or 8 bytes by prefix.
    Large,
    /// 8 or 16 bytes by prefix: two registers.
    Pair,
}

/// What follows the address.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Immediate {
    None,
    Byte,
    /// As long as the operand, 4 bytes at most.
    Sized,
}

/// What else there is to know of a row.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Use {
    Read,
    Write,
    Change,
    /// Can be locked.
    Lockable,
}

/// One opcode.
#[derive(Copy, Clone, Debug)]
pub struct Row {
    pub opcode: [u8; 2],
    /// What the reg field holds, if it is not a register.
    pub digit: Option<u8>,
    pub operand: Operand,
    pub immediate: Immediate,
    pub usage: Use,
    /// Flags that manuals leave undefined.
    pub undefined: u64,
}

impl Row {
    /// A register names a bit, of an operand that may be far away.
    pub fn bit_by_register(&self) -> bool {
        matches!(self.opcode, [0x0f, 0xa3 | 0xab | 0xb3 | 0xbb])
    }

    /// mov with an absolute address instead of modrm.
    fn absolute(&self) -> bool {
        matches!(self.opcode, [0, 0xa0..=0xa3])
    }

    /// What is compared with the operand: registers by number, the lowest first.
    pub fn compares(&self) -> Option<&'static [usize]> {
        match self.opcode {
            [0x0f, 0xb0 | 0xb1] => Some(&[0]),
            [0x0f, 0xc7] => Some(&[0, 2]),
            _ => None,
        }
    }
}

/// All rows.
pub fn table() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |opcode: u16, digit: Option<u8>, operand, immediate, usage, undefined| {
        rows.push(Row { opcode: opcode.to_be_bytes(), digit, operand, immediate, usage, undefined });
    };
    use Immediate::{Byte, None as No, Sized};
    use Operand as O;
    use Use::{Change, Lockable, Read, Write};
    // Pairs of opcodes: the even one is for bytes.
    let mut pair = |opcode: u16, digit, immediate, usage, undefined| {
        add(opcode, digit, O::Byte, immediate, usage, undefined);
        add(opcode + 1, digit, O::Any, immediate, usage, undefined);
    };
    pair(0x88, None, No, Write, 0);
    pair(0x8a, None, No, Read, 0);
    pair(0xc6, Some(0), Sized, Write, 0);
    pair(0xa0, None, No, Read, 0);
    pair(0xa2, None, No, Write, 0);
    pair(0x86, None, No, Lockable, 0);
    pair(0x0fb0, None, No, Lockable, 0);
    pair(0x0fc0, None, No, Lockable, 0);
    for operation in 0..8 {
        let undefined = if matches!(operation, 1 | 4 | 6) { AF } else { 0 };
        let usage = if operation == 7 { Read } else { Lockable };
        pair(8 * operation, None, No, usage, undefined);
        pair(8 * operation + 2, None, No, Read, undefined);
        pair(0x80, Some(operation as u8), Sized, usage, undefined);
    }
    pair(0x84, None, No, Read, AF);
    pair(0xf6, Some(0), Sized, Read, AF);
    pair(0xf6, Some(2), No, Lockable, 0);
    pair(0xf6, Some(3), No, Lockable, 0);
    pair(0xfe, Some(0), No, Lockable, 0);
    pair(0xfe, Some(1), No, Lockable, 0);
    for operation in 0..8u8 {
        let undefined = if matches!(operation, 1 | 4 | 6) { AF } else { 0 };
        add(0x83, Some(operation), O::Any, Byte, if operation == 7 { Read } else { Lockable }, undefined);
    }
    add(0x0fb6, None, O::Byte, No, Read, 0);
    add(0x0fb7, None, O::Word, No, Read, 0);
    add(0x0fbe, None, O::Byte, No, Read, 0);
    add(0x0fbf, None, O::Word, No, Read, 0);
    add(0x63, None, O::Double, No, Read, 0);
    add(0x0fc3, None, O::Large, No, Write, 0);
    add(0x0fc7, Some(1), O::Pair, No, Lockable, 0);
    for operation in 0..4 {
        let usage = if operation == 0 { Read } else { Lockable };
        add(0x0fa3 + 8 * operation, None, O::Any, No, usage, OF | SF | AF | PF);
        add(0x0fba, Some(4 + operation as u8), O::Any, Byte, usage, OF | SF | AF | PF);
    }
    for condition in 0..16 {
        add(0x0f40 + condition, None, O::Any, No, Read, 0);
        add(0x0f90 + condition, Some(0), O::Byte, No, Write, 0);
    }
    assert!(rows.iter().all(|row| row.undefined & !STATUS == 0 && row.usage != Change));
    rows
}

/// How an address is put together.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Addressing {
    /// From the instruction pointer.
    Rip,
    /// A number.
    Absolute,
    /// A register, plus a number.
    Base,
    /// A register that is multiplied, plus a number.
    Index,
    /// Two registers, plus a number.
    BaseIndex,
}

/// One instruction, and the registers' values with which it accesses the place that was wanted.
#[derive(Debug)]
pub struct Encoded {
    pub bytes: Vec<u8>,
    /// Of the operand.
    pub width: usize,
    pub addressing: Addressing,
    pub locked: bool,
    pub short_addresses: bool,
    /// 0x64 or 0x65, or 0.
    pub segment: u8,
}

/// The segments' bases and the general registers.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    pub general: [u64; 16],
    pub fs_base: u64,
    pub gs_base: u64,
}

/// Encodes a row at random, as it stands at address `at`, to access `place(width)`, and changes `registers`
/// so that it does. `None` if this dice does not fit: another does. Addresses are below 2 GiB.
pub fn encode(
    row: &Row,
    at: u64,
    registers: &mut Registers,
    bases: bool,
    random: &mut Random,
    place: impl FnOnce(usize, &mut Random) -> u64,
) -> Option<Encoded> {
    let short_addresses = random.once_in(4);
    let segment = if bases && random.once_in(3) { random.pick(&[0x64, 0x65]) } else { 0 };
    let locked = row.usage == Use::Lockable && random.once_in(2);
    let rex = (!random.once_in(3)).then(|| 0x40 | random.below(16) as u8);
    let wide = rex.is_some_and(|rex| rex & 8 != 0);
    let small = matches!(row.operand, Operand::Byte | Operand::Word | Operand::Double | Operand::Any)
        && random.once_in(3);
    let sized = match (wide, small) {
        (true, _) => 8,
        (_, true) => 2,
        _ => 4,
    };
    let width = match row.operand {
        Operand::Byte => 1,
        Operand::Word => 2,
        // movsxd to 2 bytes reads 2 on some CPUs, 4 on others; it is of no use.
        Operand::Double if sized == 2 => return None,
        Operand::Double => 4,
        Operand::Pair => 2 * sized,
        Operand::Any | Operand::Large => sized,
    };
    let mut bytes = Vec::with_capacity(15);
    let mut prefixes: Vec<u8> =
        [(short_addresses, 0x67), (segment != 0, segment), (small, 0x66), (locked, 0xf0)]
            .iter()
            .filter_map(|&(is, prefix)| is.then_some(prefix))
            .collect();
    while !prefixes.is_empty() {
        bytes.push(prefixes.swap_remove(random.below(prefixes.len() as u64) as usize));
    }
    bytes.extend(rex);
    bytes.extend(row.opcode.iter().skip(usize::from(row.opcode[0] == 0)));
    let immediate = match row.immediate {
        Immediate::None => 0,
        Immediate::Byte => 1,
        Immediate::Sized if row.operand == Operand::Byte => 1,
        Immediate::Sized => sized.min(4),
    };
    let (extend_reg, extend_index, extend_base) = match rex {
        Some(rex) => ((rex >> 2 & 1) * 8, (rex >> 1 & 1) * 8, (rex & 1) * 8),
        None => (0, 0, 0),
    };
    let reg = row.digit.unwrap_or(random.below(8) as u8);
    let operand_register = usize::from(reg + extend_reg);
    let place = place(width, random);
    // What the operand must name so that `place` is accessed.
    let mut named = place;
    if row.bit_by_register() {
        let bit = registers.general[operand_register];
        let units = match sized {
            2 => i64::from(bit as i16) >> 4,
            4 => i64::from(bit as i32) >> 5,
            _ => bit as i64 >> 6,
        };
        named = place.wrapping_sub((units * sized as i64) as u64);
    }
    let (mut base, mut index, mut scale) = (None, None, 1);
    let mut displacement_bytes;
    let mut modrm_sib = Vec::new();
    let mut rip_relative = false;
    if row.absolute() {
        displacement_bytes = if short_addresses { 4 } else { 8 };
    } else {
        let (mode, rm) = (random.below(3) as u8, random.below(8) as u8);
        modrm_sib.push(mode << 6 | reg << 3 | rm);
        displacement_bytes = [0, 1, 4][usize::from(mode)];
        if rm == 4 {
            let sib = random.any() as u8;
            modrm_sib.push(sib);
            scale = 1 << (sib >> 6);
            index = Some(usize::from((sib >> 3 & 7) + extend_index)).filter(|&index| index != 4);
            if sib & 7 == 5 && mode == 0 {
                displacement_bytes = 4;
            } else {
                base = Some(usize::from((sib & 7) + extend_base));
            }
        } else if rm == 5 && mode == 0 {
            (rip_relative, displacement_bytes) = (true, 4);
        } else {
            base = Some(usize::from(rm + extend_base));
        }
    }
    if row.bit_by_register() && [base, index].contains(&Some(operand_register)) {
        return None;
    }
    bytes.extend(&modrm_sib);
    let next = at + (bytes.len() + displacement_bytes + immediate) as u64;
    let mut displacement = match displacement_bytes {
        0 => 0,
        1 => random.any() as i8 as i64 as u64,
        _ => random.any() as i32 as i64 as u64,
    };
    // Any base that leaves a rest of 32 bits where addresses are that short.
    let segment_base = match (segment, short_addresses) {
        (0, _) => 0,
        (_, true) => place.wrapping_sub(random.any() & 0xffff_ffff),
        _ => (random.any() as i64 >> 17) as u64,
    };
    if segment_base as i64 >> 46 != 0 && segment_base as i64 >> 46 != -1 {
        return None;
    }
    let target = named.wrapping_sub(segment_base);
    let mask = if short_addresses { 0xffff_ffff } else { u64::MAX };
    let addressing = match (base, index) {
        (None, None) => {
            displacement = if rip_relative { target.wrapping_sub(next) } else { target };
            let low = displacement as i32 as i64 as u64;
            if displacement_bytes == 4 && low & mask != displacement & mask {
                return None;
            }
            if rip_relative { Addressing::Rip } else { Addressing::Absolute }
        }
        (Some(base), Some(index)) if base != index => {
            let scaled = registers.general[index].wrapping_mul(scale);
            let value = target.wrapping_sub(displacement).wrapping_sub(scaled);
            set(&mut registers.general[base], value, mask);
            Addressing::BaseIndex
        }
        (Some(base), None) => {
            set(&mut registers.general[base], target.wrapping_sub(displacement), mask);
            Addressing::Base
        }
        (base, Some(index)) => {
            // One register, times the scale, or that and 1: the number must be a multiple of its power of
            // two.
            let factor = scale + u64::from(base.is_some());
            let twos = factor & factor.wrapping_neg();
            let rest = target.wrapping_sub(displacement) & (twos - 1);
            if displacement_bytes == 0 && rest != 0 {
                return None;
            }
            let fitted = displacement.wrapping_add(rest);
            if displacement_bytes == 1 && fitted as i8 as i64 as u64 != fitted
                || fitted as i32 as i64 as u64 != fitted
            {
                return None;
            }
            displacement = fitted;
            let number = target.wrapping_sub(displacement) & mask;
            set(
                &mut registers.general[index],
                (number / twos).wrapping_mul(inverse(factor / twos)),
                mask / twos,
            );
            if base.is_some() { Addressing::BaseIndex } else { Addressing::Index }
        }
    };
    match segment {
        0x64 => registers.fs_base = segment_base,
        0x65 => registers.gs_base = segment_base,
        _ => {}
    }
    bytes.extend(&displacement.to_le_bytes()[..displacement_bytes]);
    bytes.extend(&random.edgy().to_le_bytes()[..immediate]);
    (bytes.len() <= 15).then_some(Encoded { bytes, width, addressing, locked, short_addresses, segment })
}

fn set(register: &mut u64, value: u64, mask: u64) {
    *register = *register & !mask | value & mask;
}

/// The number that an odd one must be multiplied with to give 1.
fn inverse(odd: u64) -> u64 {
    (0..6).fold(odd, |inverse, _| inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse))))
}
