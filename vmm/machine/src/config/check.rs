//! The checks of a machine's description, and the machine that has passed them.

use std::ops::Deref;

use coherence::engine;
use coherence::page::{Homes, PAGE_SIZE};
use fabric::NodeId;
use fabric::tcp::MAX_RAILS;
use firmware::pci::HOT_SLOTS;

use super::devices::{DeviceRequest, PlacedDevice, check_share, place, place_next};
use super::rdma::FabricKind;
use super::units::{check_name, check_word};
use super::{
    ConfigError, MAX_HOLD, MAX_SHARDS, MAX_SILENCE, MAX_TIMER_REST, MIN_SILENCE, MachineConfig, NodeConfig,
    NodeHost, wrong,
};
use crate::control::Machine;

/// A machine whose description has been checked, with every device in its place; what a coordinator starts.
/// It reads like its [`MachineConfig`], and nothing changes it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedMachine {
    config: MachineConfig,
    placed: Vec<PlacedDevice>,
}

impl Deref for CheckedMachine {
    type Target = MachineConfig;

    fn deref(&self) -> &MachineConfig {
        &self.config
    }
}

impl CheckedMachine {
    /// The devices that it begins with. (The field of its configuration has what was asked for.)
    pub fn placed(&self) -> &[PlacedDevice] {
        &self.placed
    }

    /// Gives one more device a place while the machine runs, beside those that it has by then.
    ///
    /// # Errors
    /// One sentence: what is wrong and what to do.
    pub fn place_more(
        &self,
        device: &DeviceRequest,
        present: &[PlacedDevice],
    ) -> Result<PlacedDevice, ConfigError> {
        place_next(self, device, present, HOT_SLOTS.into(), std::iter::empty())
    }

    /// Checks another share for a device that it has.
    ///
    /// # Errors
    /// One sentence: what is wrong and what to do.
    pub fn check_share(&self, device: &PlacedDevice, share: u32) -> Result<(), ConfigError> {
        check_share(self, device.node.into(), &device.kind, share)
    }

    /// The machine as its nodes see it, under the id of this start and with the devices that it has by then.
    pub fn machine(&self, id: [u8; 16], devices: Vec<PlacedDevice>) -> Machine {
        Machine {
            name: self.name.clone(),
            id,
            spec: self.spec(),
            budgets: self.nodes.iter().map(|node| node.budget).collect(),
            capacities: self.nodes.iter().map(|node| node.capacity).collect(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            cmdline: self.cmdline.clone(),
            shards: self.shards(),
            devices,
            hold: self.hold,
            timer_rest: self.timer_rest,
            ship: self.ship,
            silence: self.silence,
            rdma: (self.fabric == FabricKind::Rdma).then(|| self.rdma.clone()),
            plaintext_fabric: self.plaintext_fabric,
        }
    }
}

impl MachineConfig {
    /// Checks whether such a machine can be started, as far as that can be said without touching a host, and
    /// gives every device its place.
    ///
    /// # Errors
    /// One sentence: what is wrong and what to do.
    pub fn check(self) -> Result<CheckedMachine, ConfigError> {
        self.check_guest()?;
        self.check_coherence()?;
        self.rdma.check(self.nodes.iter().map(|node| node.spec.name.as_str()))?;
        let placed = place(&self)?;
        self.check_addresses()?;
        Ok(CheckedMachine { config: self, placed })
    }

    /// What it boots, and its nodes.
    fn check_guest(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() && !self.boots_from_disk() {
            return wrong(
                "there is no kernel: name one with --kernel FILE or kernel = \"FILE\", or give the first node a \
                 disk that holds one (--disk IMAGE)",
            );
        }
        if self.cmdline.bytes().any(|byte| byte < b' ' || byte == 0x7f) {
            return wrong(
                "the kernel's command line contains a control character: use one line of plain text",
            );
        }
        check_word("a machine's", &self.name, 64)?;
        for node in &self.nodes {
            check_name(&node.spec.name)?;
            let wrong = |why| ConfigError(format!("node \"{}\": {why}", node.spec.name));
            node.capacity.check().map_err(wrong)?;
        }
        self.spec().check().map_err(|error| ConfigError(error.to_string()))
    }

    /// How its memory is kept coherent.
    fn check_coherence(&self) -> Result<(), ConfigError> {
        let shards = self.shards();
        if !(1..=MAX_SHARDS).contains(&shards) {
            return wrong(format!("{shards} shards are not possible: choose 1 to {MAX_SHARDS}"));
        }
        if self.silence < MIN_SILENCE {
            return wrong(format!(
                "a silence of {:?} is too short to tell a lost node from a busy one: choose {MIN_SILENCE:?} or more",
                self.silence
            ));
        }
        if self.silence > MAX_SILENCE {
            return wrong(format!(
                "a silence of {:?} would let a machine whose node is lost stand still for so long: choose \
                 {MAX_SILENCE:?} or less",
                self.silence
            ));
        }
        if self.hold > MAX_HOLD {
            return wrong(format!(
                "a hold of {:?} would stall every other node: choose {MAX_HOLD:?} or less",
                self.hold
            ));
        }
        if self.timer_rest > MAX_TIMER_REST {
            return wrong(format!(
                "timer_rest = {} would stop the guest's clocks: choose {MAX_TIMER_REST} or less, and 0 on real servers",
                self.timer_rest
            ));
        }
        let pages = self.nodes.iter().map(|node| node.spec.memory / PAGE_SIZE as u64);
        let homes = Homes::new(pages);
        for (id, node) in (0..).map(NodeId).zip(&self.nodes) {
            let Some(budget) = node.budget else { continue };
            engine::check_budget(budget, &homes, id, self.shards())
                .map_err(|why| ConfigError(format!("node \"{}\": {why}", node.spec.name)))?;
        }
        Ok(())
    }

    fn check_addresses(&self) -> Result<(), ConfigError> {
        let rails = self.rails();
        if let Some(other) = self.nodes.iter().find(|node| node.fabric_listen.len().max(1) != rails) {
            return wrong(format!(
                "node \"{}\" has {} rails and another node {rails}: give all nodes as many fabric addresses, in the \
                 same order",
                other.spec.name,
                other.fabric_listen.len().max(1)
            ));
        }
        if rails > MAX_RAILS {
            return wrong(format!(
                "{rails} rails are not possible: give a node at most {MAX_RAILS} addresses"
            ));
        }
        if rails > 1
            && self.nodes.iter().flat_map(|node| &node.fabric_listen).any(|a| a.ip().is_unspecified())
        {
            return wrong("a rail must be the address of a network card: 0.0.0.0 is all of them");
        }
        let remote = self.nodes.iter().find(|node| node.host == NodeHost::Remote);
        let Some(remote) = remote.map(|node| &node.spec.name) else { return Ok(()) };
        if self.key.is_none() {
            return wrong(format!(
                "node \"{remote}\" joins from elsewhere and must prove who it is: make a key with `gestalt key new \
                 FILE`, name it with key = \"FILE\" (--key), and give the node that key too"
            ));
        }
        let Some(listen) = self.listen else {
            return wrong(format!(
                "node \"{remote}\" joins from elsewhere and needs to know where: give an address and port, \
                 such as listen = \"192.0.2.1:7700\" (--listen)"
            ));
        };
        let nowhere = |node: &&NodeConfig| {
            node.host == NodeHost::Local
                && node.fabric_listen.first().is_none_or(|address| address.ip().is_unspecified())
        };
        if listen.ip().is_unspecified()
            && let Some(local) = self.nodes.iter().find(nowhere)
        {
            return wrong(format!(
                "node \"{remote}\" cannot reach node \"{}\": let listen name this host's own address instead of \
                 {}, or give the node a fabric address",
                local.spec.name,
                listen.ip()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;
    use crate::config::devices::{PlacedKind, parse_disk};

    fn node(name: &str, host: NodeHost) -> NodeConfig {
        NodeConfig { host, ..NodeConfig::new(name, 1, 256 << 20) }
    }

    fn machine(nodes: Vec<NodeConfig>) -> MachineConfig {
        MachineConfig { kernel: "vmlinuz".into(), nodes, ..MachineConfig::default() }
    }

    fn refusal(config: &MachineConfig) -> String {
        config.clone().check().unwrap_err().0
    }

    #[test]
    fn a_silence_is_neither_shorter_than_a_busy_host_s_nor_longer_than_anybody_waits() {
        let with = |silence| MachineConfig { silence, ..machine(vec![node("n0", NodeHost::Local)]) };
        let passes = |silence| with(silence).check().is_ok();
        assert!(passes(MIN_SILENCE) && passes(MAX_SILENCE));
        let short = refusal(&with(MIN_SILENCE - Duration::from_millis(1)));
        assert!(short.contains("999ms") && short.contains("choose 1s or more"), "{short}");
        let long = refusal(&with(MAX_SILENCE + Duration::from_millis(1)));
        assert!(long.contains("60.001s") && long.contains("choose 60s or less"), "{long}");
    }

    #[test]
    fn a_plain_machine_passes() {
        let checked =
            machine(vec![node("n0", NodeHost::Local), node("n1", NodeHost::Local)]).check().unwrap();
        assert_eq!((checked.placed(), checked.rails()), (&[][..], 1));
    }

    #[test]
    fn each_thing_wrong_has_its_own_sentence() {
        let good = machine(vec![node("n0", NodeHost::Local)]);
        let cases: Vec<(MachineConfig, &str)> = vec![
            (MachineConfig { kernel: PathBuf::new(), ..good.clone() }, "no kernel"),
            (
                MachineConfig {
                    kernel: PathBuf::new(),
                    devices: vec![parse_disk("a.img,node=n1").unwrap()],
                    ..machine(vec![node("n0", NodeHost::Local), node("n1", NodeHost::Local)])
                },
                "no kernel",
            ),
            (MachineConfig { cmdline: "a\nb".into(), ..good.clone() }, "control character"),
            (MachineConfig { shards: Some(0), ..good.clone() }, "0 shards"),
            (MachineConfig { silence: Duration::from_millis(100), ..good.clone() }, "too short"),
            (MachineConfig { hold: Duration::from_secs(1), ..good.clone() }, "stall every other node"),
            (MachineConfig { timer_rest: 65, ..good.clone() }, "0 on real servers"),
            (
                machine(vec![NodeConfig { budget: Some(256 << 20), ..node("b", NodeHost::Local) }]),
                "256 MiB, is too small",
            ),
            (machine(vec![node("a b", NodeHost::Local)]), "cannot be a node's name"),
            (machine(vec![node("n0", NodeHost::Local), node("n0", NodeHost::Local)]), "n0"),
            (machine(vec![]), "no node"),
            (
                machine(vec![node("n0", NodeHost::Local), node("n1", NodeHost::Remote)]),
                "must prove who it is",
            ),
            (
                MachineConfig {
                    key: Some("k".into()),
                    ..machine(vec![node("n0", NodeHost::Local), node("n1", NodeHost::Remote)])
                },
                "needs to know where",
            ),
        ];
        for (config, part) in cases {
            let said = refusal(&config);
            assert!(said.contains(part), "{said:?} does not contain {part:?}");
        }
    }

    #[test]
    fn a_disk_of_the_first_node_takes_the_place_of_a_kernel() {
        for disk in ["a.img", "a.img,node=n0"] {
            let devices = vec![parse_disk(disk).unwrap()];
            let nodes = vec![node("n0", NodeHost::Local)];
            let config = MachineConfig { kernel: PathBuf::new(), devices, ..machine(nodes) };
            config.check().unwrap();
        }
    }

    #[test]
    fn a_wildcard_address_needs_fabric_addresses_when_others_join() {
        let mut config = machine(vec![node("n0", NodeHost::Local), node("n1", NodeHost::Remote)]);
        config.key = Some("machine.key".into());
        config.listen = Some("0.0.0.0:7700".parse().unwrap());
        assert!(refusal(&config).contains("cannot reach node \"n0\""));
        config.nodes[0].fabric_listen = vec!["192.0.2.1:0".parse().unwrap()];
        config.check().unwrap();
    }

    #[test]
    fn all_nodes_have_as_many_rails() {
        let mut config = machine(vec![node("n0", NodeHost::Local), node("n1", NodeHost::Local)]);
        let rails = |addresses: &[&str]| addresses.iter().map(|address| address.parse().unwrap()).collect();
        config.nodes[0].fabric_listen = rails(&["192.0.2.1:0", "198.51.100.1:0"]);
        assert!(refusal(&config).contains("node \"n1\" has 1 rails and another node 2"));
        config.nodes[1].fabric_listen = rails(&["192.0.2.2:0", "0.0.0.0:0"]);
        assert!(refusal(&config).contains("0.0.0.0 is all of them"));
        config.nodes[1].fabric_listen = rails(&["192.0.2.2:0", "198.51.100.2:0"]);
        assert_eq!(config.check().unwrap().rails(), 2);
    }

    #[test]
    fn a_device_without_a_place_makes_no_machine() {
        let nodes = || vec![node("n0", NodeHost::Local)];
        let with = |devices: &[&str]| MachineConfig {
            devices: devices.iter().map(|text| parse_disk(text).unwrap()).collect(),
            ..machine(nodes())
        };
        assert!(refusal(&with(&["a.img", "b.img,node=n7"])).contains("\"n7\""));
        assert!(refusal(&with(&["a.img,name=x", "b.img,name=x"])).contains("x already"));
        let checked = with(&["a.img", "b.img"]).check().unwrap();
        let told = checked.machine([7; 16], checked.placed().to_vec());
        assert_eq!(told.devices.len(), 2, "nodes are told of every device that was asked for");
    }

    #[test]
    fn a_running_machine_places_one_more_device_beside_those_it_has() {
        let config = MachineConfig {
            devices: vec![parse_disk("a.img").unwrap()],
            ..machine(vec![node("n0", NodeHost::Local)])
        };
        let checked = config.check().unwrap();
        let more = checked.place_more(&parse_disk("b.img").unwrap(), checked.placed()).unwrap();
        assert_eq!((more.slot, more.name.as_str()), (1, "disk1"));
        assert!(matches!(&more.kind, PlacedKind::Disk { serial, queues: 1, .. } if serial == "disk1"));
        let full: Vec<_> = (0..HOT_SLOTS).map(|slot| PlacedDevice { slot, ..more.clone() }).collect();
        let said = checked.place_more(&parse_disk("c.img").unwrap(), &full).unwrap_err().0;
        assert!(said.contains("no room"), "{said}");
    }
}
