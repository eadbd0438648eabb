//! Memory at its home that no other node asked for is the host's own, huge pages included.

use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use coherence::page::PAGE_SIZE;
use coherence::uffd::Uffd;
use tests::engines::Engines;

/// Pages of each node: 64 MiB.
const PAGES: u64 = 16_384;

/// KiB that are mapped as huge pages of files between two addresses (`/proc/self/smaps`, proc(5)). Shards
/// have mappings of their own there.
fn in_huge_pages(addresses: Range<u64>) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut inside, mut sum) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, _)) = first.split_once('-') {
            inside = u64::from_str_radix(start, 16).is_ok_and(|start| addresses.contains(&start));
        } else if inside && first == "ShmemPmdMapped:" {
            sum += words.next().unwrap().parse::<u64>().unwrap();
        }
    }
    sum
}

#[test]
fn home_memory_is_in_huge_pages_where_the_host_gives_them_and_raises_no_event() {
    if let Err(why) = Uffd::open() {
        return println!("skipped: {why}");
    }
    let machine = Engines::start(&[PAGES, PAGES], 2, Duration::ZERO).unwrap();
    for page in 0..PAGES {
        machine.page(0, page).store(page + 1, SeqCst);
    }
    assert_eq!(machine.at_rest().unwrap()[0].events, 0);
    let setting =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    if !["[advise]", "[always]", "[force]"].iter().any(|on| setting.contains(on)) {
        println!("huge pages not looked at: this host has shmem_enabled {}", setting.trim());
    } else {
        let (view, bytes) = (machine.memory(0).guest_view() as u64, PAGES * PAGE_SIZE as u64);
        let (huge, touched) = (in_huge_pages(view..view + bytes), bytes / 1024);
        // Its ends need not lie at 2 MiB; and a host may be short of huge pages, though not of most.
        assert!(huge * 10 >= touched * 9, "{huge} of {touched} KiB are in huge pages");
    }
    // One page that is asked for costs its huge page, and no more than that.
    assert_eq!(machine.page(1, 777).load(SeqCst), 778);
    for page in 0..PAGES {
        assert_eq!(machine.page(0, page).load(SeqCst), page + 1);
    }
    assert!(machine.at_rest().unwrap()[0].events <= 512, "{}", machine.at_rest().unwrap()[0].events);
}
