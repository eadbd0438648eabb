//! Disks, network cards and balloons of the machines that tests boot.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::exec;
use crate::machine::Machine;

/// Bytes of a disk; the file is sparse.
const DISK: u64 = 16 << 20;

/// The disk that is booted from, beside the machine file.
const BOOT_DISK: &str = "boot.img";

/// What a boot loader's file on a boot disk says.
const GRUB: &str = "set default=0\nmenuentry 'Linux' {\n  linux /boot/vmlinuz-1 gestalt.from=disk\n  \
    initrd /boot/initrd.img-1\n}\n";

impl Machine {
    /// The part of the machine file that lists them.
    pub(crate) fn device_entries(&self) -> String {
        let mut text = String::new();
        if let Some(path) = &self.system {
            text += &format!("\n[[disk]]\npath = \"{path}\"\nnode = \"n0\"\nserial = \"system\"\n");
        }
        for (index, node) in self.disks.iter().enumerate() {
            text += &format!(
                "\n[[disk]]\npath = \"{}\"\nnode = \"n{node}\"\nserial = \"s{index}\"\n",
                self.disk_path(index)
            );
        }
        for (index, node) in self.cards.iter().enumerate() {
            text += &format!(
                "\n[[net]]\ntap = \"gestalt{index}\"\nnode = \"n{node}\"\nmac = \"02:00:00:00:00:{index:02x}\"\n\
                 queues = {}\n",
                self.card_queues
            );
        }
        if self.balloon {
            text += "\n[balloon]\n";
        }
        text
    }

    /// The image of a disk, as the machine file names it: of every other disk on its host's own file system,
    /// and beside the machine file otherwise, which emulated hosts see over a network protocol.
    fn disk_path(&self, index: usize) -> String {
        match index {
            0 if self.boots_from_disk => BOOT_DISK.into(),
            _ if index.is_multiple_of(2) => format!("/tmp/gestalt-disk-{index}.img"),
            _ => format!("gestalt-disk-{index}.img"),
        }
    }

    /// The images of all disks, as the machine file names them.
    pub fn disk_paths(&self) -> Vec<String> {
        (0..self.disks.len()).map(|index| self.disk_path(index)).collect()
    }

    /// A script for host `host`, run beside the machine file, that makes the empty disks and the TAP
    /// interfaces there, in place of those that are there.
    pub fn prepare(&self, host: usize) -> String {
        let here = |(_, node): &(usize, &usize)| self.host_of(**node) == host;
        let blank = |(index, _): &(usize, &usize)| !(*index == 0 && self.boots_from_disk);
        let mut script = String::new();
        for (index, _) in self.disks.iter().enumerate().filter(here).filter(blank) {
            let path = self.disk_path(index);
            script += &format!("rm -f {path} && truncate -s {DISK} {path}\n");
        }
        for (index, _) in self.cards.iter().enumerate().filter(here) {
            let tap = format!("gestalt{index}");
            let several = if self.card_queues > 1 { "multi_queue" } else { "" };
            script += &format!(
                "modprobe tun 2>/dev/null; ip link del {tap} 2>/dev/null; ip tuntap add {tap} mode tap {several} && \
                 ip addr add 10.9.{index}.1/24 dev {tap} && ip link set {tap} up\n"
            );
        }
        script
    }

    /// Makes the disk that is booted from, if one is, beside the machine file in `stage`'s `share`.
    ///
    /// # Errors
    /// There is no room, or no mke2fs.
    pub fn make_boot_disk(&self, stage: &Path) -> Result<()> {
        if !self.boots_from_disk {
            return Ok(());
        }
        let image = stage.join("share").join(BOOT_DISK);
        let tree = tempfile::tempdir()?;
        let boot = tree.path().join("boot");
        fs::create_dir_all(boot.join("grub"))?;
        let guest = stage.join("guest");
        fs::copy(guest.join(self.kernel.name()), boot.join("vmlinuz-1"))?;
        fs::copy(guest.join("initramfs"), boot.join("initrd.img-1"))?;
        fs::write(boot.join("grub/grub.cfg"), GRUB)?;
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree.path()).arg(&image).arg("64M");
        exec::run(&mut mke2fs, None).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_is_on_its_node() {
        let machine = Machine { disks: vec![1, 0], ..Machine::equal(2, 1, 256) };
        let file = machine.file("/g", false);
        for (index, node) in [(0, "n1"), (1, "n0")] {
            let folder = if index == 0 { "/tmp/" } else { "" };
            let path = format!("{folder}gestalt-disk-{index}.img");
            let entry = format!("path = \"{path}\"\nnode = \"{node}\"\nserial = \"s{index}\"");
            assert!(file.contains(&entry), "{file}");
            assert!(machine.prepare(0).contains(&format!("truncate -s {DISK} {path}")));
        }
    }

    #[test]
    fn each_card_has_an_interface_on_its_nodes_host() {
        let machine = Machine { hosts: 2, cards: vec![1, 0], ..Machine::equal(2, 1, 256) };
        let file = machine.file("/g", false);
        assert!(file.contains("tap = \"gestalt0\"\nnode = \"n1\"\nmac = \"02:00:00:00:00:00\""), "{file}");
        assert!(machine.prepare(0).contains("ip tuntap add gestalt1 mode tap"));
        assert!(machine.prepare(1).contains("ip addr add 10.9.0.1/24 dev gestalt0"));
        assert_eq!(Machine::equal(2, 1, 256).prepare(0), "");
    }

    #[test]
    fn a_machine_that_boots_from_its_disk_names_no_kernel() {
        let machine = Machine { disks: vec![0], boots_from_disk: true, ..Machine::equal(1, 1, 256) };
        let file = machine.file("/g", false);
        assert!(file.contains("boot.img") && machine.prepare(0).is_empty());
        assert!(!file.contains("kernel") && !file.contains("initrd"), "{file}");
        let machine = Machine { system: Some("/dev/vdb".into()), ..Machine::equal(1, 1, 256) };
        let file = machine.file("/g", false);
        assert!(file.contains("path = \"/dev/vdb\"\nnode = \"n0\"") && !file.contains("kernel"), "{file}");
        assert!(!file.contains("gestalt.run"), "{file}");
    }
}
