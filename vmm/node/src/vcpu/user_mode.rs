//! The state of a vCPU that begins at CPL 3 in 64-bit mode, for probes and tests: the only mode in which KVM
//! on PVM runs guest code natively, and one that every KVM runs.

use firmware::boot::{BspRegisters, DescriptorTable, Segment};

/// Flags to begin with: the reserved bit, and IOPL 3 so that the code may use ports.
pub const RFLAGS: u64 = 0x3002;
/// Bytes of [`page_tables`].
pub const TABLES_SIZE: usize = 3 * 4096;
/// Present, writable, user, accessed, dirty: no CPU ever has to write such an entry.
const FLAGS: u64 = 0x67;
/// A page directory's entry maps 2 MiB.
const LARGE: u64 = 0x80;

/// Page tables to be put at guest physical address `at`, a multiple of 4096: the first GiB one to one, in
/// pages of 2 MiB, open to user mode.
pub fn page_tables(at: u64) -> Vec<u8> {
    let mut tables = vec![0; TABLES_SIZE];
    let mut set = |entry: usize, value: u64| {
        tables[entry * 8..][..8].copy_from_slice(&value.to_le_bytes());
    };
    set(0, (at + 0x1000) | FLAGS);
    set(512, (at + 0x2000) | FLAGS);
    for i in 0..512 {
        set(1024 + i, (i as u64) << 21 | FLAGS | LARGE);
    }
    tables
}

/// Registers to begin with at `rip`, interrupts off, with [`RFLAGS`] and without descriptor tables: any
/// exception ends the guest.
pub fn registers(tables: u64, rip: u64) -> BspRegisters {
    let data = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3,
        present: true,
        dpl: 3,
        db: true,
        s: true,
        l: false,
        g: true,
    };
    let nothing = DescriptorTable { base: 0, limit: 0 };
    BspRegisters {
        rip,
        rsp: 0,
        rsi: 0,
        rflags: RFLAGS,
        // Protection, numeric errors, write protection, paging; PAE and SSE; long mode, active.
        cr0: 0x8001_0033,
        cr3: tables,
        cr4: 0x220,
        efer: 0x500,
        cs: Segment { selector: 0x33, type_: 0xb, db: false, l: true, ..data },
        data,
        tr: Segment {
            selector: 0x40,
            limit: 0x67,
            type_: 0xb,
            dpl: 0,
            db: false,
            s: false,
            g: false,
            ..data
        },
        gdt: nothing,
        idt: nothing,
    }
}
