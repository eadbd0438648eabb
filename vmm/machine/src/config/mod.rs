//! The machine as its owner asks for it: what a machine file and the flags of `gestalt run` become.
//!
//! ```text
//! machine.toml ── file ──> MachineConfig ── check ──> CheckedMachine ──> the coordinator
//! flags ── gestalt::cli ──────┘               └─> a sentence: what is wrong and what to do
//! ```
//!
//! | file | concept |
//! |---|---|
//! | this one | the structure that files and flags fill |
//! | [`mod@file`] | machine files |
//! | [`units`] | sizes, durations and names |
//! | [`check`] | the checks that need no host, and the machine that has passed them |
//! | [`devices`] | disks, network cards and the like: asked for, and placed |
//! | [`limits`] | what a device may do each second |
//! | [`rdma`] | which RDMA ports carry the fabric's frames |
//! | [`cloud_init`] | what cloud-init is told |

pub mod check;
pub mod cloud_init;
pub mod devices;
pub mod file;
pub mod limits;
pub mod rdma;
pub mod units;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use firmware::{MachineSpec, NodeSpec};
use serde::{Deserialize, Serialize};

pub use self::check::CheckedMachine;
use self::devices::{DeviceRequest, RequestedKind};
use self::limits::Capacity;
use self::rdma::{FabricKind, RdmaConfig};

/// How long a node or peer may be silent before it counts as lost, unless the machine file says otherwise.
pub const DEFAULT_SILENCE: Duration = Duration::from_secs(3);
/// The shortest silence that can be told from a busy host: several heartbeats (every 0.5 s) must fit.
pub const MIN_SILENCE: Duration = Duration::from_secs(1);
/// The longest silence: the end of a machine waits for most of one if a node was cut off.
pub const MAX_SILENCE: Duration = Duration::from_secs(60);
/// How long a node keeps a page that it just won, unless the machine file says otherwise.
pub const DEFAULT_HOLD: Duration = Duration::from_micros(100);
/// The longest hold: every other node's access to the page waits for it.
pub const MAX_HOLD: Duration = Duration::from_millis(100);
/// The most that [`MachineConfig::timer_rest`] may be.
pub const MAX_TIMER_REST: u32 = 64;
/// CPUs of the largest node for each coherence shard, unless the machine file says how many shards there are:
/// one userfaultfd does not serve more than a few CPUs that fault all the time.
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

/// A mistake in a machine's description, in a sentence that says what to do.
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

/// The host of a node, which says who starts its process.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Default)]
pub enum NodeHost {
    /// The host of `gestalt run`, which starts it.
    #[default]
    Local,
    /// Another, where somebody runs `gestalt node`.
    Remote,
}

/// One node of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Name, CPUs and memory.
    pub spec: NodeSpec,
    /// What it may hold for the guest at most, in bytes: its own memory and copies of the others'. `None`: as
    /// much as comes.
    pub budget: Option<u64>,
    /// What its devices may do all together.
    pub capacity: Capacity,
    /// Where it runs.
    pub host: NodeHost,
    /// Where its fabric listens, an address for each rail. Without any it is the one that its control
    /// connection comes from, which is loopback as long as everything is on one host.
    pub fabric_listen: Vec<SocketAddr>,
}

impl NodeConfig {
    /// A local node with so many CPUs and bytes of memory, and nothing else said about it.
    pub fn new(name: &str, cpus: u32, memory: u64) -> NodeConfig {
        NodeConfig {
            spec: NodeSpec { name: name.into(), cpus, memory },
            budget: None,
            capacity: Capacity::default(),
            host: NodeHost::Local,
            fabric_listen: Vec::new(),
        }
    }
}

/// The whole machine, with how to start it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// For messages and reports.
    pub name: String,
    /// The guest kernel (bzImage or ELF), a path on node 0's host. Empty: what the first disk of node 0 would
    /// boot.
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
    pub devices: Vec<DeviceRequest>,
    /// SLIT distances; empty for 10 and 20.
    pub distances: Vec<Vec<u8>>,
    /// How long a node may say nothing: [`MIN_SILENCE`] to [`MAX_SILENCE`].
    pub silence: Duration,
    /// Coherence shards; `None`: as many as [`MachineConfig::shards`] thinks.
    pub shards: Option<u16>,
    /// How long a node keeps a page that it just won.
    pub hold: Duration,
    /// After a timer interrupt its CPU is left alone for so many times as long as it took. For emulated
    /// hosts, where one may take longer than a tick; 0 on real servers: each interrupt comes at its time.
    pub timer_rest: u32,
    /// Whether instructions may be carried out where their operand is, instead of moving its page.
    pub ship: ShipMode,
    /// The file with the machine's key. Without one, `gestalt run` draws a key for the one run, which it can
    /// give to nodes on its own host only.
    pub key: Option<PathBuf>,
    /// Whether the fabric's frames travel in the clear.
    pub plaintext_fabric: bool,
    /// How long the nodes may take to join; `None` for [`DEFAULT_JOIN_LOCAL`] or [`DEFAULT_JOIN_REMOTE`].
    pub join_timeout: Option<Duration>,
    /// The carrier of the fabric's frames.
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
            timer_rest: 0,
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
    /// Whether the kernel comes out of the first node's first disk.
    pub fn boots_from_disk(&self) -> bool {
        let first = self.nodes.first().map(|node| node.spec.name.as_str());
        let boots = |device: &DeviceRequest| {
            let here = device.node.is_none() || device.node.as_deref() == first;
            here && matches!(device.kind, RequestedKind::Disk { .. })
        };
        self.kernel.as_os_str().is_empty() && self.devices.iter().any(boots)
    }

    /// The machine as firmware sees it.
    pub fn spec(&self) -> MachineSpec {
        MachineSpec {
            nodes: self.nodes.iter().map(|node| node.spec.clone()).collect(),
            distances: self.distances.clone(),
            pci: !self.devices.is_empty(),
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
        self.nodes.iter().any(|node| node.host == NodeHost::Remote)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_follow_the_largest_nodes_cpus_unless_told() {
        let mut config = MachineConfig {
            nodes: ["n0", "n1"].map(|name| NodeConfig::new(name, 1, 256 << 20)).into(),
            ..MachineConfig::default()
        };
        let mut shards = |cpus, told| {
            config.nodes[1].spec.cpus = cpus;
            config.shards = told;
            config.shards()
        };
        assert_eq!([0, 8, 9, 64, 4096].map(|cpus| shards(cpus, None)), [1, 1, 2, 8, 16]);
        assert_eq!(shards(64, Some(3)), 3);
    }

    #[test]
    fn local_nodes_join_a_wildcard_listener_over_loopback() {
        let bound = "0.0.0.0:7700".parse().unwrap();
        assert_eq!(MachineConfig::local_join_address(bound), "127.0.0.1:7700".parse().unwrap());
        let bound = "192.0.2.1:7700".parse().unwrap();
        assert_eq!(MachineConfig::local_join_address(bound), bound);
    }
}
