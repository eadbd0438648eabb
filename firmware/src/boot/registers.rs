//! The state in which the first CPU enters the kernel: 64-bit mode, interrupts off, memory one to one.

use crate::addresses::PAGE_SIZE;

/// GPA of the global descriptor table.
const GDT_ADDR: u64 = 0x500;
/// Top of the stack.
const STACK_TOP: u64 = 0x7000;
/// GPA of the topmost page table; five more follow it.
const PAGE_TABLES_ADDR: u64 = 0x9000;

/// `__BOOT_CS`, which the boot protocol prescribes.
const CODE_SELECTOR: u16 = 0x10;
/// `__BOOT_DS`, likewise.
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with nothing but the bit that is always 1.
const RFLAGS: u64 = 2;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: usize = 512;
/// Page directories, each for 1 GiB: everything below 4 GiB.
const DIRECTORIES: u64 = 4;

/// One segment register with its hidden part; the fields are those of KVM's `kvm_segment`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// First linear address.
    pub base: u64,
    /// Last offset, in bytes.
    pub limit: u32,
    /// The visible part.
    pub selector: u16,
    /// The descriptor's 4-bit type.
    pub type_: u8,
    /// Whether it may be used.
    pub present: bool,
    /// Privilege level, 0 to 3.
    pub dpl: u8,
    /// Default operand size is 32 bits.
    pub db: bool,
    /// A code or data segment; otherwise a system one.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// The limit in the descriptor counts 4 KiB pages.
    pub g: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u16,
}

/// The first CPU's registers at the kernel's entry. Those not named here are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BspRegisters {
    /// The kernel's 64-bit entry.
    pub rip: u64,
    /// Top of a small stack.
    pub rsp: u64,
    /// Guest physical address of the boot parameters.
    pub rsi: u64,
    /// Interrupts off.
    pub rflags: u64,
    /// Control register 0: protected mode with paging.
    pub cr0: u64,
    /// Guest physical address of the page tables.
    pub cr3: u64,
    /// Control register 4: PAE.
    pub cr4: u64,
    /// Extended features: long mode, active.
    pub efer: u64,
    /// Code segment.
    pub cs: Segment,
    /// For DS, ES, FS, GS and SS alike.
    pub data: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table: empty, any exception ends the machine until the kernel sets its own.
    pub idt: DescriptorTable,
}

const CODE: Segment = Segment {
    base: 0,
    limit: 0xffff_ffff,
    selector: CODE_SELECTOR,
    type_: 0xb, // execute, read, accessed
    present: true,
    dpl: 0,
    db: false,
    s: true,
    l: true,
    g: true,
};

const DATA: Segment = Segment {
    selector: DATA_SELECTOR,
    type_: 0x3, /* read, write, accessed */
    db: true,
    l: false,
    ..CODE
};

const TASK: Segment = Segment {
    selector: TASK_SELECTOR,
    type_: 0xb, // busy 64-bit task
    db: false,
    s: false,
    limit: 0x67,
    g: false,
    ..DATA
};

/// Registers to enter the kernel at `entry` with its boot parameters at `params`.
pub(super) fn at_entry(entry: u64, params: u64) -> BspRegisters {
    BspRegisters {
        rip: entry,
        rsp: STACK_TOP,
        rsi: params,
        rflags: RFLAGS,
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr3: PAGE_TABLES_ADDR,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        cs: CODE,
        data: DATA,
        tr: TASK,
        gdt: DescriptorTable { base: GDT_ADDR, limit: (gdt().len() * 8 - 1) as u16 },
        idt: DescriptorTable::default(),
    }
}

/// The tables in memory that the registers point at, with their addresses.
pub(super) fn tables() -> Vec<(u64, Vec<u8>)> {
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let directory_pointers = PAGE_TABLES_ADDR + PAGE_SIZE;
    let directories = directory_pointers + PAGE_SIZE;

    let mut top = [0; ENTRIES];
    top[0] = directory_pointers | PRESENT_WRITABLE;
    let mut pointers = [0; ENTRIES];
    for (at, pointer) in (0..DIRECTORIES).zip(&mut pointers) {
        *pointer = (directories + at * PAGE_SIZE) | PRESENT_WRITABLE;
    }
    let pages = (0..DIRECTORIES * ENTRIES as u64)
        .map(|page| (page * LARGE_PAGE_SIZE) | PRESENT_WRITABLE | LARGE_PAGE);
    let pages: Vec<u64> = pages.collect();
    vec![
        (GDT_ADDR, bytes(&gdt())),
        (PAGE_TABLES_ADDR, bytes(&top)),
        (directory_pointers, bytes(&pointers)),
        (directories, bytes(&pages)),
    ]
}

/// The global descriptor table: the task's descriptor is 16 bytes long.
fn gdt() -> [u64; 6] {
    [0, 0, descriptor(&CODE), descriptor(&DATA), descriptor(&TASK), 0]
}

/// A segment as the GDT holds it (SDM volume 3A, 3.4.5).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.g { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    let flag = |on: bool, bit: u32| u64::from(on) << bit;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_) << 40
        | flag(segment.s, 44)
        | u64::from(segment.dpl) << 45
        | flag(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
        | (base >> 24 & 0xff) << 56
}
