//! Machine files: TOML to [`MachineConfig`].
//!
//! ```toml
//! name = "demo"                       # for messages; default "gestalt"
//! kernel = "vmlinuz"                  # relative to this file, as is initrd; without one the first node's first
//!                                     # disk says what to boot, and cmdline is appended to what it says
//! initrd = "initrd.img"
//! cmdline = "console=ttyS0"
//! listen = "192.0.2.1:7700"           # default: loopback, any port
//! silence = "3s"                      # a node that says nothing for so long (1 to 60 s) is lost
//! shards = 2                          # threads per node that keep memory coherent; default: by CPUs
//! hold = "100us"                      # how long a node keeps a page it just won
//! ship = "off"                        # or "auto", "always": instructions go to pages, not pages to instructions
//! timer_rest = 8                      # emulated hosts only: after a timer interrupt its CPU is left alone for so
//!                                     # many times as long as it took, 4 s at most; default: 0, each comes at its time
//! join_timeout = "10min"
//! key = "machine.key"                 # of `gestalt key new`, relative to this file; needed for nodes elsewhere
//! plaintext_fabric = false            # true: pages and interrupts travel unprotected; for networks of your own
//! distances = [[10, 20], [20, 10]]    # SLIT
//! fabric = "rdma"                     # default "tcp"; the table [rdma] is described in `rdma.rs`. What travels over
//!                                     # RDMA is neither encrypted nor authenticated
//!
//! [[node]]
//! name = "n0"
//! cpus = 2
//! memory = "512M"
//! budget = "576M"                     # what the server may spend on the guest; default: no limit
//! disk_bandwidth = "400M"             # what all disks of the node may do each second, split by their shares;
//! disk_iops = 8000                    # default: no limit
//! net_bandwidth = "100M"              # the same for all network cards, in each direction; also net_iops
//!
//! [[node]]
//! name = "n1"
//! cpus = 2                            # 0: a memory-only node
//! memory = "512M"
//! where = "remote"                    # default "local": started by `gestalt run`
//! fabric = "192.0.2.2:7701"           # where its fabric listens; an address, with or without port,
//!                                     # or one for each rail: ["192.0.2.2", "198.51.100.2"]
//!
//! [[disk]]
//! path = "root.img"                   # raw image or block device on its node's host; relative to this file
//! node = "n1"                         # default: the first node
//! readonly = true                     # default false
//! unlocked = true                     # use it even where the file system has no locks; default false
//! name = "root"                       # default disk0 and so on
//! serial = "root"                     # default: the name
//! queues = 4                          # default: one for each CPU, 16 at most
//! iops = 500                          # requests each second; default: no limit
//! bandwidth = "20M"                   # bytes each second; default: no limit
//! share = 300                         # of disk_bandwidth and disk_iops of its node; default 100
//!
//! [[net]]
//! tap = "tap0"                        # a TAP interface of its node's host
//! node = "n1"                         # default: the first node
//! name = "outside"                    # default net0 and so on; iops, bandwidth, share as above, in each direction
//! mac = "02:00:00:00:00:07"           # default: made from the names of machine and card
//! queues = 2                          # pairs of queues; default 1
//!
//! [[console]]                         # a second console, hvc0 in the guest
//! socket = "/run/console.sock"        # a Unix socket made on its node's host; relative to this file
//! node = "n1"                         # default: the first node
//!
//! [[channel]]                         # between a program in the guest and one on its node's host
//! name = "org.qemu.guest_agent.0"     # /dev/virtio-ports/NAME in the guest
//! socket = "/run/agent.sock"          # a Unix socket made on its node's host; relative to this file
//! node = "n1"                         # default: the first node
//!
//! [entropy]                           # random numbers from the host
//! node = "n0"                         # default: the first node
//!
//! [balloon]                           # takes back memory that the guest does not use
//! size = "512M"                       # and so much that it does use; default 0
//! node = "n0"                         # default: the first node
//! ```

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use firmware::NodeSpec;
use serde::Deserialize;

use crate::config::devices::{DeviceRequest, RequestedKind, parse_mac};
use crate::config::limits::{Capacity, Limits};
use crate::config::rdma::{FabricKind, RdmaForm};
use crate::config::units::{parse_duration, parse_size};
use crate::config::{ConfigError, MachineConfig, NodeConfig, NodeHost, ShipMode};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    name: Option<String>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    listen: Option<SocketAddr>,
    silence: Option<String>,
    shards: Option<u16>,
    hold: Option<String>,
    timer_rest: Option<u32>,
    #[serde(default)]
    ship: ShipMode,
    join_timeout: Option<String>,
    key: Option<PathBuf>,
    #[serde(default)]
    plaintext_fabric: bool,
    #[serde(default)]
    fabric: FabricKind,
    rdma: Option<RdmaForm>,
    #[serde(default)]
    distances: Vec<Vec<u8>>,
    #[serde(default)]
    node: Vec<NodeForm>,
    #[serde(default)]
    disk: Vec<DiskForm>,
    #[serde(default)]
    net: Vec<NetForm>,
    #[serde(default)]
    console: Vec<ConsoleForm>,
    #[serde(default)]
    channel: Vec<ChannelForm>,
    entropy: Option<EntropyForm>,
    balloon: Option<BalloonForm>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleForm {
    socket: PathBuf,
    node: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChannelForm {
    name: String,
    socket: PathBuf,
    node: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NetForm {
    tap: String,
    node: Option<String>,
    mac: Option<String>,
    queues: Option<u16>,
    name: Option<String>,
    iops: Option<u64>,
    bandwidth: Option<SizeForm>,
    share: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskForm {
    path: PathBuf,
    node: Option<String>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    unlocked: bool,
    serial: Option<String>,
    queues: Option<u16>,
    name: Option<String>,
    iops: Option<u64>,
    bandwidth: Option<SizeForm>,
    share: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EntropyForm {
    node: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BalloonForm {
    size: Option<SizeForm>,
    node: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeForm {
    name: String,
    cpus: u32,
    memory: SizeForm,
    budget: Option<SizeForm>,
    disk_iops: Option<u64>,
    disk_bandwidth: Option<SizeForm>,
    net_iops: Option<u64>,
    net_bandwidth: Option<SizeForm>,
    #[serde(default, rename = "where")]
    host: HostForm,
    #[serde(default)]
    fabric: RailsForm,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "an address such as \"192.0.2.2\", or a list of them")]
enum RailsForm {
    One(String),
    Several(Vec<String>),
}

impl Default for RailsForm {
    fn default() -> Self {
        RailsForm::Several(Vec::new())
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a size such as \"512M\", or a number of bytes")]
enum SizeForm {
    Bytes(u64),
    Text(String),
}

impl SizeForm {
    fn bytes(&self) -> Result<u64, ConfigError> {
        match self {
            SizeForm::Bytes(bytes) => Ok(*bytes),
            SizeForm::Text(text) => parse_size(text),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum HostForm {
    #[default]
    Local,
    Remote,
}

/// Reads a machine file. What it says is not checked beyond its form: see [`MachineConfig::check`].
///
/// # Errors
/// One sentence that begins with the file's name, and the line where it can be told.
pub fn read(path: &Path) -> Result<MachineConfig, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let what = match error.kind() {
            std::io::ErrorKind::NotFound => "it does not exist: check the path".to_string(),
            std::io::ErrorKind::InvalidData => "it is not text: give a machine file in TOML".to_string(),
            _ => error.to_string(),
        };
        ConfigError(format!("the machine file {} cannot be read: {what}", path.display()))
    })?;
    let mut config = parse(&text).map_err(|error| ConfigError(format!("{}: {error}", path.display())))?;
    // A file that is moved together with its kernel keeps working, wherever `gestalt run` is called from.
    let folder = path.parent().unwrap_or(Path::new(""));
    config.kernel = beside(folder, config.kernel);
    config.initrd = config.initrd.map(|initrd| beside(folder, initrd));
    for device in &mut config.devices {
        if let RequestedKind::Disk { path, .. } | RequestedKind::Console { socket: path, .. } =
            &mut device.kind
        {
            *path = beside(folder, std::mem::take(path));
        }
    }
    config.key = config.key.map(|key| beside(folder, key));
    Ok(config)
}

/// The path as seen from `folder`; an empty path (none given) stays empty.
fn beside(folder: &Path, path: PathBuf) -> PathBuf {
    if path.as_os_str().is_empty() { path } else { folder.join(path) }
}

/// Reads the text of a machine file.
///
/// # Errors
/// One sentence, with the line where it can be told.
pub fn parse(text: &str) -> Result<MachineConfig, ConfigError> {
    let form: FileForm = toml::from_str(text).map_err(|error| ConfigError(sentence(text, &error)))?;
    let default = MachineConfig::default();
    let duration = |key: &str, value: Option<String>, default: Duration| match value {
        None => Ok(default),
        Some(value) => parse_duration(&value).map_err(|error| ConfigError(format!("{key}: {error}"))),
    };
    let mut devices = devices(form.disk, form.net, form.entropy, form.balloon)?;
    devices.extend(ports(form.console, form.channel));
    Ok(MachineConfig {
        name: form.name.unwrap_or(default.name),
        kernel: form.kernel.unwrap_or_default(),
        initrd: form.initrd,
        cmdline: form.cmdline.unwrap_or(default.cmdline),
        listen: form.listen,
        nodes: form.node.into_iter().map(node).collect::<Result<_, _>>()?,
        devices,
        distances: form.distances,
        silence: duration("silence", form.silence, default.silence)?,
        shards: form.shards.or(default.shards),
        key: form.key,
        plaintext_fabric: form.plaintext_fabric,
        hold: duration("hold", form.hold, default.hold)?,
        timer_rest: form.timer_rest.unwrap_or(default.timer_rest),
        ship: form.ship,
        join_timeout: match form.join_timeout {
            None => None,
            given => Some(duration("join_timeout", given, Duration::ZERO)?),
        },
        fabric: form.fabric,
        rdma: form.rdma.map(Into::into).unwrap_or_default(),
    })
}

fn devices(
    disks: Vec<DiskForm>,
    cards: Vec<NetForm>,
    entropy: Option<EntropyForm>,
    balloon: Option<BalloonForm>,
) -> Result<Vec<DeviceRequest>, ConfigError> {
    let mut devices = Vec::new();
    for form in disks {
        let limits = limits(form.iops, form.bandwidth)?;
        let DiskForm { path, readonly, unlocked, serial, queues, node, name, share, .. } = form;
        let kind = RequestedKind::Disk { path, readonly, unlocked, serial, queues };
        devices.push(DeviceRequest { node, name, limits, share, kind });
    }
    for form in cards {
        let limits = limits(form.iops, form.bandwidth)?;
        let NetForm { tap, mac, queues, node, name, share, .. } = form;
        let mac = mac.as_deref().map(parse_mac).transpose()?;
        devices.push(DeviceRequest {
            node,
            name,
            limits,
            share,
            kind: RequestedKind::Net { tap, mac, queues },
        });
    }
    devices.extend(entropy.map(|form| DeviceRequest::new(form.node, RequestedKind::Entropy)));
    if let Some(BalloonForm { size, node }) = balloon {
        let size = size.as_ref().map(SizeForm::bytes).transpose()?.unwrap_or(0);
        devices.push(DeviceRequest::new(node, RequestedKind::Balloon { size }));
    }
    Ok(devices)
}

fn limits(iops: Option<u64>, bandwidth: Option<SizeForm>) -> Result<Limits, ConfigError> {
    Ok(Limits { iops, bandwidth: bandwidth.as_ref().map(SizeForm::bytes).transpose()? })
}

fn ports(consoles: Vec<ConsoleForm>, channels: Vec<ChannelForm>) -> impl Iterator<Item = DeviceRequest> {
    let port = |socket, name, node| DeviceRequest::new(node, RequestedKind::Console { socket, name });
    let console = move |ConsoleForm { socket, node }| port(socket, None, node);
    let channel = move |ChannelForm { name, socket, node }| port(socket, Some(name), node);
    consoles.into_iter().map(console).chain(channels.into_iter().map(channel))
}

fn node(form: NodeForm) -> Result<NodeConfig, ConfigError> {
    let at = |error: ConfigError| ConfigError(format!("node {:?}: {error}", form.name));
    let size = |form: &SizeForm| form.bytes().map_err(at);
    let memory = size(&form.memory)?;
    let budget = form.budget.as_ref().map(size).transpose()?;
    let capacity = Capacity {
        disks: limits(form.disk_iops, form.disk_bandwidth).map_err(at)?,
        cards: limits(form.net_iops, form.net_bandwidth).map_err(at)?,
    };
    let rails = match &form.fabric {
        RailsForm::One(address) => std::slice::from_ref(address),
        RailsForm::Several(addresses) => addresses,
    };
    let rails = rails.iter().map(|address| parse_fabric(address));
    let fabric_listen = rails.collect::<Result<_, _>>().map_err(at)?;
    let host = match form.host {
        HostForm::Local => NodeHost::Local,
        HostForm::Remote => NodeHost::Remote,
    };
    let spec = NodeSpec { name: form.name, cpus: form.cpus, memory };
    Ok(NodeConfig { spec, budget, capacity, host, fabric_listen })
}

/// A fabric address: with a port, or without one (the kernel chooses).
///
/// # Errors
/// A sentence with the forms that are understood.
pub fn parse_fabric(text: &str) -> Result<SocketAddr, ConfigError> {
    let address = text.parse().or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 0)));
    address.map_err(|_| {
        ConfigError(format!("{text:?} is not an address: write for example 192.0.2.2 or 192.0.2.2:7701"))
    })
}

/// toml's message in one line, with the line number that its span means.
fn sentence(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().trim().replace('\n', ", ");
    match error.span() {
        Some(span) => {
            let line = text.get(..span.start).unwrap_or(text).matches('\n').count() + 1;
            format!("line {line}: {message}")
        }
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "demo"
        kernel = "vmlinuz"
        initrd = "initrd.img"
        cmdline = "console=ttyS0 quiet"
        listen = "127.0.0.1:7700"
        silence = "4s"
        key = "machine.key"
        plaintext_fabric = true
        [[node]]
        name = "n0"
        cpus = 2
        memory = "512M"
        [[node]]
        name = "n1"
        cpus = 0
        memory = 134217728
        budget = "150M"
        disk_iops = 800
        net_bandwidth = "1M"
        where = "remote"
        fabric = "192.0.2.2"
        [[disk]]
        path = "root.img"
        unlocked = true
        node = "n1"
        serial = "root"
        name = "system"
        iops = 500
        bandwidth = "20M"
        share = 300
        [[net]]
        tap = "tap0"
        mac = "02:00:00:00:00:07"
        [entropy]
        [balloon]
        size = "64M"
        node = "n1"
        [[console]]
        socket = "/run/console.sock"
        [[channel]]
        name = "agent"
        socket = "/run/agent.sock"
        node = "n1"
    "#;

    fn refusal(text: &str) -> String {
        parse(text).unwrap_err().0
    }

    #[test]
    fn a_full_file_becomes_the_machine_it_describes() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.name, "demo");
        assert_eq!(config.initrd, Some("initrd.img".into()));
        assert_eq!(config.listen, Some("127.0.0.1:7700".parse().unwrap()));
        assert_eq!(config.silence, Duration::from_secs(4));
        assert_eq!(config.nodes[0].spec, NodeSpec { name: "n0".into(), cpus: 2, memory: 512 << 20 });
        assert_eq!(config.nodes[0].host, NodeHost::Local);
        assert_eq!(config.nodes[1].spec.memory, 128 << 20);
        assert_eq!([0, 1].map(|node| config.nodes[node].budget), [None, Some(150 << 20)]);
        let disks = Limits { iops: Some(800), bandwidth: None };
        let cards = Limits { iops: None, bandwidth: Some(1 << 20) };
        assert_eq!(
            [0, 1].map(|node| config.nodes[node].capacity),
            [Capacity::default(), Capacity { disks, cards }]
        );
        assert_eq!(config.nodes[1].host, NodeHost::Remote);
        assert_eq!(config.nodes[0].fabric_listen, []);
        assert_eq!(config.nodes[1].fabric_listen, ["192.0.2.2:0".parse().unwrap()]);
        assert_eq!((config.key.as_deref(), config.plaintext_fabric), (Some(Path::new("machine.key")), true));
        let disk = RequestedKind::Disk {
            path: "root.img".into(),
            readonly: false,
            unlocked: true,
            serial: Some("root".into()),
            queues: None,
        };
        let limits = Limits { iops: Some(500), bandwidth: Some(20 << 20) };
        let name = Some("system".to_owned());
        assert_eq!(
            config.devices[0],
            DeviceRequest { node: Some("n1".into()), name, limits, share: Some(300), kind: disk }
        );
        let net = RequestedKind::Net { tap: "tap0".into(), mac: Some([2, 0, 0, 0, 0, 7]), queues: None };
        assert_eq!(config.devices[1], DeviceRequest::new(None, net));
        assert_eq!(config.devices[2], DeviceRequest::new(None, RequestedKind::Entropy));
        let balloon = RequestedKind::Balloon { size: 64 << 20 };
        assert_eq!(config.devices[3], DeviceRequest::new(Some("n1".into()), balloon));
        let port = |socket: &str, name: Option<&str>| RequestedKind::Console {
            socket: socket.into(),
            name: name.map(Into::into),
        };
        let console = DeviceRequest::new(None, port("/run/console.sock", None));
        let channel = DeviceRequest::new(Some("n1".into()), port("/run/agent.sock", Some("agent")));
        assert_eq!(config.devices[4..], [console, channel]);
        config.check().unwrap();
    }

    #[test]
    fn several_rails_are_a_list() {
        let text = GOOD.replace("\"192.0.2.2\"", "[\"192.0.2.2\", \"198.51.100.2:7\"]");
        let rails = ["192.0.2.2:0", "198.51.100.2:7"].map(|address| address.parse().unwrap());
        assert_eq!(parse(&text).unwrap().nodes[1].fabric_listen, rails);
        let said = refusal(&GOOD.replace("\"192.0.2.2\"", "3"));
        assert!(said.contains("an address such as"), "{said}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let said = refusal("kernel = \"k\"\nkernal = \"x\"\n");
        assert!(said.starts_with("line 2: ") && said.contains("kernal"), "{said}");
        let said = refusal("[[node]]\nname = \"n0\"\ncpus = 1\nmemory = 1\nram = 2\n");
        assert!(said.starts_with("line 5: ") && said.contains("ram"), "{said}");
    }

    #[test]
    fn every_refusal_is_one_line() {
        let cases = [
            ("kernel = ", "line 1"),
            ("[[node]]\nname = \"n0\"\ncpus = 1\n", "memory"),
            ("[[node]]\nname = \"n0\"\ncpus = -1\nmemory = 1\n", "line 3"),
            ("[[node]]\nname = \"n0\"\ncpus = 1\nmemory = \"lots\"\n", "\"lots\" is not a size"),
            ("[[node]]\nname = \"n0\"\ncpus = 1\nmemory = true\n", "a size such as"),
            ("[[node]]\nname = \"n0\"\ncpus = 1\nmemory = 1\nwhere = \"moon\"\n", "moon"),
            ("[[node]]\nname = \"n0\"\ncpus = 1\nmemory = 1\nfabric = \"eth0\"\n", "not an address"),
            ("silence = \"soon\"", "not a duration"),
            ("listen = \"here\"", "line 1"),
            ("fabric = \"ether\"", "line 1"),
            ("fabric = \"rdma\"\n[rdma]\nlane = 3\n", "line 3"),
        ];
        for (text, part) in cases {
            let said = refusal(text);
            assert!(said.contains(part) && !said.contains('\n'), "{said:?} for {text:?}");
        }
    }

    #[test]
    fn rdma_is_chosen_by_the_fabric_and_described_by_its_table() {
        let with = |text: &str| parse(&format!("{text}{GOOD}")).unwrap();
        assert_eq!(with("").fabric, FabricKind::Tcp);
        let config = parse(&format!("fabric = \"rdma\"{GOOD}[rdma]\ndevice = \"mlx5_0\"\n")).unwrap();
        assert_eq!(config.fabric, FabricKind::Rdma);
        assert_eq!(config.rdma.settings("n1").device.as_deref(), Some("mlx5_0"));
        let told = |config: MachineConfig| config.check().unwrap().machine([0; 16], Vec::new()).rdma;
        assert_eq!(told(config.clone()), Some(config.rdma));
        assert_eq!(told(with("fabric = \"tcp\"")), None);
    }

    #[test]
    fn a_missing_file_is_named() {
        let said = read(Path::new("no/such/machine.toml")).unwrap_err().0;
        assert!(said.contains("no/such/machine.toml") && said.contains("does not exist"), "{said}");
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.toml");
        std::fs::write(&path, GOOD).unwrap();
        let config = read(&path).unwrap();
        assert_eq!(config.kernel, folder.path().join("vmlinuz"));
        assert_eq!(config.initrd, Some(folder.path().join("initrd.img")));
        let root = folder.path().join("root.img");
        assert!(matches!(&config.devices[0].kind, RequestedKind::Disk { path, .. } if *path == root));
        assert_eq!(config.key, Some(folder.path().join("machine.key")));
    }
}
