//! Every form in the table, with random operands, on this CPU and by our own semantics.

use std::collections::BTreeSet;

use coherence::execution::execute;

use super::encoding::{Operand, Registers, Row, Use, encode, table};
use super::processor::Processor;
use super::random::Random;
use crate::instruction::Cpu;
use crate::instruction::decode::decode;
use crate::instruction::flags::{RF, STATUS};

/// Of each row of the table.
const CASES: usize = 9_000;

#[repr(align(4096))]
struct Frame([u8; 4096]);

#[test]
fn every_form_does_to_registers_flags_and_memory_what_this_cpu_does() {
    let mut processor = match Processor::new() {
        Ok(processor) => processor,
        Err(why) => return println!("skipped: {why}"),
    };
    if !processor.bases {
        println!("without segments: this kernel does not let user code set the bases of FS and GS");
    }
    let rows = table();
    let mut frame = Box::new(Frame([0; 4096]));
    let mut forms = BTreeSet::new();
    let mut cases = 0;
    for (number, row) in rows.iter().enumerate() {
        let mut random = Random(number as u64);
        let mut done = 0;
        while done < CASES {
            let seed = random.0;
            let Some(form) = case(row, &mut processor, &mut frame, &mut random, seed) else { continue };
            forms.insert((number, form));
            done += 1;
        }
        cases += done;
    }
    assert!(processor.surroundings_are_untouched());
    println!("{cases} cases of {} opcodes in {} forms", rows.len(), forms.len());
    assert!(cases >= 1_000_000);
}

/// What is told apart: the operand's width, the addressing, locked, short addresses, the segment.
type Form = (usize, u8, bool, bool, u8);

/// One case; `None` if the dice did not fit.
fn case(
    row: &Row,
    processor: &mut Processor,
    frame: &mut Frame,
    random: &mut Random,
    seed: u64,
) -> Option<Form> {
    let mut registers = Registers { general: std::array::from_fn(|_| random.edgy()), ..Registers::default() };
    let at = processor.instruction();
    let mut offset = 0;
    let bases = processor.bases;
    let memory = processor.memory();
    let encoded = encode(row, at, &mut registers, bases, random, |width, random| {
        offset = place(row, width, random);
        memory + offset as u64
    })?;
    let width = encoded.width;
    let flags = random.any() & STATUS;
    let mut content = [random.edgy().to_le_bytes(), random.edgy().to_le_bytes()].concat();
    if let Some(compared) = row.compares().filter(|_| random.once_in(2)) {
        let part = width / compared.len();
        for (n, &register) in compared.iter().enumerate() {
            content[n * part..][..part].copy_from_slice(&registers.general[register].to_le_bytes()[..part]);
        }
    }
    for page in [&mut frame.0, processor.page()] {
        page[offset..][..width].copy_from_slice(&content[..width]);
    }

    let tell = || format!("{row:x?} {encoded:x?}\n{registers:x?} flags {flags:#x} seed {seed:#x}");
    let mut cpu = Cpu {
        general: registers.general,
        rip: at,
        rflags: flags | RF | 2,
        fs_base: registers.fs_base,
        gs_base: registers.gs_base,
        code64: true,
        interrupt_shadow: true,
        ..Cpu::default()
    };
    let decoded = decode(&encoded.bytes, &cpu).unwrap_or_else(|refusal| panic!("{refusal}: {}", tell()));
    assert_eq!(decoded.address, memory + offset as u64, "another address: {}", tell());
    assert_eq!(decoded.operation.width().bytes(), width, "{}", tell());
    assert_eq!(decoded.operation.action().writes(), row.usage != Use::Read, "{}", tell());
    // SAFETY: the whole frame is ours, and nobody has a reference to it meanwhile.
    let old = unsafe { execute(&mut frame.0, &decoded.operation) };
    decoded.completion.finish(old, &mut cpu);

    let (mut after, mut flags_after) = (registers.clone(), flags);
    processor.set_instruction(&encoded.bytes);
    // SAFETY: the table has only instructions that go on at their end, and `encode` has made this one to
    // access the page for operands; that the decoder agrees was just checked.
    unsafe { processor.run(&mut after, &mut flags_after) };
    assert_eq!(cpu.general, after.general, "other registers (ours left): {}", tell());
    let differ = (cpu.rflags ^ flags_after) & STATUS;
    assert_eq!(differ & !row.undefined, 0, "other flags {differ:#x}: {}", tell());
    // What manuals leave undefined is as Intel's CPUs leave it; others may do otherwise, as ours may beside
    // them.
    assert!(differ == 0 || !is_intel(), "other undefined flags {differ:#x}: {}", tell());
    assert!(frame.0 == *processor.page(), "other memory: {}", tell());
    assert_eq!(cpu.rip, at + encoded.bytes.len() as u64, "{}", tell());
    assert_eq!(cpu.rflags & !STATUS, 2, "{}", tell());
    assert!(!cpu.interrupt_shadow);
    Some((width, encoded.addressing as u8, encoded.locked, encoded.short_addresses, encoded.segment))
}

fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

/// Where in the page an operand lies: anywhere, but in one cache line if it is changed, and aligned if it is
/// a wide pair.
fn place(row: &Row, width: usize, random: &mut Random) -> usize {
    let offset = random.below((4096 - width + 1) as u64) as usize;
    match (row.operand, row.usage) {
        (Operand::Pair, _) if width == 16 => offset / 16 * 16,
        (_, Use::Lockable) if offset % 64 + width > 64 => offset / 64 * 64 + 64 - width,
        _ => offset,
    }
}
