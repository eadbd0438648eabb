//! Limits, measured with a driver and a disk on a real file.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk as blk;

use super::{Block, BlockConfig, RawDisk};
use crate::limits::{Limiter, Limits};
use crate::virtio::testing::{DATA, Driver};

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

/// How long one measurement takes.
const ROUND: Duration = Duration::from_millis(500);

/// Reads of `len` bytes that a driver gets done each second, one after the other.
fn rate(driver: &mut Driver, len: u32) -> f64 {
    driver.put(HEADER, &blk::VIRTIO_BLK_T_IN.to_le_bytes());
    let (begin, mut done) = (Instant::now(), 0);
    while begin.elapsed() < ROUND {
        driver.request(0, &[(HEADER, 16, false), (BUFFER, len, true), (STATUS, 1, true)]);
        assert_eq!(driver.get(STATUS, 1), [0]);
        done += 1;
    }
    f64::from(done) / begin.elapsed().as_secs_f64()
}

#[test]
fn limits_hold_within_a_tenth_and_change_while_the_disk_is_used() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let limiter = Arc::new(Limiter::default());
    let config = BlockConfig { name: "the disk".into(), serial: String::new(), readonly: false, queues: 1 };
    let disk = Arc::new(RawDisk::open(file.path(), false).unwrap());
    let mut driver = Driver::new(Box::new(Block::new(disk, config).limited(limiter.clone())));
    driver.start(0);
    let free = rate(&mut driver, 4096);
    let limits = |iops, bandwidth| Limits { iops, bandwidth };
    for (limits, len, wanted) in [
        (limits(Some(200), None), 512, 200.0),
        (limits(Some(400), None), 4096, 400.0),
        (limits(None, Some(1 << 20)), 4096, 256.0),
        (limits(None, Some(8 << 20)), 32768, 256.0),
        // The stricter one counts.
        (limits(Some(100), Some(8 << 20)), 4096, 100.0),
    ] {
        limiter.set(limits);
        // Uses the burst up.
        rate(&mut driver, len);
        // A host that is busy with other things makes a disk slower, but never faster.
        let rates = [(); 3].map(|()| rate(&mut driver, len));
        let best = rates.into_iter().fold(0.0, f64::max);
        eprintln!("{limits}, {len} bytes: {rates:.1?} each second of {wanted}");
        assert!(rates.iter().all(|rate| *rate < wanted * 1.1), "{limits}: {rates:?}");
        if free > 4.0 * wanted {
            assert!(best > wanted * 0.9, "{limits}: {rates:?}");
        } else {
            eprintln!("skipped: whether {wanted} are reached; this host does {free} without a limit");
        }
    }
    limiter.set(Limits::default());
    let lifted = rate(&mut driver, 4096);
    assert!(lifted > 500.0 || lifted > free / 4.0, "{lifted} of {free}");
}
