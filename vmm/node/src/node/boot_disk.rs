//! The kernel that node 0 loads: the one that was named, or the one inside its first disk.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use firmware::boot::BootSource;
use firmware::disk;
use nix::sys::memfd::{MFdFlags, memfd_create};

use devices::virtio::block::Qcow2Disk;
use machine::config::devices::Kind;
use machine::control::Machine;

/// Kernel, initrd and command line, as files that can be opened as long as this value lives.
pub struct BootPaths {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    /// What came out of a disk.
    _extracted: Vec<File>,
}

impl BootPaths {
    /// What `machine` boots.
    ///
    /// # Errors
    /// There is no kernel on the disk that should have one.
    pub fn of(machine: &Machine) -> anyhow::Result<BootPaths> {
        let initrd = machine.initrd.clone();
        if !machine.kernel.as_os_str().is_empty() {
            let (kernel, cmdline) = (machine.kernel.clone(), machine.cmdline.clone());
            return Ok(BootPaths { kernel, initrd, cmdline, _extracted: Vec::new() });
        }
        let disks = machine.devices.iter().filter(|device| device.node == 0);
        let path = disks.into_iter().find_map(|device| match &device.kind {
            Kind::Disk { path, .. } => Some(path),
            _ => None,
        });
        let path = path.context("there is neither a kernel nor a disk on the first node")?;
        let found = match Qcow2Disk::peek(path)? {
            None => disk::find(path)?,
            Some(image) => disk::find_on(Arc::new(image), path)?,
        };
        tracing::info!("booting {}", found.origin);
        found.notes.iter().for_each(|note| tracing::warn!("{}: {note}", path.display()));
        let mut extracted = Vec::new();
        let kernel = extract(&found.kernel, &mut extracted)?;
        let initrd = match initrd {
            None if !found.initrd.is_empty() => Some(extract(&found.initrd, &mut extracted)?),
            given => given,
        };
        let cmdline = [found.cmdline.as_str(), &machine.cmdline].join(" ").trim().to_owned();
        Ok(BootPaths { kernel, initrd, cmdline, _extracted: extracted })
    }

    /// For the loader.
    pub fn source(&self) -> BootSource<'_> {
        BootSource { kernel: &self.kernel, initrd: self.initrd.as_deref(), cmdline: &self.cmdline }
    }
}

/// Puts bytes into a file in memory; its path.
fn extract(bytes: &[u8], files: &mut Vec<File>) -> anyhow::Result<PathBuf> {
    let mut file = File::from(memfd_create(c"gestalt-boot", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    files.push(file);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use machine::config::devices::parse_disk;
    use machine::config::{MachineConfig, NodeConfig};

    fn machine(kernel: &str, disks: &[&str]) -> Machine {
        let config = MachineConfig {
            kernel: kernel.into(),
            nodes: vec![NodeConfig::new("n0", 1, 256 << 20)],
            devices: disks.iter().map(|text| parse_disk(text).unwrap()).collect(),
            ..MachineConfig::default()
        };
        config.machine([0; 16])
    }

    #[test]
    fn a_kernel_that_is_named_is_taken_whatever_disks_there_are() {
        let paths = BootPaths::of(&machine("vmlinuz", &["/nonexistent/disk"])).unwrap();
        assert_eq!((paths.kernel.as_path(), paths.initrd), ("vmlinuz".as_ref(), None));
    }

    #[test]
    fn a_disk_without_a_kernel_is_named_in_the_error() {
        let refusal = |disk: &str| match BootPaths::of(&machine("", &[disk])) {
            Ok(_) => panic!("a kernel was found"),
            Err(error) => error.to_string(),
        };
        assert!(refusal("/nonexistent/disk").contains("/nonexistent/disk"));
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        assert!(refusal(&file.path().display().to_string()).contains("no file system"));
    }

    /// Whether a program did what it should; `false` where it is missing.
    fn run(program: &str, arguments: &[&str]) -> bool {
        let Ok(status) = Command::new(program).args(arguments).status() else {
            eprintln!("skipped: {program} is not installed");
            return false;
        };
        assert!(status.success(), "{program} {arguments:?}");
        true
    }

    #[test]
    fn the_kernel_on_a_qcow2_image_is_the_one_that_was_put_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (tree, raw, image) = (path("tree"), path("raw"), path("disk.qcow2"));
        // Larger than a cluster, and not the same all over.
        let kernel: Vec<u8> = (0..300_000u32).map(|at| (at / 7) as u8).collect();
        std::fs::create_dir_all(format!("{tree}/boot/grub")).unwrap();
        std::fs::write(format!("{tree}/boot/vmlinuz-1"), &kernel).unwrap();
        std::fs::write(format!("{tree}/boot/initrd.img-1"), b"initrd 1").unwrap();
        let menu =
            "menuentry 'Linux' {\n linux /boot/vmlinuz-1 root=/dev/vda\n initrd /boot/initrd.img-1\n}\n";
        std::fs::write(format!("{tree}/boot/grub/grub.cfg"), menu).unwrap();
        if !run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &tree, &raw, "8M"])
            || !run("qemu-img", &["convert", "-q", "-f", "raw", "-O", "qcow2", &raw, &image])
        {
            return;
        }
        let mut machine = machine("", &[&image]);
        machine.cmdline = "quiet".into();
        let paths = BootPaths::of(&machine).unwrap();
        assert!(std::fs::read(&paths.kernel).unwrap() == kernel);
        assert_eq!(std::fs::read(paths.initrd.as_ref().unwrap()).unwrap(), b"initrd 1");
        assert_eq!(paths.cmdline, "root=/dev/vda quiet");
    }

    #[test]
    fn what_was_extracted_can_be_opened_by_its_path() {
        let mut files = Vec::new();
        let path = extract(b"kernel", &mut files).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), b"kernel");
    }
}
