//! The topology leaves: a CPU's id, and what CPUs share: one package per node, one thread per core, the
//! last-level cache shared by a node.

use super::{CpuidEntry, Table};
use crate::layout::{CpuPlace, Layout};

/// Level types of leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What CPUID answers on the CPU at `place`: `base` (from [`super::intersect`]) with its APIC id and
/// topology, and its clock's frequency in kHz.
pub fn for_vcpu(base: &[CpuidEntry], layout: &Layout, place: &CpuPlace, tsc_khz: u32) -> Vec<CpuidEntry> {
    let mut table = Table { entries: base.to_vec() };
    let cpus = layout.cpus_on(place.node.into()).max(1);
    let shift = layout.apic_id_shift();
    // Ids that a package has room for; nodes with fewer CPUs leave some unused.
    let ids = 1 << shift;
    let intel = table.is_intel();

    let identity = table.entry(1, 0);
    let clflush = identity.ebx & 0xff00;
    identity.ebx = (place.apic_id & 0xff) << 24 | ids.min(0xff) << 16 | clflush;
    identity.edx = set(identity.edx, 28, ids > 1);

    caches(&mut table, 4, ids);
    caches(&mut table, 0x8000_001d, ids);

    let max_basic = table.get(0, 0).map_or(0, |entry| entry.eax);
    for leaf in [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= max_basic) {
        levels(&mut table, leaf, place.apic_id, cpus, shift);
    }
    if intel {
        frequency(&mut table, tsc_khz);
    } else {
        amd(&mut table, place, cpus, shift);
    }
    table.entries
}

/// Extended topology enumeration.
fn levels(table: &mut Table, leaf: u32, apic_id: u32, cpus: u32, shift: u32) {
    // Linux takes a level with EBX = 0 for a leaf that does not work.
    for (subleaf, kind, shift, count) in [(0, LEVEL_THREAD, 0, 1), (1, LEVEL_CORE, shift, cpus), (2, 0, 0, 0)]
    {
        let entry = table.entry(leaf, subleaf);
        entry.eax = shift;
        entry.ebx = count;
        entry.ecx = kind << 8 | subleaf;
        entry.edx = apic_id;
    }
}

/// Deterministic cache parameters, on both vendors' leaves: levels 1 and 2 are a core's own.
fn caches(table: &mut Table, leaf: u32, ids: u32) {
    for entry in table.entries.iter_mut().filter(|entry| entry.leaf == leaf && entry.eax & 0x1f != 0) {
        let level = entry.eax >> 5 & 7;
        let sharing = if level >= 3 { ids } else { 1 };
        entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14;
        if leaf == 4 {
            // Ids for cores in the package; the field has 6 bits.
            entry.eax |= (ids - 1).min(63) << 26;
        }
    }
}

/// Clock and core frequency. As the crystal's frequency says 1 kHz, the ratio is the TSC's kHz exactly.
fn frequency(table: &mut Table, tsc_khz: u32) {
    let crystal = table.entry(0x15, 0);
    (crystal.eax, crystal.ebx, crystal.ecx, crystal.edx) = (1, tsc_khz, 1000, 0);
    let core = table.entry(0x16, 0);
    (core.eax, core.ebx, core.ecx, core.edx) = (tsc_khz / 1000, tsc_khz / 1000, 0, 0);
}

/// AMD's own: package size, and the extended APIC id leaf.
fn amd(table: &mut Table, place: &CpuPlace, cpus: u32, shift: u32) {
    if let Some(features) = table.get_mut(0x8000_0001, 0) {
        features.ecx = set(features.ecx, 1, cpus > 1);
    }
    if let Some(sizes) = table.get_mut(0x8000_0008, 0) {
        sizes.ecx = (cpus - 1) & 0xff | shift << 12;
    }
    if let Some(topology) = table.get_mut(0x8000_001e, 0) {
        topology.eax = place.apic_id;
        topology.ebx = place.local & 0xff;
        topology.ecx = u32::from(place.node) & 0xff;
        topology.edx = 0;
    }
}

fn set(word: u32, bit: u32, on: bool) -> u32 {
    word & !(1 << bit) | u32::from(on) << bit
}
