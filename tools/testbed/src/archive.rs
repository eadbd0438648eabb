//! Writing initramfs archives (cpio, "newc" format).

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{Builder, trailer};

/// An initramfs being put together in memory.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    next_inode: u32,
    directories: BTreeSet<String>,
}

impl Initramfs {
    /// An archive with the console device that the kernel opens for `/init` before anything is mounted.
    ///
    /// # Errors
    /// None in practice: it is written to memory.
    pub fn new() -> Result<Self> {
        let mut this = Self::default();
        for directory in ["bin", "dev", "proc", "sys", "tmp", "run"] {
            this.directory(directory)?;
        }
        let console = this.header("dev/console", 0o020_600).rdev_major(5).rdev_minor(1);
        this.append(console, b"")?;
        Ok(this)
    }

    /// Adds a directory, and those above it.
    ///
    /// # Errors
    /// None in practice.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let part = &path[..end];
            if self.directories.insert(part.to_owned()) {
                let header = self.header(part, 0o040_755);
                self.append(header, b"")?;
            }
        }
        Ok(())
    }

    /// Adds a file with permission bits `mode`, and the directories above it.
    ///
    /// # Errors
    /// The file is larger than 4 GiB.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above)?;
        }
        let header = self.header(path, 0o100_000 | mode);
        self.append(header, content)
    }

    /// Adds a copy of an executable of this machine.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.file(path, 0o755, &content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// None in practice.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        let header = self.header(path, 0o120_777);
        self.append(header, target.as_bytes())
    }

    /// Ends the archive and returns its bytes.
    ///
    /// # Errors
    /// None in practice.
    pub fn finish(self) -> Result<Vec<u8>> {
        Ok(trailer(self.bytes)?)
    }

    fn header(&mut self, path: &str, mode: u32) -> Builder {
        self.next_inode += 1;
        Builder::new(path).ino(self.next_inode).mode(mode).nlink(1)
    }

    fn append(&mut self, header: Builder, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len()).context("a file of an initramfs is below 4 GiB")?;
        let mut writer = header.write(&mut self.bytes, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_they_hold_and_only_once() {
        let mut archive = Initramfs::new().unwrap();
        archive.file("a/b/one", 0o644, b"first").unwrap();
        archive.file("a/b/two", 0o755, b"second!").unwrap();
        let bytes = archive.finish().unwrap();
        let mut names = Vec::new();
        let mut rest = &bytes[..];
        loop {
            let reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_owned());
            rest = reader.finish().unwrap();
        }
        assert_eq!(names[names.len() - 4..], ["a", "a/b", "a/b/one", "a/b/two"]);
    }
}
