//! Limits and shares, measured with drivers and disks on real files.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk as blk;

use super::{Access, Block, BlockConfig, RawDisk};
use crate::rate_limit::{Limiter, Pool};
use crate::virtio::testing::{DATA, Driver};
use machine::config::limits::Limits;

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

/// A disk, started, that is held to what `limiter` allows.
fn disk(limiter: &Arc<Limiter>) -> Driver {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let config = BlockConfig { name: "the disk".into(), serial: String::new(), readonly: false, queues: 1 };
    // Open for as long as it is used.
    let disk = Arc::new(RawDisk::open(file.path(), Access::WRITE).unwrap());
    let mut driver = Driver::new(Box::new(Block::new(disk, config).limited(limiter.clone())));
    driver.start(0);
    driver
}

#[test]
fn limits_hold_within_a_tenth_and_change_while_the_disk_is_used() {
    let limiter = Arc::new(Limiter::default());
    let mut driver = disk(&limiter);
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

/// The rates of disks that are read at the same time, each in pieces of its own length.
fn rates(disks: &mut [(Driver, u32)]) -> Vec<f64> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            disks.iter_mut().map(|(driver, len)| scope.spawn(|| rate(driver, *len))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Reads from disks that should reach `wanted` requests each second.
fn expect(what: &str, disks: &mut [(Driver, u32)], wanted: &[f64], able: bool) {
    // Until the shares count, and bursts are used up.
    rates(disks);
    let rounds = [(); 3].map(|()| rates(disks));
    eprintln!("{what}: {rounds:.1?} each second of {wanted:?}");
    let bytes =
        |rates: &[f64]| rates.iter().zip(disks.iter()).map(|(rate, (_, len))| rate * f64::from(*len)).sum();
    let most: f64 = bytes(wanted);
    assert!(rounds.iter().all(|round| bytes(round) < most * 1.1), "{what}: more than there is to share");
    // A host that is busy with other things makes a disk slower, and what that leaves goes to the other.
    let near = |(rate, wanted): (&f64, &f64)| (rate - wanted).abs() < wanted * 0.1;
    if able {
        assert!(rounds.iter().any(|round| round.iter().zip(wanted).all(near)), "{what}: {rounds:?}");
    } else {
        eprintln!("skipped: whether {wanted:?} are reached; this host does not do as much without a limit");
    }
}

#[test]
fn shares_hold_within_a_tenth_and_change_while_the_disks_are_used() {
    let pool = Pool::new(Limits { iops: None, bandwidth: Some(4 << 20) }).unwrap();
    let limiter = |share| Arc::new(Limiter::new(Limits::default(), Some(pool.join(share))));
    let limiters = [limiter(300), limiter(100)];
    // The one reads pages, the other larger pieces.
    let mut disks: Vec<_> =
        limiters.iter().zip([4096, 16384]).map(|(limiter, len)| (disk(limiter), len)).collect();
    let unlimited = rate(&mut disk(&Arc::default()), 4096);
    let able = unlimited > 8.0 * 1024.0;
    expect("3 to 1", &mut disks, &[768.0, 64.0], able);
    expect("the first alone", &mut disks[..1], &[1024.0], able);
    expect("the second alone", &mut disks[1..], &[256.0], able);
    limiters[1].set_share(300);
    expect("1 to 1", &mut disks, &[512.0, 128.0], able);
    // A limit of its own leaves more to the other.
    limiters[0].set(Limits { iops: Some(256), bandwidth: None });
    expect("the first limited to 1 MiB/s", &mut disks, &[256.0, 192.0], able);
}
