//! Memory that nobody needs any more costs no frame at any node, and is zero.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use coherence::page::PAGE_SIZE;
use coherence::uffd::Uffd;
use tests::engines::Engines;

/// Pages of each node: several blocks, and not a whole number of them.
const PAGES: u64 = 1300;

#[test]
fn discarded_memory_costs_no_frame_anywhere_and_is_zero() {
    if let Err(why) = Uffd::open() {
        return println!("skipped: {why}");
    }
    let machine = Engines::start(&[PAGES, PAGES, PAGES], 2, Duration::ZERO).unwrap();
    let frames = || -> Vec<u64> {
        let bytes = (0..3).map(|node| machine.resident_bytes(node).unwrap());
        bytes.map(|bytes| bytes / PAGE_SIZE as u64).collect()
    };
    for by in [2, 1, 0] {
        machine.spread(0..PAGES);
        let sent = |totals: &[coherence::stats::Totals]| totals.iter().map(|t| t.pages_sent).sum::<u64>();
        let before = machine.at_rest().unwrap();
        // More at the others, if they asked ahead.
        let frames_before = frames();
        assert!(
            frames_before[0] == PAGES && frames_before[1..].iter().all(|&n| n >= PAGES / 3),
            "{frames_before:?}"
        );
        machine.discard(by, 0..PAGES).unwrap();
        let after = machine.at_rest().unwrap();
        assert_eq!(frames(), [0, 0, 0], "discarded by node {by}");
        assert_eq!(sent(&before), sent(&after), "nobody's content is sent to be discarded");
        assert_eq!(after[0].discarded - before[0].discarded, PAGES);
        for page in 0..PAGES {
            let node = (page + by as u64) as usize % 3;
            assert_eq!(machine.page(node, page).load(SeqCst), 0, "page {page} at node {node}");
        }
        machine.discard(by, 0..PAGES).unwrap();
    }
    machine.check().unwrap();
}

/// Each node counts in words of its own on shared pages, which other nodes read, while pages are discarded: a
/// word is what was last written or zero, and what is once gone does not come back.
#[test]
fn discarding_memory_in_use_loses_it_whole_and_brings_nothing_old_back() {
    if let Err(why) = Uffd::open() {
        return println!("skipped: {why}");
    }
    const SHARED: u64 = 480;
    const ROUNDS: u64 = 60;
    let machine = Engines::start(&[SHARED / 2, SHARED / 2, 4], 1, Duration::from_micros(50)).unwrap();
    let over = AtomicBool::new(false);
    let word = |node: usize, owner: u64, page: u64| {
        machine.word(node, page as usize * PAGE_SIZE + 8 * owner as usize)
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3u64)
            .map(|owner| {
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        for page in 0..SHARED {
                            let word = word(owner as usize, owner, page);
                            word.store(round, SeqCst);
                            let seen = word.load(SeqCst);
                            assert!(seen == round || seen == 0, "page {page}: wrote {round}, read {seen}");
                        }
                    }
                })
            })
            .collect();
        for reader in 0..3u64 {
            let over = &over;
            scope.spawn(move || {
                let mut last = [0; SHARED as usize];
                while !over.load(SeqCst) {
                    for (page, last) in (0..SHARED).zip(&mut last) {
                        let seen = word(reader as usize, (reader + 1) % 3, page).load(SeqCst);
                        assert!(seen >= *last || seen == 0, "page {page}: {seen} came back after {last}");
                        *last = (*last).max(seen);
                    }
                }
            });
        }
        for by in 0..3 {
            let (machine, over) = (&machine, &over);
            scope.spawn(move || {
                for first in (0..SHARED).cycle() {
                    if over.load(SeqCst) {
                        break;
                    }
                    machine.discard(by, first..(first + 5).min(SHARED)).unwrap();
                }
            });
        }
        let done: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        over.store(true, SeqCst);
        assert!(done.iter().all(Result::is_ok));
    });
    let discarded: u64 = machine.at_rest().unwrap().iter().map(|totals| totals.discarded).sum();
    println!("{discarded} pages were discarded");
    assert!(discarded > 0);
}
