//! The limits of a search: the guest wrote everything on its disk, and reading that must not cost the host
//! more than this.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::source::Source;

/// The largest kernel that is read, in bytes.
pub const LARGEST_KERNEL: u64 = 512 << 20;
/// The most that all initrds of an entry may have together, in bytes.
pub const LARGEST_INITRDS: u64 = 1 << 30;
/// The largest text (a loader's entry or script) that is read, in bytes.
pub const LARGEST_TEXT: u64 = 1 << 20;
/// Names that are looked at in one directory.
pub const MOST_NAMES: usize = 4096;
/// Partitions that are looked at.
pub const MOST_PARTITIONS: usize = 256;
/// Entries of a loader's menu, submenus and their entries included.
pub const MOST_ENTRIES: usize = 1024;
/// Commands of a loader's script that are carried out.
pub const MOST_STEPS: u32 = 100_000;
/// Bytes of text that the variables of a script may become, in all.
pub const MOST_EXPANSION: usize = 4 << 20;
/// How deep a script may be nested: blocks, functions, files.
pub const DEEPEST: u32 = 32;
/// Bytes that are read from a disk while its loader is looked for, without kernel and initrds.
const SEARCHED: u64 = 256 << 20;
/// Reads of a disk meanwhile. File systems are read in pieces of 512 bytes and more; a chain of clusters that
/// bites its own tail would be followed without end otherwise.
const SEARCHES: u64 = 128 << 10;
/// Bytes that are read in all: kernel and initrds as well, with as much again for their file systems' tables.
const READ: u64 = SEARCHED + 2 * (LARGEST_KERNEL + LARGEST_INITRDS);
/// Reads in all.
const READS: u64 = SEARCHES + 2 * (LARGEST_KERNEL + LARGEST_INITRDS) / 512;

/// A disk of which only so much can be read: further reads fail.
pub struct Metered {
    disk: Arc<dyn Source>,
    bytes: AtomicU64,
    reads: AtomicU64,
    found: AtomicBool,
}

impl Metered {
    /// A disk of which nothing has been read yet.
    pub fn new(disk: Arc<dyn Source>) -> Metered {
        Metered { disk, bytes: AtomicU64::new(0), reads: AtomicU64::new(0), found: AtomicBool::new(false) }
    }

    /// Lets kernel and initrds be read as well, once they are found.
    pub fn found(&self) {
        self.found.store(true, Ordering::Relaxed);
    }

    /// Whether more was to be read than may be.
    pub fn exhausted(&self) -> bool {
        let (bytes, reads) =
            if self.found.load(Ordering::Relaxed) { (READ, READS) } else { (SEARCHED, SEARCHES) };
        self.bytes.load(Ordering::Relaxed) > bytes || self.reads.load(Ordering::Relaxed) > reads
    }
}

impl Source for Metered {
    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.fetch_add(to.len() as u64, Ordering::Relaxed);
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.exhausted() {
            return Err(io::Error::other("more of it was to be read than any real disk needs"));
        }
        self.disk.read(to, offset)
    }
}
