//! CPUs of two nodes that want the same page: both get on.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use coherence::page::PAGE_SIZE;
use kvm_bindings::kvm_regs;
use tests::litmus::code;
use tests::litmus::guest::{Machine, host};
use vmm::kvm::HostCpu;

/// How often each of two CPUs incremented a counter until it was `total`, and the misses it took.
fn race(host: &HostCpu, nodes: &[usize], total: u64) -> ([u64; 2], u64) {
    let machine = Machine::start(host, nodes, Duration::from_micros(100)).unwrap();
    machine.load(&[code::counter(), code::counter()]);
    let counter = 16 * PAGE_SIZE;
    let registers = |thread| kvm_regs {
        rsi: counter as u64,
        rbx: machine.results(thread) as u64,
        r12: total,
        ..Default::default()
    };
    machine.run(&[registers(0), registers(1)]).unwrap();
    let engines = machine.engines();
    let counts = [0, 1].map(|thread| engines.word(nodes[thread], machine.results(thread)).load(SeqCst));
    assert_eq!(engines.word(0, counter).load(SeqCst), counts[0] + counts[1], "increments that count");
    let misses = engines.at_rest().unwrap().iter().map(|totals| totals.remote_write_faults).sum();
    (counts, misses)
}

/// An increment is a single instruction: whoever has the page does many before it goes. What is shown is that
/// the page changes hands often, and that each CPU has it for about as long as the other: over some seconds,
/// since on a busy host each CPU in turn is kept from running for a while.
#[test]
fn two_cpus_on_two_nodes_that_increment_one_counter_get_on_alike() {
    let Some(host) = host() else { return };
    let (counts, misses) = race(&host, &[0, 1], 500_000_000);
    println!("{counts:?} increments, {misses} misses");
    let (less, more) = (counts[0].min(counts[1]), counts[0].max(counts[1]));
    assert!(more <= 2 * less, "{counts:?} increments: one CPU had more than twice as many");
    assert!(misses > 100, "the counter changed hands {misses} times only");
}
