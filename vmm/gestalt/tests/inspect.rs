//! `gestalt inspect`, and the child process that looks into disks.

use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fatfs::{FormatVolumeOptions, FsOptions};

/// A kernel that is larger than a pipe.
const KERNEL: usize = 1 << 20;
const SCRIPT: &[u8] = b"menuentry 'Linux' {\n linux /vmlinuz root=/dev/vda1 ro\n}\n";

/// An image with a FAT file system and these files, in `folder`.
fn image(folder: &Path, files: &[(&str, &[u8])]) -> PathBuf {
    let mut bytes = vec![0; 8 << 20];
    fatfs::format_volume(Cursor::new(&mut bytes), FormatVolumeOptions::new()).unwrap();
    let system = fatfs::FileSystem::new(Cursor::new(&mut bytes), FsOptions::new()).unwrap();
    system.root_dir().create_dir("grub").unwrap();
    for (path, content) in files {
        system.root_dir().create_file(path).unwrap().write_all(content).unwrap();
    }
    drop(system);
    let path = folder.join("disk.img");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn gestalt(arguments: &[&str], image: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gestalt"))
        .args(arguments)
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn what_would_boot_is_said_in_words_and_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), &[("vmlinuz", &[7; KERNEL]), ("grub/grub.cfg", SCRIPT)]);
    let output = gestalt(&["inspect", "--json"], &image);
    assert!(output.status.success(), "{output:?}");
    let survey: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(survey["boots"]["kernel"], "the whole disk: /vmlinuz");
    assert_eq!(survey["boots"]["cmdline"], "root=/dev/vda1 ro");
    assert_eq!(survey["boots"]["from"], "the whole disk: /grub/grub.cfg");
    assert_eq!(survey["partitions"][0]["content"], "FAT");
    assert_eq!(survey["entries"][0]["title"], "Linux");
    assert!(survey["refused"].is_null());
    let text = String::from_utf8(gestalt(&["inspect"], &image).stdout).unwrap();
    assert!(text.contains("boots   the whole disk: /vmlinuz\n"), "{text}");
}

#[test]
fn where_nothing_would_boot_the_reason_is_said_and_the_exit_code_is_1() {
    let folder = tempfile::tempdir().unwrap();
    let empty = image(folder.path(), &[]);
    let output = gestalt(&["inspect", "--json"], &empty);
    assert_eq!(output.status.code(), Some(1));
    let survey: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(survey["boots"].is_null());
    assert!(survey["refused"].as_str().unwrap().contains("no grub.cfg"), "{survey}");
    let missing = gestalt(&["inspect"], Path::new("/nonexistent/disk"));
    assert_eq!(missing.status.code(), Some(1));
    let said = String::from_utf8(missing.stderr).unwrap();
    assert!(said.contains("/nonexistent/disk cannot be opened") && said.lines().count() == 1, "{said}");
    let qcow2 = folder.path().join("disk.qcow2");
    std::fs::write(&qcow2, b"not an image").unwrap();
    let refused = String::from_utf8(gestalt(&["inspect"], &qcow2).stderr).unwrap();
    assert!(refused.contains("cannot be used as the qcow2 image"), "{refused}");
}

#[test]
fn the_process_that_reads_a_disk_can_do_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), &[("vmlinuz", &[7; KERNEL]), ("grub/grub.cfg", SCRIPT)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_gestalt"))
        .args(["disk-search", "disk.img"])
        .stdin(File::open(image).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = child.stdout.take().unwrap();
    // It has begun to answer, and cannot end before the kernel is read: the pipe is too small for that.
    pipe.read_exact(&mut [0; 4]).unwrap();
    let proc = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap();
    let status = proc("status");
    let line =
        |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim).map(str::to_owned);
    assert_eq!(line("Seccomp:").as_deref(), Some("2"), "{status}");
    assert_eq!(line("NoNewPrivs:").as_deref(), Some("1"));
    assert_eq!(line("Threads:").as_deref(), Some("1"));
    let limits = proc("limits");
    for limit in
        ["Max cpu time              60", "Max file size             0", "Max core file size        0"]
    {
        assert!(limits.contains(limit), "{limit}: {limits}");
    }
    assert!(!limits.contains("Max address space         unlimited"), "{limits}");
    pipe.read_to_end(&mut Vec::new()).unwrap();
    assert!(child.wait().unwrap().success());
}
