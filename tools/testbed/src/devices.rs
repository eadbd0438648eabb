//! Disks and network cards of the machines that tests boot.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::exec;
use crate::machine::Machine;

/// Bytes of a disk; the file is sparse.
const DISK: u64 = 16 << 20;

fn disk_name(index: usize) -> String {
    format!("disk-{index}.img")
}

/// What a boot loader's file on a boot disk says.
const GRUB: &str = "set default=0\nmenuentry 'Linux' {\n  linux /boot/vmlinuz-1 gestalt.from=disk\n  \
    initrd /boot/initrd.img-1\n}\n";

impl Machine {
    /// The part of the machine file that lists them.
    pub(crate) fn device_entries(&self) -> String {
        let mut text = String::new();
        for (index, node) in self.disks.iter().enumerate() {
            text += &format!(
                "\n[[disk]]\npath = \"{}\"\nnode = \"n{node}\"\nserial = \"s{index}\"\n",
                disk_name(index)
            );
        }
        for (index, node) in self.cards.iter().enumerate() {
            text += &format!(
                "\n[[net]]\ntap = \"gestalt{index}\"\nnode = \"n{node}\"\nmac = \"02:00:00:00:00:{index:02x}\"\n"
            );
        }
        text
    }

    /// A script for host `host` that makes the TAP interfaces of the cards there, anew if there are some.
    pub fn make_taps(&self, host: usize) -> String {
        let here = self.cards.iter().enumerate().filter(|(_, node)| self.host_of(**node) == host);
        let make = here.map(|(index, _)| {
            let tap = format!("gestalt{index}");
            format!(
                "ip link del {tap} 2>/dev/null; ip tuntap add {tap} mode tap && ip addr add 10.9.{index}.1/24 dev {tap} \
                 && ip link set {tap} up\n"
            )
        });
        let make: String = make.collect();
        if make.is_empty() { make } else { format!("modprobe tun 2>/dev/null\n{make}") }
    }

    /// Makes the disks in `stage`'s `share`, where the machine file is: empty, but for the one that is booted from.
    ///
    /// # Errors
    /// There is no room, or no mke2fs.
    pub fn make_disks(&self, stage: &Path) -> Result<()> {
        for index in 0..self.disks.len() {
            let image = stage.join("share").join(disk_name(index));
            if index == 0 && self.boots_from_disk {
                self.make_boot_disk(stage, &image)?;
            } else {
                File::create(&image)?.set_len(DISK)?;
            }
        }
        Ok(())
    }

    /// An ext4 file system with kernel, initramfs and the file of a boot loader that would start them.
    fn make_boot_disk(&self, stage: &Path, image: &Path) -> Result<()> {
        let tree = tempfile::tempdir()?;
        let boot = tree.path().join("boot");
        fs::create_dir_all(boot.join("grub"))?;
        let guest = stage.join("guest");
        fs::copy(guest.join(self.kernel.name()), boot.join("vmlinuz-1"))?;
        fs::copy(guest.join("initramfs"), boot.join("initrd.img-1"))?;
        fs::write(boot.join("grub/grub.cfg"), GRUB)?;
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(tree.path()).arg(image).arg("64M");
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
        assert!(file.contains("path = \"disk-0.img\"\nnode = \"n1\"\nserial = \"s0\""), "{file}");
        assert!(file.contains("path = \"disk-1.img\"\nnode = \"n0\"\nserial = \"s1\""), "{file}");
        let stage = tempfile::tempdir().unwrap();
        fs::create_dir(stage.path().join("share")).unwrap();
        machine.make_disks(stage.path()).unwrap();
        assert_eq!(stage.path().join("share/disk-1.img").metadata().unwrap().len(), DISK);
    }

    #[test]
    fn each_card_has_an_interface_on_its_nodes_host() {
        let machine = Machine { hosts: 2, cards: vec![1, 0], ..Machine::equal(2, 1, 256) };
        let file = machine.file("/g", false);
        assert!(file.contains("tap = \"gestalt0\"\nnode = \"n1\"\nmac = \"02:00:00:00:00:00\""), "{file}");
        assert!(machine.make_taps(0).contains("ip tuntap add gestalt1 mode tap"));
        assert!(machine.make_taps(1).contains("ip addr add 10.9.0.1/24 dev gestalt0"));
        assert_eq!(Machine::equal(2, 1, 256).make_taps(0), "");
    }

    #[test]
    fn a_machine_that_boots_from_its_disk_names_no_kernel() {
        let machine = Machine { disks: vec![0], boots_from_disk: true, ..Machine::equal(1, 1, 256) };
        let file = machine.file("/g", false);
        assert!(!file.contains("kernel") && !file.contains("initrd"), "{file}");
    }
}
