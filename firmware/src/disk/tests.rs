use std::io::{Cursor, Write};
use std::os::unix::fs::FileExt;
use std::process::Command;

use super::*;
use fatfs::{FormatVolumeOptions, FsOptions};

const MIB: usize = 1 << 20;

/// A FAT file system with these files.
fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 2 * MIB];
    fatfs::format_volume(Cursor::new(&mut bytes), FormatVolumeOptions::new()).unwrap();
    let system = fatfs::FileSystem::new(Cursor::new(&mut bytes), FsOptions::new()).unwrap();
    for (path, content) in files {
        let mut folder = system.root_dir();
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        for part in above.split('/').filter(|part| !part.is_empty()) {
            folder = folder.create_dir(part).unwrap();
        }
        folder.create_file(name).unwrap().write_all(content).unwrap();
    }
    drop(system);
    bytes
}

/// An ext4 file system with these files; `None` where mke2fs is missing.
fn ext4(files: &[(&str, &[u8])]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in files {
        let path = dir.path().join("tree").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    let image = dir.path().join("image");
    let command = ["-q", "-F", "-t", "ext4", "-d"];
    let made = ["mke2fs", "/sbin/mke2fs"].into_iter().find_map(|program| {
        Command::new(program).args(command).arg(dir.path().join("tree")).arg(&image).arg("4M").status().ok()
    });
    if made.is_none() {
        eprintln!("skipped: mke2fs is not installed");
    }
    made.filter(std::process::ExitStatus::success).map(|_| std::fs::read(&image).unwrap())
}

/// A disk with an MBR and these partitions, one MiB apart from the start.
fn mbr(partitions: &[Vec<u8>]) -> Vec<u8> {
    let mut disk = vec![0; MIB];
    for (index, content) in partitions.iter().enumerate() {
        let entry = 446 + 16 * index;
        disk[entry + 4] = 0x83;
        let (start, len) = ((disk.len() / 512) as u32, (content.len() / 512) as u32);
        disk[entry + 8..entry + 12].copy_from_slice(&start.to_le_bytes());
        disk[entry + 12..entry + 16].copy_from_slice(&len.to_le_bytes());
        disk.extend(content);
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// The same with a GPT.
fn gpt(partitions: &[Vec<u8>]) -> Vec<u8> {
    let total = 4 * MIB + partitions.iter().map(Vec::len).sum::<usize>();
    let mut disk = Cursor::new(vec![0; total]);
    gpt::mbr::ProtectiveMBR::with_lb_size((total / 512 - 1) as u32).overwrite_lba0(&mut disk).unwrap();
    let config = gpt::GptConfig::new().writable(true).logical_block_size(gpt::disk::LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(disk, None).unwrap();
    let mut places = Vec::new();
    for content in partitions {
        let id = table
            .add_partition("part", content.len() as u64, gpt::partition_types::LINUX_FS, 0, None)
            .unwrap();
        places.push(table.partitions()[&id].first_lba as usize * 512);
    }
    let mut disk = table.write().unwrap().into_inner();
    for (at, content) in places.into_iter().zip(partitions) {
        disk[at..at + content.len()].copy_from_slice(content);
    }
    disk
}

fn find_in(disk: &[u8]) -> Result<BootFiles, FirmwareError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(disk).unwrap();
    find(file.path())
}

const GRUB: &[u8] = b"menuentry 'Linux' {\n linux /vmlinuz-1 root=/dev/vda2 ro\n initrd /initrd-1\n}\n";

#[test]
fn a_boot_partition_with_grub_is_found_behind_either_table() {
    let boot = fat(&[("vmlinuz-1", b"kernel"), ("initrd-1", b"ramdisk"), ("grub/grub.cfg", GRUB)]);
    let empty = fat(&[("readme", b"nothing to boot")]);
    for disk in [mbr(&[empty.clone(), boot.clone()]), gpt(&[empty, boot])] {
        let found = find_in(&disk).unwrap();
        assert_eq!(found.kernel, b"kernel");
        assert_eq!(found.initrd, b"ramdisk\0");
        assert_eq!(found.cmdline, "root=/dev/vda2 ro");
        assert!(found.origin.starts_with("partition 2: /vmlinuz-1"), "{}", found.origin);
    }
}

#[test]
fn a_file_system_without_partitions_is_found() {
    let entry = b"title x\nlinux /a/vmlinuz\noptions quiet\n";
    let disk = fat(&[("a/vmlinuz", b"kernel"), ("loader/entries/x.conf", entry)]);
    let found = find_in(&disk).unwrap();
    assert_eq!((found.kernel, found.initrd, found.cmdline.as_str()), (b"kernel".to_vec(), vec![], "quiet"));
}

#[test]
fn an_entry_may_name_files_of_another_partition() {
    let entry = b"linux /boot/vmlinuz\ninitrd /boot/initrd\noptions root=/dev/vda2\n";
    let Some(root) = ext4(&[("boot/vmlinuz", b"kernel"), ("boot/initrd", b"initrd..")]) else { return };
    let esp = fat(&[("loader/entries/x.conf", entry)]);
    let found = find_in(&gpt(&[esp, root])).unwrap();
    assert_eq!((found.kernel, found.initrd), (b"kernel".to_vec(), b"initrd..".to_vec()));
}

#[test]
fn the_links_in_a_roots_folder_do_when_there_is_no_loader() {
    let Some(root) = ext4(&[("vmlinuz", b"kernel"), ("initrd.img", b"ramdisk!")]) else { return };
    let found = find_in(&mbr(&[fat(&[]), root])).unwrap();
    assert_eq!(found.cmdline, "root=/dev/vda2 ro");
    assert_eq!((found.kernel, found.initrd), (b"kernel".to_vec(), b"ramdisk!".to_vec()));
}

#[test]
fn what_cannot_be_booted_is_explained() {
    let refusal = |disk: &[u8]| find_in(disk).unwrap_err().to_string();
    assert!(refusal(&vec![0; MIB]).contains("no file system"));
    assert!(refusal(&[]).contains("no kernel can be found"));
    assert!(refusal(&mbr(&[fat(&[("a", b"")])])).contains("partition 1"));
    let lost = refusal(&fat(&[("grub/grub.cfg", GRUB)]));
    assert!(lost.contains("/vmlinuz-1 or its initrd cannot be read"), "{lost}");
}

#[test]
fn a_damaged_disk_is_refused_or_read_but_harms_nothing() {
    let boot = fat(&[("vmlinuz-1", b"kernel"), ("initrd-1", b"ramdisk"), ("grub/grub.cfg", GRUB)]);
    let good = gpt(&[boot]);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&good).unwrap();
    // Bytes of the tables and of the file system's first sectors, one at a time.
    for at in (0..40 * 512).step_by(7).chain((MIB..MIB + 4096).step_by(5)) {
        file.as_file().write_all_at(&[!good[at]], at as u64).unwrap();
        let _ = find(file.path());
        file.as_file().write_all_at(&[good[at]], at as u64).unwrap();
    }
    assert_eq!(find(file.path()).unwrap().kernel, b"kernel", "the damage is undone");
}
