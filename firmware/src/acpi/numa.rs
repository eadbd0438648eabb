//! SRAT and SLIT: the CPUs and memory of each node, and the distances between nodes (ACPI 6.5, 5.2.16,
//! 5.2.17).

use super::table;
use crate::layout::Layout;
use crate::spec::MachineSpec;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// From revision 2 on, proximity domains have 32 bits.
const SRAT_REVISION: u8 = 3;
const SLIT_REVISION: u8 = 1;
/// The entry is to be used.
const ENABLED: u32 = 1;
/// What precedes the SRAT's entries (after the common header): a 1 of old, 8 bytes reserved.
const SRAT_FIXED: [u8; 12] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Processor local x2APIC affinity (5.2.16.3).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct X2ApicAffinity {
    kind: u8,
    len: u8,
    reserved: U16,
    domain: U32,
    apic_id: U32,
    flags: U32,
    clock_domain: U32,
    reserved2: U32,
}
const _: () = assert!(size_of::<X2ApicAffinity>() == 24);

/// Memory affinity (5.2.16.2).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct MemoryAffinity {
    kind: u8,
    len: u8,
    domain: U32,
    reserved: U16,
    base: U64,
    bytes: U64,
    reserved2: U32,
    flags: U32,
    reserved3: U64,
}
const _: () = assert!(size_of::<MemoryAffinity>() == 40);

/// The SRAT: proximity domain n is node n.
pub(super) fn srat(layout: &Layout) -> Vec<u8> {
    let mut body = SRAT_FIXED.to_vec();
    let last_with_cpus = layout.cpus().last().map_or(0, |cpu| usize::from(cpu.node));
    for node in 0..layout.nodes() {
        for cpu in layout.node_cpus(node) {
            body.extend_from_slice(x2apic(node, cpu.apic_id).as_bytes());
        }
        // Linux numbers its nodes as it meets their domains, CPU entries first. A memory-only node before a
        // node with CPUs would change places with it, so it is met here, by an id of its block that no CPU
        // has.
        if layout.cpus_on(node) == 0 && node < last_with_cpus {
            let unused = (node as u32) << layout.apic_id_shift();
            body.extend_from_slice(x2apic(node, unused).as_bytes());
        }
    }
    for node in 0..layout.nodes() {
        for range in layout.node_gpa_ranges(node) {
            let entry = MemoryAffinity {
                kind: 1,
                len: size_of::<MemoryAffinity>() as u8,
                domain: (node as u32).into(),
                reserved: 0.into(),
                base: range.start.into(),
                bytes: (range.end - range.start).into(),
                reserved2: 0.into(),
                flags: ENABLED.into(),
                reserved3: 0.into(),
            };
            body.extend_from_slice(entry.as_bytes());
        }
    }
    table(*b"SRAT", SRAT_REVISION, &body)
}

/// Bytes of the SRAT at most.
pub(super) fn srat_size(nodes: usize, cpus: usize) -> u64 {
    // Each node may stand for an unused id, and one node may have memory on both sides of the hole.
    let cpu_entries = (cpus + nodes) * size_of::<X2ApicAffinity>();
    (super::HEADER_LEN + SRAT_FIXED.len() + cpu_entries + (nodes + 1) * size_of::<MemoryAffinity>()) as u64
}

/// The SLIT: one byte for each pair of nodes.
pub(super) fn slit(layout: &Layout, spec: &MachineSpec) -> Vec<u8> {
    let nodes = layout.nodes();
    let mut body = (nodes as u64).to_le_bytes().to_vec();
    for from in 0..nodes {
        body.extend((0..nodes).map(|to| spec.distance(from, to)));
    }
    table(*b"SLIT", SLIT_REVISION, &body)
}

fn x2apic(node: usize, apic_id: u32) -> X2ApicAffinity {
    X2ApicAffinity {
        kind: 2,
        len: size_of::<X2ApicAffinity>() as u8,
        reserved: 0.into(),
        domain: (node as u32).into(),
        apic_id: apic_id.into(),
        flags: ENABLED.into(),
        clock_domain: 0.into(),
        reserved2: 0.into(),
    }
}
