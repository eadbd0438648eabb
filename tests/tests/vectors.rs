//! Vector registers survive whatever takes a vCPU out of the guest: exits, kicks, and faults that move pages
//! between nodes. On emulated hosts nothing of this is seen: QEMU's SVM does not intercept XSETBV, so guests
//! there do without XSAVE.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coherence::page::PAGE_SIZE;
use kvm_bindings::kvm_regs;
use tests::litmus::guest::{Exits, Machine, host};
use tests::vectors::{AWAY_EVERY, MASKS, Width};
use vmm::kvm::HostCpu;
use vmm::vcpu::signal;

/// Of each thread in a round; a multiple of [`AWAY_EVERY`].
const TURNS: u64 = 8000;
/// Rounds go on until there have been so many kicks, and as many faults that move pages; on a busy host one
/// thread of a round may be done before the other begins.
const ENOUGH: u64 = 100;
/// Longer than that ever takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// The page that both threads want.
const SHARED: usize = 16 * PAGE_SIZE;
const THREADS: usize = 2;

/// The value that lane `lane` of register `register` begins with.
fn initial(thread: usize, register: usize, lane: usize) -> u64 {
    let number = (thread * 64 + register) * 8 + lane + 1;
    (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Where a thread's registers come from, and where they go in the end.
fn places(machine: &Machine, thread: usize) -> (usize, usize) {
    (machine.results(thread), machine.results(thread) + 2 * PAGE_SIZE)
}

/// A thread on each of two nodes runs [`TURNS`] turns, kicked all the while; their registers then hold what
/// they must.
fn round(machine: &Machine, width: Width) -> Exits {
    let engines = machine.engines();
    let (lanes, last) = (width.bytes() / 8, width.registers() - 1);
    for thread in 0..THREADS {
        let (begin, _) = places(machine, thread);
        for (register, lane) in (0..=last).flat_map(|register| (0..lanes).map(move |lane| (register, lane))) {
            let at = begin + register * width.bytes() + lane * 8;
            engines.word(thread, at).store(initial(thread, register, lane), Ordering::Relaxed);
        }
        for mask in 0..8 {
            let at = begin + MASKS + mask * 8;
            engines.word(thread, at).store(initial(thread, 60, mask), Ordering::Relaxed);
        }
    }
    let registers: Vec<kvm_regs> = (0..THREADS)
        .map(|thread| kvm_regs {
            rdi: places(machine, thread).0 as u64,
            rbx: places(machine, thread).1 as u64,
            rsi: SHARED as u64,
            r8: (SHARED + 64 + thread * 64) as u64,
            r12: TURNS,
            ..Default::default()
        })
        .collect();
    let (ids, done) = (machine.thread_ids(), AtomicBool::new(false));
    let exits = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                ids.iter().for_each(|&id| signal::send(id));
                // What is wanted is many kicks, not one after another without the guest between.
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let exits = machine.run(&registers);
        done.store(true, Ordering::Relaxed);
        exits.unwrap()
    });
    for thread in 0..THREADS {
        let (_, end) = places(machine, thread);
        for (register, lane) in (0..=last).flat_map(|register| (0..lanes).map(move |lane| (register, lane))) {
            let at = end + register * width.bytes() + lane * 8;
            let added = if register == last { 0 } else { initial(thread, last, lane).wrapping_mul(TURNS) };
            let wanted = initial(thread, register, lane).wrapping_add(added);
            let got = engines.word(thread, at).load(Ordering::Relaxed);
            assert_eq!(got, wanted, "{width:?}: thread {thread}, register {register}, lane {lane}");
        }
        for mask in (0..8).filter(|_| width == Width::Zmm) {
            let got = engines.word(thread, end + MASKS + mask * 8).load(Ordering::Relaxed);
            assert_eq!(got, initial(thread, 60, mask), "thread {thread}, mask {mask}");
        }
    }
    assert_eq!(exits.ports, TURNS / AWAY_EVERY * THREADS as u64);
    exits
}

fn check(host: &HostCpu, width: Width) {
    let machine = Machine::start(host, &[0, 1], Duration::ZERO).unwrap();
    machine.load(&[width.code(), width.code()]);
    let engines = machine.engines();
    let (begin, mut rounds, mut kicks, mut faults) = (Instant::now(), 0, 0, 0);
    while kicks < ENOUGH || faults < ENOUGH {
        assert!(begin.elapsed() < PATIENCE, "{rounds} rounds had {kicks} kicks and {faults} faults only");
        kicks += round(&machine, width).kicks;
        rounds += 1;
        faults = engines.at_rest().unwrap().iter().map(|totals| totals.remote_write_faults).sum();
    }
    let count = engines.word(0, SHARED).load(Ordering::SeqCst);
    assert_eq!(count, rounds * TURNS * THREADS as u64, "{width:?}: increments");
    println!("{width:?}: {rounds} rounds, {kicks} kicks, {faults} write faults on pages of another node");
}

#[test]
fn vector_registers_survive_exits_kicks_and_faults_that_move_pages() {
    let Some(host) = host() else { return };
    let widths = Width::all(&host);
    println!("vector registers of guests: {widths:?}");
    widths.into_iter().for_each(|width| check(&host, width));
}
