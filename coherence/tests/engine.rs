//! Engines of several nodes in one process, each with memory and userfaultfds of its own, over the
//! in-process transport and over TCP: threads that touch the guest views stand for vCPUs.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coherence::engine::{Engine, EngineConfig};
use coherence::memory::DualMemory;
use coherence::page::{Homes, PAGE_SIZE};
use coherence::uffd::Uffd;
use fabric::{NodeId, Transport};

/// A machine of engines; any failure is kept and reported when the machine ends.
struct Machine {
    memories: Vec<Arc<DualMemory>>,
    engines: Vec<Engine>,
    failures: Arc<Mutex<Vec<String>>>,
}

fn can_run() -> bool {
    match Uffd::open() {
        Ok(_) => true,
        Err(why) => {
            println!("skipped: {why}");
            false
        }
    }
}

impl Machine {
    fn new(pages: &[u64], shards: u16) -> Machine {
        let homes = Homes::new(pages.iter().copied());
        let failures = Arc::new(Mutex::new(Vec::new()));
        let (mut memories, mut engines) = (Vec::new(), Vec::new());
        for transport in fabric::sim::cluster(pages.len(), shards + 1).unwrap() {
            let memory = Arc::new(DualMemory::new(homes.pages()).unwrap());
            let config = EngineConfig {
                node: transport.node(),
                homes: homes.clone(),
                shards,
                first_lane: 1,
                hold: Duration::from_micros(50),
                spin: Duration::ZERO,
                stuck: Duration::from_secs(20),
            };
            let failures = failures.clone();
            let on_failure = Arc::new(move |e: coherence::engine::EngineError| {
                eprintln!("engine failed: {e}");
                failures.lock().unwrap().push(e.to_string());
            });
            engines.push(Engine::start(config, memory.clone(), Arc::new(transport), on_failure).unwrap());
            memories.push(memory);
        }
        Machine { memories, engines, failures }
    }

    /// A word of guest memory as a node's CPUs see it.
    fn word(&self, node: usize, page: u64, index: usize) -> &AtomicU64 {
        let view = self.memories[node].guest_view();
        let offset = page as usize * PAGE_SIZE + index * 8;
        assert!(offset < self.memories[node].len());
        // SAFETY: aligned and inside the guest view, which lives as long as the machine; atomics may alias.
        unsafe { &*view.add(offset).cast::<AtomicU64>() }
    }

    fn end(self) {
        let failures = self.failures.lock().unwrap().clone();
        assert!(failures.is_empty(), "{failures:?}");
    }
}

#[test]
fn increments_of_one_word_from_every_node_all_count() {
    if !can_run() {
        return;
    }
    let machine = Machine::new(&[8, 8, 8], 2);
    const EACH: u64 = 3000;
    std::thread::scope(|scope| {
        for node in 0..3 {
            for _ in 0..2 {
                let word = machine.word(node, 9, 3);
                scope.spawn(move || (0..EACH).for_each(|_| _ = word.fetch_add(1, SeqCst)));
            }
        }
    });
    for node in 0..3 {
        assert_eq!(machine.word(node, 9, 3).load(SeqCst), 6 * EACH);
    }
    assert!(machine.engines.iter().map(|e| e.totals().remote_write_faults).sum::<u64>() > 0);
    machine.end();
}

#[test]
fn what_one_node_writes_every_other_reads() {
    if !can_run() {
        return;
    }
    let machine = Machine::new(&[600, 600, 600], 2);
    let value = |writer: u64, page: u64| writer << 32 | page << 8 | 1;
    for writer in 0..3 {
        for page in 0..1800 {
            machine.word(writer, page, 100).store(value(writer as u64, page), SeqCst);
        }
        for reader in 0..3 {
            for page in 0..1800 {
                assert_eq!(machine.word(reader, page, 100).load(SeqCst), value(writer as u64, page));
            }
        }
    }
    machine.end();
}

/// A busy shard gives frames back late: what was to be given back may be of use again by then. Bytes that two
/// other nodes read are in their home's frame though the home itself has no rights to them.
#[test]
fn a_home_keeps_the_bytes_that_others_share() {
    if !can_run() {
        return;
    }
    const WORKERS: u64 = 8;
    const EACH: u64 = 300;
    let machine = Machine::new(&[WORKERS * EACH, 8, 8], 1);
    let wrong = AtomicU64::new(0);
    std::thread::scope(|scope| {
        // Several at a time: between two quiet moments of the home's shard pages go, and come to be shared.
        for worker in 0..WORKERS {
            let (machine, wrong) = (&machine, &wrong);
            scope.spawn(move || {
                let pages = worker * EACH..(worker + 1) * EACH;
                let check = |node: usize, page: u64| {
                    let read = machine.word(node, page, 7).load(SeqCst);
                    wrong.fetch_add(u64::from(read != page + 1), SeqCst);
                };
                for page in pages.clone() {
                    machine.word(0, page, 7).store(page, SeqCst);
                    machine.word(1, page, 7).store(page + 1, SeqCst);
                    check(2, page);
                }
                pages.for_each(|page| check(0, page));
            });
        }
    });
    assert_eq!(wrong.into_inner(), 0, "reads of something else than what was written last");
    machine.end();
}

#[test]
fn home_memory_that_is_never_shared_raises_no_event() {
    if !can_run() {
        return;
    }
    let machine = Machine::new(&[2048, 2048], 2);
    for page in 0..2048 {
        machine.word(0, page, 0).store(page, SeqCst);
    }
    assert_eq!(machine.engines[0].totals().events, 0);
    assert_eq!(machine.word(1, 77, 0).load(SeqCst), 77);
    machine.end();
}

#[test]
fn pages_never_touched_are_read_as_zero_without_their_bytes() {
    if !can_run() {
        return;
    }
    let machine = Machine::new(&[64, 64], 1);
    for page in 0..64 {
        assert_eq!(machine.word(1, page, 5).load(SeqCst), 0);
    }
    let totals = machine.engines[0].totals();
    assert_eq!(totals.pages_sent, 0);
    // Runs of 1 + 7, 1 + 15 and 1 + 31 pages, then the rest.
    assert_eq!(totals.zero_pages_sent, 4);
    assert_eq!(machine.engines[1].totals().run_pages, 60);
    // The home notices what others hold: its next write must invalidate them.
    machine.word(0, 10, 5).store(1, SeqCst);
    assert_eq!(machine.word(1, 10, 5).load(SeqCst), 1);
    machine.end();
}

#[test]
fn two_words_written_in_order_are_seen_in_order_across_pages() {
    if !can_run() {
        return;
    }
    let machine = Machine::new(&[8, 8, 8], 2);
    const ROUNDS: u64 = 2000;
    std::thread::scope(|scope| {
        let (data, flag) = (machine.word(1, 3, 0), machine.word(1, 20, 0));
        scope.spawn(move || {
            for i in 1..=ROUNDS {
                data.store(i, SeqCst);
                flag.store(i, SeqCst);
            }
        });
        for node in [0, 2] {
            let (data, flag) = (machine.word(node, 3, 0), machine.word(node, 20, 0));
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
    machine.end();
}

#[test]
fn random_accesses_of_many_threads_keep_every_counter_exact() {
    if !can_run() {
        return;
    }
    let machine = Machine::new(&[5, 3, 9, 1], 2);
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
                    let word = machine.word(seed as usize % 4, page, page as usize * 7);
                    let seen = if write { word.fetch_add(1, SeqCst) + 1 } else { word.load(SeqCst) };
                    assert!(seen >= last[page as usize], "a counter went back");
                    last[page as usize] = seen;
                }
            });
        }
    });
    for page in 0..18u64 {
        for node in 0..4 {
            assert_eq!(machine.word(node, page, page as usize * 7).load(SeqCst), expected[page as usize]);
        }
    }
    machine.end();
}

#[test]
fn a_stranger_on_the_lane_ends_the_engine_with_a_sentence() {
    if !can_run() {
        return;
    }
    let mut cluster = fabric::sim::cluster(2, 2).unwrap();
    let stranger = cluster.pop().unwrap();
    let homes = Homes::new([4, 4]);
    let memory = Arc::new(DualMemory::new(homes.pages()).unwrap());
    let (tell, told) = std::sync::mpsc::channel();
    let tell = Mutex::new(tell);
    let config = EngineConfig {
        node: NodeId(0),
        homes,
        shards: 1,
        first_lane: 1,
        hold: Duration::ZERO,
        spin: Duration::ZERO,
        stuck: Duration::from_secs(20),
    };
    let on_failure = Arc::new(move |e: coherence::engine::EngineError| {
        tell.lock().unwrap().send(e.to_string()).unwrap();
    });
    let _engine = Engine::start(config, memory, Arc::new(cluster.pop().unwrap()), on_failure).unwrap();
    stranger.send(NodeId(0), 1, &[&[200; 24]]).unwrap();
    let why = told.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(why.starts_with("node 1 was lost: it sent a coherence frame"), "{why}");
}
