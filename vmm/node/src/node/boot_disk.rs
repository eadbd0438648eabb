//! The kernel that node 0 loads: the one that was named, or the one inside its first disk.

use std::path::{Path, PathBuf};

use anyhow::Context;
use firmware::boot::BootSource;
use machine::config::devices::PlacedKind;
use machine::control::Machine;

use crate::disk_search::{Extracted, Found};

/// Kernel, initrd and command line, as files that can be opened as long as this value lives.
pub struct BootPaths {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    /// What came out of a disk.
    _extracted: Vec<Extracted>,
}

impl BootPaths {
    /// What `machine` boots; `find` looks into its disk if that says so, as [`crate::disk_search::find`]
    /// does.
    ///
    /// # Errors
    /// There is no kernel on the disk that should have one.
    pub fn of(
        machine: &Machine,
        find: impl FnOnce(&Path) -> anyhow::Result<Found>,
    ) -> anyhow::Result<BootPaths> {
        let given = machine.initrd.clone();
        if !machine.kernel.as_os_str().is_empty() {
            let (kernel, cmdline) = (machine.kernel.clone(), machine.cmdline.clone());
            return Ok(BootPaths { kernel, initrd: given, cmdline, _extracted: Vec::new() });
        }
        let disks = machine.devices.iter().filter(|device| device.node == 0);
        let path = disks.into_iter().find_map(|device| match &device.kind {
            PlacedKind::Disk { path, .. } => Some(path),
            _ => None,
        });
        let path = path.context("there is neither a kernel nor a disk on the first node")?;
        let Found { origin, kernel, initrd, cmdline, notes } = find(path)?;
        tracing::info!("booting {origin}");
        notes.iter().for_each(|note| tracing::warn!("{}: {note}", path.display()));
        let cmdline = [cmdline.as_str(), &machine.cmdline].join(" ").trim().to_owned();
        let paths = (kernel.path(), given.or_else(|| initrd.as_ref().map(Extracted::path)));
        let extracted = std::iter::once(kernel).chain(initrd).collect();
        Ok(BootPaths { kernel: paths.0, initrd: paths.1, cmdline, _extracted: extracted })
    }

    /// For the loader.
    pub fn source(&self) -> BootSource<'_> {
        BootSource { kernel: &self.kernel, initrd: self.initrd.as_deref(), cmdline: &self.cmdline }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;
    use std::sync::Arc;

    use devices::virtio::block::{Qcow2Disk, is_qcow2};
    use firmware::disk::source::Source;

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
        let checked = config.check().unwrap();
        checked.machine([0; 16], checked.placed().to_vec())
    }

    /// A search in this process: its child is the `gestalt` binary, whose tests look into disks by it.
    fn here(path: &Path) -> anyhow::Result<Found> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let disk: Arc<dyn Source> = match is_qcow2(path) {
            true => Arc::new(Qcow2Disk::peek(file, path)?),
            false => Arc::new(file),
        };
        let found = firmware::disk::find_on(disk, path)?;
        let initrd = (!found.initrd.is_empty()).then(|| Extracted::of(&found.initrd)).transpose()?;
        let kernel = Extracted::of(&found.kernel)?;
        Ok(Found { origin: found.origin, kernel, initrd, cmdline: found.cmdline, notes: found.notes })
    }

    #[test]
    fn a_kernel_that_is_named_is_taken_whatever_disks_there_are() {
        let paths = BootPaths::of(&machine("vmlinuz", &["/nonexistent/disk"]), here).unwrap();
        assert_eq!((paths.kernel.as_path(), paths.initrd), ("vmlinuz".as_ref(), None));
    }

    #[test]
    fn a_disk_without_a_kernel_is_named_in_the_error() {
        let refusal = |disk: &str| match BootPaths::of(&machine("", &[disk]), here) {
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
        let paths = BootPaths::of(&machine, here).unwrap();
        assert!(std::fs::read(&paths.kernel).unwrap() == kernel);
        assert_eq!(std::fs::read(paths.initrd.as_ref().unwrap()).unwrap(), b"initrd 1");
        assert_eq!(paths.cmdline, "root=/dev/vda quiet");
    }

    #[test]
    fn what_was_extracted_can_be_opened_by_its_path() {
        let file = Extracted::of(b"kernel").unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"kernel");
    }
}
