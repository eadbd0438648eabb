//! The common abilities of all nodes' CPUs: feature bits that all have, the least of every limit.

use super::{CpuidEntry, Table};
use crate::FirmwareError;

/// 7.0 EBX bits that say what a CPU does *not* do (x87 pointers saved only on exceptions; no x87 selectors):
/// the guest must know if any CPU is so.
const LACKING: u32 = 1 << 6 | 1 << 13;

/// The common abilities. Leaves that are not named here are dropped: nothing reaches the guest by default.
pub(super) fn all(nodes: &[Vec<CpuidEntry>]) -> Result<Table, FirmwareError> {
    let tables: Vec<(usize, Table)> = nodes
        .iter()
        .enumerate()
        .filter(|(_, entries)| !entries.is_empty())
        .map(|(node, entries)| (node, normalized(entries)))
        .collect();
    let Some(((first_node, first), others)) = tables.split_first() else {
        return Err(FirmwareError::Spec("no node of the machine has a CPU: give node 0 at least one".into()));
    };
    for (node, other) in others {
        check_alike(*first_node, first, *node, other)?;
    }
    let others: Vec<&Table> = others.iter().map(|(_, table)| table).collect();
    let entries = first.entries.iter().filter_map(|entry| common(entry, &others)).collect();
    Ok(Table { entries })
}

fn normalized(entries: &[CpuidEntry]) -> Table {
    let entries = entries.iter().map(|entry| CpuidEntry {
        subleaf: if super::has_subleaves(entry.leaf) { entry.subleaf } else { 0 },
        significant_index: super::has_subleaves(entry.leaf),
        ..*entry
    });
    Table { entries: entries.collect() }
}

fn check_alike(first_node: usize, first: &Table, node: usize, other: &Table) -> Result<(), FirmwareError> {
    if first.vendor() != other.vendor() {
        return Err(FirmwareError::Spec(format!(
            "node {first_node} has {} CPUs and node {node} has {} CPUs: use hosts whose CPUs are of one vendor",
            name(first),
            name(other)
        )));
    }
    let line = |table: &Table| table.get(1, 0).map_or(0, |entry| entry.ebx >> 8 & 0xff) * 8;
    if line(first) != line(other) {
        return Err(FirmwareError::Spec(format!(
            "node {first_node} has cache lines of {} bytes and node {node} of {}: use hosts with alike CPUs",
            line(first),
            line(other)
        )));
    }
    Ok(())
}

fn name(table: &Table) -> String {
    String::from_utf8_lossy(&table.vendor()).trim_end_matches('\0').into()
}

/// What `entry` and the same entry of all `others` share; `None` if the guest shall not see the leaf.
fn common(entry: &CpuidEntry, others: &[&Table]) -> Option<CpuidEntry> {
    let same = |table: &&Table| table.get(entry.leaf, entry.subleaf).copied();
    let all = |pick: fn(&CpuidEntry) -> u32, join: fn(u32, u32) -> u32| {
        others.iter().map(|table| same(table).map_or(0, |other| pick(&other))).fold(pick(entry), join)
    };
    let and = |pick| all(pick, |a, b| a & b);
    let min = |pick| all(pick, u32::min);
    let or = |pick| all(pick, |a, b| a | b);
    let equal = || others.iter().all(|table| same(table).as_ref() == Some(entry));

    let mut result = *entry;
    match (entry.leaf, entry.subleaf) {
        (0 | 0x8000_0000, _) => result.eax = min(|e| e.eax),
        (1 | 0x8000_0001, _) => {
            result.ecx = and(|e| e.ecx);
            result.edx = and(|e| e.edx);
        }
        (7, 0) => {
            result.eax = min(|e| e.eax);
            result.ebx = and(|e| e.ebx) | or(|e| e.ebx) & LACKING;
            result.ecx = and(|e| e.ecx);
            result.edx = and(|e| e.edx);
        }
        (6 | 0x4000_0001 | 0x8000_0007 | 0x8000_001a | 0x8000_0021, _) | (7, _) => {
            result.eax = and(|e| e.eax);
            result.ebx = and(|e| e.ebx);
            result.ecx = and(|e| e.ecx);
            result.edx = and(|e| e.edx);
        }
        (0xd, 0) => {
            result.eax = and(|e| e.eax);
            result.edx = and(|e| e.edx);
        }
        (0xd, 1) => {
            result.eax = and(|e| e.eax);
            result.ecx = and(|e| e.ecx);
            result.edx = and(|e| e.edx);
        }
        // A state component whose place differs from node to node, and tiles of different shapes, are of no
        // use.
        (0xd | 0x1d | 0x1e, _) if !equal() => return None,
        (0x8000_0008, _) => {
            let tables: Vec<CpuidEntry> = others.iter().filter_map(same).chain([*entry]).collect();
            result.eax = [0, 8, 16].into_iter().fold(0, |eax, shift| eax | least(&tables, shift));
            result.ebx = and(|e| e.ebx);
        }
        // Identity, brand, caches and TLBs: the first node's. Topology leaves are rewritten for each CPU.
        (2 | 4 | 0xd | 0x1d | 0x1e | 0x4000_0000, _) => {}
        (0x8000_0002..=0x8000_0006 | 0x8000_0019 | 0x8000_001d | 0x8000_001e, _) => {}
        _ => return None,
    }
    Some(result)
}

/// The least of a byte of EAX, in its place, where 0 means "not said".
fn least(entries: &[CpuidEntry], shift: u32) -> u32 {
    let bytes = entries.iter().map(|entry| entry.eax >> shift & 0xff);
    bytes.filter(|byte| *byte > 0).min().unwrap_or(0) << shift
}
