//! The drivers of a guest kernel's virtio devices, as an archive to append to the guest's initramfs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::archive::Initramfs;
use crate::exec;

/// Modules in the order to load them. What a kernel has built in has no file, and is left out.
const ORDER: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "rng-core",
    "virtio-rng",
    "virtio_balloon",
    "virtio_console",
];

/// The archive: `modules/<release>/<name>.ko`, and `modules/<release>/order` with their names.
///
/// # Errors
/// `modules` is no directory of kernel modules named after the kernel's release.
pub fn archive(modules: &Path) -> Result<Vec<u8>> {
    let release = modules.file_name().context("a modules' directory without name")?.to_string_lossy();
    let found = exec::run(Command::new("find").arg(modules).args(["-name", "*.ko*"]), None)?;
    let mut archive = Initramfs::default();
    let mut order = String::new();
    for name in ORDER {
        let file = found.lines().map(Path::new).find(|path| {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            file.split('.').next() == Some(*name)
        });
        if let Some(file) = file {
            archive.file(&format!("modules/{release}/{name}.ko"), 0o644, &decompressed(file)?)?;
            order += &format!("{name}\n");
        }
    }
    archive.file(&format!("modules/{release}/order"), 0o644, order.as_bytes())?;
    archive.finish()
}

/// A kernel module's bytes; Debian compresses them with xz.
pub(crate) fn decompressed(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(file)?);
    }
    let output = Command::new("xz").arg("-dc").arg(file).output().context("running xz")?;
    ensure!(output.status.success(), "xz cannot unpack {}", file.display());
    Ok(output.stdout)
}

/// Archives one after the other: the kernel wants each to begin at a multiple of 4.
pub fn joined(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut whole = Vec::new();
    for part in parts {
        whole.extend_from_slice(part);
        whole.resize(whole.len().next_multiple_of(4), 0);
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_that_are_modules_are_listed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("6.0-test");
        std::fs::create_dir_all(modules.join("kernel/a")).unwrap();
        for name in ["virtio_net", "virtio_blk", "ext4"] {
            std::fs::write(modules.join(format!("kernel/a/{name}.ko")), name).unwrap();
        }
        let archive = archive(&modules).unwrap();
        let text = String::from_utf8_lossy(&archive);
        assert!(text.contains("virtio_blk\nvirtio_net\n"), "{text}");
        assert!(text.contains("modules/6.0-test/virtio_blk.ko") && !text.contains("ext4"));
    }

    #[test]
    fn joined_archives_are_aligned() {
        assert_eq!(joined(&[vec![1; 5], vec![2; 3]]), [1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 0]);
    }
}
