//! Engines of several nodes in one process, each with memory and userfaultfds of its own, over the
//! in-process transport and over TCP: threads that touch the guest views stand for vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use coherence::engine::{Load, Store, budget_for};
use coherence::memory::DualMemory;
use coherence::page::{Homes, PAGE_SIZE, Page};
use coherence::testing::{Builder, Cluster, can_run};
use fabric::{NodeId, Transport};

/// A machine whose lane 0 is somebody else's.
fn builder(pages: &[u64], shards: u16) -> Builder {
    let builder = Builder::new(Homes::new(pages.iter().copied())).fatal();
    let hold = Duration::from_micros(50);
    builder.with(|config| (config.shards, config.first_lane, config.hold) = (shards, 1, hold))
}

fn machine(pages: &[u64], shards: u16) -> Cluster {
    builder(pages, shards).start().unwrap()
}

/// Node 0 of two with a page range each, and the other's end of the transport.
fn one_of_two(pages: u64) -> (Cluster, impl Transport) {
    let mut transports = fabric::sim::cluster(2, 2).unwrap();
    let other = transports.pop().unwrap();
    let builder = Builder::new(Homes::new([pages, pages])).with(|config| config.first_lane = 1);
    (builder.start_over([Arc::new(transports.pop().unwrap()) as _]).unwrap(), other)
}

#[test]
fn increments_of_one_word_from_every_node_all_count() {
    if !can_run() {
        return;
    }
    let machine = machine(&[8, 8, 8], 2);
    const EACH: u64 = 3000;
    std::thread::scope(|scope| {
        for node in 0..3 {
            for _ in 0..2 {
                let word = machine.word_of(node, 9, 3);
                scope.spawn(move || (0..EACH).for_each(|_| _ = word.fetch_add(1, SeqCst)));
            }
        }
    });
    for node in 0..3 {
        assert_eq!(machine.word_of(node, 9, 3).load(SeqCst), 6 * EACH);
    }
    assert!(machine.totals().iter().map(|t| t.remote_write_faults).sum::<u64>() > 0);
}

#[test]
fn what_one_node_writes_every_other_reads() {
    if !can_run() {
        return;
    }
    let machine = machine(&[600, 600, 600], 2);
    let value = |writer: u64, page: u64| writer << 32 | page << 8 | 1;
    for writer in 0..3 {
        for page in 0..1800 {
            machine.word_of(writer, page, 100).store(value(writer as u64, page), SeqCst);
        }
        for reader in 0..3 {
            for page in 0..1800 {
                assert_eq!(machine.word_of(reader, page, 100).load(SeqCst), value(writer as u64, page));
            }
        }
    }
}

#[test]
fn an_engine_that_ends_gives_devices_their_bytes_back() {
    if !can_run() {
        return;
    }
    let mut machine = machine(&[8, 8], 1);
    // Node 1 is lost, and with it who would answer.
    machine.lose_last();
    let (mut to, from) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
    for _ in 0..3 {
        let load = Load { page: Page(9), offset: 0, to: &mut to };
        assert_eq!(machine.engine(0).load(vec![load]), [false]);
        assert_eq!(machine.engine(0).store(&[Store { page: Page(10), from: &from }]), [false]);
    }
    assert_eq!(to, [1; PAGE_SIZE]);
}

#[test]
fn home_memory_that_is_never_shared_raises_no_event() {
    if !can_run() {
        return;
    }
    let machine = machine(&[2048, 2048], 2);
    for page in 0..2048 {
        machine.word_of(0, page, 0).store(page, SeqCst);
    }
    assert_eq!(machine.engine(0).totals().events, 0);
    assert_eq!(machine.word_of(1, 77, 0).load(SeqCst), 77);
}

#[test]
fn pages_never_touched_are_read_as_zero_without_their_bytes() {
    if !can_run() {
        return;
    }
    let machine = machine(&[64, 64], 1);
    for page in 0..64 {
        assert_eq!(machine.word_of(1, page, 5).load(SeqCst), 0);
    }
    let totals = machine.engine(0).totals();
    assert_eq!(totals.pages_sent, 0);
    // Runs of 1 + 7, 1 + 15 and 1 + 31 pages, then the rest.
    assert_eq!(totals.zero_pages_sent, 4);
    assert_eq!(machine.engine(1).totals().run_pages, 60);
    // The home notices what others hold: its next write must invalidate them.
    machine.word_of(0, 10, 5).store(1, SeqCst);
    assert_eq!(machine.word_of(1, 10, 5).load(SeqCst), 1);
}

#[test]
fn two_words_written_in_order_are_seen_in_order_across_pages() {
    if !can_run() {
        return;
    }
    let machine = machine(&[8, 8, 8], 2);
    const ROUNDS: u64 = 2000;
    std::thread::scope(|scope| {
        let (data, flag) = (machine.word_of(1, 3, 0), machine.word_of(1, 20, 0));
        scope.spawn(move || {
            for i in 1..=ROUNDS {
                data.store(i, SeqCst);
                flag.store(i, SeqCst);
            }
        });
        for node in [0, 2] {
            let (data, flag) = (machine.word_of(node, 3, 0), machine.word_of(node, 20, 0));
            scope.spawn(move || {
                loop {
                    let seen = flag.load(SeqCst);
                    let got = data.load(SeqCst);
                    assert!(got >= seen, "flag {seen} but data {got}");
                    if seen == ROUNDS {
                        break;
                    }
                }
            });
        }
    });
}

#[test]
fn random_accesses_of_many_threads_keep_every_counter_exact() {
    if !can_run() {
        return;
    }
    let machine = machine(&[5, 3, 9, 1], 2);
    let mut expected = [0u64; 18];
    let plan = |seed: u64| {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
        (0..1500).map(move |_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % 18, x >> 40 & 3 != 0)
        })
    };
    for seed in 0..8 {
        plan(seed).filter(|(_, write)| *write).for_each(|(page, _)| expected[page as usize] += 1);
    }
    std::thread::scope(|scope| {
        for seed in 0..8u64 {
            let machine = &machine;
            scope.spawn(move || {
                let mut last = [0; 18];
                for (page, write) in plan(seed) {
                    let word = machine.word_of(seed as usize % 4, page, page as usize * 7);
                    let seen = if write { word.fetch_add(1, SeqCst) + 1 } else { word.load(SeqCst) };
                    assert!(seen >= last[page as usize], "a counter went back");
                    last[page as usize] = seen;
                }
            });
        }
    });
    for page in 0..18u64 {
        for node in 0..4 {
            assert_eq!(machine.word_of(node, page, page as usize * 7).load(SeqCst), expected[page as usize]);
        }
    }
}

/// One thread of the storm: its own word of each page, which it alone writes, and what it last saw of the
/// others'.
struct Sailor<'a> {
    machine: &'a Cluster,
    id: usize,
    node: usize,
    random: u64,
    mine: Vec<u64>,
    seen: Vec<u64>,
}

impl Sailor<'_> {
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 20) % below
    }

    fn write(&mut self, page: u64) {
        let before = self.machine.word_of(self.node, page, self.id * 60).fetch_add(1, SeqCst);
        assert_eq!(before, self.mine[page as usize], "thread {} lost a write to page {page}", self.id);
        self.mine[page as usize] += 1;
    }

    fn read(&mut self, page: u64, other: usize) {
        let count = self.machine.word_of(self.node, page, other * 60).load(SeqCst);
        let last = &mut self.seen[page as usize * STORM_THREADS + other];
        assert!(count >= *last, "thread {} saw {other}'s count on page {page} go back to {count}", self.id);
        *last = count;
    }

    /// Pages that are wanted together, or one after the other: what is asked for ahead of its need, granted
    /// in runs, freed and fetched again.
    fn burst(&mut self, pages: u64) {
        let (kind, len) = (self.random(4), 4 + self.random(40));
        let group = self.random(12);
        let start = self.random(pages);
        for i in 0..len {
            let page = if kind < 2 { (group * 7919 + i * i * 31) % pages } else { (start + i) % pages };
            match kind {
                0 | 2 => self.write(page),
                _ => {
                    let other = self.random(STORM_THREADS as u64) as usize;
                    self.read(page, other);
                }
            }
        }
    }
}

const STORM_THREADS: usize = 8;

/// Threads on every node that want the same pages in bursts, so that everything the engine does ahead of a
/// need is done: no write may be lost and no reader may see an older one than before.
fn storm(homes: &[u64], shards: u16, bursts: u32, seed: u64) {
    let machine = machine(homes, shards);
    blow(&machine, homes, bursts, seed);
    let totals = machine
        .totals()
        .iter()
        .fold((0, 0, 0), |sum, t| (sum.0 + t.prefetches, sum.1 + t.run_pages, sum.2 + t.invalidations));
    assert!(
        totals.0 > 0 && totals.1 > 0 && totals.2 > 0,
        "prefetches, pages in runs, invalidations: {totals:?}"
    );
}

fn blow(machine: &Cluster, homes: &[u64], bursts: u32, seed: u64) {
    let pages = homes.iter().sum::<u64>();
    let counts: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let sailors: Vec<_> = (0..STORM_THREADS)
            .map(|id| {
                let random = (seed * 64 + id as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mine = vec![0; pages as usize];
                let seen = vec![0; pages as usize * STORM_THREADS];
                let node = id % homes.len();
                let mut sailor = Sailor { machine, id, node, random, mine, seen };
                scope.spawn(move || {
                    (0..bursts).for_each(|_| sailor.burst(pages));
                    sailor.mine
                })
            })
            .collect();
        sailors.into_iter().map(|sailor| sailor.join().unwrap()).collect()
    });
    for page in 0..pages {
        for node in 0..homes.len() {
            for (id, counts) in counts.iter().enumerate() {
                assert_eq!(
                    machine.word_of(node, page, id * 60).load(SeqCst),
                    counts[page as usize],
                    "page {page}"
                );
            }
        }
    }
}

/// A storm over memory of which each node may hold all of its own and a few pages more; they hold no more at
/// any time, as their files say.
#[test]
fn nodes_stay_within_their_budgets_in_a_storm() {
    if !can_run() {
        return;
    }
    const HOMES: [u64; 3] = [500, 700, 400];
    const COPIES: u64 = 150;
    let homes = Homes::new(HOMES);
    let budget = move |node| Some(budget_for(COPIES, &homes, node));
    let machine = builder(&HOMES, 2).budget(budget).start().unwrap();
    let most: Vec<AtomicU64> = HOMES.iter().map(|_| AtomicU64::new(0)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(SeqCst) {
                for (node, most) in most.iter().enumerate() {
                    most.fetch_max(machine.memory(node).resident_bytes().unwrap(), SeqCst);
                }
            }
        });
        blow(&machine, &HOMES, 200, 1);
        over.store(true, SeqCst);
    });
    for (node, most) in most.into_iter().enumerate() {
        let (most, limit) = (most.into_inner(), (HOMES[node] + COPIES) * 4096);
        assert!(most <= limit, "node {node} held {most} bytes, of {limit}");
        assert!(most > (HOMES[node] + COPIES / 2) * 4096, "node {node} held {most} bytes only: no storm");
        let totals = machine.engine(node).totals();
        assert!(totals.evictions > 0 && totals.probes > 0, "{totals:?}");
    }
}

#[test]
fn a_storm_of_bursts_loses_no_write() {
    if can_run() {
        storm(&[700, 1100, 600], 2, 40, 1);
        storm(&[300, 200, 400, 100], 1, 40, 2);
        (0..4).for_each(|seed| storm(&[40, 40, 40], 1, 300, seed));
    }
}

/// The same for minutes: `cargo test --release -p coherence --test engine -- --ignored --nocapture`.
#[test]
#[ignore = "runs for minutes"]
fn long_storms_lose_no_write() {
    if can_run() {
        for seed in 0..40 {
            println!("storm {seed}");
            storm(&[1500, 1100, 1600], 2, 300, seed);
            storm(&[300, 200, 400, 100], 1, 300, seed);
            storm(&[40, 40, 40], 1, 300, seed);
            let homes = [900, 500, 700];
            let machine = builder(&homes, 2).budget(|_| Some(5 << 20)).start().unwrap();
            blow(&machine, &homes, 300, seed);
        }
    }
}

/// How many pages of the guest view raise minor faults, as the kernel says.
fn watched_pages(memory: &DualMemory) -> u64 {
    let (start, end) = (memory.guest_view() as u64, memory.guest_view() as u64 + memory.len() as u64);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut here, mut watched) = (0, 0);
    for line in smaps.lines() {
        let range = line.split(' ').next().unwrap().split_once('-');
        let address = |text| u64::from_str_radix(text, 16);
        if let Some((Ok(from), Ok(to))) = range.map(|(from, to)| (address(from), address(to))) {
            here = if from >= start && to <= end { (to - from) / PAGE_SIZE as u64 } else { 0 };
        } else if line.starts_with("VmFlags:") && line.split(' ').any(|flag| flag == "ui") {
            watched += here;
        }
    }
    watched
}

/// As a vCPU that takes interrupts while it waits for a page.
#[test]
fn a_thread_that_is_called_out_of_its_wait_again_and_again_waits_once() {
    if !can_run() {
        return;
    }
    extern "C" fn ignore(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction is valid, and a handler that does nothing is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    // Nobody is at node 1: the page does not come.
    let (node, _silent) = one_of_two(4);
    let (engine, memory) = (node.engine(0), node.memory(0).clone());
    let waiter = std::thread::spawn(move || {
        // SAFETY: inside the guest view, which the thread keeps; an aligned read.
        unsafe { memory.guest_view().add(5 * PAGE_SIZE).read_volatile() }
    });
    let faulted = |times| {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while engine.totals().events < times {
            assert!(std::time::Instant::now() < deadline, "fault {times} does not come");
            std::thread::yield_now();
        }
    };
    const TIMES: u64 = 50;
    faulted(1);
    for time in 0..TIMES {
        let thread = std::os::unix::thread::JoinHandleExt::as_pthread_t(&waiter);
        // SAFETY: the thread has not been joined.
        assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR1) }, 0);
        faulted(2 + time);
    }
    let totals = engine.totals();
    assert_eq!((totals.events, totals.resumed_waits), (1 + TIMES, TIMES));
    assert_eq!((totals.remote_read_faults, totals.local_faults, totals.messages_sent), (1, 0, 1));
    // Nobody watches the page any more: the thread goes on.
    drop(node);
    waiter.join().unwrap();
}

#[test]
fn a_stranger_on_the_lane_ends_the_engine_with_a_sentence() {
    if !can_run() {
        return;
    }
    let (node, stranger) = one_of_two(4);
    let watched = watched_pages(node.memory(0));
    assert_eq!(watched, 8);
    stranger.send(NodeId(0), 1, &[&[200; 24]]).unwrap();
    let why = node.failure(Duration::from_secs(10)).unwrap();
    assert!(why.starts_with("node 1 was lost: it sent a coherence frame"), "{why}");
    // Else the kernel would let the guest go on, with zeroes in place of what is elsewhere.
    assert_eq!(watched_pages(node.memory(0)), watched, "pages of the guest view that userfaultfd watches");
}
