//! Disks in QEMU's format qcow2, through the crate `imago`.
//!
//! A file is a qcow2 image if its name ends in `.qcow2`, and raw otherwise. What is in it does not count: the
//! guest writes that, and could make a raw disk pass for an image that names any file of the host. For the
//! same reason an image stands alone: one that refers to another file is refused, as are encrypted ones, and
//! ones with snapshots inside unless they are only read. `qemu-img convert` makes one that can be used of any
//! of these.
//!
//! All tables of an image are looked through when it is opened ([`check`]), and one that is damaged is
//! refused.

pub mod check;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;

use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use firmware::disk::source::Source;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, StorageOpenOptions};

use self::check::Header;
use super::disk::{Access, Disk, OpenError, RawDisk, open_file};

/// What a qcow2 file begins with.
const MAGIC: &[u8; 4] = b"QFI\xfb";

/// Opens the disk at `path`: a qcow2 image if its name ends in `.qcow2`, else a raw image or a block device.
///
/// # Errors
/// [`OpenError`].
pub fn open(path: &Path, access: Access) -> Result<Arc<dyn Disk>, OpenError> {
    if is_qcow2(path) {
        return Ok(Arc::new(Qcow2Disk::open(path, access)?));
    }
    let disk = RawDisk::open(path, access)?;
    if disk.begins_with(MAGIC) {
        let path = path.display();
        tracing::warn!(
            "{path} looks like a qcow2 image but is a raw disk by its name: if it is one, call it {path}.qcow2"
        );
    }
    Ok(Arc::new(disk))
}

/// Whether the name says so.
pub fn is_qcow2(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "qcow2")
}

/// A qcow2 image.
pub struct Qcow2Disk {
    /// Reads and writes share it; discards, which give clusters to other uses, have it alone.
    image: RwLock<FormatAccess<File>>,
    len: u64,
    /// Goes after the image, which writes what it still holds when it goes.
    _lock: Lock,
}

/// Lets others open the file at once, even while a process that was just forked still has a copy of the
/// descriptor.
struct Lock(std::fs::File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing the last copy does the same, only later.
        let _ = self.0.unlock();
    }
}

impl Qcow2Disk {
    /// Opens `path` and keeps others from writing it at the same time.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, access: Access) -> Result<Qcow2Disk, OpenError> {
        let (file, _) = open_file(path, access)?;
        Qcow2Disk::new(file, path, access.readonly)
    }

    /// The image in an open file, only to look into it, whoever else has it; `path` names it in messages.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn peek(file: std::fs::File, path: &Path) -> Result<Qcow2Disk, OpenError> {
        Qcow2Disk::new(file, path, true)
    }

    fn new(file: std::fs::File, path: &Path, readonly: bool) -> Result<Qcow2Disk, OpenError> {
        let shown = path.display().to_string();
        let wrong = |why: String| OpenError::Qcow2 { path: shown.clone(), why };
        let header = Header::read(&file, readonly).map_err(wrong)?;
        let file_len = Source::len(&file).map_err(|error| wrong(error.to_string()))?;
        let uncounted = check::check(&file, file_len, &header).map_err(wrong)?;
        if !readonly && !uncounted.is_empty() {
            let count = || uncounted.iter().try_for_each(|cluster| cluster.count(&file));
            count().and_then(|()| file.sync_data()).map_err(|error| wrong(error.to_string()))?;
            tracing::warn!("{shown}: {} clusters are counted that a crash had left out", uncounted.len());
        }
        let len = header.len;
        let lock = Lock(file.try_clone().map_err(|error| wrong(error.to_string()))?);
        let options = StorageOpenOptions::new().write(!readonly);
        let image = File::from_open_file(file, options).and_then(|file| Qcow2::open_image(file, !readonly));
        let mut image: Qcow2<File> = image.map_err(|error| wrong(error.to_string()))?;
        if image.requires_external_data_file() || image.implicit_backing_file().is_some() {
            return Err(wrong(
                "it keeps its data in another file: convert it with `qemu-img convert`".into(),
            ));
        }
        image.set_backing(None);
        image.set_data_file(None);
        let image = FormatAccess::new(image);
        if image.size() != len {
            return Err(wrong(format!("it has {} bytes and not the {len} of its header", image.size())));
        }
        let len = len - len % super::SECTOR;
        if len == 0 {
            return Err(OpenError::Empty(shown));
        }
        Ok(Qcow2Disk { image: RwLock::new(image), len, _lock: lock })
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<File>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<File>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For finding the kernel inside.
impl Source for Qcow2Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(to, offset)
    }
}

impl Disk for Qcow2Disk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(to, offset)
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.shared().write(from, offset)
    }

    fn flush(&self) -> io::Result<()> {
        let image = self.shared();
        image.flush()?;
        image.sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.alone().discard_to_any(offset, len) {
            // Advice that an old version of the format has no way to take is no failure.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            return self.alone().discard_to_zero(offset, len);
        }
        self.shared().write_zeroes(offset, len)
    }
}

#[cfg(test)]
mod tests;
