//! The bytes of a disk that is only read.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A disk's content.
pub trait Source: Send + Sync {
    /// Bytes.
    ///
    /// # Errors
    /// What the host says.
    fn len(&self) -> io::Result<u64>;

    /// Whether there is no byte.
    ///
    /// # Errors
    /// Those of [`Source::len`].
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills all of `to` from `offset` on.
    ///
    /// # Errors
    /// What the host says, and a range beyond the end.
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A raw image or a block device.
impl Source for File {
    fn len(&self) -> io::Result<u64> {
        // Block devices have no length in their metadata, but an end.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(to, offset)
    }
}

/// A place on a disk that moves on as it is read, for crates that want a stream and be able to write.
pub struct ReadOnly {
    disk: Arc<dyn Source>,
    at: u64,
}

impl ReadOnly {
    /// The disk from its beginning.
    pub fn new(disk: &Arc<dyn Source>) -> ReadOnly {
        ReadOnly { disk: disk.clone(), at: 0 }
    }
}

impl fmt::Debug for ReadOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadOnly").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Read for ReadOnly {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.len()?.saturating_sub(self.at);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(to.len());
        self.disk.read(&mut to[..len], self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Write for ReadOnly {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for ReadOnly {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let from = |base: u64, by: i64| base.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput);
        self.at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => from(self.at, by)?,
            SeekFrom::End(by) => from(self.disk.len()?, by)?,
        };
        Ok(self.at)
    }
}
