//! The disk that an emulated Intel host boots from: a FAT file system with SYSLINUX, a kernel and an
//! initramfs.
//!
//! There is no partition table: the file system begins at the first sector, which is the boot sector that the
//! BIOS runs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::exec;

/// Heads and sectors of its tracks: a cylinder is 1 MiB.
const HEADS: &str = "64";
const SECTORS: &str = "32";
/// MiB beyond the files: the file system's own and SYSLINUX.
const SLACK_MIB: u64 = 8;

/// Writes the disk to `image`. `append` is the kernel's command line; files are made beside the image for a
/// while.
///
/// # Errors
/// The package syslinux or mtools is missing, or there is no room.
pub fn make(image: &Path, vmlinuz: &Path, initramfs: &[u8], append: &str) -> Result<()> {
    let dir = tempfile::tempdir_in(image.parent().context("an image is in a directory")?)?;
    let put = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes);
    fs::copy(vmlinuz, dir.path().join("vmlinuz"))?;
    put("initrd", initramfs)?;
    put(
        "syslinux.cfg",
        format!("DEFAULT host\nPROMPT 0\nLABEL host\n KERNEL vmlinuz\n INITRD initrd\n APPEND {append}\n")
            .as_bytes(),
    )?;
    let files = ["vmlinuz", "initrd", "syslinux.cfg"].map(|name| dir.path().join(name));
    let bytes = files.iter().map(|file| fs::metadata(file).map(|meta| meta.len())).sum::<Result<u64, _>>()?;
    let mib = (bytes >> 20) + SLACK_MIB;
    fs::File::create(image)?.set_len(mib << 20)?;
    let format = ["-t", &mib.to_string(), "-h", HEADS, "-s", SECTORS, "-H", "0", "::"];
    exec::run(mtool("mformat", image).args(format), None)?;
    exec::run(mtool("mcopy", image).args(&files).arg("::"), None)?;
    exec::run(Command::new("syslinux").arg("--install").arg(image), None).map(drop)
}

fn mtool(program: &str, image: &Path) -> Command {
    let mut command = Command::new(program);
    // Its check wants the geometry of old drives.
    command.env("MTOOLS_SKIP_CHECK", "1").arg("-i").arg(image);
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup;

    #[test]
    fn a_disk_has_a_boot_sector_and_its_files() {
        if setup::missing(setup::TO_EMULATE_INTEL) {
            eprintln!("skipped: syslinux or mtools is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (image, vmlinuz) = (dir.path().join("disk"), dir.path().join("vmlinuz"));
        fs::write(&vmlinuz, "kernel").unwrap();
        make(&image, &vmlinuz, &[7; 3 << 20], "words").unwrap();
        let bytes = fs::read(&image).unwrap();
        assert_eq!((bytes.len() % (1 << 20), &bytes[510..512]), (0, &[0x55, 0xaa][..]));
        let listed = exec::run(mtool("mdir", &image).args(["-b", "::"]), None).unwrap();
        for file in ["vmlinuz", "initrd", "syslinux.cfg"] {
            assert!(listed.contains(file), "{listed}");
        }
        let config = exec::run(mtool("mtype", &image).arg("::syslinux.cfg"), None).unwrap();
        assert!(config.contains("APPEND words"), "{config}");
    }
}
