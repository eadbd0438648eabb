//! The verdict on a boot: whether the guest found the machine that was asked for.

use serde_json::Value;

use crate::boot::Outcome;
use crate::machine::Machine;

/// Share of a node's memory that its guest must report: the rest is the kernel itself and its page structs.
const MEMORY_SHARE: f64 = 0.7;

/// What is wrong with a boot that should have ended by itself, in sentences; empty when nothing is.
///
/// `checked` says whether the guest was to run `smp-check`.
pub fn faults(machine: &Machine, outcome: &Outcome, checked: bool) -> Vec<String> {
    let mut faults = Vec::new();
    let mut expect = |ok: bool, what: String| {
        if !ok {
            faults.push(what);
        }
    };
    let facts = &outcome.facts;
    expect(outcome.code == Some(0), format!("gestalt run ended with {:?} instead of 0", outcome.code));
    expect(facts.text("kernel").is_some(), "the guest did not report its kernel".into());
    let cpus = facts.number("cpus_online");
    expect(
        cpus == Some(machine.cpus().into()),
        format!("the guest has {cpus:?} CPUs online instead of {}", machine.cpus()),
    );
    let nodes = facts.number("numa_nodes");
    expect(
        nodes == Some(machine.nodes.len() as u64),
        format!("the guest has {nodes:?} NUMA nodes instead of {}", machine.nodes.len()),
    );
    for (index, node) in machine.nodes.iter().enumerate() {
        let listed = facts.text(&format!("node{index}.cpus")).map(listed_cpus);
        expect(
            listed == Some(node.cpus),
            format!("NUMA node {index} has {listed:?} CPUs instead of {}", node.cpus),
        );
        let kib = facts.number(&format!("node{index}.mem_total_kib")).unwrap_or(0);
        let least = (f64::from(node.memory_mib) * 1024.0 * MEMORY_SHARE) as u64;
        expect(kib >= least, format!("NUMA node {index} has {kib} KiB of its {} MiB", node.memory_mib));
    }
    if machine.boots_from_disk {
        let said = facts.text("booted_from");
        expect(said == Some("disk"), format!("the guest booted from {said:?} instead of its disk"));
    } else if !machine.disks.is_empty() {
        let said = facts.text("disks");
        expect(said == Some("ok"), format!("the check of the disks said {said:?}"));
    }
    for (index, node) in machine.cards.iter().enumerate() {
        let said = facts.text(&format!("card{index}"));
        let wanted = format!("ok node {node}");
        expect(
            said == Some(&wanted),
            format!("the check of card {index} said {said:?} instead of {wanted:?}"),
        );
    }
    for (index, node) in machine.disks.iter().enumerate() {
        let near = facts.number(&format!("s{index}.numa_node"));
        expect(
            near == Some(*node as u64),
            format!("disk s{index} is near to node {near:?} instead of {node}"),
        );
    }
    if machine.budget_mib.is_some() {
        let said = facts.text("fill");
        expect(said == Some("ok"), format!("filling the memory said {said:?}"));
        let evictions = outcome.counters.as_ref().map_or(0, |counters| sum_of(counters, "evictions"));
        expect(evictions > 0, "no copy had to go: the budgets were never reached".into());
    }
    if checked {
        let said = facts.text("smp_check");
        expect(said == Some("ok"), format!("smp-check said {said:?}"));
    }
    faults
}

/// The sum of all numbers of that name anywhere in a report.
fn sum_of(report: &Value, name: &str) -> u64 {
    match report {
        Value::Object(fields) => {
            let here = fields.get(name).and_then(Value::as_u64).unwrap_or(0);
            here + fields.values().map(|field| sum_of(field, name)).sum::<u64>()
        }
        Value::Array(items) => items.iter().map(|item| sum_of(item, name)).sum(),
        _ => 0,
    }
}

/// How many CPUs a list such as `0-3,8` names.
fn listed_cpus(list: &str) -> u32 {
    let ranges = list.split(',').filter(|range| !range.is_empty());
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    };
    ranges.filter_map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Facts;

    fn outcome(facts: &[(&str, &str)]) -> Outcome {
        let facts = facts.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Outcome { code: Some(0), facts: Facts(facts), ..Outcome::default() }
    }

    const GOOD: [(&str, &str); 11] = [
        ("kernel", "6.12"),
        ("cpus_online", "2"),
        ("numa_nodes", "2"),
        ("node0.cpus", "0-1"),
        ("node0.mem_total_kib", "500000"),
        ("node1.cpus", ""),
        ("node1.mem_total_kib", "520000"),
        ("disks", "ok"),
        ("s0.numa_node", "1"),
        ("card0", "ok node 0"),
        ("smp_check", "ok"),
    ];

    fn machine() -> Machine {
        let mut machine = Machine { disks: vec![1], cards: vec![0], ..Machine::equal(2, 2, 512) };
        machine.nodes[1].cpus = 0;
        machine
    }

    #[test]
    fn the_machine_asked_for_has_no_faults() {
        assert_eq!(faults(&machine(), &outcome(&GOOD), true), Vec::<String>::new());
    }

    #[test]
    fn budgets_must_have_been_reached() {
        let machine = Machine { budget_mib: Some(600), ..machine() };
        let mut outcome = outcome(&[&GOOD[..], &[("fill", "ok")]].concat());
        assert_eq!(faults(&machine, &outcome, true).len(), 1);
        let report = |evictions| serde_json::json!({"nodes": [{"evictions": 0}, {"shards": [{"evictions": evictions}]}]});
        outcome.counters = Some(report(0));
        assert_eq!(faults(&machine, &outcome, true).len(), 1);
        outcome.counters = Some(report(3));
        assert_eq!(faults(&machine, &outcome, true), Vec::<String>::new());
    }

    #[test]
    fn each_missing_or_wrong_fact_is_a_fault() {
        for index in 0..GOOD.len() {
            let mut facts = GOOD.to_vec();
            facts[index].1 = "7";
            if GOOD[index].0 == "kernel" {
                facts.remove(index);
            }
            assert_eq!(faults(&machine(), &outcome(&facts), true).len(), 1, "{:?}", GOOD[index]);
        }
    }

    #[test]
    fn lists_of_cpus_are_counted() {
        for (list, count) in [("", 0), ("3", 1), ("0-3", 4), ("0-1,4,6-7", 5)] {
            assert_eq!(listed_cpus(list), count, "{list}");
        }
    }
}
