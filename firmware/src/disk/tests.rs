//! Disks as installers leave them, and disks made to harm who searches them.

use std::io::{Cursor, Write};
use std::os::unix::fs::FileExt;
use std::process::Command;

use super::*;
use fatfs::{FormatVolumeOptions, FsOptions};

const MIB: usize = 1 << 20;

/// A FAT file system with these files.
fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * MIB];
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
    assert!(refusal(&[]).contains("no kernel can be booted"));
    assert!(refusal(&mbr(&[fat(&[("a", b"")])])).contains("partition 1"));
    let lost = refusal(&fat(&[("grub/grub.cfg", GRUB)]));
    assert!(lost.contains("grub.cfg names /vmlinuz-1, which is not there"), "{lost}");
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

/// What GRUB would boot by this grub.cfg and grubenv: kernel, initrds joined, command line; or the refusal.
fn grub(script: &str, environment: &str, more: &[(&str, &[u8])]) -> Result<(String, String), String> {
    let kernels = ["1", "2", "3"].map(|n| (format!("vmlinuz-{n}"), format!("kernel {n}").into_bytes()));
    let mut files: Vec<(&str, &[u8])> =
        kernels.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
    files.push(("grub/grub.cfg", script.as_bytes()));
    if !environment.is_empty() {
        files.push(("grub/grubenv", environment.as_bytes()));
    }
    files.extend(more);
    let found = find_in(&mbr(&[fat(&files)])).map_err(|error| error.to_string())?;
    Ok((String::from_utf8(found.kernel).unwrap(), found.cmdline))
}

/// What Debian's grub-mkconfig writes, shortened, with two kernels in the submenu and an entry of the
/// administrator's.
const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${saved_entry}"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  else
    insmod efi_gop
  fi
}
if [ x$feature_default_font_path = xy ] ; then
   font=unicode
else
   insmod part_gpt
   search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt2  aaaa
   font="/usr/share/grub/unicode.pf2"
fi
if loadfont $font ; then
  set gfxmode=auto
  load_video
  insmod gfxterm
fi
terminal_output gfxterm
if [ "${recordfail}" = 1 ] ; then
  set timeout=30
else
  set timeout=5
fi
function gfxmode {
	set gfxpayload="${1}"
}
set linux_gfx_mode=
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-aaaa' {
	load_video
	gfxmode $linux_gfx_mode
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	set root='hd0,gpt2'
	search --no-floppy --fs-uuid --set=root aaaa
	echo	'Loading Linux ...'
	linux	/vmlinuz-3 root=UUID=aaaa ro  quiet
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-aaaa' {
	menuentry 'Debian GNU/Linux, with Linux 3' --class debian $menuentry_id_option 'gnulinux-3-advanced-aaaa' {
		linux	/vmlinuz-3 root=UUID=aaaa ro  advanced
	}
	menuentry 'Debian GNU/Linux, with Linux 2' --class debian $menuentry_id_option 'gnulinux-2-advanced-aaaa' {
		linux	/vmlinuz-2 root=UUID=aaaa ro
	}
}
if [ "$grub_platform" = "efi" ]; then
	fwsetup --is-supported
	if [ "$?" = 0 ]; then
		menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
			fwsetup
		}
	fi
fi
menuentry 'Pinned by me' --id pinned {
	linux /vmlinuz-1 ro pinned
}
if [ -f  ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
elif [ -z "${config_directory}" -a -f  $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
"#;

#[test]
fn grubs_default_is_found_by_number_title_identifier_and_path() {
    let first = ("kernel 3".to_owned(), "root=UUID=aaaa ro quiet".to_owned());
    let second = ("kernel 2".to_owned(), "root=UUID=aaaa ro".to_owned());
    let pinned = ("kernel 1".to_owned(), "ro pinned".to_owned());
    for (saved, wanted) in [
        ("", &first),
        ("0", &first),
        ("2", &pinned),
        ("Pinned by me", &pinned),
        ("pinned", &pinned),
        ("1>1", &second),
        ("gnulinux-advanced-aaaa>gnulinux-2-advanced-aaaa", &second),
        ("Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 2", &second),
        ("no such entry", &first),
    ] {
        let environment = format!("# GRUB Environment Block\nsaved_entry={saved}\n####");
        assert_eq!(grub(DEBIAN, &environment, &[]).as_ref(), Ok(wanted), "{saved}");
    }
    let refusal = grub(DEBIAN, "saved_entry=1\n", &[]).unwrap_err();
    assert!(refusal.contains("default is the submenu"), "{refusal}");
    let once = grub(DEBIAN, "next_entry=pinned\n", &[]).unwrap_err();
    assert!(once.contains("booted once"), "{once}");
    let custom: &[(&str, &[u8])] = &[("grub/custom.cfg", b"set default=pinned\n")];
    assert_eq!(grub(DEBIAN, "", custom).as_ref(), Ok(&pinned));
}

/// What RHEL's grub2-mkconfig writes, shortened.
const RHEL: &str = r#"
if [ -f ${config_directory}/grubenv ]; then
  load_env -f ${config_directory}/grubenv
elif [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="${saved_entry}"
fi
insmod part_gpt
set root='hd0,gpt2'
search --no-floppy --fs-uuid --set=boot bbbb
if [ -z "${kernelopts}" ]; then
  set kernelopts="root=/dev/vda3 ro fallback "
fi
insmod blscfg
blscfg
if [ "${boot_success}" = "1" -o "${boot_indeterminate}" = "1" ]; then
  set menu_hide_ok=1
fi
"#;

#[test]
fn entries_of_the_specification_have_grubs_variables_and_default_when_grub_reads_them() {
    let entry = |n: &str| {
        format!("title Linux {n}\nversion {n}\nlinux /vmlinuz-{n}\noptions $kernelopts rhgb $tuned_params\n")
    };
    let (two, three) = (entry("2"), entry("3"));
    let entries: &[(&str, &[u8])] =
        &[("loader/entries/m-2.conf", two.as_bytes()), ("loader/entries/m-3.conf", three.as_bytes())];
    let boots = |kernel: &str, options: &str| Ok((format!("kernel {kernel}"), options.to_owned()));
    assert_eq!(grub(RHEL, "", entries), boots("3", "root=/dev/vda3 ro fallback rhgb"));
    let environment = "saved_entry=m-2\nkernelopts=root=/dev/vda9 ro\n";
    assert_eq!(grub(RHEL, environment, entries), boots("2", "root=/dev/vda9 ro rhgb"));
    // The environment block of a machine with UEFI is on another partition.
    let boot = fat(&[("vmlinuz-3", b"kernel 3"), ("grub2/grub.cfg", RHEL.as_bytes()), entries[1]]);
    let esp = fat(&[("EFI/redhat/grubenv", b"kernelopts=root=/dev/mapper/x\n")]);
    let script = RHEL.replace("if [ -f ${config_directory}/grubenv ]; then", "if true; then");
    let linked = fat(&[("vmlinuz-3", b"kernel 3"), ("grub2/grub.cfg", script.as_bytes()), entries[1]]);
    assert_eq!(find_in(&mbr(&[esp.clone(), linked])).unwrap().cmdline, "root=/dev/mapper/x rhgb");
    assert_eq!(find_in(&mbr(&[esp, boot])).unwrap().cmdline, "root=/dev/vda3 ro fallback rhgb");
    let unset = RHEL.replace("set kernelopts=", "set other=");
    let refusal = grub(&unset, "", entries).unwrap_err();
    assert!(refusal.contains("$kernelopts"), "{refusal}");
}

#[test]
fn conditions_choose_and_what_cannot_be_known_is_refused() {
    let slots = "slot=a\nif [ $slot = a ]; then\n linux /vmlinuz-1 root=/dev/vda1\nelse\n linux /vmlinuz-2 root=/dev/vda2\nfi\n";
    assert_eq!(grub(slots, "", &[]).unwrap().0, "kernel 1");
    let menu = "menuentry one {\n linux /vmlinuz-1\n}\nmenuentry two {\n linux /vmlinuz-2 a\n}\n";
    for (script, line, why) in [
        ("if keystatus --shift; then\n set default=1\nfi\n", 0, "default"),
        ("if keystatus --shift; then\n linux /vmlinuz-3\nfi\n", 2, "linux"),
        ("eval \"set default=1\"\n", 1, "eval"),
        ("for x in 1 2; do\n set default=1\ndone\n", 0, "default"),
        ("decrement boot_counter\n", 1, "counts boots"),
        ("source /grub/nothing.cfg\n", 1, "nothing.cfg"),
        ("probe --set=default -u $root\n", 0, "default"),
    ] {
        let refusal = grub(&format!("{script}{menu}"), "", &[]).unwrap_err();
        assert!(refusal.contains(why), "{script}: {refusal}");
        assert!(line == 0 || refusal.contains(&format!("line {line}")), "{script}: {refusal}");
    }
    let harmless = "if keystatus --shift; then\n set timeout=10\nfi\n";
    assert_eq!(grub(&format!("{harmless}default=1\n{menu}"), "", &[]).unwrap().0, "kernel 2");
}

#[test]
fn quotes_continued_lines_and_the_last_assignment_count() {
    let quoted = "linux /vmlinuz-1 \"root=LABEL=my root\" 'dyndbg=file drivers/usb/* +p' quiet\n";
    let options = r#""root=LABEL=my root" "dyndbg=file drivers/usb/* +p" quiet"#;
    assert_eq!(grub(quoted, "", &[]).unwrap().1, options);
    let continued = "linux /vmlinuz-1 root=/dev/vda1 \\\n  console=ttyS0 \\\n  crashkernel=256M\n";
    assert_eq!(grub(continued, "", &[]).unwrap().1, "root=/dev/vda1 console=ttyS0 crashkernel=256M");
}

#[test]
fn a_script_cannot_take_more_than_its_limits() {
    let doubling: String = std::iter::once("set a=xxxxxxxx\n".to_owned())
        .chain((0..40).map(|_| "set a=$a$a\n".to_owned()))
        .collect();
    for (script, why) in [
        (format!("{doubling}linux /vmlinuz-1 $a\n"), "beyond all measure"),
        ("function f {\n f\n}\nf\n".into(), "more than any menu needs"),
        ("source /grub/grub.cfg\n".into(), "more than any menu needs"),
        ("menuentry x {\n linux /vmlinuz-1\n}\n".repeat(2000), "its menu has no end"),
        ("if true; then ".repeat(1000), "nested too deeply"),
        ("#".repeat(2 * MIB), "more than 1048576 bytes"),
    ] {
        let refusal = grub(&script, "", &[]).unwrap_err();
        assert!(refusal.contains(why), "{refusal}");
    }
    let initrd = vec![0; MIB];
    let many = format!("linux /vmlinuz-1\ninitrd {}\n", "/big ".repeat(1100));
    let mut disk = vec![0; 4 * MIB];
    fatfs::format_volume(Cursor::new(&mut disk), FormatVolumeOptions::new()).unwrap();
    let system = fatfs::FileSystem::new(Cursor::new(&mut disk), FsOptions::new()).unwrap();
    for (name, content) in [("vmlinuz-1", &b"kernel"[..]), ("big", &initrd[..])] {
        system.root_dir().create_file(name).unwrap().write_all(content).unwrap();
    }
    let folder = system.root_dir().create_dir("grub").unwrap();
    folder.create_file("grub.cfg").unwrap().write_all(many.as_bytes()).unwrap();
    drop(folder);
    drop(system);
    let refusal = find_in(&disk).unwrap_err().to_string();
    assert!(refusal.contains("have more than 1073741824 bytes together"), "{refusal}");
}

#[test]
fn systemd_boots_default_order_and_options_are_kept() {
    let entry = |kernel: &str, more: &str| format!("linux /{kernel}\n{more}");
    let boots = |files: &[(&str, &str)]| {
        let mut all: Vec<(&str, &[u8])> = vec![("k1", b"kernel 1"), ("k2", b"kernel 2")];
        all.extend(files.iter().map(|(name, text)| (*name, text.as_bytes())));
        find_in(&mbr(&[fat(&all)])).map_err(|error| error.to_string())
    };
    let (old, new) = (entry("k1", "options a=\"b c\" d=$e f\\g #h\n"), entry("k2", ""));
    let (old, new) = (("loader/entries/n-9.conf", old.as_str()), ("loader/entries/n-10.conf", new.as_str()));
    assert_eq!(boots(&[old, new]).unwrap().kernel, b"kernel 2");
    let back = boots(&[old, new, ("loader/loader.conf", "timeout 3\ndefault n-9.conf\n")]).unwrap();
    assert_eq!((back.kernel, back.cmdline.as_str()), (b"kernel 1".to_vec(), "a=\"b c\" d=$e f\\g #h"));
    let missing = boots(&[old, ("loader/entries/n-11.conf", "linux /k3\n")]).unwrap_err();
    assert!(missing.contains("n-11.conf names /k3, which is not there"), "{missing}");
    let keyed = ("loader/entries/n-8.conf", "linux /k1\nsort-key a\n");
    let passed = boots(&[keyed, ("loader/entries/n-11.conf", "linux /k3\n")]).unwrap();
    assert_eq!(passed.kernel, b"kernel 1");
    assert!(passed.notes[0].contains("n-11 names /k3, which is not there"), "{:?}", passed.notes);
    let arm = ("loader/entries/z.conf", "linux /k1\narchitecture aa64\n");
    assert_eq!(boots(&[arm, new]).unwrap().kernel, b"kernel 2");
    for (file, why) in [
        (("loader/loader.conf", "default @saved\n"), "@saved"),
        (("loader/entries/n-12+3.conf", "linux /k1\n"), "counts its boots"),
        (("loader/entries/n-12.conf", "efi /shell.efi\n"), "/shell.efi"),
    ] {
        let refusal = boots(&[old, file]).unwrap_err();
        assert!(refusal.contains(why), "{refusal}");
    }
}

#[test]
fn partitions_that_cannot_be_read_are_named() {
    let mut xfs = vec![0; MIB];
    xfs[..4].copy_from_slice(b"XFSB");
    let refusal = find_in(&mbr(&[fat(&[("EFI/x", b"")]), xfs])).unwrap_err().to_string();
    assert!(refusal.contains("partition 2 is XFS, which cannot be read here"), "{refusal}");
    let whole = mbr(&[fat(&[]), fat(&[("vmlinuz", b"kernel")])]);
    let cut = find_in(&whole[..whole.len() - MIB]).unwrap_err().to_string();
    assert!(cut.contains("partition 2 is cut off") && cut.contains("incomplete"), "{cut}");
}

#[test]
fn features_of_ext4_that_cannot_be_read_are_named() {
    let Some(mut image) = ext4(&[("vmlinuz", b"kernel")]) else { return };
    // s_feature_incompat, with metadata checksums off so that the superblock's own does not object.
    image[0x464..0x468].copy_from_slice(&0u32.to_le_bytes());
    let old = u32::from_le_bytes(image[0x460..0x464].try_into().unwrap());
    image[0x460..0x464].copy_from_slice(&(old | 0x2_0000).to_le_bytes());
    let refusal = find_in(&image).unwrap_err().to_string();
    assert!(refusal.contains("ext4, which cannot be read: it has casefold"), "{refusal}");
}

#[test]
fn a_directory_whose_clusters_bite_their_own_tail_ends() {
    let mut disk = vec![0; 8 * MIB];
    let options = FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat16).bytes_per_cluster(512);
    fatfs::format_volume(Cursor::new(&mut disk), options).unwrap();
    let system = fatfs::FileSystem::new(Cursor::new(&mut disk), FsOptions::new()).unwrap();
    let folder = system.root_dir().create_dir("grub").unwrap();
    folder.create_file("only-a-name").unwrap();
    drop(folder);
    drop(system);
    // The folder's cluster: all of its entries deleted, so that none ends it, and itself as the next one.
    let at = disk.windows(11).position(|name| name == b".          ").unwrap() / 512 * 512;
    disk[at..at + 512].chunks_exact_mut(32).for_each(|entry| entry[0] = 0xe5);
    let word = |at: usize| usize::from(u16::from_le_bytes([disk[at], disk[at + 1]]));
    let (reserved, fats, roots, sectors) = (word(14), usize::from(disk[16]), word(17), word(22));
    let cluster = (at / 512 - reserved - fats * sectors - roots * 32 / 512) + 2;
    for fat in 0..fats {
        let entry = (reserved + fat * sectors) * 512 + 2 * cluster;
        disk[entry..entry + 2].copy_from_slice(&(cluster as u16).to_le_bytes());
    }
    let refusal = find_in(&disk).unwrap_err().to_string();
    assert!(refusal.contains("given up, because it had no end"), "{refusal}");
}
