//! Transfers between a device on one node and its driver on another: buffers of many pages, copied by
//! ordinary instructions and announced by a word of shared memory, while the next buffers are already being
//! filled.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use coherence::page::PAGE_SIZE;
use coherence::uffd::Uffd;
use tests::engines::Engines;

/// Pages of each node's own memory.
const PAGES: u64 = 512;
/// Pages of one buffer.
const BUFFER: usize = 16;
/// Buffers of one transfer.
const BUFFERS: usize = 8;
/// How long each way is exercised.
const FOR: Duration = Duration::from_secs(4);

/// Copies a page into or out of a node's guest view.
fn copy(engines: &Engines, node: usize, page: u64, bytes: &mut [u8; PAGE_SIZE], write: bool) {
    assert!((page as usize) < 2 * PAGES as usize);
    // SAFETY: inside the guest view, which lives as long as `engines`; the announcements order who touches
    // it.
    unsafe {
        let at = engines.memory(node).guest_view().add(page as usize * PAGE_SIZE);
        match write {
            true => std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, PAGE_SIZE),
            false => std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), PAGE_SIZE),
        }
    }
}

fn content(round: u64, buffer: usize, page: usize) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    let mut seed =
        (round << 20 | (buffer as u64) << 10 | page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_exact_mut(8) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        word.copy_from_slice(&seed.to_le_bytes());
    }
    bytes
}

/// The driver on `driver` and the device on the other node work on buffers from page `first` on.
fn exercise(driver: usize, first: u64) {
    let engines = Engines::start(&[PAGES, PAGES], 1, Duration::from_micros(100)).unwrap();
    let engines = &engines;
    let device = 1 - driver;
    // One word for each buffer: the last round that was written, read, and so on. A page for each side.
    let (asked, done) = (2 * PAGES - 1, 2 * PAGES - 2);
    let at = |page: u64, buffer: usize| page as usize * PAGE_SIZE + buffer * 8;
    let page = |buffer: usize, page: usize| first + (buffer * BUFFER + page) as u64;
    let wait = |node: usize, offset: usize, round: u64| {
        let begin = Instant::now();
        while engines.word(node, offset).load(SeqCst) < round {
            assert!(begin.elapsed() < Duration::from_secs(30), "{}", engines.describe());
            std::thread::yield_now();
        }
    };
    let end = Instant::now() + FOR;
    std::thread::scope(|scope| {
        for queue in 0..2 {
            // The device: takes what was written (odd rounds), gives it back into the same pages (even
            // rounds).
            scope.spawn(move || {
                let mut disk = vec![[0; PAGE_SIZE]; BUFFERS * BUFFER];
                for round in 1u64.. {
                    for buffer in (queue..BUFFERS).step_by(2) {
                        wait(device, at(asked, buffer), round);
                        if engines.word(device, at(asked, buffer)).load(SeqCst) == u64::MAX {
                            return;
                        }
                        for number in 0..BUFFER {
                            let bytes = &mut disk[buffer * BUFFER + number];
                            copy(engines, device, page(buffer, number), bytes, round.is_multiple_of(2));
                        }
                        engines.word(device, at(done, buffer)).store(round, SeqCst);
                    }
                }
            });
        }
        let mut round = 1;
        while Instant::now() < end {
            for buffer in 0..BUFFERS {
                for number in 0..BUFFER {
                    copy(engines, driver, page(buffer, number), &mut content(round, buffer, number), true);
                }
                engines.word(driver, at(asked, buffer)).store(round, SeqCst);
            }
            (0..BUFFERS).for_each(|buffer| wait(driver, at(done, buffer), round));
            // All reads at once: the device fills one buffer while the one before is looked at.
            (0..BUFFERS).for_each(|buffer| engines.word(driver, at(asked, buffer)).store(round + 1, SeqCst));
            for buffer in 0..BUFFERS {
                wait(driver, at(done, buffer), round + 1);
                for number in 0..BUFFER {
                    let mut seen = [0; PAGE_SIZE];
                    copy(engines, driver, page(buffer, number), &mut seen, false);
                    let wanted = content(round, buffer, number);
                    if seen != wanted {
                        let wrong = seen.iter().zip(&wanted).position(|(a, b)| a != b).unwrap_or(0);
                        panic!("round {round}, buffer {buffer}, page {number}: wrong from byte {wrong} on");
                    }
                }
            }
            round += 2;
        }
        (0..BUFFERS).for_each(|buffer| engines.word(driver, at(asked, buffer)).store(u64::MAX, SeqCst));
        println!("driver on node {driver}, pages from {first}: {} rounds", round / 2);
    });
    engines.check().unwrap();
}

#[test]
fn buffers_arrive_whole_whichever_node_has_device_and_memory() {
    if let Err(why) = Uffd::open() {
        println!("skipped: {why}");
        return;
    }
    for driver in 0..2 {
        for first in [16, PAGES + 16] {
            exercise(driver, first);
        }
    }
}
