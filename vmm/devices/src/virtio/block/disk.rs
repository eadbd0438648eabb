//! The disk behind a block device.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

/// Bytes of zeroes that are written at once where the host cannot make them cheaper.
const ZEROES: usize = 64 << 10;

/// A disk's content. It never sees the guest's memory: some file systems (9p, NFS, FUSE) pin the caller's pages and have
/// them read or written later, when another node may have taken the guest's page over; and which do cannot be told, since
/// 9p goes by the name of the file system that it serves.
///
/// All calls may come at once from several threads; offsets and lengths are in bytes and lie within
/// [`Disk::len`].
pub trait Disk: Send + Sync {
    /// Bytes.
    fn len(&self) -> u64;

    /// Whether there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills all of `to` from `offset` on.
    ///
    /// # Errors
    /// What the host says; some of it may have been filled.
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `from` at `offset`.
    ///
    /// # Errors
    /// What the host says; some of it may have been written.
    fn write(&self, from: &[u8], offset: u64) -> io::Result<()>;

    /// Returns once all that was written before is on stable storage.
    ///
    /// # Errors
    /// What the host says.
    fn flush(&self) -> io::Result<()>;

    /// Nobody needs these bytes any more; what they read as afterwards is open.
    ///
    /// # Errors
    /// What the host says.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes bytes zero; with `unmap` their storage may be given up.
    ///
    /// # Errors
    /// What the host says.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("the disk {path} cannot be opened{how}: {source}")]
    Open {
        /// The file.
        path: String,
        /// In which way.
        how: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("the disk {0} is neither a file nor a block device: name an image or a device such as /dev/sdb")]
    Kind(String),
    /// Somebody else has it.
    #[error("the disk {0} is in use by another machine or program: two that write would destroy it")]
    InUse(String),
    /// It is not what its name says.
    #[error("the disk {path} cannot be used as the qcow2 image that its name says it is: {why}")]
    Qcow2 {
        /// The file.
        path: String,
        /// Why, and what to do.
        why: String,
    },
    /// There is nothing on it.
    #[error("the disk {0} is smaller than one sector of 512 bytes: make it larger (`truncate -s 10G FILE`)")]
    Empty(String),
}

/// A raw image: a file, or a block device of the host. The host's page cache is used; a flush reaches the storage.
pub struct RawDisk {
    file: File,
    len: u64,
}

impl RawDisk {
    /// Opens `path` and keeps others from writing it at the same time.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, readonly: bool) -> Result<RawDisk, OpenError> {
        let (file, len) = open_file(path, readonly)?;
        let len = len - len % super::SECTOR;
        if len == 0 {
            return Err(OpenError::Empty(path.display().to_string()));
        }
        Ok(RawDisk { file, len })
    }

    /// Whether these are its first bytes.
    pub(super) fn begins_with(&self, bytes: &[u8]) -> bool {
        let mut first = vec![0; bytes.len()];
        self.file.read_exact_at(&mut first, 0).is_ok() && first == bytes
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        fallocate(&self.file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset as i64, len as i64)?;
        Ok(())
    }

    fn write_zeroes_slowly(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = vec![0; ZEROES];
        while len > 0 {
            let part = len.min(ZEROES as u64);
            self.file.write_all_at(&zeroes[..part as usize], offset)?;
            (offset, len) = (offset + part, len - part);
        }
        Ok(())
    }
}

/// Opens a file or block device and keeps others from writing it at the same time; its length too.
pub(super) fn open_file(path: &Path, readonly: bool) -> Result<(File, u64), OpenError> {
    let shown = path.display().to_string();
    let how = if readonly { "" } else { " for writing" };
    let failed = |source| OpenError::Open { path: shown.clone(), how, source };
    let mut file = OpenOptions::new().read(true).write(!readonly).open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Kind(shown));
    }
    let locked = if readonly { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(shown)),
        // Some file systems have no locks.
        Err(TryLockError::Error(error)) => tracing::debug!("{shown} cannot be locked: {error}"),
    }
    // Works for block devices too, unlike the length in the metadata.
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((file, len))
}

/// Whether the host says that it cannot do a thing at all, rather than that it failed.
fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}

impl Disk for RawDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(to, offset)
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len) {
            // Advice that the host cannot take is no failure.
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        let modes = [punch, FallocateFlags::FALLOC_FL_ZERO_RANGE];
        for mode in modes.into_iter().filter(|mode| unmap || *mode != punch) {
            match self.allocate(mode, offset, len) {
                Err(error) if unsupported(&error) => {}
                result => return result,
            }
        }
        self.write_zeroes_slowly(offset, len)
    }
}

/// A disk that exists in memory only and cannot be written.
pub struct MemoryDisk(pub Vec<u8>);

impl Disk for MemoryDisk {
    fn len(&self) -> u64 {
        self.0.len() as u64 - self.0.len() as u64 % super::SECTOR
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let wanted = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)?.get(..to.len()));
        to.copy_from_slice(wanted.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
