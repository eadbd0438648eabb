//! The disk behind a block device.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

/// Bytes of zeroes that are written at once where the host cannot make them cheaper.
const ZEROES: usize = 64 << 10;

/// A disk's content. It never sees the guest's memory: some file systems (9p, NFS, FUSE) pin the caller's
/// pages and have them read or written later, when another node may have taken the guest's page over; and
/// which do cannot be told, since 9p goes by the name of the file system that it serves.
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

/// How a disk's file is opened.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Only to read.
    pub readonly: bool,
    /// Even where the file system has no locks, so that nothing keeps another machine or program from writing
    /// it as well.
    pub unlocked: bool,
}

impl Access {
    /// To read and write, where others can be kept away.
    pub const WRITE: Access = Access { readonly: false, unlocked: false };
    /// Only to read, where others can be kept from writing.
    pub const READ: Access = Access { readonly: true, unlocked: false };
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
    /// The host uses it.
    #[error(
        "the disk {0} is in use on this host: it is mounted, part of a volume or RAID, or another machine's; free it or name another"
    )]
    Mounted(String),
    /// The file system has no locks.
    #[error(
        "the disk {path} cannot be locked ({source}), so that nothing would keep another machine from writing it at the same \
         time: move it to a file system with locks, or if you see to that yourself say `unlocked`"
    )]
    NoLocks {
        /// The file.
        path: String,
        /// What the file system said.
        source: io::Error,
    },
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

/// A raw image: a file, or a block device of the host. The host's page cache is used; a flush reaches the
/// storage.
pub struct RawDisk {
    file: File,
    len: u64,
}

impl RawDisk {
    /// Opens `path` and keeps others from writing it at the same time.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, access: Access) -> Result<RawDisk, OpenError> {
        let (file, len) = open_file(path, access)?;
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
pub(super) fn open_file(path: &Path, access: Access) -> Result<(File, u64), OpenError> {
    let Access { readonly, unlocked } = access;
    let shown = path.display().to_string();
    let how = if readonly { "" } else { " for writing" };
    let failed = |source| OpenError::Open { path: shown.clone(), how, source };
    let mut options = OpenOptions::new();
    options.read(true).write(!readonly);
    let mut file = options.open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Kind(shown));
    }
    if kind.is_block_device() && !readonly {
        // Alone, against who mounts it or uses it in another way (open(2), O_EXCL without O_CREAT). The same
        // device as was just looked at, whatever its name means by now.
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        file = options.custom_flags(libc::O_EXCL).open(same).map_err(|error| exclusive(&shown, error))?;
    }
    let locked = if readonly { file.try_lock_shared() } else { file.try_lock() };
    judge(locked, unlocked, &shown)?;
    // Works for block devices too, unlike the length in the metadata.
    let len = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((file, len))
}

/// What it means that a block device could not be opened exclusively.
fn exclusive(shown: &str, error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(libc::EBUSY) => OpenError::Mounted(shown.into()),
        _ => OpenError::Open { path: shown.into(), how: " for writing, by nobody else", source: error },
    }
}

/// What the outcome of locking a disk's file means.
fn judge(locked: Result<(), TryLockError>, unlocked: bool, shown: &str) -> Result<(), OpenError> {
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse(shown.into())),
        Err(TryLockError::Error(error)) if unlocked => {
            tracing::warn!("{shown} cannot be locked ({error}): see to it that nobody else writes it");
            Ok(())
        }
        Err(TryLockError::Error(source)) => Err(OpenError::NoLocks { path: shown.into(), source }),
    }
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_file_system_without_locks_is_refused_unless_told_otherwise() {
        let none = || Err(TryLockError::Error(io::Error::from_raw_os_error(libc::ENOLCK)));
        let why = judge(none(), false, "a.img").unwrap_err().to_string();
        assert!(why.starts_with("the disk a.img cannot be locked") && why.contains("`unlocked`"), "{why}");
        judge(none(), true, "a.img").unwrap();
        // That somebody has it locked is another thing.
        assert!(matches!(judge(Err(TryLockError::WouldBlock), true, "a.img"), Err(OpenError::InUse(_))));
    }

    /// A loop device of the host's; gone when it is dropped.
    struct Loop(String);

    impl Loop {
        fn new() -> Option<Loop> {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().ok()?;
            let name = String::from_utf8(made.stdout).unwrap().trim().to_owned();
            // The device keeps the file.
            made.status.success().then_some(Loop(name))
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }

    #[test]
    fn a_block_device_that_the_host_uses_is_refused_and_one_that_a_machine_has_cannot_be_mounted() {
        let Some(device) = Loop::new() else {
            return println!("skipped: this user cannot set up a loop device");
        };
        let path = Path::new(&device.0);
        // As the kernel has a device that it has mounted.
        let alone = || OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
        let mounted = alone().unwrap();
        assert!(matches!(RawDisk::open(path, Access::WRITE), Err(OpenError::Mounted(_))));
        drop(RawDisk::open(path, Access::READ).expect("who only looks disturbs nobody"));
        drop(mounted);
        let disk = RawDisk::open(path, Access::WRITE).unwrap();
        assert_eq!(alone().unwrap_err().raw_os_error(), Some(libc::EBUSY));
        assert_eq!(disk.len(), 1 << 20);
    }

    #[test]
    fn a_block_device_that_the_host_uses_is_named_so() {
        let why = exclusive("/dev/sdb", io::Error::from_raw_os_error(libc::EBUSY)).to_string();
        assert!(why.contains("/dev/sdb is in use on this host"), "{why}");
        let why = exclusive("/dev/sdb", io::Error::from_raw_os_error(libc::EACCES)).to_string();
        assert!(why.contains("/dev/sdb cannot be opened for writing"), "{why}");
    }
}
