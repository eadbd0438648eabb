//! The judgement on RDMA. Nothing about it keeps a machine from running: TCP serves as well.

use super::facts::{RdmaFacts, RdmaPort};
use super::{Finding, ok, warn};

/// An RDMA packet takes a whole page from this MTU on, in bytes.
const PAGE_MTU: u32 = 4096;
/// Locked memory, in bytes, that suffices for sixteen shards: each has slots of up to 4 MB, and queues.
const ENOUGH_LOCKED: u64 = 128 << 20;

/// One finding for each port, and for what keeps them all from being used.
pub(super) fn judge(facts: &RdmaFacts, findings: &mut Vec<Finding>) {
    if facts.ports.is_empty() {
        return findings.push(ok("no RDMA device: nodes talk over TCP"));
    }
    if let Err(why) = &facts.library {
        let what = format!("{} RDMA ports, but RDMA is unavailable because {why}", facts.ports.len());
        return findings.push(warn(what, ""));
    }
    findings.extend(facts.ports.iter().map(port));
    if let Some(lockable) = facts.lockable.filter(|bytes| *bytes < ENOUGH_LOCKED) {
        findings.push(warn(
            format!("a process may lock {} KiB of memory, and RDMA locks its buffers", lockable >> 10),
            "if it fails for lack of memory, `ulimit -l unlimited` (LimitMEMLOCK=infinity in a systemd unit)",
        ));
    }
}

fn port(port: &RdmaPort) -> Finding {
    let (name, state) = (&port.name, &port.state);
    if state != "ACTIVE" {
        let mend = "see its cable and `rdma link`; nodes talk over TCP meanwhile";
        return warn(format!("RDMA port {name} is {state}"), mend);
    }
    let kind = match (&port.address, port.ethernet) {
        (Some(address), true) => format!("RoCE v2 at {address}"),
        (None, true) => {
            return warn(
                format!("RDMA port {name} has no RoCE v2 address"),
                "give its network interface an IPv4 address",
            );
        }
        (_, false) => "InfiniBand".into(),
    };
    match &port.mtu {
        Err(why) => {
            let mend = "see the rights of /dev/infiniband/uverbs*: nodes must be able to open them";
            warn(format!("RDMA port {name} is active, but {why}"), mend)
        }
        Ok(mtu) if *mtu < PAGE_MTU => {
            let mend = match port.ethernet {
                true => {
                    "if its switches can, `ip link set INTERFACE mtu 9000` for its network interface on all hosts"
                }
                false => "let the subnet manager allow 4096 (opensm: mtu=5 in partitions.conf)",
            };
            warn(
                format!(
                    "RDMA port {name} ({kind}) has an MTU of {mtu}, so a page travels in several packets"
                ),
                mend,
            )
        }
        Ok(mtu) => ok(format!("RDMA port {name} is active ({kind}, MTU {mtu}): `fabric = \"rdma\"` uses it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn good() -> RdmaPort {
        RdmaPort {
            name: "mlx5_0/1".into(),
            state: "ACTIVE".into(),
            ethernet: true,
            address: Some("192.0.2.7".into()),
            mtu: Ok(4096),
        }
    }

    fn findings(port: RdmaPort) -> Vec<Finding> {
        let mut findings = Vec::new();
        judge(&RdmaFacts { library: Ok(()), ports: vec![port], lockable: None }, &mut findings);
        findings
    }

    #[test]
    fn a_good_port_needs_no_mending() {
        let found = findings(good());
        assert_eq!((found.len(), found[0].level), (1, Level::Ok));
        assert!(found[0].what.contains("192.0.2.7") && found[0].what.contains("4096"), "{}", found[0]);
        let found = findings(RdmaPort { ethernet: false, address: None, ..good() });
        assert!(found[0].level == Level::Ok && found[0].what.contains("InfiniBand"), "{}", found[0]);
    }

    #[test]
    fn what_is_wrong_with_a_port_warns_with_its_mending() {
        let infiniband = RdmaPort { ethernet: false, address: None, mtu: Ok(2048), ..good() };
        for (port, what, mend) in [
            (RdmaPort { state: "DOWN".into(), ..good() }, "is DOWN", "cable"),
            (RdmaPort { address: None, ..good() }, "no RoCE v2", "IPv4"),
            (RdmaPort { mtu: Ok(1024), ..good() }, "MTU of 1024", "mtu 9000"),
            (infiniband, "MTU of 2048", "opensm"),
            (RdmaPort { mtu: Err("it cannot be opened".into()), ..good() }, "cannot be opened", "uverbs"),
        ] {
            let found = findings(port);
            let said = found[0].sentence();
            assert_eq!((found.len(), found[0].level), (1, Level::Warn), "{said}");
            assert!(said.contains(what) && said.contains(mend), "{said}");
        }
    }

    #[test]
    fn a_missing_library_and_a_low_limit_are_said_once() {
        let ports = vec![good(), good()];
        let mut found = Vec::new();
        judge(&RdmaFacts { library: Err("it is absent".into()), ports, lockable: Some(0) }, &mut found);
        assert_eq!(found.len(), 1);
        assert!(found[0].what.contains("unavailable because it is absent"), "{}", found[0]);
        found.clear();
        judge(&RdmaFacts { library: Ok(()), ports: vec![good()], lockable: Some(8 << 20) }, &mut found);
        assert!(found[1].sentence().contains("8192 KiB") && found[1].mend.contains("ulimit -l"));
    }
}
