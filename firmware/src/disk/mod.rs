//! The kernel inside a disk image, as a boot loader would find it there.
//!
//! | file | concept |
//! |---|---|
//! | this one | the search |
//! | [`source`] | the disk's bytes: a raw image, a block device, or the content of another format |
//! | [`partitions`] | the places of file systems: GPT, MBR, or the whole disk |
//! | [`filesystem`] | reading files from ext2/3/4 and FAT |
//! | [`loader`] | boot loaders' files: entries of the Boot Loader Specification, and grub.cfg |
//!
//! ```text
//!  image ── partitions ── file systems ──> loader entries, else grub.cfg, else /vmlinuz
//!                              └─────────> kernel, initrds (from the same file system, else from any) ──> BootFiles
//! ```
//!
//! Nothing is written, and nothing in the image is trusted: sizes are bounded and whatever cannot be read is passed over.

pub mod filesystem;
pub mod loader;
pub mod partitions;
pub mod source;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use self::filesystem::FileSystem;
use self::loader::Entry;
use self::source::Source;
use crate::FirmwareError;

/// The largest kernel or initrd that is read, in bytes.
pub const LARGEST: u64 = 1 << 30;

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// Where it was found, for messages.
    pub origin: String,
    /// The kernel's bytes.
    pub kernel: Vec<u8>,
    /// The initial ramdisk's bytes; several follow each other. Empty: none.
    pub initrd: Vec<u8>,
    /// The command line.
    pub cmdline: String,
}

/// Finds the kernel that a boot loader would start from the raw image or block device at `path`.
///
/// # Errors
/// [`FirmwareError::Disk`]: the image cannot be read, or nothing to boot is on it; it says what was looked at.
pub fn find(path: &Path) -> Result<BootFiles, FirmwareError> {
    let file = File::open(path).map_err(|error| nothing_on(path, &error.to_string()))?;
    find_on(Arc::new(file), path)
}

fn nothing_on(path: &Path, why: &str) -> FirmwareError {
    FirmwareError::Disk(format!("no kernel can be found on {}: {why}", path.display()))
}

/// The same on a disk that is not simply the content of a file; `path` names it in messages.
///
/// # Errors
/// Those of [`find`].
pub fn find_on(disk: Arc<dyn Source>, path: &Path) -> Result<BootFiles, FirmwareError> {
    let wrong = |why: String| nothing_on(path, &why);
    let ranges = partitions::list(&disk).map_err(|error| wrong(error.to_string()))?;
    let systems: Vec<(String, FileSystem)> = ranges
        .iter()
        .filter_map(|range| Some((range.name.clone(), FileSystem::open(&disk, range.start, range.len)?)))
        .collect();
    if systems.is_empty() {
        let why = "it has no file system that can be read (ext2, ext3, ext4, FAT)";
        return Err(wrong(format!("{why}: name a kernel with --kernel FILE")));
    }
    let mut missing = Vec::new();
    for (index, (name, system)) in systems.iter().enumerate() {
        for entry in loader::entries(system, ranges.len() > 1, name) {
            let kernel = read(&systems, index, &entry.kernel);
            let initrds: Option<Vec<_>> =
                entry.initrds.iter().map(|path| read(&systems, index, path)).collect();
            match (kernel, initrds) {
                (Some(kernel), Some(initrds)) => {
                    let Entry { origin, kernel: path, options, .. } = entry;
                    let origin = format!("{name}: {path} (by {origin})");
                    return Ok(BootFiles { origin, kernel, initrd: join(initrds), cmdline: options });
                }
                _ => missing.push(entry.kernel),
            }
        }
    }
    let names: Vec<_> = systems.iter().map(|(name, _)| name.as_str()).collect();
    let looked = format!("looked for loader entries, grub.cfg and /vmlinuz in {}", names.join(", "));
    Err(wrong(match missing.first() {
        Some(path) => {
            format!("{looked}; {path} or its initrd cannot be read: name a kernel with --kernel FILE")
        }
        None => format!("{looked}: name a kernel with --kernel FILE"),
    }))
}

/// A file of the file system that names it, else of any other: a loader's own partition may name files of another.
fn read(systems: &[(String, FileSystem)], first: usize, path: &str) -> Option<Vec<u8>> {
    let others = (0..systems.len()).filter(|index| *index != first);
    std::iter::once(first).chain(others).find_map(|index| systems[index].1.read(path, LARGEST))
}

/// Initrds one after the other, each at a multiple of 4 bytes as the kernel wants them.
fn join(parts: Vec<Vec<u8>>) -> Vec<u8> {
    let mut whole = Vec::new();
    for part in parts {
        whole.extend(part);
        whole.resize(whole.len().next_multiple_of(4), 0);
    }
    whole
}

#[cfg(test)]
mod tests;
