//! A disk that reports no success after a flush that failed.
//!
//! The kernel tells of what it could not write once, and then forgets: it marks the pages clean, and the next
//! fsync succeeds although their content is lost (fsync(2); Rebello et al., "Can Applications Recover from
//! fsync Failures?", 2020). A guest that tries again would take that for the truth. So the first failure is
//! the answer to all flushes that follow, until the disk is opened again; writes go on, as on a disk that
//! cannot promise anything any more.

use std::io;
use std::sync::{Arc, Mutex};

use base::lock;

use super::disk::Disk;

/// A disk whose flushes are true.
pub struct Durable {
    disk: Arc<dyn Disk>,
    /// What the first flush that failed has said. Held during a flush: of two at once only one would be told.
    failed: Mutex<Option<String>>,
}

impl Durable {
    /// One of which no flush has failed.
    pub fn new(disk: Arc<dyn Disk>) -> Durable {
        Durable { disk, failed: Mutex::default() }
    }
}

impl Disk for Durable {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read(to, offset)
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write(from, offset)
    }

    fn flush(&self) -> io::Result<()> {
        let mut failed = lock(&self.failed);
        if let Some(why) = &*failed {
            return Err(io::Error::other(format!(
                "an earlier flush failed ({why}), and what was written before it may be lost: take the disk away, check \
                 its host, and add it again"
            )));
        }
        self.disk.flush().inspect_err(|error| *failed = Some(error.to_string()))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
}
