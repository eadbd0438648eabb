//! Whole shipments: state, fetch, operand, completion.

use coherence::protocol::{Action, Width};

use super::random::Random;
use super::walking::{A, CR0, D, EFER, NX, P, PAE, SMAP, SMEP, U, W, Words};
use crate::instruction::flags::{RF, STATUS, ZF};
use crate::instruction::walk::Fault;
use crate::instruction::{Cpu, Refusal, Shipment, decode::decode, ship};

/// Guest-physical: the pages of code, and that of data.
const CODE: u64 = 0x8000;
const CODE_AFTER: u64 = 0xc000;
const DATA: u64 = 0x9000;
/// Linear: the code, the page after it, the data.
const RIP: u64 = 0x0040_0000;
const DATA_AT: u64 = 0x0040_3000;

/// A CPU at CPL 3 on `code`, `before_end` bytes before the end of the page, and memory in which RBX is the
/// address of data.
fn machine(code: &[u8], before_end: u64) -> (Cpu, Words) {
    let upper = P | W | U | A | D;
    let mut words = Words::default();
    words.0.insert(0x1000, 0x2000 | upper);
    words.0.insert(0x2000, 0x3000 | upper);
    words.0.insert(0x3000 + 8 * 2, 0x4000 | upper);
    for (index, entry) in [(0, CODE | P | U | A), (1, CODE_AFTER | P | U | A), (3, DATA | upper | NX)] {
        words.0.insert(0x4000 + 8 * index, entry);
    }
    let mut bytes = vec![0x90; 2 * 4096];
    let start = 4096 - before_end as usize;
    bytes[start..start + code.len()].copy_from_slice(code);
    for (page, address) in bytes.chunks(4096).zip([CODE, CODE_AFTER]) {
        for (n, word) in page.chunks(8).enumerate() {
            words.0.insert(address + 8 * n as u64, u64::from_le_bytes(word.try_into().unwrap()));
        }
    }
    let mut cpu = Cpu {
        rip: RIP + start as u64,
        rflags: RF | STATUS | 2,
        code64: true,
        cpl: 3,
        cr0: CR0,
        cr3: 0x1000,
        cr4: PAE | SMEP | SMAP,
        efer: EFER,
        dr7: 0x400,
        physical_bits: 46,
        gigabyte_pages: true,
        interrupt_shadow: true,
        ..Cpu::default()
    };
    cpu.general[3] = DATA_AT + 0x128;
    (cpu, words)
}

/// lock xadd [rbx+8], ecx
const XADD: [u8; 5] = [0xf0, 0x0f, 0xc1, 0x4b, 0x08];

fn entry(words: &mut Words, linear: u64) -> &mut u64 {
    words.0.get_mut(&(0x4000 + (linear >> 12 & 511) * 8)).unwrap()
}

#[test]
fn an_operation_travels_and_its_answer_completes_the_instruction() {
    for before_end in [4096, 100, 15, 5] {
        let (mut cpu, words) = machine(&XADD, before_end);
        cpu.general[1] = 0xffff_ffff_0000_0003;
        let Shipment { operation, completion } = ship(&cpu, &words, DATA).unwrap();
        assert_eq!((operation.action(), operation.width()), (Action::Add, Width::Four));
        assert_eq!((operation.offset(), operation.operand()), (0x130, 3));
        let rip = cpu.rip;
        completion.finish(0xffff_fffd, &mut cpu);
        assert_eq!(cpu.general[1], 0xffff_fffd, "the old value, the upper half cleared");
        assert_eq!(cpu.rip, rip + 5);
        assert_eq!(cpu.rflags & ZF, ZF);
        assert_eq!(cpu.rflags & RF, 0, "the real instruction clears it");
        assert!(!cpu.interrupt_shadow);
    }
}

#[test]
fn an_instruction_that_crosses_a_page_is_fetched_from_both_and_needs_both() {
    for before_end in 1..5 {
        let (cpu, mut words) = machine(&XADD, before_end);
        assert!(ship(&cpu, &words, DATA).is_ok());
        *entry(&mut words, RIP + 4096) |= NX;
        assert_eq!(ship(&cpu, &words, DATA), Err(Refusal::Fetch(Fault::NoExecute)));
        words.0.remove(&CODE_AFTER);
        *entry(&mut words, RIP + 4096) &= !NX;
        assert_eq!(ship(&cpu, &words, DATA), Err(Refusal::CodeAbsent));
    }
    // What ends with its page needs no other.
    let (cpu, mut words) = machine(&XADD, 5);
    *entry(&mut words, RIP + 4096) = 0;
    assert!(ship(&cpu, &words, DATA).is_ok());
}

#[test]
fn the_cpus_state_can_forbid_it() {
    let refused = |change: fn(&mut Cpu)| {
        let (mut cpu, words) = machine(&XADD, 64);
        change(&mut cpu);
        ship(&cpu, &words, DATA).unwrap_err()
    };
    assert_eq!(refused(|cpu| cpu.code64 = false), Refusal::Mode);
    assert_eq!(refused(|cpu| cpu.event = true), Refusal::Event);
    assert_eq!(refused(|cpu| cpu.rflags |= 1 << 8), Refusal::SingleStep);
    for bit in 0..8 {
        let (mut cpu, words) = machine(&XADD, 64);
        cpu.dr7 |= 1 << bit;
        assert_eq!(ship(&cpu, &words, DATA), Err(Refusal::Breakpoint));
    }
    assert_eq!(refused(|cpu| cpu.rip = 1 << 47), Refusal::Fetch(Fault::NotCanonical));
    assert_eq!(refused(|cpu| cpu.rip += 5), Refusal::NoOperand, "a nop");
}

#[test]
fn the_operands_place_can_forbid_it() {
    let at = |place: u64, code: &[u8], change: fn(&mut Cpu, &mut Words)| {
        let (mut cpu, mut words) = machine(code, 64);
        cpu.general[3] = place;
        change(&mut cpu, &mut words);
        ship(&cpu, &words, DATA).err()
    };
    let none = |_: &mut Cpu, _: &mut Words| {};
    let load = [0x48, 0x8b, 0x03];
    assert_eq!(at(DATA_AT + 0xff8, &load, none), None);
    assert_eq!(at(DATA_AT + 0xff9, &load, none), Some(Refusal::CrossesPage));
    assert_eq!(at(DATA_AT + 0x3c, &load, none), None, "a load may cross a cache line");
    assert_eq!(at(DATA_AT + 0x35, &XADD, none), Some(Refusal::SplitLock));
    assert_eq!(at(DATA_AT + 0x31, &XADD, none), None, "unaligned, in one line");
    let checked = |cpu: &mut Cpu, _: &mut Words| {
        cpu.cr0 |= 1 << 18;
        cpu.rflags |= 1 << 18;
    };
    assert_eq!(at(DATA_AT + 0x31, &XADD, checked), Some(Refusal::Misaligned));
    assert_eq!(at(DATA_AT + 0x30, &XADD, checked), None);
    // cmpxchg16b [rbx]
    let wide = [0xf0, 0x48, 0x0f, 0xc7, 0x0b];
    assert_eq!(at(DATA_AT + 8, &wide, none), Some(Refusal::Misaligned));
    assert_eq!(at(DATA_AT + 16, &wide, none), None);
    assert_eq!(at(RIP, &load, none), Some(Refusal::OtherPage));
    assert_eq!(at(1 << 63, &load, none), Some(Refusal::Operand(Fault::NotCanonical)));
    assert_eq!(
        at(DATA_AT, &XADD, |_, words| *entry(words, DATA_AT) &= !W),
        Some(Refusal::Operand(Fault::ReadOnly))
    );
    // Marks: Accessed all the way, Dirty only of a write.
    assert_eq!(at(DATA_AT, &XADD, |_, words| *entry(words, DATA_AT) &= !D), Some(Refusal::Marks));
    assert_eq!(at(DATA_AT, &load, |_, words| *entry(words, DATA_AT) &= !D), None);
    assert_eq!(at(DATA_AT, &load, |_, words| *entry(words, DATA_AT) &= !A), Some(Refusal::Marks));
    assert_eq!(at(DATA_AT, &load, |_, words| *words.0.get_mut(&0x2000).unwrap() &= !A), Some(Refusal::Marks));
    let compared = [0xf0, 0x0f, 0xb1, 0x0b];
    assert_eq!(
        at(DATA_AT, &compared, |_, words| *entry(words, DATA_AT) &= !D),
        Some(Refusal::Marks),
        "it may write"
    );
}

#[test]
fn what_is_not_in_the_table_is_not_shipped() {
    let refused = |code: &[u8]| {
        let (cpu, words) = machine(code, 64);
        ship(&cpu, &words, DATA).unwrap_err()
    };
    let unknown: [&[u8]; 13] = [
        &[0xff, 0x33],             // push [rbx]
        &[0x8f, 0x03],             // pop [rbx]
        &[0xff, 0x13],             // call [rbx]
        &[0xff, 0x23],             // jmp [rbx]
        &[0x8e, 0x1b],             // mov ds, [rbx]
        &[0x8c, 0x1b],             // mov [rbx], ds
        &[0xd1, 0x23],             // shl [rbx], 1
        &[0xf7, 0x23],             // mul [rbx]
        &[0x0f, 0x10, 0x03],       // movups xmm0, [rbx]
        &[0xdd, 0x03],             // fld [rbx]
        &[0x0f, 0x01, 0x13],       // lgdt [rbx]
        &[0x0f, 0x38, 0xf0, 0x03], // movbe eax, [rbx]
        &[0x0f, 0xae, 0x3b],       // clflush [rbx]
    ];
    for code in unknown {
        assert_eq!(refused(code), Refusal::Unknown, "{code:x?}");
    }
    let without: [&[u8]; 6] = [
        &[0x48, 0x89, 0xd8], // mov rax, rbx
        &[0xa4],             // movsb
        &[0x55],             // push rbp
        &[0x48, 0x8d, 0x03], // lea rax, [rbx]
        &[0x0f, 0x0b],       // ud2
        &[0xf3, 0xab],       // rep stosd
    ];
    for code in without {
        assert!(matches!(refused(code), Refusal::NoOperand | Refusal::Unknown), "{code:x?}");
    }
    for code in [&[0xf0, 0x8b, 0x03][..], &[0xf0, 0x01, 0xd8], &[0x0e], &[0xf0, 0x39, 0x03]] {
        assert_eq!(refused(code), Refusal::Undecodable, "{code:x?}");
    }
    assert_eq!(refused(&[0x66; 20]), Refusal::Undecodable, "an instruction of more than 15 bytes");
}

#[test]
fn any_bytes_give_an_operation_in_one_page_or_a_refusal() {
    let mut random = Random(6);
    let (mut shipped, mut lone) = (0, 0);
    for _ in 0..400_000 {
        let mut code: [u8; 15] = std::array::from_fn(|_| random.any() as u8);
        if random.once_in(2) {
            code[0] = random.pick(&[0xf0, 0x48, 0x66, 0x0f, 0x8b, 0x89, 0x67]);
        }
        let length = random.below(16) as usize;
        let cpu = Cpu {
            general: std::array::from_fn(|_| random.edgy()),
            rip: random.edgy(),
            rflags: random.any(),
            fs_base: random.edgy(),
            gs_base: random.edgy(),
            cr0: random.any(),
            cpl: random.below(4) as u8,
            code64: true,
            ..Cpu::default()
        };
        let decoded = decode(&code[..length], &cpu);
        if let Ok(decoded) = decoded {
            let operation = decoded.operation;
            assert_eq!(u64::from(operation.offset()), decoded.address % 4096);
            let mut after = cpu.clone();
            decoded.completion.finish(u128::from(random.any()) << 64 | u128::from(random.any()), &mut after);
            let length = after.rip.wrapping_sub(cpu.rip);
            assert!((2..=15).contains(&length) && after.rflags & !STATUS == cpu.rflags & !STATUS & !RF);
            // More bytes change nothing, fewer are too few.
            assert_eq!(decode(&code, &cpu), Ok(decoded));
            shipped += 1;
        } else if length > 0 && decoded == Err(Refusal::Truncated) {
            lone += 1;
        }
        assert!(length > 0 || decoded == Err(Refusal::Truncated));
    }
    assert!(shipped > 10_000 && lone > 1_000, "{shipped} shipped, {lone} truncated");
}
