//! Reading files from the file systems that kernels are kept on, and naming those that cannot be read.

use std::error::Error;
use std::io::{self, Read};
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Read};
use fatfs::FsOptions;
use fscommon::{BufStream, StreamSlice};

use super::limits::{LARGEST_TEXT, MOST_NAMES};
use super::source::{ReadOnly, Source};

/// A file system of a disk.
pub enum FileSystem {
    /// ext2, ext3 or ext4.
    Ext4(Box<Ext4>),
    /// FAT12, FAT16 or FAT32.
    Fat(Box<fatfs::FileSystem<BufStream<StreamSlice<ReadOnly>>>>),
}

/// What is in a part of a disk.
pub enum Content {
    /// A file system that can be read.
    Readable(FileSystem),
    /// Something else: what it is, and why it cannot be read.
    Other {
        /// Such as `XFS`; `nothing that is known` if it cannot be told.
        what: &'static str,
        /// A reason that adds to it, if there is one.
        why: Option<String>,
    },
}

/// What else may stand at the beginning of a partition: a name, and bytes at an offset.
const SIGNATURES: [(&str, usize, &[u8]); 10] = [
    ("XFS", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("LUKS (encrypted)", 0, b"LUKS\xba\xbe"),
    ("an LVM physical volume", 0x218, b"LVM2 001"),
    ("swap space", 4086, b"SWAPSPACE2"),
    ("NTFS", 3, b"NTFS    "),
    ("F2FS", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    ("SquashFS", 0, b"hsqs"),
    ("ISO 9660", 0x8001, b"CD001"),
    ("part of a Linux RAID", 0x1000, &[0xfc, 0x4e, 0x2b, 0xa9]),
];

impl Content {
    /// What is in `len` bytes of `disk` from `start` on.
    pub fn of(disk: &Arc<dyn Source>, start: u64, len: u64) -> Content {
        let part = Part { disk: disk.clone(), start, len };
        let has = |at: usize, bytes: &[u8]| {
            let mut there = vec![0; bytes.len()];
            let inside = (at + bytes.len()) as u64 <= len;
            inside && disk.read(&mut there, start + at as u64).is_ok() && there == bytes
        };
        if has(0x438, &[0x53, 0xef]) {
            return match Ext4::load(Box::new(part)) {
                Ok(ext4) => Content::Readable(FileSystem::Ext4(Box::new(ext4))),
                Err(error) => {
                    Content::Other { what: "ext4", why: Some(ext4_refusal(disk, start, &error.to_string())) }
                }
            };
        }
        if let Some((what, ..)) = SIGNATURES.iter().find(|(_, at, bytes)| has(*at, bytes)) {
            return Content::Other { what, why: None };
        }
        match fat(disk, start, len) {
            Some(fat) => Content::Readable(FileSystem::Fat(Box::new(fat))),
            None if has(0x52, b"FAT32") => {
                let why = "it has fewer clusters than its name says".to_owned();
                Content::Other { what: "FAT32", why: Some(why) }
            }
            None => Content::Other { what: "nothing that is known", why: None },
        }
    }
}

/// Why an ext4 cannot be read: features of its superblock (Linux, "ext4 Data Structures and Algorithms",
/// s_feature_incompat) by the names that mke2fs gives them, or what the crate says.
fn ext4_refusal(disk: &Arc<dyn Source>, start: u64, error: &str) -> String {
    const RECOVER: u32 = 4;
    const NAMES: [(u32, &str); 9] = [
        (0x10, "meta_bg"),
        (0x100, "mmp"),
        (0x400, "ea_inode"),
        (0x1000, "dirdata"),
        (0x4000, "large_dir"),
        (0x8000, "inline_data"),
        (0x1_0000, "encrypt"),
        (0x2_0000, "casefold"),
        (8, "journal_dev"),
    ];
    let mut field = [0; 4];
    let read = disk.read(&mut field, start + 0x460);
    let features = read.map_or(0, |()| u32::from_le_bytes(field));
    let names: Vec<_> = NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect();
    if error.contains("features") && !names.is_empty() {
        return format!("it has {}", names.join(", "));
    }
    if features & RECOVER != 0 {
        return "its machine was cut off while it was mounted: `e2fsck -fy`, with the machine off, mends it"
            .into();
    }
    error.into()
}

fn fat(
    disk: &Arc<dyn Source>,
    start: u64,
    len: u64,
) -> Option<fatfs::FileSystem<BufStream<StreamSlice<ReadOnly>>>> {
    let part = StreamSlice::new(ReadOnly::new(disk), start, start.checked_add(len)?).ok()?;
    fatfs::FileSystem::new(BufStream::new(part), FsOptions::new()).ok()
}

impl FileSystem {
    /// What it is.
    pub fn kind(&self) -> &'static str {
        match self {
            FileSystem::Ext4(_) => "ext4",
            FileSystem::Fat(_) => "FAT",
        }
    }

    /// A file's bytes; `None` if there is no such file, it cannot be read or has more than `most` bytes.
    pub fn read(&self, path: &str, most: u64) -> Option<Vec<u8>> {
        let path = format!("/{}", path.trim_start_matches('/'));
        match self {
            FileSystem::Ext4(ext4) => {
                let len = ext4.metadata(path.as_str()).ok()?.len();
                if len > most { None } else { ext4.read(path.as_str()).ok() }
            }
            FileSystem::Fat(fat) => {
                let root = fat.root_dir();
                let file = root.open_file(path.trim_start_matches('/')).ok()?;
                let mut bytes = Vec::new();
                // One byte more tells a file of just the largest size from a larger one.
                file.take(most.saturating_add(1)).read_to_end(&mut bytes).ok()?;
                (bytes.len() as u64 <= most).then_some(bytes)
            }
        }
    }

    /// The length of a file in bytes, its links followed; `None` if there is no such file.
    pub fn len_of(&self, path: &str) -> Option<u64> {
        let path = format!("/{}", path.trim_start_matches('/'));
        match self {
            FileSystem::Ext4(ext4) => {
                let metadata = ext4.metadata(path.as_str()).ok()?;
                (!metadata.is_dir()).then(|| metadata.len())
            }
            FileSystem::Fat(fat) => {
                // By the directory: going to a file's end would read its whole chain of clusters.
                let (folder, name) = path.rsplit_once('/')?;
                let root = fat.root_dir();
                let folder = match folder.trim_start_matches('/') {
                    "" => root,
                    inner => root.open_dir(inner).ok()?,
                };
                let mut entries = folder.iter().take(MOST_NAMES).flatten();
                let entry = entries.find(|entry| entry.file_name().eq_ignore_ascii_case(name))?;
                entry.is_file().then(|| entry.len())
            }
        }
    }

    /// A file as text; `None` as for [`FileSystem::read`].
    pub fn read_text(&self, path: &str) -> Option<String> {
        Some(String::from_utf8_lossy(&self.read(path, LARGEST_TEXT)?).into_owned())
    }

    /// The names in a directory, sorted; none if there is no such directory.
    pub fn list(&self, path: &str) -> Vec<String> {
        let path = format!("/{}", path.trim_start_matches('/'));
        let mut names: Vec<String> = match self {
            FileSystem::Ext4(ext4) => {
                let entries = ext4.read_dir(path.as_str()).into_iter().flatten().take(MOST_NAMES).flatten();
                entries.filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned)).collect()
            }
            FileSystem::Fat(fat) => {
                let root = fat.root_dir();
                let folder = match path.trim_start_matches('/') {
                    "" => Ok(root),
                    inner => root.open_dir(inner),
                };
                let entries = folder.iter().flat_map(|folder| folder.iter()).take(MOST_NAMES).flatten();
                entries.map(|entry| entry.file_name()).collect()
            }
        };
        names.sort_unstable();
        names
    }
}

/// Part of a disk, for ext4.
struct Part {
    disk: Arc<dyn Source>,
    start: u64,
    len: u64,
}

impl Ext4Read for Part {
    fn read(&mut self, start: u64, to: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        if start.checked_add(to.len() as u64).is_none_or(|end| end > self.len) {
            return Err(Box::new(io::Error::from(io::ErrorKind::UnexpectedEof)));
        }
        Ok(self.disk.read(to, self.start + start)?)
    }
}
