//! What a disk promises: that a flush that failed stays failed.

use std::sync::atomic::AtomicBool;

use base::lock;

use super::*;

/// What a host does in place of a disk's flushes.
struct Host {
    flush: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
}

impl Host {
    fn that_flushes(flush: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Arc<Host> {
        Arc::new(Host { flush: Box::new(flush) })
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

    fn write(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        (self.flush)()
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
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
    // The first fails, but only once a second one is under way or has been kept away; the second one is told nothing.
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
