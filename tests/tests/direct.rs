//! Direct access: devices read and overwrite pages of other nodes without bringing them to their own.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use coherence::page::PAGE_SIZE;
use coherence::uffd::Uffd;
use tests::engines::Engines;

/// Pages of each node: more than a block, so that both shards have some.
const PAGES: u64 = 700;
const WORDS: usize = PAGE_SIZE / 8;

fn remote_faults(machine: &Engines) -> u64 {
    let totals = machine.at_rest().unwrap();
    totals.iter().map(|node| node.remote_read_faults + node.remote_write_faults).sum()
}

#[test]
fn what_a_device_reads_stays_where_it_is() {
    if let Err(why) = Uffd::open() {
        return println!("skipped: {why}");
    }
    let machine = Engines::start(&[PAGES, PAGES, PAGES], 2, Duration::ZERO).unwrap();
    machine.spread(0..PAGES);
    let faults = remote_faults(&machine);
    let pages: Vec<u64> = (0..PAGES).collect();
    for device in 0..3 {
        let found = machine.load(device, &pages);
        let mut here = 0;
        for (page, found) in pages.iter().zip(found) {
            let value = if page % 3 == 0 { page + 2 } else { page + 1 };
            match found {
                Some(words) => assert_eq!(words[0], value, "page {page}, read by node {device}"),
                None => here += 1,
            }
        }
        // What a node has, or may have without asking anybody else, is not for it to load.
        let third = |rest| (0..PAGES).filter(|page| page % 3 == rest).count();
        let expected = [third(1) + third(2), third(0), third(1)][device];
        assert!(here >= expected && here < PAGES as usize, "node {device} must touch {here} pages");
    }
    assert_eq!(remote_faults(&machine), faults);
    for page in 0..PAGES {
        // Who had a page to write still has it.
        machine.page(usize::from(page % 3 == 0), page).load(SeqCst);
    }
    assert_eq!(remote_faults(&machine), faults, "somebody lost a page");
    machine.check().unwrap();
}

#[test]
fn what_a_device_overwrites_everybody_reads() {
    if let Err(why) = Uffd::open() {
        return println!("skipped: {why}");
    }
    let machine = Engines::start(&[PAGES, PAGES, PAGES], 2, Duration::ZERO).unwrap();
    for device in 0..3 {
        machine.spread(0..PAGES);
        let value = |page: u64| page << 8 | device as u64 | 0x80;
        let pages: Vec<(u64, u64)> = (0..PAGES).map(|page| (page, value(page))).collect();
        let written = machine.store(device, &pages);
        assert!(written.iter().filter(|written| **written).count() as u64 >= PAGES / 3, "by node {device}");
        for ((page, value), written) in pages.into_iter().zip(written) {
            for node in (0..3).filter(|_| written) {
                for word in [0, WORDS - 1] {
                    let seen = machine.word(node, page as usize * PAGE_SIZE + 8 * word).load(SeqCst);
                    assert_eq!(
                        seen, value,
                        "page {page} at node {node}, written by a device of node {device}"
                    );
                }
            }
        }
    }
    // Memory that nobody has touched, too.
    assert_eq!(machine.store(1, &[(PAGES - 1, 0), (2 * PAGES + 5, 7)])[1..], [true]);
    assert_eq!(machine.page(2, 2 * PAGES + 5).load(SeqCst), 7);
    machine.check().unwrap();
}

/// CPUs and devices of all nodes take turns at each page, and each finds what the one before has written,
/// while other CPUs look on, who never see a page go back.
#[test]
fn cpus_and_devices_that_take_turns_find_what_the_last_one_wrote() {
    if let Err(why) = Uffd::open() {
        return println!("skipped: {why}");
    }
    const SHARED: u64 = 48;
    const TURNS: u64 = 6000;
    let machine = Engines::start(&[SHARED / 2, SHARED / 2, 4], 1, Duration::from_micros(50)).unwrap();
    let over = AtomicBool::new(false);
    let offset = |page: u64, word: usize| page as usize * PAGE_SIZE + 8 * word;
    std::thread::scope(|scope| {
        // Nobody looks on from node 2, so that its devices find little there.
        for node in 0..2 {
            let (machine, over) = (&machine, &over);
            scope.spawn(move || {
                let mut last = [0; SHARED as usize];
                while !over.load(SeqCst) {
                    for page in 0..SHARED {
                        let now = machine.word(node, offset(page, 77)).load(SeqCst);
                        let before = std::mem::replace(&mut last[page as usize], now);
                        assert!(now >= before, "node {node} saw page {page} go from {before} to {now}");
                    }
                }
            });
        }
        let mut values = [0; SHARED as usize];
        let mut seed = 88_172_645_463_325_252u64;
        for turn in 1..=TURNS {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let (page, node) = (seed % SHARED, (seed >> 20) as usize % 3);
            let cpu_reads = || -> Vec<u64> {
                [0, 77, WORDS - 1].map(|word| machine.word(node, offset(page, word)).load(SeqCst)).into()
            };
            let cpu_writes = || {
                (0..WORDS).for_each(|word| machine.word(node, offset(page, word)).store(turn, SeqCst));
            };
            let value = &mut values[page as usize];
            match (seed >> 40) % 4 {
                0 => assert!(cpu_reads().iter().all(|seen| seen == value), "turn {turn}"),
                1 => {
                    let found = machine.load(node, &[page]).remove(0).unwrap_or_else(cpu_reads);
                    assert!(found.iter().all(|seen| seen == value), "turn {turn}: {value} in page {page}");
                }
                2 => {
                    cpu_writes();
                    *value = turn;
                }
                _ => {
                    if machine.store(node, &[(page, turn)]) == [false] {
                        cpu_writes();
                    }
                    *value = turn;
                }
            }
        }
        over.store(true, SeqCst);
    });
    let totals = machine.at_rest().unwrap();
    let sum = |count: fn(&coherence::stats::Totals) -> u64| totals.iter().map(count).sum::<u64>();
    println!(
        "{} loads, {} stores, {} left to the CPU's way",
        sum(|t| t.loads),
        sum(|t| t.stores),
        sum(|t| t.not_direct)
    );
    assert!(sum(|t| t.loads) > 100 && sum(|t| t.stores) > 100);
    machine.check().unwrap();
}
