//! The counters that a node reports at the end of a run.

use coherence::stats::Totals;
use fabric::TransportStats;

use super::shipping::Shipping;
use crate::clock::guest::ClockStats;
use crate::vcpu::Counters;
use machine::control::NodeReport;

/// All counters of a node by name, and the latency of its remote faults.
pub fn report(
    memory: &Totals,
    wire: &TransportStats,
    cpus: &[Counters],
    clock: &ClockStats,
    shipping: Option<&Shipping>,
) -> NodeReport {
    let mut total = Counters::default();
    cpus.iter().for_each(|cpu| total.add(cpu));
    let mut counters: Vec<(String, u64)> =
        memory.list().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let mut add = |name: &str, value| counters.push((name.to_owned(), value));
    add("bytes_moved", wire.bytes_sent);
    add("frames_sent", wire.frames_sent);
    total.list().into_iter().for_each(|(name, value)| add(name, value));
    for (name, value) in shipping.iter().flat_map(|shipping| shipping.refusals().list()) {
        add(name, value);
    }
    add("clock_bound_ns", clock.bound_ns);
    add("clock_steps", clock.steps);
    let fault_latency = memory
        .latency
        .iter_recorded()
        .map(|bucket| (bucket.value_iterated_to(), bucket.count_at_value()))
        .collect();
    NodeReport { counters, fault_latency }
}
