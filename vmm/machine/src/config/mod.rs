//! The machine as its owner asks for it: what a machine file and the flags of `gestalt run` become.
//!
//! Reading is in [`file`] and `gestalt::cli`; this is the structure both fill, the units
//! they share, and the checks that need no host.

pub mod cloud_init;
pub mod devices;
pub mod file;
pub mod limits;
pub mod rdma;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use coherence::engine;
use coherence::page::{Homes, PAGE_SIZE};
use fabric::NodeId;
use fabric::tcp::MAX_RAILS;
use firmware::{MachineSpec, NodeSpec};
use serde::{Deserialize, Serialize};

use crate::config::devices::{Kind, PeripheralConfig};
use crate::config::limits::Capacity;
use crate::config::rdma::{FabricKind, RdmaConfig};
use crate::control::Machine;

/// How long a node or peer may be silent before it counts as lost, unless the machine file says otherwise.
pub const DEFAULT_SILENCE: Duration = Duration::from_secs(3);
/// The shortest silence that can be told from a busy host: several heartbeats (every 0.5 s) must fit.
pub const MIN_SILENCE: Duration = Duration::from_secs(1);
/// How long a node keeps a page that it just won, unless the machine file says otherwise.
pub const DEFAULT_HOLD: Duration = Duration::from_micros(100);
/// The longest hold: every other node's access to the page waits for it.
pub const MAX_HOLD: Duration = Duration::from_millis(100);
/// CPUs of the largest node for each coherence shard, unless the machine file says how many shards there are: one
/// userfaultfd does not serve more than a few CPUs that fault all the time.
pub const CPUS_PER_SHARD: u32 = 8;
/// The most shards that are chosen without being asked for.
pub const MOST_DEFAULT_SHARDS: u16 = 16;
/// The most coherence shards: each is a thread per node and a connection per pair of nodes.
pub const MAX_SHARDS: u16 = 64;
/// How long the nodes may take to join, unless told otherwise, if `gestalt run` starts all of them.
pub const DEFAULT_JOIN_LOCAL: Duration = Duration::from_secs(60);
/// The same if somebody has to start nodes on other hosts.
pub const DEFAULT_JOIN_REMOTE: Duration = Duration::from_secs(600);
/// The guest's command line if none is given: Linux then speaks on the terminal.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// What is wrong with a machine's description, in a sentence that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Whether an instruction on a page that stays at another node is carried out there.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShipMode {
    /// Never: all pages move to who uses them.
    #[default]
    Off,
    /// Where the page's home sees that it saves time.
    Auto,
    /// Wherever it is possible: for tests.
    Always,
}

/// Who starts a node's process.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
pub enum Place {
    /// `gestalt run` does, on its own host.
    #[default]
    Local,
    /// Somebody runs `gestalt node` on another host.
    Remote,
}

/// One node of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Name, CPUs and memory.
    pub spec: NodeSpec,
    /// What it may hold for the guest at most, in bytes: its own memory and copies of the others'. `None`: as much
    /// as comes.
    pub budget: Option<u64>,
    /// What its devices may do all together.
    pub capacity: Capacity,
    /// Who starts it.
    pub place: Place,
    /// Where its fabric listens, an address for each rail. Without any it is the one that its control connection
    /// comes from, which is loopback as long as everything is on one host.
    pub fabric_listen: Vec<SocketAddr>,
}

impl NodeConfig {
    /// A local node with so many CPUs and bytes of memory, and nothing else said about it.
    pub fn new(name: &str, cpus: u32, memory: u64) -> NodeConfig {
        NodeConfig {
            spec: NodeSpec { name: name.into(), cpus, memory },
            budget: None,
            capacity: Capacity::default(),
            place: Place::Local,
            fabric_listen: Vec::new(),
        }
    }
}

/// The whole machine, with how to start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// For messages and reports.
    pub name: String,
    /// The guest kernel (bzImage or ELF), a path on node 0's host. Empty: what the first disk of node 0 would boot.
    pub kernel: PathBuf,
    /// The initial ramdisk, a path on node 0's host.
    pub initrd: Option<PathBuf>,
    /// The guest kernel's command line; what a disk's boot loader would say goes before it.
    pub cmdline: String,
    /// Where `gestalt run` waits for nodes; port 0 lets the kernel choose. `None`: loopback, any port, which
    /// will not do for nodes on other hosts.
    pub listen: Option<SocketAddr>,
    /// The nodes; the position is the node's index.
    pub nodes: Vec<NodeConfig>,
    /// Disks, network cards and the like.
    pub devices: Vec<PeripheralConfig>,
    /// SLIT distances; empty for 10 and 20.
    pub distances: Vec<Vec<u8>>,
    /// How long a node may say nothing.
    pub silence: Duration,
    /// Coherence shards; `None`: as many as [`MachineConfig::shards`] thinks.
    pub shards: Option<u16>,
    /// How long a node keeps a page that it just won.
    pub hold: Duration,
    /// Whether instructions may be carried out where their operand is, instead of moving its page.
    pub ship: ShipMode,
    /// The file with the machine's key. Without one, `gestalt run` draws a key for the one run, which it can give to
    /// nodes on its own host only.
    pub key: Option<PathBuf>,
    /// Whether the fabric's frames travel in the clear.
    pub plaintext_fabric: bool,
    /// How long the nodes may take to join; `None` for [`DEFAULT_JOIN_LOCAL`] or [`DEFAULT_JOIN_REMOTE`].
    pub join_timeout: Option<Duration>,
    /// What carries the fabric's frames.
    pub fabric: FabricKind,
    /// Which RDMA ports, if RDMA does.
    pub rdma: RdmaConfig,
}

impl Default for MachineConfig {
    /// A machine without kernel and nodes; [`MachineConfig::check`] refuses it as it is.
    fn default() -> Self {
        MachineConfig {
            name: "gestalt".into(),
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: DEFAULT_CMDLINE.into(),
            listen: None,
            nodes: Vec::new(),
            devices: Vec::new(),
            distances: Vec::new(),
            silence: DEFAULT_SILENCE,
            shards: None,
            hold: DEFAULT_HOLD,
            ship: ShipMode::default(),
            join_timeout: None,
            fabric: FabricKind::default(),
            rdma: RdmaConfig::default(),
            key: None,
            plaintext_fabric: false,
        }
    }
}

impl MachineConfig {
    /// Whether such a machine can be started, as far as that can be said without touching a host.
    ///
    /// # Errors
    /// One sentence: what is wrong and what to do.
    pub fn check(&self) -> Result<(), ConfigError> {
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
        self.spec().check().map_err(|error| ConfigError(error.to_string()))?;
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
        if self.hold > MAX_HOLD {
            return wrong(format!(
                "a hold of {:?} would stall every other node: choose {MAX_HOLD:?} or less",
                self.hold
            ));
        }
        self.check_budgets()?;
        self.rdma.check(self.nodes.iter().map(|node| node.spec.name.as_str()))?;
        devices::place(self)?;
        self.check_addresses()
    }

    fn check_budgets(&self) -> Result<(), ConfigError> {
        let pages = self.nodes.iter().map(|node| node.spec.memory / PAGE_SIZE as u64);
        let homes = Homes::new(pages);
        for (id, node) in (0..).map(NodeId).zip(&self.nodes) {
            let Some(budget) = node.budget else { continue };
            engine::check_budget(budget, &homes, id, self.shards())
                .map_err(|why| ConfigError(format!("node \"{}\": {why}", node.spec.name)))?;
        }
        Ok(())
    }

    /// Whether the kernel comes out of the first node's first disk.
    pub fn boots_from_disk(&self) -> bool {
        let first = self.nodes.first().map(|node| node.spec.name.as_str());
        let boots = |device: &PeripheralConfig| {
            let here = device.node.is_none() || device.node.as_deref() == first;
            here && matches!(device.kind, Kind::Disk { .. })
        };
        self.kernel.as_os_str().is_empty() && self.devices.iter().any(boots)
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
        let remote = self.nodes.iter().find(|node| node.place == Place::Remote);
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
            node.place == Place::Local
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

    /// The machine as firmware sees it.
    pub fn spec(&self) -> MachineSpec {
        MachineSpec {
            nodes: self.nodes.iter().map(|node| node.spec.clone()).collect(),
            distances: self.distances.clone(),
            pci: !self.devices.is_empty(),
        }
    }

    /// The machine as its nodes see it, under the id of this start.
    pub fn machine(&self, id: [u8; 16]) -> Machine {
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
            // Checked before a machine is started.
            devices: devices::place(self).unwrap_or_default(),
            hold: self.hold,
            ship: self.ship,
            silence: self.silence,
            rdma: (self.fabric == FabricKind::Rdma).then(|| self.rdma.clone()),
            plaintext_fabric: self.plaintext_fabric,
        }
    }

    /// Coherence shards: as many as were asked for, or as suits the CPUs of the largest node.
    pub fn shards(&self) -> u16 {
        let cpus = self.nodes.iter().map(|node| node.spec.cpus).max().unwrap_or(0);
        let suitable = cpus.div_ceil(CPUS_PER_SHARD).clamp(1, u32::from(MOST_DEFAULT_SHARDS));
        self.shards.unwrap_or(suitable as u16)
    }

    /// The index of the node of this name.
    pub fn node_named(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.spec.name == name)
    }

    /// How many rails every node has.
    pub fn rails(&self) -> usize {
        self.nodes.iter().map(|node| node.fabric_listen.len()).max().unwrap_or(0).max(1)
    }

    /// Whether somebody has to start nodes elsewhere.
    pub fn has_remote_nodes(&self) -> bool {
        self.nodes.iter().any(|node| node.place == Place::Remote)
    }

    /// Where to listen.
    pub fn listen(&self) -> SocketAddr {
        self.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// How long the nodes may take to join.
    pub fn join_timeout(&self) -> Duration {
        let default = if self.has_remote_nodes() { DEFAULT_JOIN_REMOTE } else { DEFAULT_JOIN_LOCAL };
        self.join_timeout.unwrap_or(default)
    }

    /// Where local nodes find the coordinator that listens on `bound`.
    pub fn local_join_address(bound: SocketAddr) -> SocketAddr {
        match bound.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from(([127, 0, 0, 1], bound.port())),
            IpAddr::V6(ip) if ip.is_unspecified() => {
                SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, bound.port()))
            }
            _ => bound,
        }
    }
}

fn wrong<T>(why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(why.into()))
}

/// Names appear in messages, file names and command lines: letters, digits, `.`, `_`, `-`, at most 64.
///
/// # Errors
/// A sentence about the first thing wrong.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    check_word("a node's", name, 64)
}

/// The same for the name of something else, such as "a device's", with at most `most` characters.
///
/// # Errors
/// A sentence about the first thing wrong.
pub fn check_word(whose: &str, name: &str, most: usize) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > most || name.starts_with(['-', '.']) || !name.chars().all(plain) {
        return wrong(format!(
            "{name:?} cannot be {whose} name: use 1 to {most} letters, digits, '.', '_' and '-', beginning with a \
             letter or digit"
        ));
    }
    Ok(())
}

/// Bytes from `512M`, `2G`, `1.5G` or a plain number of bytes; K, M, G and T are powers of 1024, an `iB`
/// or `B` may follow.
///
/// # Errors
/// A sentence with the forms that are understood.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let refused =
        || ConfigError(format!("{text:?} is not a size: write for example 512M, 2G or a number of bytes"));
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(refused()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(refused);
    }
    let fraction: f64 = number.parse().map_err(|_| refused())?;
    let bytes = fraction * (1u64 << shift) as f64;
    if shift == 0 || bytes.fract() != 0.0 || bytes >= u64::MAX as f64 {
        return Err(refused());
    }
    Ok(bytes as u64)
}

/// A duration from `3s`, `500ms`, `100us` or `2min`.
///
/// # Errors
/// A sentence with the forms that are understood.
pub fn parse_duration(text: &str) -> Result<Duration, ConfigError> {
    let refused =
        || ConfigError(format!("{text:?} is not a duration: write for example 3s, 500ms, 100us or 2min"));
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refused)?;
    let (number, unit) = trimmed.split_at(digits);
    let seconds = match unit.trim() {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(refused()),
    };
    let number: f64 = number.parse().map_err(|_| refused())?;
    let nanos = number * seconds * 1e9;
    if nanos > 1e9 * 86_400.0 * 365.0 {
        return Err(refused());
    }
    Ok(Duration::from_nanos(nanos.round() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::devices::parse_disk;

    fn node(name: &str, place: Place) -> NodeConfig {
        NodeConfig { place, ..NodeConfig::new(name, 1, 256 << 20) }
    }

    fn machine(nodes: Vec<NodeConfig>) -> MachineConfig {
        MachineConfig { kernel: "vmlinuz".into(), nodes, ..MachineConfig::default() }
    }

    fn refusal(config: &MachineConfig) -> String {
        config.check().unwrap_err().0
    }

    #[test]
    fn sizes_are_read_in_bytes_and_binary_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("1.5g"), Ok(3 << 29));
        for bad in ["", "M", "-1M", "12Q", "1.5", "0.0001K", "99999999999T", "1..2G", "1 2"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(parse_duration("3s"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("2.5 s"), Ok(Duration::from_millis(2500)));
        assert_eq!(parse_duration("100us"), Ok(Duration::from_micros(100)));
        assert_eq!(parse_duration("2min"), Ok(Duration::from_secs(120)));
        for bad in ["", "3", "s", "-3s", "3h", "999999999999min"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shards_follow_the_largest_nodes_cpus_unless_told() {
        let mut config = machine(vec![node("n0", Place::Local), node("n1", Place::Local)]);
        let mut shards = |cpus, told| {
            config.nodes[1].spec.cpus = cpus;
            config.shards = told;
            config.shards()
        };
        assert_eq!([0, 8, 9, 64, 4096].map(|cpus| shards(cpus, None)), [1, 1, 2, 8, 16]);
        assert_eq!(shards(64, Some(3)), 3);
    }

    #[test]
    fn a_plain_machine_passes() {
        assert_eq!(machine(vec![node("n0", Place::Local), node("n1", Place::Local)]).check(), Ok(()));
    }

    #[test]
    fn each_thing_wrong_has_its_own_sentence() {
        let good = machine(vec![node("n0", Place::Local)]);
        let cases: Vec<(MachineConfig, &str)> = vec![
            (MachineConfig { kernel: PathBuf::new(), ..good.clone() }, "no kernel"),
            (
                MachineConfig {
                    kernel: PathBuf::new(),
                    devices: vec![parse_disk("a.img,node=n1").unwrap()],
                    ..machine(vec![node("n0", Place::Local), node("n1", Place::Local)])
                },
                "no kernel",
            ),
            (MachineConfig { cmdline: "a\nb".into(), ..good.clone() }, "control character"),
            (MachineConfig { shards: Some(0), ..good.clone() }, "0 shards"),
            (MachineConfig { silence: Duration::from_millis(100), ..good.clone() }, "too short"),
            (MachineConfig { hold: Duration::from_secs(1), ..good.clone() }, "stall every other node"),
            (
                machine(vec![NodeConfig { budget: Some(256 << 20), ..node("b", Place::Local) }]),
                "256 MiB, is too small",
            ),
            (machine(vec![node("a b", Place::Local)]), "cannot be a node's name"),
            (machine(vec![node("n0", Place::Local), node("n0", Place::Local)]), "n0"),
            (machine(vec![]), "no node"),
            (machine(vec![node("n0", Place::Local), node("n1", Place::Remote)]), "must prove who it is"),
            (
                MachineConfig {
                    key: Some("k".into()),
                    ..machine(vec![node("n0", Place::Local), node("n1", Place::Remote)])
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
            let nodes = vec![node("n0", Place::Local)];
            let config = MachineConfig { kernel: PathBuf::new(), devices, ..machine(nodes) };
            assert_eq!(config.check(), Ok(()));
        }
    }

    #[test]
    fn a_wildcard_address_needs_fabric_addresses_when_others_join() {
        let mut config = machine(vec![node("n0", Place::Local), node("n1", Place::Remote)]);
        config.key = Some("machine.key".into());
        config.listen = Some("0.0.0.0:7700".parse().unwrap());
        assert!(refusal(&config).contains("cannot reach node \"n0\""));
        config.nodes[0].fabric_listen = vec!["192.0.2.1:0".parse().unwrap()];
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn all_nodes_have_as_many_rails() {
        let mut config = machine(vec![node("n0", Place::Local), node("n1", Place::Local)]);
        let rails = |addresses: &[&str]| addresses.iter().map(|address| address.parse().unwrap()).collect();
        config.nodes[0].fabric_listen = rails(&["192.0.2.1:0", "198.51.100.1:0"]);
        assert!(refusal(&config).contains("node \"n1\" has 1 rails and another node 2"));
        config.nodes[1].fabric_listen = rails(&["192.0.2.2:0", "0.0.0.0:0"]);
        assert!(refusal(&config).contains("0.0.0.0 is all of them"));
        config.nodes[1].fabric_listen = rails(&["192.0.2.2:0", "198.51.100.2:0"]);
        assert_eq!((config.check(), config.rails()), (Ok(()), 2));
    }

    #[test]
    fn local_nodes_join_a_wildcard_listener_over_loopback() {
        let bound = "0.0.0.0:7700".parse().unwrap();
        assert_eq!(MachineConfig::local_join_address(bound), "127.0.0.1:7700".parse().unwrap());
        let bound = "192.0.2.1:7700".parse().unwrap();
        assert_eq!(MachineConfig::local_join_address(bound), bound);
    }
}
