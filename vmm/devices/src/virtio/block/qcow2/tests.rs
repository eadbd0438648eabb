//! Images against a plain disk that does the same, and damaged ones.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2CreateBuilder;
use proptest::prelude::*;

use super::*;

const LEN: u64 = 1 << 20;
/// Small clusters make many of them, and more of what keeps track of them.
const CLUSTER: usize = 4096;

/// An empty image; it is removed with the folder.
fn image(len: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let storage = File::from_open_file(file, StorageOpenOptions::new().write(true)).unwrap();
    let new: Qcow2CreateBuilder<File> = Qcow2::create_builder(storage);
    new.size(len).cluster_size(CLUSTER).create().unwrap();
    (dir, path)
}

fn read(disk: &dyn Disk, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    disk.read(&mut bytes, offset)?;
    Ok(bytes)
}

fn write(disk: &dyn Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
    disk.write(bytes, offset)
}

/// What `qemu-img check` objects to; `None` where there is no qemu-img.
fn objections(path: &Path) -> Option<String> {
    let said = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output();
    let Ok(said) = said else {
        eprintln!("skipped: qemu-img is not installed, nobody else judges the image");
        return None;
    };
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    Some(if said.status.success() { String::new() } else { text })
}

fn refusal(path: &Path, readonly: bool) -> String {
    match Qcow2Disk::open(path, Access { readonly, unlocked: false }) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error.to_string(),
    }
}

/// Overwrites bytes of a file.
fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// One thing that a guest does.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = LEN / 512;
    let range = (0..sectors, 1u64..64).prop_map(move |(at, count)| (at * 512, count.min(sectors - at) * 512));
    prop_oneof![
        4 => (range.clone(), 1..255u8).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        1 => range.prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn it_holds_what_a_plain_disk_would(steps in proptest::collection::vec(step(), 1..25)) {
        let (_dir, path) = image(LEN);
        let mut disk = Some(Qcow2Disk::open(&path, Access::WRITE).unwrap());
        let mut model = vec![Some(0u8); LEN as usize];
        for step in steps {
            let at = disk.as_ref().unwrap();
            match step {
                Step::Write(offset, len, byte) => {
                    write(at, offset, &vec![byte; len as usize]).unwrap();
                    model[offset as usize..(offset + len) as usize].fill(Some(byte));
                }
                Step::Zero(offset, len, unmap) => {
                    at.write_zeroes(offset, len, unmap).unwrap();
                    model[offset as usize..(offset + len) as usize].fill(Some(0));
                }
                Step::Discard(offset, len) => {
                    at.discard(offset, len).unwrap();
                    model[offset as usize..(offset + len) as usize].fill(None);
                }
                Step::Flush => {
                    // What the file holds now is what is left if the node is killed.
                    let left = path.with_file_name("left.qcow2");
                    std::fs::copy(&path, &left).unwrap();
                    drop(Qcow2Disk::open(&left, Access::WRITE).unwrap());
                    at.flush().unwrap();
                }
                Step::Reopen => {
                    drop(disk.take());
                    disk = Some(Qcow2Disk::open(&path, Access::WRITE).unwrap());
                }
            }
            let seen = read(disk.as_ref().unwrap(), 0, LEN as usize).unwrap();
            let wrong = seen.iter().zip(&model).position(|(seen, wanted)| wanted.is_some_and(|byte| byte != *seen));
            prop_assert_eq!(wrong, None);
        }
        drop(disk);
        prop_assert_eq!(objections(&path).unwrap_or_default(), "");
    }

    /// Images that somebody has tampered with, or whose host disk has lost bits.
    #[test]
    fn a_damaged_image_is_refused_or_fails_requests_but_harms_nothing(
        damage in proptest::collection::vec((0u64..CLUSTER as u64 * 12, any::<[u8; 8]>(), 1usize..9), 1..12),
        header in proptest::collection::vec((0u64..112, any::<u8>()), 0..3),
        cut in proptest::option::of(0u64..CLUSTER as u64 * 12),
    ) {
        let (_dir, path) = image(LEN);
        let disk = Qcow2Disk::open(&path, Access::WRITE).unwrap();
        for number in 0..32u64 {
            write(&disk, number * 20480, &[number as u8 + 1; 5000]).unwrap();
        }
        drop(disk);
        for (at, bytes, len) in damage {
            patch(&path, at, &bytes[..len]);
        }
        for (at, byte) in header {
            patch(&path, at, &[byte]);
        }
        // Mostly leave the first eight bytes as they are: without them there is nothing to test.
        patch(&path, 0, b"QFI\xfb\0\0\0\x03");
        if let Some(cut) = cut {
            OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        }
        for readonly in [true, false] {
            let Ok(disk) = Qcow2Disk::open(&path, Access { readonly, unlocked: false }) else { continue };
            let last = Disk::len(&disk) - 512;
            for at in (0..LEN).step_by(20480).chain([last]).filter(|at| *at <= last) {
                // What comes back is open; that something does is the point.
                let _ = read(&disk, at, 512);
                if !readonly {
                    let _ = write(&disk, at, &[7; 512]);
                    let _ = disk.write_zeroes(at, 512, true);
                    let _ = disk.discard(at, 512);
                }
            }
            let _ = disk.flush();
        }
    }
}

#[test]
fn several_threads_write_at_once() {
    let (_dir, path) = image(LEN);
    let disk = Qcow2Disk::open(&path, Access::WRITE).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..64u64 {
                    let at = (round * 4 + thread) * 4096;
                    write(disk, at, &[thread as u8 + 1; 4096]).unwrap();
                    disk.discard(at + 512, 512).unwrap();
                    write(disk, at + 512, &[thread as u8 + 1; 512]).unwrap();
                }
            });
        }
    });
    for thread in 0..4u64 {
        for round in 0..64u64 {
            let seen = read(&disk, (round * 4 + thread) * 4096, 4096).unwrap();
            assert!(seen.iter().all(|byte| *byte == thread as u8 + 1), "thread {thread}, round {round}");
        }
    }
    drop(disk);
    assert_eq!(objections(&path).unwrap_or_default(), "");
}

#[test]
fn what_cannot_be_used_is_refused_with_what_to_do() {
    for (offset, bytes, part) in [
        (0, &b"what"[..], "another name"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 200], "qemu-img convert"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (60, &[0, 0, 0, 1], "snapshots"),
        (24, &[0x7f, 0, 0, 0, 0, 0, 0, 0], "are the most"),
        (24, &[0; 8], "smaller than one sector"),
        // A data file of its own, damage that was noticed, and what nobody knows.
        (79, &[4], "in another file"),
        (79, &[2], "feature"),
        (72, &[0x80], "feature"),
    ] {
        let (_dir, path) = image(LEN);
        patch(&path, offset, bytes);
        let said = refusal(&path, false);
        assert!(said.contains(part), "{said:?} does not contain {part:?}");
        assert!(said.contains("disk.qcow2"), "{said}");
    }
    assert!(refusal(Path::new("/nonexistent/disk.qcow2"), false).contains("cannot be opened"));
}

/// Where the refcount table, its first block, the L1 table and its first L2 table are.
fn places(path: &Path) -> [u64; 4] {
    let bytes = std::fs::read(path).unwrap();
    let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let (refcounts, l1) = (long(48), long(40));
    let l2 = long(l1 as usize) & 0x00ff_ffff_ffff_fe00;
    [refcounts, long(refcounts as usize), l1, l2]
}

#[test]
fn clusters_that_a_crash_left_uncounted_are_counted_before_they_could_be_used_again() {
    let (_dir, path) = image(LEN);
    write(&Qcow2Disk::open(&path, Access::WRITE).unwrap(), 0, &[1; 3 * CLUSTER]).unwrap();
    patch(&path, places(&path)[1], &[0; 16]);
    assert!(read(&Qcow2Disk::open(&path, Access::READ).unwrap(), 0, 512).is_ok(), "reading needs no counts");
    let disk = Qcow2Disk::open(&path, Access::WRITE).unwrap();
    write(&disk, 8 * CLUSTER as u64, &[2; 3 * CLUSTER]).unwrap();
    drop(disk);
    let disk = Qcow2Disk::open(&path, Access::READ).unwrap();
    assert_eq!(read(&disk, 0, 3 * CLUSTER).unwrap(), [1; 3 * CLUSTER]);
    assert_eq!(read(&disk, 8 * CLUSTER as u64, 3 * CLUSTER).unwrap(), [2; 3 * CLUSTER]);
    assert_eq!(objections(&path).unwrap_or_default(), "");
}

#[test]
fn damage_is_found_before_anything_is_written() {
    for (place, bytes, part) in [
        (0, &[0; 8][..], "not counted"),
        (0, &[0, 0, 0, 0, 0, 0x10, 0, 0], "outside of the file"),
        (0, &[0, 0, 0, 0, 0, 0, 0, 1], "the entry of a refcount block"),
        (2, &[0x80, 0, 0, 0, 0, 0, 0, 0], "two uses"),
        (2, &[0x80, 1, 0, 0, 0, 0, 0, 0], "outside of the file"),
        (3, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40], "an L2 table has the entry"),
        (3, &[0x40, 0, 0, 0, 0, 0, 0, 0], "two uses"),
        (3, &[0x7f; 8], "outside of the file"),
    ] {
        let (_dir, path) = image(LEN);
        write(&Qcow2Disk::open(&path, Access::WRITE).unwrap(), 0, &[1; 8192]).unwrap();
        patch(&path, places(&path)[place], bytes);
        for readonly in [false, true] {
            let said = refusal(&path, readonly);
            assert!(
                said.contains(part) && said.contains("damaged"),
                "{place}: {said:?} does not contain {part:?}"
            );
        }
    }
}

/// Otherwise a write would free a cluster in which others still lie.
#[test]
fn compressed_clusters_that_share_one_which_is_not_counted_for_each_are_refused() {
    let (_dir, path) = image(LEN);
    write(&Qcow2Disk::open(&path, Access::WRITE).unwrap(), 0, &[1; CLUSTER]).unwrap();
    let [_, counts, _, table] = places(&path);
    let entry = std::fs::read(&path).unwrap()[table as usize..][..8].try_into().unwrap();
    let data = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    for place in 0..2 {
        patch(&path, table + place * 8, &(1u64 << 62 | (data + place * 512)).to_be_bytes());
    }
    assert!(refusal(&path, false).contains("2 uses and is counted 1 times"));
    patch(&path, counts + data / CLUSTER as u64 * 2, &[0, 2]);
    drop(Qcow2Disk::open(&path, Access::WRITE).expect("it is counted for both"));
}

/// Images as others make them: other sizes of clusters and counts, compressed, full, old.
#[test]
fn images_of_qemu_img_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let content: Vec<u8> = (0..LEN).map(|at| (at / 700 % 251) as u8).collect();
    std::fs::write(&raw, &content).unwrap();
    for (number, options) in [
        &["-o", "cluster_size=512,refcount_bits=1"][..],
        &["-o", "cluster_size=2M,refcount_bits=64"],
        &["-o", "compat=0.10"],
        &["-o", "preallocation=metadata,lazy_refcounts=on"],
        &["-c", "-o", "cluster_size=64k"],
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{number}.qcow2"));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args(options).arg(&raw).arg(&path);
        let Ok(made) = convert.status() else {
            eprintln!("skipped: qemu-img is not installed");
            return;
        };
        assert!(made.success(), "{options:?}");
        let disk =
            Qcow2Disk::open(&path, Access::WRITE).unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert!(read(&disk, 0, LEN as usize).unwrap() == content, "{options:?}");
        write(&disk, 100 * 512, &[0xaa; 3 * 512]).unwrap();
        disk.flush().unwrap();
        drop(disk);
        assert_eq!(objections(&path).unwrap_or_default(), "", "{options:?}");
        let disk = Qcow2Disk::open(&path, Access::READ).unwrap();
        let mut wanted = content.clone();
        wanted[100 * 512..103 * 512].fill(0xaa);
        assert!(read(&disk, 0, LEN as usize).unwrap() == wanted, "{options:?}");
    }
}

#[test]
fn it_is_not_opened_twice_unless_to_read() {
    let (_dir, path) = image(LEN);
    let first = Qcow2Disk::open(&path, Access::WRITE).unwrap();
    assert!(refusal(&path, false).contains("in use") && refusal(&path, true).contains("in use"));
    drop(first);
    let first = Qcow2Disk::open(&path, Access::READ).unwrap();
    drop(Qcow2Disk::open(&path, Access::READ).expect("two readers may share a disk"));
    assert!(write(&first, 0, &[1; 512]).is_err());
}

#[test]
fn the_name_tells_what_it_is_and_the_content_does_not() {
    let (dir, path) = image(LEN);
    assert_eq!(open(&path, Access::READ).unwrap().len(), LEN);
    let raw = dir.path().join("disk.img");
    std::fs::copy(&path, &raw).unwrap();
    let disk = open(&raw, Access::READ).unwrap();
    assert_eq!(read(&*disk, 0, 4).unwrap(), MAGIC);
}
