//! Partitions: the places of a disk's file systems.

use std::io;
use std::sync::Arc;

use gpt::disk::LogicalBlockSize;

use super::source::{ReadOnly, Source};

/// Bytes of a sector, in which MBR counts.
const SECTOR: u64 = 512;
/// Offset of the four entries of an MBR, 16 bytes each.
const MBR_ENTRIES: usize = 446;
/// Types of MBR entries that lead on: extended partitions, and the placeholder of a GPT.
const MBR_OTHER: [u8; 5] = [0, 0x05, 0x0f, 0x85, 0xee];

/// A part of the disk that may hold a file system, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// `partition 1` and so on, or `the whole disk`.
    pub name: String,
    /// First byte.
    pub start: u64,
    /// Length.
    pub len: u64,
}

/// The partitions of a disk in the order of their numbers; the whole disk if it has none.
///
/// # Errors
/// The disk cannot be read.
pub fn list(disk: &Arc<dyn Source>) -> io::Result<Vec<Range>> {
    let len = disk.len()?;
    let mut found = by_gpt(disk);
    if found.is_empty() {
        found = by_mbr(&**disk, len)?;
    }
    found.retain(|range| range.len > 0 && range.start.checked_add(range.len).is_some_and(|end| end <= len));
    if found.is_empty() {
        found.push(Range { name: "the whole disk".into(), start: 0, len });
    }
    Ok(found)
}

fn name(number: u32) -> String {
    format!("partition {number}")
}

fn by_gpt(disk: &Arc<dyn Source>) -> Vec<Range> {
    for size in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
        let config = gpt::GptConfig::new().writable(false).logical_block_size(size);
        let Ok(table) = config.open_from_device(ReadOnly::new(disk)) else { continue };
        let range = |(number, partition): (&u32, &gpt::partition::Partition)| {
            let (start, len) = (partition.bytes_start(size).ok()?, partition.bytes_len(size).ok()?);
            partition.is_used().then(|| Range { name: name(*number), start, len })
        };
        return table.partitions().iter().filter_map(range).collect();
    }
    Vec::new()
}

fn by_mbr(disk: &dyn Source, len: u64) -> io::Result<Vec<Range>> {
    let mut sector = [0; SECTOR as usize];
    if len < SECTOR {
        return Ok(Vec::new());
    }
    disk.read(&mut sector, 0)?;
    if sector[510..] != [0x55, 0xaa] {
        return Ok(Vec::new());
    }
    let entries = sector[MBR_ENTRIES..510].chunks_exact(16);
    // A FAT file system on the whole disk ends in the same two bytes; no partition table has such status bytes.
    if entries.clone().any(|entry| entry[0] & 0x7f != 0) {
        return Ok(Vec::new());
    }
    let word = |entry: &[u8], at: usize| {
        u64::from(u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]))
    };
    let used = (1..).zip(entries).filter(|(_, entry)| !MBR_OTHER.contains(&entry[4]));
    let range = |(number, entry): (u32, &[u8])| Range {
        name: name(number),
        start: word(entry, 8) * SECTOR,
        len: word(entry, 12) * SECTOR,
    };
    Ok(used.map(range).collect())
}
