//! Partitions, the places of file systems: GPT, MBR with logical partitions, or the whole disk.

use std::io;
use std::sync::Arc;

use gpt::disk::LogicalBlockSize;

use super::limits::MOST_PARTITIONS;
use super::source::{ReadOnly, Source};

/// Bytes of a sector, in which MBR counts.
const SECTOR: u64 = 512;
/// Offset of the four entries of an MBR, 16 bytes each.
const MBR_ENTRIES: usize = 446;
/// Types of MBR entries that lead to logical partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The type of the MBR entry that stands for a GPT.
const PROTECTIVE: u8 = 0xee;
/// Number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;

/// A part of the disk that may hold a file system, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// Its number in the partition table; `None` for the whole disk.
    pub number: Option<u32>,
    /// First byte.
    pub start: u64,
    /// Length.
    pub len: u64,
}

impl Range {
    /// `partition 1` and so on, or `the whole disk`.
    pub fn name(&self) -> String {
        self.number.map_or("the whole disk".into(), |number| format!("partition {number}"))
    }

    /// The byte behind its last.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// The partitions of a disk in the order of their numbers; the whole disk if it has none. A partition may end
/// behind the end of a disk that is cut off.
///
/// # Errors
/// The disk cannot be read, or its partition table makes no sense.
pub fn list(disk: &Arc<dyn Source>) -> io::Result<Vec<Range>> {
    let len = disk.len()?;
    let mut found = by_gpt(disk, len)?;
    if found.is_empty() {
        found = by_mbr(&**disk, len)?;
    }
    found.retain(|range| range.len > 0);
    found.truncate(MOST_PARTITIONS);
    if found.is_empty() {
        found.push(Range { number: None, start: 0, len });
    }
    Ok(found)
}

fn by_gpt(disk: &Arc<dyn Source>, len: u64) -> io::Result<Vec<Range>> {
    for size in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
        let block = size.as_u64();
        // The crate trusts these fields: the table at the front and its copy at the end are looked at before.
        for at in [block, len.saturating_sub(block)] {
            check_gpt_header(&**disk, at, len)?;
        }
        let config = gpt::GptConfig::new().writable(false).logical_block_size(size);
        let Ok(table) = config.open_from_device(ReadOnly::new(disk)) else { continue };
        let range = |(number, partition): (&u32, &gpt::partition::Partition)| {
            let (start, len) = (partition.bytes_start(size).ok()?, partition.bytes_len(size).ok()?);
            partition.is_used().then_some(Range { number: Some(*number), start, len })
        };
        return Ok(table.partitions().iter().filter_map(range).collect());
    }
    Ok(Vec::new())
}

/// Refuses a GPT header (UEFI specification, table "GPT Header") whose entries are of another size than all
/// programs write, or more than any disk has.
fn check_gpt_header(disk: &dyn Source, at: u64, len: u64) -> io::Result<()> {
    const ENTRY: u32 = 128;
    let mut header = [0; 92];
    if at.checked_add(header.len() as u64).is_none_or(|end| end > len) {
        return Ok(());
    }
    disk.read(&mut header, at)?;
    if header[..8] != *b"EFI PART" {
        return Ok(());
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (count, size) = (word(80), word(84));
    if size != ENTRY || count as usize > 4 * MOST_PARTITIONS {
        return Err(io::Error::other(format!(
            "its GPT says that it has {count} entries of {size} bytes, which makes no sense"
        )));
    }
    Ok(())
}

fn by_mbr(disk: &dyn Source, len: u64) -> io::Result<Vec<Range>> {
    let Some(entries) = mbr_entries(disk, 0, len)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(&entries) {
        match entry.kind {
            0 | PROTECTIVE => {}
            kind if EXTENDED.contains(&kind) => logical(disk, entry.start, len, &mut found)?,
            _ => found.push(Range { number: Some(number), start: entry.start, len: entry.len }),
        }
    }
    found.sort_by_key(|range| range.number);
    Ok(found)
}

/// Follows the chain of extended boot records from `first` on: each has a partition, relative to itself, and
/// the next record, relative to the first.
fn logical(disk: &dyn Source, first: u64, len: u64, found: &mut Vec<Range>) -> io::Result<()> {
    let mut at = first;
    for number in (FIRST_LOGICAL..).take(MOST_PARTITIONS) {
        let Some([part, next, ..]) = mbr_entries(disk, at, len)? else { return Ok(()) };
        if part.kind != 0 {
            found.push(Range { number: Some(number), start: at.saturating_add(part.start), len: part.len });
        }
        if !EXTENDED.contains(&next.kind) {
            return Ok(());
        }
        at = first.saturating_add(next.start);
    }
    Ok(())
}

#[derive(Copy, Clone)]
struct MbrEntry {
    kind: u8,
    start: u64,
    len: u64,
}

/// The entries of the boot record at `at`; `None` if there is none.
fn mbr_entries(disk: &dyn Source, at: u64, len: u64) -> io::Result<Option<[MbrEntry; 4]>> {
    let mut sector = [0; SECTOR as usize];
    if at.checked_add(SECTOR).is_none_or(|end| end > len) {
        return Ok(None);
    }
    disk.read(&mut sector, at)?;
    let entry = |number: usize| &sector[MBR_ENTRIES + 16 * number..][..16];
    // A FAT file system on the whole disk ends in the same two bytes; no partition table has such status
    // bytes.
    if sector[510..] != [0x55, 0xaa] || (0..4).any(|number| entry(number)[0] & 0x7f != 0) {
        return Ok(None);
    }
    let word = |entry: &[u8], at: usize| {
        u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
    };
    Ok(Some(std::array::from_fn(|number| {
        let entry = entry(number);
        let bytes = |at| u64::from(word(entry, at)) * SECTOR;
        MbrEntry { kind: entry[4], start: bytes(8), len: bytes(12) }
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of these bytes.
    struct Bytes(Vec<u8>);

    impl Source for Bytes {
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.len() as u64)
        }

        fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
            let from = self.0.get(offset as usize..offset as usize + to.len());
            to.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    fn put(disk: &mut [u8], record: usize, number: usize, kind: u8, start: u32, len: u32) {
        let at = record * 512 + MBR_ENTRIES + 16 * number;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
        disk[record * 512 + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
    }

    fn numbers(disk: Vec<u8>) -> io::Result<Vec<(Option<u32>, u64)>> {
        let disk: Arc<dyn Source> = Arc::new(Bytes(disk));
        Ok(list(&disk)?.into_iter().map(|range| (range.number, range.start / 512)).collect())
    }

    #[test]
    fn logical_partitions_are_found_and_a_chain_without_end_ends() {
        let mut disk = vec![0; 512 * 200];
        put(&mut disk, 0, 0, 0x82, 10, 10);
        put(&mut disk, 0, 1, 0x05, 100, 100);
        put(&mut disk, 100, 0, 0x83, 1, 20);
        put(&mut disk, 100, 1, 0x05, 50, 30);
        put(&mut disk, 150, 0, 0x83, 2, 20);
        assert_eq!(numbers(disk.clone()).unwrap(), [(Some(1), 10), (Some(5), 101), (Some(6), 152)]);
        put(&mut disk, 150, 1, 0x05, 50, 30);
        assert_eq!(numbers(disk).unwrap().len(), MOST_PARTITIONS);
    }

    #[test]
    fn a_gpt_with_entries_of_another_size_or_too_many_is_refused() {
        for (count, size) in [(128u32, 256u32), (128, 0), (25_000_000, 128)] {
            let mut disk = vec![0; 512 * 100];
            put(&mut disk, 0, 0, PROTECTIVE, 1, 99);
            disk[512..520].copy_from_slice(b"EFI PART");
            disk[512 + 80..512 + 84].copy_from_slice(&count.to_le_bytes());
            disk[512 + 84..512 + 88].copy_from_slice(&size.to_le_bytes());
            let refusal = numbers(disk).unwrap_err().to_string();
            assert!(refusal.contains("makes no sense"), "{refusal}");
        }
    }
}
