//! MADT: the CPUs by their x2APIC ids, and the I/O APIC (ACPI 6.5, 5.2.12).
//!
//! All CPUs are x2APIC entries (type 9), those with small ids too: they start in x2APIC mode, and Linux
//! ignores type 9 with an id below 255 only in a table that also has entries of type 0.

use super::table;
use crate::addresses::{IOAPIC_ADDR, IOAPIC_ID, LAPIC_ADDR};
use crate::layout::Layout;
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

const REVISION: u8 = 5;
/// The entry's CPU can be used.
const ENABLED: u32 = 1;
/// Every CPU, where an entry asks for a CPU's UID.
const ALL_CPUS: u32 = u32::MAX;

/// What precedes the entries (after the common header).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Fixed {
    lapic_addr: U32,
    /// Bit 0 would say that there is a PIC; there is none.
    flags: U32,
}
const _: () = assert!(size_of::<Fixed>() == 8);

/// Processor local x2APIC (5.2.12.12).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalX2Apic {
    kind: u8,
    len: u8,
    reserved: U16,
    apic_id: U32,
    flags: U32,
    uid: U32,
}
const _: () = assert!(size_of::<LocalX2Apic>() == 16);

/// Local x2APIC NMI (5.2.12.13).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct LocalX2ApicNmi {
    kind: u8,
    len: u8,
    flags: U16,
    uid: U32,
    lint: u8,
    reserved: [u8; 3],
}
const _: () = assert!(size_of::<LocalX2ApicNmi>() == 12);

/// I/O APIC (5.2.12.3).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct IoApic {
    kind: u8,
    len: u8,
    id: u8,
    reserved: u8,
    addr: U32,
    gsi_base: U32,
}
const _: () = assert!(size_of::<IoApic>() == 12);

/// The table.
pub(super) fn bytes(layout: &Layout) -> Vec<u8> {
    let mut body = Vec::new();
    let fixed = Fixed { lapic_addr: (LAPIC_ADDR as u32).into(), flags: 0.into() };
    body.extend_from_slice(fixed.as_bytes());
    for cpu in layout.cpus() {
        let entry = LocalX2Apic {
            kind: 9,
            len: size_of::<LocalX2Apic>() as u8,
            reserved: 0.into(),
            apic_id: cpu.apic_id.into(),
            flags: ENABLED.into(),
            uid: cpu.vcpu.into(),
        };
        body.extend_from_slice(entry.as_bytes());
    }
    let ioapic = IoApic {
        kind: 1,
        len: size_of::<IoApic>() as u8,
        id: IOAPIC_ID,
        reserved: 0,
        addr: (IOAPIC_ADDR as u32).into(),
        gsi_base: 0.into(),
    };
    body.extend_from_slice(ioapic.as_bytes());
    let nmi = LocalX2ApicNmi {
        kind: 10,
        len: size_of::<LocalX2ApicNmi>() as u8,
        flags: 0.into(),
        uid: ALL_CPUS.into(),
        lint: 1,
        reserved: [0; 3],
    };
    body.extend_from_slice(nmi.as_bytes());
    table(*b"APIC", REVISION, &body)
}

/// Bytes of the table for `cpus` CPUs.
pub(super) fn size(cpus: usize) -> u64 {
    let fixed = super::HEADER_LEN + size_of::<Fixed>() + size_of::<IoApic>() + size_of::<LocalX2ApicNmi>();
    (fixed + cpus * size_of::<LocalX2Apic>()) as u64
}
