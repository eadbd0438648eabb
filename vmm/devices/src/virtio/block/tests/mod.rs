//! A disk as its driver sees it: requests, features, resets, and what it promises of durability.

mod coherent;
mod limited;
mod promises;

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_blk as blk;

use super::*;
use crate::virtio::testing::{DATA, Driver, image, rings};

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn config(readonly: bool) -> BlockConfig {
    BlockConfig { name: "the disk".into(), serial: "serial-1".into(), readonly, queues: 2 }
}

fn driver(disk: Arc<dyn Disk>, readonly: bool) -> Driver {
    let mut driver = Driver::new(Box::new(Block::new(disk, config(readonly))));
    driver.start(0);
    driver
}

fn open(path: &Path, readonly: bool) -> Arc<dyn Disk> {
    Arc::new(RawDisk::open(path, Access { readonly, unlocked: false }).unwrap())
}

/// One request; its outcome.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> u32 {
    driver.put(HEADER, &kind.to_le_bytes());
    driver.put(HEADER + 8, &sector.to_le_bytes());
    driver.put(STATUS, &[0xee]);
    let buffers = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
    driver.request(1, &buffers);
    driver.get(STATUS, 1)[0].into()
}

#[test]
fn the_registers_say_what_disk_it_is() {
    let file = image(16);
    let driver = driver(open(file.path(), false), false);
    assert_eq!(driver.read(0x2000, 8), 16, "sectors");
    assert_eq!(driver.read(0x2000 + 20, 4), 512, "bytes of a block");
    assert_eq!(driver.read(0x2000 + 34, 2), 2, "queues");
    assert_eq!(driver.read(0x2000 + 60, 8), 0, "beyond the end");
}

#[test]
fn sectors_are_read_into_scattered_buffers_and_written_from_them() {
    let file = image(16);
    let mut driver = driver(open(file.path(), false), false);
    let two = [(BUFFER, 100, true), (BUFFER + 0x800, 924, true)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 3, &two), blk::VIRTIO_BLK_S_OK);
    assert_eq!(driver.get(BUFFER, 100), [4; 100]);
    assert_eq!(driver.get(BUFFER + 0x800, 412), [4; 412]);
    assert_eq!(driver.get(BUFFER + 0x800 + 412, 512), [5; 512]);
    driver.put(BUFFER, &[0xaa; 512]);
    let write = [(BUFFER, 512, false)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 15, &write), blk::VIRTIO_BLK_S_OK);
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), blk::VIRTIO_BLK_S_OK);
    assert_eq!(std::fs::read(file.path()).unwrap()[15 * 512..], [0xaa; 512]);
}

#[test]
fn more_than_one_buffer_of_our_own_is_read_and_written() {
    let file = image(255);
    let disk = RawDisk::open(file.path(), Access::WRITE).unwrap();
    let mut driver = driver(Arc::new(disk), false);
    let many = [(BUFFER, 5 * 512 + 7, true), (BUFFER + 0x4000, 200 * 512 - 7, true)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 1, &many), blk::VIRTIO_BLK_S_OK);
    let content = std::fs::read(file.path()).unwrap();
    let first = 5 * 512 + 7;
    assert_eq!(driver.get(BUFFER, first), content[512..512 + first]);
    assert_eq!(driver.get(BUFFER + 0x4000, 200 * 512 - 7), content[512 + first..206 * 512]);
    let write = [(BUFFER + 0x4000, 100 * 512, false), (BUFFER, 512, false)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &write), blk::VIRTIO_BLK_S_OK);
    let written = std::fs::read(file.path()).unwrap();
    assert_eq!(written[..100 * 512], content[512 + first..][..100 * 512]);
    assert_eq!(written[100 * 512..101 * 512], content[512..1024]);
    assert_eq!(written[101 * 512..], content[101 * 512..]);
}

#[test]
fn a_disk_in_memory_is_read_and_not_written() {
    let content: Vec<u8> = (0..2048u32).map(|n| (n / 3) as u8).collect();
    let mut driver = driver(Arc::new(MemoryDisk(content.clone())), true);
    let read = [(BUFFER, 100, true), (BUFFER + 0x1000, 924, true)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 2, &read), blk::VIRTIO_BLK_S_OK);
    assert_eq!(driver.get(BUFFER, 100), content[1024..1124]);
    assert_eq!(driver.get(BUFFER + 0x1000, 924), content[1124..]);
    let write = [(BUFFER, 512, false)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &write), blk::VIRTIO_BLK_S_IOERR);
}

#[test]
fn the_serial_number_is_told() {
    let file = image(1);
    let mut driver = driver(open(file.path(), false), false);
    let id = [(BUFFER, 20, true)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_GET_ID, 0, &id), blk::VIRTIO_BLK_S_OK);
    assert_eq!(driver.get(BUFFER, 20), b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let file = image(32);
    let mut driver = driver(open(file.path(), false), false);
    for (kind, sector, flags) in [
        (blk::VIRTIO_BLK_T_DISCARD, 0u64, 0u32),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 8, 1),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 17, 0),
    ] {
        let segment = [&sector.to_le_bytes()[..], &2u32.to_le_bytes(), &flags.to_le_bytes()].concat();
        driver.put(BUFFER, &segment);
        assert_eq!(request(&mut driver, kind, 0, &[(BUFFER, 16, false)]), blk::VIRTIO_BLK_S_OK);
    }
    let content = std::fs::read(file.path()).unwrap();
    assert_eq!(content.len(), 32 * 512);
    assert_eq!((&content[8 * 512..10 * 512], content[10 * 512]), (&[0; 1024][..], 11));
    assert_eq!((&content[17 * 512..19 * 512], content[19 * 512]), (&[0; 1024][..], 20));
}

#[test]
fn requests_beyond_the_end_or_of_a_strange_kind_fail_alone() {
    let file = image(16);
    let mut driver = driver(open(file.path(), false), false);
    let sector = [(BUFFER, 512, true)];
    for (kind, first, data, outcome) in [
        (blk::VIRTIO_BLK_T_IN, 16, &sector[..], blk::VIRTIO_BLK_S_IOERR),
        (blk::VIRTIO_BLK_T_IN, u64::MAX, &sector, blk::VIRTIO_BLK_S_IOERR),
        (blk::VIRTIO_BLK_T_IN, u64::MAX / 512, &sector, blk::VIRTIO_BLK_S_IOERR),
        (blk::VIRTIO_BLK_T_IN, 0, &[(BUFFER, 100, true)], blk::VIRTIO_BLK_S_IOERR),
        (blk::VIRTIO_BLK_T_DISCARD, 0, &[(BUFFER, 8, false)], blk::VIRTIO_BLK_S_IOERR),
        (77, 0, &sector, blk::VIRTIO_BLK_S_UNSUPP),
        (blk::VIRTIO_BLK_T_IN, 15, &sector, blk::VIRTIO_BLK_S_OK),
    ] {
        assert_eq!(request(&mut driver, kind, first, data), outcome, "{kind} {first}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = image(4);
    let mut driver = driver(open(file.path(), true), true);
    let write = [(BUFFER, 512, false)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &write), blk::VIRTIO_BLK_S_IOERR);
    assert_eq!(std::fs::read(file.path()).unwrap()[..512], [1; 512]);
}

#[test]
fn a_request_without_room_for_its_outcome_is_given_back() {
    let file = image(4);
    let mut driver = driver(open(file.path(), false), false);
    assert_eq!(driver.request(0, &[(HEADER, 16, false)]), 0);
    assert_eq!(driver.request(0, &[(HEADER, 3, false), (STATUS, 1, true)]), 1);
    assert_eq!(driver.get(STATUS, 1)[0], blk::VIRTIO_BLK_S_IOERR as u8);
}

#[test]
fn a_file_that_shrinks_is_an_error_to_the_guest_and_no_more() {
    let file = image(16);
    let mut driver = driver(open(file.path(), false), false);
    file.as_file().set_len(1024).unwrap();
    let sector = [(BUFFER, 512, true)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 8, &sector), blk::VIRTIO_BLK_S_IOERR);
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 1, &sector), blk::VIRTIO_BLK_S_OK);
}

/// A disk on which nothing works.
struct Broken;

impl Disk for Broken {
    fn len(&self) -> u64 {
        8192
    }
    fn read(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
    fn write(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }
    fn flush(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }
}

#[test]
fn what_fails_on_the_host_is_an_error_to_the_guest() {
    let mut driver = driver(Arc::new(Broken), false);
    driver.put(BUFFER, &[0; 16]);
    driver.put(BUFFER + 8, &[1]);
    for (kind, data) in [
        (blk::VIRTIO_BLK_T_IN, &[(BUFFER + 0x400, 512, true)][..]),
        (blk::VIRTIO_BLK_T_OUT, &[(BUFFER + 0x400, 512, false)]),
        (blk::VIRTIO_BLK_T_FLUSH, &[]),
        (blk::VIRTIO_BLK_T_DISCARD, &[(BUFFER, 16, false)]),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(BUFFER, 16, false)]),
    ] {
        assert_eq!(request(&mut driver, kind, 0, data), blk::VIRTIO_BLK_S_IOERR, "{kind}");
    }
}

/// A disk whose reads wait for each other: each needs another one that is under way at the same time.
#[derive(Default)]
struct Together {
    under_way: Mutex<usize>,
    changed: Condvar,
}

impl Disk for Together {
    fn len(&self) -> u64 {
        8192
    }
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let mut under_way = self.under_way.lock().unwrap();
        *under_way += 1;
        self.changed.notify_all();
        let wait = self.changed.wait_timeout_while(under_way, Duration::from_secs(20), |n| *n % 2 == 1);
        to.fill(1 + (offset / 512) as u8);
        if wait.unwrap().1.timed_out() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
    fn write(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn requests_of_one_queue_do_not_wait_for_each_other() {
    let mut driver = driver(Arc::new(Together::default()), false);
    let [table, ..] = rings(0);
    for round in 0..50 {
        let heads = [0u16, 8];
        for (sector, head) in (1u64..).zip(heads) {
            let (header, status) = (HEADER + sector * 0x20, STATUS + sector);
            let data = BUFFER + sector * 0x1000;
            driver.put(header, &blk::VIRTIO_BLK_T_IN.to_le_bytes());
            driver.put(header + 8, &sector.to_le_bytes());
            driver.put(status, &[0xee]);
            driver.descriptor(table, head, header, 16, 1, head + 1);
            driver.descriptor(table, head + 1, data, 512, 3, head + 2);
            driver.descriptor(table, head + 2, status, 1, 2, 0);
        }
        heads.iter().for_each(|head| driver.offer(0, *head));
        let mut done = heads.map(|_| driver.wait(0));
        done.sort_unstable();
        assert_eq!(done, heads.map(|head| (head, 513)), "round {round}");
        for sector in 1..=2 {
            assert_eq!(driver.get(STATUS + sector, 1), [0]);
            assert_eq!(driver.get(BUFFER + sector * 0x1000, 512), [1 + sector as u8; 512]);
        }
    }
    driver.reset();
}

#[test]
fn a_disk_that_cannot_be_used_is_explained() {
    let refusal = |path: &Path, readonly| match RawDisk::open(path, Access { readonly, unlocked: false }) {
        Ok(_) => panic!("{} can be opened", path.display()),
        Err(error) => error.to_string(),
    };
    assert!(refusal(Path::new("/nonexistent/disk"), false).contains("cannot be opened for writing"));
    assert!(refusal(Path::new("/dev/null"), false).contains("neither a file nor a block device"));
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(refusal(file.path(), false).contains("smaller than one sector"));
    let file = image(1);
    let first = RawDisk::open(file.path(), Access::READ).unwrap();
    drop(RawDisk::open(file.path(), Access::READ).expect("two readers may share a disk"));
    assert!(refusal(file.path(), false).contains("in use"));
    drop(first);
    RawDisk::open(file.path(), Access::WRITE).expect("nobody else has it any more");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn whatever_the_driver_asks_the_device_answers_the_next_sound_request(
        chains in proptest::collection::vec((
            proptest::collection::vec((prop_oneof![0u64..0x10_1000, any::<u64>()], prop_oneof![0u32..4096, any::<u32>()], any::<u16>(), any::<u16>()), 1..6),
            0u32..16, any::<u64>(),
        ), 1..6),
    ) {
        let file = image(16);
        let mut driver = driver(open(file.path(), false), false);
        for (descriptors, kind, sector) in chains {
            driver.put(HEADER, &kind.to_le_bytes());
            driver.put(HEADER + 8, &sector.to_le_bytes());
            let table = crate::virtio::testing::rings(1)[0];
            for (index, (gpa, len, flags, next)) in descriptors.iter().enumerate() {
                driver.descriptor(table, index as u16, *gpa, *len, *flags & 7, *next % 20);
            }
            driver.offer(1, 0);
        }
        driver.reset();
        driver.start(0);
        let read = [(BUFFER, 512, true)];
        prop_assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_IN, 0, &read), blk::VIRTIO_BLK_S_OK);
    }
}
