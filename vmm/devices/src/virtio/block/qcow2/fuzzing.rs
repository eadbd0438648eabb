//! Any bytes as an image, and what a guest may do to it then: opened or refused, and if opened, every access
//! gives data or an error. Built for tests only.
//!
//! An image that stays whole also keeps what is written to it: what was written is read again, and the image
//! that is left behind can be opened again and holds the same.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;
use crate::virtio::block::SECTOR;
use crate::virtio::testing::hostile::Input;

/// Steps of one input at most.
const MOST_STEPS: u8 = 24;
/// Sectors of one read or write at most: more than two pieces of what goes through a buffer at once.
const MOST_SECTORS: u64 = 300;
/// The same for what needs no buffer.
const MOST_CLEARED: u64 = 1 << 14;

/// First how many steps there are and whether the image is only read, then the steps, the image is the rest.
/// Returns whether it was opened.
pub fn image(data: &[u8]) -> bool {
    let mut input = Input(data);
    let first = input.byte();
    let (readonly, count) = (first & 0x80 != 0, usize::from(first & 0x7f).min(MOST_STEPS.into()));
    let steps: Vec<Step> = (0..count).map(|_| Step::take(&mut input)).collect();
    let file = std::fs::File::from(memfd_create(c"image", MFdFlags::empty()).expect("a file in memory"));
    file.write_all_at(input.0, 0).expect("it can be written");
    let Some(disk) = open(&file, readonly) else { return false };
    let mut seen = Seen(Some(BTreeMap::new()));
    for step in &steps {
        if step.run(&disk, &file, readonly, &mut seen).is_err() {
            seen = Seen(None);
        }
    }
    if disk.flush().is_err() {
        seen = Seen(None);
    }
    seen.compare(&disk);
    drop(disk);
    match open(&file, readonly) {
        Some(disk) => seen.compare(&disk),
        None => assert!(seen.0.is_none(), "an image is refused that nothing was wrong with before"),
    }
    true
}

fn open(file: &std::fs::File, readonly: bool) -> Option<Qcow2Disk> {
    let file = file.try_clone().expect("another descriptor");
    Qcow2Disk::new(file, Path::new("image"), readonly).ok()
}

/// What a guest does, or somebody to the image's file.
struct Step {
    kind: u8,
    unmap: bool,
    from_end: bool,
    at: u64,
    count: u64,
}

impl Step {
    fn take(input: &mut Input) -> Step {
        let bits = input.byte();
        let (unmap, from_end) = (bits & 0x40 != 0, bits & 0x80 != 0);
        Step { kind: bits % 8, unmap, from_end, at: input.number(2), count: input.number(2) }
    }

    /// First sector and count, at most `most` and all of them there.
    fn range(&self, disk: &Qcow2Disk, most: u64) -> (u64, u64) {
        let sectors = Disk::len(disk) / SECTOR;
        let at = self.at % sectors;
        let first = if self.from_end { sectors - 1 - at } else { at };
        (first, (1 + self.count % most).min(sectors - first))
    }

    fn run(&self, disk: &Qcow2Disk, file: &std::fs::File, readonly: bool, seen: &mut Seen) -> io::Result<()> {
        let most = if matches!(self.kind, 3..6) { MOST_CLEARED } else { MOST_SECTORS };
        let (first, count) = self.range(disk, most);
        let (offset, len) = (first * SECTOR, count * SECTOR);
        match self.kind {
            0 => seen.read(disk, first, count)?,
            // The device keeps a guest from that.
            1..6 if readonly => {}
            1 | 2 => {
                let byte = self.count as u8 | 1;
                disk.write(&vec![byte; len as usize], offset)?;
                seen.now(first, count, Some(byte));
            }
            3 => {
                disk.discard(offset, len)?;
                seen.now(first, count, None);
            }
            4 | 5 => {
                disk.write_zeroes(offset, len, self.unmap)?;
                seen.now(first, count, Some(0));
            }
            6 => disk.flush()?,
            _ => {
                file.set_len(self.count)?;
                return Err(io::Error::other("the file was cut"));
            }
        }
        Ok(())
    }
}

/// What the sectors must hold that were read or written; `None` once something has failed in the middle.
struct Seen(Option<BTreeMap<u64, Vec<u8>>>);

impl Seen {
    /// Sectors are full of a byte now, or of anything.
    fn now(&mut self, first: u64, count: u64, byte: Option<u8>) {
        let Some(sectors) = &mut self.0 else { return };
        for sector in first..first + count {
            match byte {
                Some(byte) => sectors.insert(sector, vec![byte; SECTOR as usize]),
                None => sectors.remove(&sector),
            };
        }
    }

    /// Reads sectors and notes what they hold.
    fn read(&mut self, disk: &Qcow2Disk, first: u64, count: u64) -> io::Result<()> {
        let mut bytes = vec![0; (count * SECTOR) as usize];
        Disk::read(disk, &mut bytes, first * SECTOR)?;
        let Some(sectors) = &mut self.0 else { return Ok(()) };
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            let before = sectors.insert(sector, bytes.to_vec());
            assert!(before.is_none_or(|before| before == bytes), "sector {sector} has changed by itself");
        }
        Ok(())
    }

    fn compare(&self, disk: &Qcow2Disk) {
        for (sector, wanted) in self.0.iter().flatten() {
            let mut bytes = vec![0; SECTOR as usize];
            let read = Disk::read(disk, &mut bytes, sector * SECTOR);
            read.expect("a sector cannot be read that was read or written before");
            assert!(bytes == *wanted, "sector {sector} holds something else than was read or written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_that_a_fuzzer_begins_with_are_opened_and_used() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/qcow2");
        let mut opened = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let data = std::fs::read(entry.unwrap().path()).unwrap();
            opened += usize::from(image(&data));
        }
        assert_eq!(opened, 9);
    }
}
