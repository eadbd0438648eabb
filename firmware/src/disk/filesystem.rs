//! Reading files from the file systems that kernels are kept on.

use std::error::Error;
use std::io::{self, Read};
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Read};
use fatfs::FsOptions;
use fscommon::{BufStream, StreamSlice};

use super::source::{ReadOnly, Source};

/// A file system of a disk.
pub enum FileSystem {
    /// ext2, ext3 or ext4.
    Ext4(Box<Ext4>),
    /// FAT12, FAT16 or FAT32.
    Fat(Box<fatfs::FileSystem<BufStream<StreamSlice<ReadOnly>>>>),
}

impl FileSystem {
    /// The file system in `len` bytes of `disk` from `start` on; `None` if there is none that can be read.
    pub fn open(disk: &Arc<dyn Source>, start: u64, len: u64) -> Option<FileSystem> {
        let part = Part { disk: disk.clone(), start, len };
        if let Ok(ext4) = Ext4::load(Box::new(part)) {
            return Some(FileSystem::Ext4(Box::new(ext4)));
        }
        let part = StreamSlice::new(ReadOnly::new(disk), start, start.checked_add(len)?).ok()?;
        let fat = fatfs::FileSystem::new(BufStream::new(part), FsOptions::new()).ok()?;
        Some(FileSystem::Fat(Box::new(fat)))
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
                file.take(most + 1).read_to_end(&mut bytes).ok()?;
                (bytes.len() as u64 <= most).then_some(bytes)
            }
        }
    }

    /// A file as text.
    pub fn read_text(&self, path: &str) -> Option<String> {
        const MOST: u64 = 1 << 20;
        Some(String::from_utf8_lossy(&self.read(path, MOST)?).into_owned())
    }

    /// The names in a directory, sorted; none if there is no such directory.
    pub fn list(&self, path: &str) -> Vec<String> {
        let path = format!("/{}", path.trim_start_matches('/'));
        let mut names: Vec<String> = match self {
            FileSystem::Ext4(ext4) => {
                let entries = ext4.read_dir(path.as_str()).into_iter().flatten().flatten();
                entries.filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned)).collect()
            }
            FileSystem::Fat(fat) => {
                let root = fat.root_dir();
                let folder = root.open_dir(path.trim_start_matches('/'));
                folder
                    .iter()
                    .flat_map(|folder| folder.iter())
                    .flatten()
                    .map(|entry| entry.file_name())
                    .collect()
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
