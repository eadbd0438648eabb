//! What a disk promises: that a flush that failed stays failed, and that nothing is written once the machine
//! has ended.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use base::lock;
use machine::control::fence::{self, Ended, Fence, Gate};

use super::*;

const MIB: u64 = 1 << 20;

/// A disk behind a fence, in a use that does not end.
fn fenced(disk: Arc<dyn Disk>, fence: &Arc<Fence>) -> Fenced {
    Fenced::new(disk, Gate::new(fence.clone(), Arc::default()))
}

/// A driver on a node with that fence, which has offered to write 512 KiB: two pieces.
fn writer(disk: Arc<dyn Disk>, fence: &Arc<Fence>) -> Driver {
    let mut driver = Driver::fenced(Box::new(Block::new(disk, config(false))), fence.clone());
    driver.start(0);
    driver.put(HEADER, &blk::VIRTIO_BLK_T_OUT.to_le_bytes());
    driver.put(STATUS, &[0xee]);
    driver.chain(1, &[(HEADER, 16, false), (BUFFER, 512 << 10, false), (STATUS, 1, true)]);
    driver.offer(1, 0);
    driver
}

/// What a host does in place of a disk's writes of any kind (offset, length), and of its flushes.
struct Host {
    write: Box<dyn Fn(u64, u64) + Send + Sync>,
    flush: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
}

impl Host {
    fn that_writes(write: impl Fn(u64, u64) + Send + Sync + 'static) -> Arc<Host> {
        Arc::new(Host { write: Box::new(write), flush: Box::new(|| Ok(())) })
    }

    /// Its writes are counted there.
    fn that_counts(writes: &Arc<AtomicUsize>) -> Arc<Host> {
        let writes = writes.clone();
        Host::that_writes(move |_, _| {
            writes.fetch_add(1, Ordering::SeqCst);
        })
    }

    fn that_flushes(flush: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Arc<Host> {
        Arc::new(Host { write: Box::new(|_, _| {}), flush: Box::new(flush) })
    }

    fn wrote(&self, offset: u64, len: u64) -> io::Result<()> {
        (self.write)(offset, len);
        Ok(())
    }
}

impl Disk for Host {
    fn len(&self) -> u64 {
        1 << 30
    }

    fn read(&self, to: &mut [u8], _: u64) -> io::Result<()> {
        to.fill(0);
        Ok(())
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.wrote(offset, from.len() as u64)
    }

    fn flush(&self) -> io::Result<()> {
        (self.flush)()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.wrote(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.wrote(offset, len)
    }
}

/// A failure that is told once, as the kernel's page cache does.
fn fails_once(fails: &Arc<AtomicBool>) -> Arc<Host> {
    let fails = fails.clone();
    Host::that_flushes(move || match fails.swap(false, Ordering::SeqCst) {
        true => Err(io::ErrorKind::StorageFull.into()),
        false => Ok(()),
    })
}

#[test]
fn after_a_flush_that_failed_none_succeeds_until_the_disk_is_opened_anew() {
    let fails = Arc::new(AtomicBool::new(false));
    let host = fails_once(&fails);
    let mut driver = driver(Arc::new(Durable::new(host.clone())), false);
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), blk::VIRTIO_BLK_S_OK);
    fails.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let outcome = request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!(outcome, blk::VIRTIO_BLK_S_IOERR, "what was written before may be lost");
    }
    driver.reset();
    driver.start(0);
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), blk::VIRTIO_BLK_S_IOERR);
    Durable::new(host).flush().unwrap();
}

#[test]
fn what_follows_a_flush_that_failed_says_why() {
    let disk = Durable::new(fails_once(&Arc::new(AtomicBool::new(true))));
    let (first, then) = (disk.flush().unwrap_err(), disk.flush().unwrap_err().to_string());
    assert!(then.starts_with(&format!("an earlier flush failed ({first})")), "{then}");
}

#[test]
fn of_two_flushes_at_once_none_succeeds_if_one_fails() {
    // The first fails, but only once a second one is under way or has been kept away; the second one is told
    // nothing.
    let begun = Arc::new((Mutex::new(0), Condvar::new()));
    let host = {
        let begun = begun.clone();
        Host::that_flushes(move || {
            let mut count = lock(&begun.0);
            *count += 1;
            begun.1.notify_all();
            if *count > 1 {
                return Ok(());
            }
            drop(begun.1.wait_timeout_while(count, Duration::from_millis(200), |count| *count < 2));
            Err(io::ErrorKind::StorageFull.into())
        })
    };
    let disk = Durable::new(host);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| disk.flush());
        drop(begun.1.wait_while(lock(&begun.0), |count| *count == 0));
        assert!(disk.flush().is_err());
        assert!(first.join().unwrap().is_err());
    });
}

#[test]
fn nothing_is_written_once_the_machine_has_ended() {
    let writes = Arc::new(AtomicUsize::new(0));
    let (host, fence) = (Host::that_counts(&writes), Arc::new(Fence::open()));
    let disk = fenced(Arc::new(Durable::new(host)), &fence);
    let all: [&dyn Fn() -> io::Result<()>; 4] =
        [&|| disk.write(&[0; 512], 0), &|| disk.flush(), &|| disk.discard(0, 512), &|| {
            disk.write_zeroes(0, 512, false)
        }];
    all.iter().for_each(|write| write().unwrap());
    fence.end();
    assert!(all.iter().all(|write| Ended::is(&write().unwrap_err())));
    assert_eq!(writes.load(Ordering::SeqCst), 3);
    disk.read(&mut [0; 512], 0).unwrap();
}

#[test]
fn a_request_in_the_middle_of_which_the_machine_ends_goes_no_further_and_gets_no_outcome() {
    let (fence, written) = (Arc::new(Fence::open()), Arc::new(Mutex::new(Vec::new())));
    let (ends, seen) = (fence.clone(), written.clone());
    let host = Host::that_writes(move |offset, len| {
        lock(&seen).push((offset, len));
        ends.end();
    });
    let driver = writer(host, &fence);
    // When this is over, all workers have ended.
    while lock(&written).is_empty() {
        std::thread::yield_now();
    }
    driver.reset();
    assert_eq!(*lock(&written), [(0, 256 << 10)]);
    assert_eq!((driver.given_back(1), driver.get(STATUS, 1)[0]), (0, 0xee));
}

#[test]
fn making_a_long_range_zero_asks_the_fence_again_and_again() {
    let (fence, written) = (Arc::new(Fence::open()), Arc::new(Mutex::new(Vec::new())));
    let (ends, seen) = (fence.clone(), written.clone());
    let host = Host::that_writes(move |offset, len| {
        let mut seen = lock(&seen);
        seen.push((offset, len));
        if seen.len() == 2 {
            ends.end();
        }
    });
    let disk = fenced(host, &fence);
    assert!(Ended::is(&disk.write_zeroes(512, 512 * MIB, true).unwrap_err()));
    assert_eq!(*lock(&written), [(512, 2 * MIB - 512), (2 * MIB, 2 * MIB)]);
}

#[test]
fn a_node_that_others_may_have_given_up_writes_nothing_and_goes_on_when_it_is_heard_again() {
    let writes = Arc::new(AtomicUsize::new(0));
    let host = Host::that_counts(&writes);
    // Its lease was over as soon as it began.
    let fence = Arc::new(Fence::leased(Duration::from_nanos(2)));
    let disk = fenced(host, &fence);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write(&[0; 512], 0));
        // It cannot write, however long this takes.
        for _ in 0..1000 {
            assert_eq!(writes.load(Ordering::SeqCst), 0);
            std::thread::yield_now();
        }
        fence.renew(fence::now() + 60_000_000_000);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(writes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_reset_ends_the_wait_of_a_node_that_others_may_have_given_up_before_a_request() {
    let writes = Arc::new(AtomicUsize::new(0));
    let fence = Arc::new(Fence::leased(Duration::from_nanos(2)));
    let mut driver = writer(Host::that_counts(&writes), &fence);
    driver.reset();
    assert_eq!((driver.given_back(1), driver.get(STATUS, 1)[0]), (0, 0xee));
    // The next use of the device is none the worse for it.
    driver.start(0);
    fence.renew(fence::now() + 60_000_000_000);
    let sector = [(BUFFER, 512, false)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &sector), blk::VIRTIO_BLK_S_OK);
    assert_eq!(writes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_reset_ends_the_wait_of_a_node_that_others_may_have_given_up_in_the_middle_of_a_request() {
    let silence = Duration::from_millis(200);
    let fence = Arc::new(Fence::leased(silence));
    // How many were written, and when the fence was renewed for the last time.
    let (writes, last) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
    let (counted, renewed) = (writes.clone(), last.clone());
    let host = Host::that_writes(move |_, _| {
        counted.fetch_add(1, Ordering::SeqCst);
        let over = |last| last != 0 && fence::now() > last + fence::lease(silence).as_nanos() as u64;
        while !over(renewed.load(Ordering::SeqCst)) {
            std::thread::yield_now();
        }
    });
    let driver = writer(host, &fence);
    while writes.load(Ordering::SeqCst) == 0 {
        fence.renew(fence::now());
        std::thread::yield_now();
    }
    last.store(fence::now(), Ordering::SeqCst);
    driver.reset();
    assert_eq!(writes.load(Ordering::SeqCst), 1);
    assert_eq!((driver.given_back(1), driver.get(STATUS, 1)[0]), (0, 0xee));
}

#[test]
fn a_device_takes_no_request_once_the_machine_has_ended() {
    let writes = Arc::new(AtomicUsize::new(0));
    let host = Host::that_counts(&writes);
    let mut driver = driver(host, false);
    let sector = [(BUFFER, 512, false)];
    assert_eq!(request(&mut driver, blk::VIRTIO_BLK_T_OUT, 0, &sector), blk::VIRTIO_BLK_S_OK);
    driver.fence.end();
    driver.chain(1, &[(HEADER, 16, false), (BUFFER, 512, false), (STATUS, 1, true)]);
    driver.offer(1, 0);
    // There is nothing to wait for: a worker that would take it does so in much less than this.
    let end = std::time::Instant::now() + Duration::from_millis(500);
    while std::time::Instant::now() < end {
        assert_eq!((writes.load(Ordering::SeqCst), driver.given_back(1)), (1, 1));
        std::thread::yield_now();
    }
    driver.reset();
}
