//! The report of a run: the nodes' counters, added up, for `gestalt run --report`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::event::Outcome;
use machine::config::MachineConfig;
use machine::control::NodeReport;
use machine::control::wire::Hello;

/// Counters of all nodes over all starts of the machine.
#[derive(Debug)]
pub struct Tally {
    machine: String,
    nodes: Vec<NodeRow>,
    starts: u64,
    since: Option<Instant>,
    ran: Duration,
}

#[derive(Debug, Default)]
struct NodeRow {
    name: String,
    cpus: u32,
    memory: u64,
    host: Option<Hello>,
    counters: BTreeMap<String, u64>,
    latency: BTreeMap<u64, u64>,
}

impl Tally {
    /// No counts yet.
    pub fn new(config: &MachineConfig) -> Tally {
        let entry = |node: &machine::config::NodeConfig| NodeRow {
            name: node.spec.name.clone(),
            cpus: node.spec.cpus,
            memory: node.spec.memory,
            ..NodeRow::default()
        };
        Tally {
            machine: config.name.clone(),
            nodes: config.nodes.iter().map(entry).collect(),
            starts: 0,
            since: None,
            ran: Duration::ZERO,
        }
    }

    /// A node told where it runs.
    pub fn host(&mut self, node: usize, hello: &Hello) {
        self.nodes[node].host = Some(hello.clone());
    }

    /// vCPUs started.
    pub fn started(&mut self, now: Instant) {
        self.starts += 1;
        self.since = Some(now);
    }

    /// Whether vCPUs have started and not stopped since.
    pub fn running(&self) -> bool {
        self.since.is_some()
    }

    /// The machine stopped; does nothing if it had not started.
    pub fn stopped(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.ran += now.saturating_duration_since(since);
        }
    }

    /// Adds a node's counts.
    pub fn add(&mut self, node: usize, report: NodeReport) {
        let entry = &mut self.nodes[node];
        for (name, count) in report.counters {
            let sum = entry.counters.entry(name).or_default();
            *sum = sum.saturating_add(count);
        }
        for (edge, count) in report.fault_latency {
            let sum = entry.latency.entry(edge).or_default();
            *sum = sum.saturating_add(count);
        }
    }

    /// The report as JSON: totals at the top level under the counters' own names, and the same per node.
    ///
    /// `run_seconds` counts from the start of the vCPUs, all starts together. `fault_p50_us` and
    /// `fault_p99_us` are null if no remote fault was counted.
    pub fn to_json(&self, outcome: &Outcome) -> Value {
        let mut counters = BTreeMap::new();
        let mut latency = BTreeMap::new();
        for entry in &self.nodes {
            add_up(&mut counters, &entry.counters);
            add_up(&mut latency, &entry.latency);
        }
        let mut report = numbers(&counters, &latency);
        report["machine"] = json!(self.machine);
        report["outcome"] = match outcome {
            Outcome::PoweredOff => json!("powered off"),
            Outcome::Interrupted(_) => json!("interrupted"),
            Outcome::Failed(why) => json!(why),
        };
        report["emulated"] =
            json!(self.nodes.iter().any(|entry| entry.host.as_ref().is_some_and(|h| h.emulated)));
        report["starts"] = json!(self.starts);
        report["run_seconds"] = json!(self.ran.as_secs_f64());
        report["nodes"] = self.nodes.iter().map(NodeRow::to_json).collect();
        report
    }
}

impl NodeRow {
    fn to_json(&self) -> Value {
        let mut entry = numbers(&self.counters, &self.latency);
        entry["name"] = json!(self.name);
        entry["cpus"] = json!(self.cpus);
        entry["memory_bytes"] = json!(self.memory);
        if let Some(host) = &self.host {
            entry["host"] = json!(host.host);
            entry["host_kernel"] = json!(host.kernel);
            entry["emulated"] = json!(host.emulated);
        }
        entry
    }
}

fn add_up<K: Ord + Clone>(sums: &mut BTreeMap<K, u64>, counts: &BTreeMap<K, u64>) {
    for (key, count) in counts {
        let sum = sums.entry(key.clone()).or_default();
        *sum = sum.saturating_add(*count);
    }
}

fn numbers(counters: &BTreeMap<String, u64>, latency: &BTreeMap<u64, u64>) -> Value {
    let mut object = json!({});
    for (name, count) in counters {
        object[name.as_str()] = json!(count);
    }
    object["fault_p50_us"] = json!(quantile(latency, 0.50));
    object["fault_p99_us"] = json!(quantile(latency, 0.99));
    object
}

/// The upper edge of the bucket that holds the quantile, in microseconds.
fn quantile(latency: &BTreeMap<u64, u64>, share: f64) -> Option<f64> {
    let total = latency.values().fold(0u64, |sum, count| sum.saturating_add(*count));
    let wanted = (total as f64 * share).ceil().max(1.0) as u64;
    let mut seen = 0u64;
    for (edge, count) in latency {
        seen = seen.saturating_add(*count);
        if total > 0 && seen >= wanted {
            return Some(*edge as f64 / 1000.0);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::config::NodeConfig;

    fn tally(nodes: usize) -> Tally {
        let node = |index| NodeConfig::new(&format!("n{index}"), 1, 1 << 30);
        Tally::new(&MachineConfig { nodes: (0..nodes).map(node).collect(), ..MachineConfig::default() })
    }

    #[test]
    fn counters_and_latencies_of_all_nodes_are_added_up() {
        let mut tally = tally(2);
        let report = |faults, latency| NodeReport {
            counters: vec![("remote_read_faults".into(), faults)],
            fault_latency: latency,
        };
        tally.add(0, report(3, vec![(10_000, 98), (500_000, 1)]));
        tally.add(1, report(4, vec![(10_000, 0), (2_000_000, 1)]));
        let json = tally.to_json(&Outcome::PoweredOff);
        assert_eq!(json["remote_read_faults"], 7);
        assert_eq!(json["nodes"][1]["remote_read_faults"], 4);
        assert_eq!(json["fault_p50_us"], 10.0);
        assert_eq!(json["fault_p99_us"], 500.0);
        assert_eq!(json["nodes"][1]["fault_p99_us"], 2000.0);
        assert_eq!(json["outcome"], "powered off");
    }

    #[test]
    fn no_fault_has_no_latency() {
        let json = tally(1).to_json(&Outcome::Failed("node n0 failed".into()));
        assert_eq!(json["fault_p50_us"], Value::Null);
        assert_eq!(json["outcome"], "node n0 failed");
    }
}
