//! Guests at CPL 3 in 64-bit mode, with interrupts: the rest of an operating system, in a few pages.
//!
//! | at | what |
//! |---|---|
//! | [`KERNEL`] | begins here at CPL 0, enables the local APIC, and goes to [`CODE`] at CPL 3 |
//! | [`GDT`], [`TSS`], [`IDT`] | descriptors; the stack of handlers ends at [`STACK`] |
//! | [`HANDLERS`] | the handlers, at CPL 0 |
//! | [`PAGE`] | the test's |
//! | [`TABLES`] | page tables |

use firmware::boot::{DescriptorTable, Segment};
use vmm::testing::{code64, patch};
use vmm::vcpu::user_mode;

use super::harness::{CODE, Parts};
use super::interrupts::{enable_apic, eoi};

const KERNEL: u16 = 0x2000;
const HANDLERS: u16 = 0x3000;
const GDT: u16 = 0x7000;
const TSS: u16 = 0x7100;
const STACK: u64 = 0x8000;
const IDT: u16 = 0x9000;
/// The page that tests withhold, and where it is.
pub const PAGE: u64 = 0xa;
const TABLES: u16 = 0xc000;

/// How a guest begins.
pub struct Setup<'a> {
    /// At CPL 0, after the local APIC was enabled.
    pub kernel: &'a [u8],
    /// At CPL 3.
    pub code: &'a [u8],
    /// Whether interrupts are on at CPL 3.
    pub interrupts: bool,
    /// Vectors whose handlers report `0x100 + vector` and touch nothing but their stack.
    pub vectors: &'a [u8],
}

const KERNEL_CODE: u16 = 0x08;
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
const TASK: u16 = 0x40;

/// Makes the boot processor begin so.
pub fn prepare(parts: &mut Parts, setup: &Setup) {
    parts.load(TABLES, &user_mode::page_tables(TABLES.into()));
    descriptors(parts);
    let go = code64!("push 0x2b", "push 0", "push 0x12345678", "push 0x33", "push 0x1000", "iretq");
    let mut kernel = [code64!(enable_apic!()), setup.kernel, go].concat();
    // Flags for CPL 3: IOPL 3.
    patch(&mut kernel, if setup.interrupts { 0x3202 } else { 0x3002 });
    parts.load(KERNEL, &kernel);
    parts.load(CODE, setup.code);
    for (index, &vector) in (0..).zip(setup.vectors) {
        handler(parts, vector, HANDLERS + index * 0x40, &reporting(vector));
    }
    let user = user_mode::registers(TABLES.into(), KERNEL.into());
    let (cs, data) = (user.cs, user.data);
    parts.start = firmware::boot::BspRegisters {
        rsp: STACK,
        rflags: 2,
        cs: Segment { selector: KERNEL_CODE, dpl: 0, ..cs },
        data: Segment { selector: 0x10, dpl: 0, ..data },
        tr: Segment { base: TSS.into(), ..user.tr },
        gdt: DescriptorTable { base: GDT.into(), limit: 0x4f },
        idt: DescriptorTable { base: IDT.into(), limit: 0xfff },
        ..user
    };
}

/// A handler that reports `0x100 + vector`; all but an NMI's finish the interrupt.
fn reporting(vector: u8) -> Vec<u8> {
    let begin = code64!("push rax", "push rcx", "push rdx", "mov eax, 0x12345678", "out 0x80, eax");
    let end = code64!("pop rdx", "pop rcx", "pop rax", "iretq");
    let finish: &[u8] = if vector == 2 { &[] } else { code64!(eoi!()) };
    let mut code = [begin, finish, end].concat();
    patch(&mut code, 0x100 + u32::from(vector));
    code
}

/// Makes `vector` run `code` at `at`.
pub fn handler(parts: &Parts, vector: u8, at: u16, code: &[u8]) {
    parts.load(at, code);
    // An interrupt gate (SDM vol. 3, 7.14.1): present, from any privilege level.
    let gate = u64::from(at) | u64::from(KERNEL_CODE) << 16 | 0xee00 << 32;
    parts.load(IDT + u16::from(vector) * 16, &gate.to_le_bytes());
}

fn descriptors(parts: &Parts) {
    let segment = |access: u64, flags: u64| 0xffff | access << 40 | 0xf << 48 | flags << 52;
    let tss = u64::from(TSS);
    let entries: [u64; 10] = [
        0,
        // At CPL 0: 64-bit code, data.
        segment(0x9b, 0xa),
        segment(0x93, 0xc),
        0,
        0,
        // At CPL 3: data, 64-bit code.
        segment(0xf3, 0xc),
        segment(0xfb, 0xa),
        0,
        // The busy task state.
        0x67 | tss << 16 | 0x8b << 40,
        0,
    ];
    const _: () = assert!(USER_DATA == 5 << 3 | 3 && USER_CODE == 6 << 3 | 3 && TASK == 8 << 3);
    parts.load(GDT, &entries.map(u64::to_le_bytes).concat());
    // The stack pointer for CPL 0.
    parts.load(TSS + 4, &STACK.to_le_bytes());
}
