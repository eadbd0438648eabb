//! `gestalt run`: reads the description of a machine, refuses one that cannot run, and holds the machine to
//! its end.

use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use crossbeam::channel::{self, Receiver};
use firmware::boot::{self, BootSource};

use super::signals;
use crate::coordinator::event::{Interrupt, Outcome};
use crate::coordinator::spawn::ProcessSpawner;
use crate::coordinator::{Console, Coordinator};
use crate::doctor::{self, Needs};
use crate::operator;
use crate::operator::server::{Asked, Server};
use crate::output::Output;
use crate::terminal;
use machine::config::cloud_init::Seed;
use machine::config::devices::{
    DeviceRequest, RequestedKind, parse_balloon, parse_channel, parse_console, parse_disk, parse_net,
};
use machine::config::file::{self, parse_fabric};
use machine::config::rdma::FabricKind;
use machine::config::units::{parse_duration, parse_size};
use machine::config::{CheckedMachine, ConfigError, MachineConfig, NodeConfig, NodeHost, ShipMode};
use machine::keys::{KeyFile, MachineKey};

/// CPUs per node if nothing is said.
const DEFAULT_CPUS: u32 = 1;
/// Memory per node if nothing is said, in bytes.
const DEFAULT_MEMORY: u64 = 512 << 20;
/// How long the console's last bytes wait for a standard output that takes nothing, once the machine is over.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// Pieces of typed text between the reading thread and the coordinator.
const TYPED: usize = 4;

/// What carries the fabric's frames, as the command line knows it.
#[derive(Copy, Clone, Debug, clap::ValueEnum)]
enum FabricArg {
    /// TCP.
    Tcp,
    /// InfiniBand or RoCE, connected over TCP; neither encrypted nor authenticated.
    Rdma,
}

impl From<FabricArg> for FabricKind {
    fn from(fabric: FabricArg) -> FabricKind {
        match fabric {
            FabricArg::Tcp => FabricKind::Tcp,
            FabricArg::Rdma => FabricKind::Rdma,
        }
    }
}

/// Whether instructions are shipped, as the command line knows it.
#[derive(Copy, Clone, Debug, clap::ValueEnum)]
enum ShipArg {
    /// Never.
    Off,
    /// Where it saves time.
    Auto,
    /// Wherever it is possible.
    Always,
}

impl From<ShipArg> for ShipMode {
    fn from(ship: ShipArg) -> ShipMode {
        match ship {
            ShipArg::Off => ShipMode::Off,
            ShipArg::Auto => ShipMode::Auto,
            ShipArg::Always => ShipMode::Always,
        }
    }
}

/// Flags of `gestalt run`. What is given here goes before what the machine file says.
#[derive(Debug, Args)]
// What may be left out stands in brackets, as in a manual; no link.
#[allow(rustdoc::broken_intra_doc_links)]
pub struct RunArgs {
    /// A machine file (TOML)
    machine: Option<PathBuf>,
    /// The guest kernel: bzImage or ELF [default: the one inside the first node's first disk]
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// The initial RAM file system
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The guest kernel's command line
    #[arg(long)]
    cmdline: Option<String>,
    /// The machine's name in messages and reports
    #[arg(long)]
    name: Option<String>,
    /// Where nodes join; loopback unless nodes on other hosts take part
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// How many nodes, all on this host
    #[arg(long, conflicts_with_all = ["machine", "node"])]
    nodes: Option<u16>,
    /// CPUs of each node
    #[arg(long, conflicts_with_all = ["machine", "node"])]
    cpus: Option<u32>,
    /// Memory of each node, such as 512M
    #[arg(long, conflicts_with_all = ["machine", "node"], value_parser = parse_size)]
    memory: Option<u64>,
    /// What each node may hold of the guest's memory: its own and copies of the others'; default: no limit
    #[arg(long, conflicts_with_all = ["machine", "node"], value_parser = parse_size)]
    budget: Option<u64>,
    /// One node: name=n0,cpus=2,memory=1G[,budget=1200M][,where=remote][,fabric=ADDRESS[:PORT]], and what its
    /// devices may do together: [,disk_bandwidth=SIZE][,disk_iops=NUMBER][,net_bandwidth=SIZE]; give it once
    /// per node, and fabric= once per rail
    #[arg(long, conflicts_with = "machine", value_parser = parse_node)]
    node: Vec<NodeConfig>,
    /// A disk:
    /// PATH[,node=NAME][,name=NAME][,readonly][,unlocked][,serial=TEXT][,queues=NUMBER][,iops=NUMBER][,bandwidth=SIZE]
    /// [,share=NUMBER]; give it once per disk
    #[arg(long, value_name = "PATH[,KEY=VALUE..]", value_parser = parse_disk)]
    disk: Vec<DeviceRequest>,
    /// A network card:
    /// tap=NAME[,node=NAME][,name=NAME][,mac=ADDRESS][,queues=NUMBER][,iops=NUMBER][,bandwidth=SIZE]
    /// [,share=NUMBER]; give it once per card
    #[arg(long, value_name = "tap=NAME[,KEY=VALUE..]", value_parser = parse_net)]
    net: Vec<DeviceRequest>,
    /// Tell cloud-init this host name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Tell cloud-init that this SSH public key may log in; give it once per file
    #[arg(long, value_name = "FILE")]
    ssh_key: Vec<PathBuf>,
    /// Give cloud-init this user data
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Give cloud-init this network configuration; without it, network cards ask DHCP
    #[arg(long, value_name = "FILE")]
    network_config: Option<PathBuf>,
    /// Give the guest the host's random numbers
    #[arg(long)]
    entropy: bool,
    /// A second console, at a Unix socket made on its node's host: SOCKET[,node=NAME]; give it once per
    /// console
    #[arg(long, value_name = "SOCKET[,node=NAME]", value_parser = parse_console)]
    console: Vec<DeviceRequest>,
    /// A channel to a program in the guest, such as an agent: NAME=SOCKET[,node=NAME]; give it once per
    /// channel
    #[arg(long, value_name = "NAME=SOCKET[,node=NAME]", value_parser = parse_channel)]
    channel: Vec<DeviceRequest>,
    /// Take back memory that the guest does not use, and SIZE (default 0) that it does: [SIZE][,node=NAME]
    #[arg(long, value_name = "SIZE[,node=NAME]", value_parser = parse_balloon, num_args = 0..=1,
          default_missing_value = "")]
    balloon: Option<DeviceRequest>,
    /// A node that says nothing for so long is lost: 1 s to 60 s
    #[arg(long, value_parser = parse_duration)]
    silence: Option<Duration>,
    /// Threads per node that keep memory coherent; default: one for every eight CPUs of the largest node
    #[arg(long)]
    shards: Option<u16>,
    /// How long a node keeps a page that it just won
    #[arg(long, value_parser = parse_duration)]
    hold: Option<Duration>,
    /// Whether instructions on a page that stays at another node are carried out there; "always" is for tests
    #[arg(long, value_enum)]
    ship: Option<ShipArg>,
    /// What carries pages and messages between nodes
    #[arg(long, value_enum)]
    fabric: Option<FabricArg>,
    /// How long nodes may take to join
    #[arg(long, value_parser = parse_duration)]
    join_timeout: Option<Duration>,
    /// The machine's key, of `gestalt key new`; needed if nodes on other hosts take part
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Let pages and interrupts travel between nodes unprotected; for networks of your own
    #[arg(long)]
    plaintext_fabric: bool,
    /// Write counters of the run to this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write registers and traces of a failure to files in this folder instead of standard error
    #[arg(long, value_name = "FOLDER")]
    dump_dir: Option<PathBuf>,
}

/// Runs the machine; the exit code.
///
/// # Errors
/// One sentence: what is wrong with the request or this host, or which node failed how.
pub fn run(args: RunArgs, verbose: u8) -> anyhow::Result<u8> {
    terminal::queue_lines().context("messages cannot be queued")?;
    let config = args.config()?.check()?;
    check_files(&config)?;
    let key = match &config.key {
        Some(path) => KeyFile::read(path)?.for_machine()?,
        // For this run alone; the nodes that it starts get theirs from it.
        None => MachineKey::generate()?,
    };
    if let Some(how) = unprotected(&config) {
        tracing::warn!(
            "the fabric {how}: who can reach its network can read and change the guest's memory; use a network of the \
             machine's own"
        );
    }
    let report = args.report.as_deref().map(open_report).transpose()?;
    signals::block().context("signals cannot be blocked")?;
    let program = std::env::current_exe().context("this program's own file cannot be found")?;
    let mut arguments = vec!["--spawned".to_string()];
    arguments.extend((0..verbose).map(|_| "-v".to_string()));
    let spawner = ProcessSpawner::new(program, arguments);
    let name = config.name.clone();
    let local: Vec<_> = config.nodes.iter().filter(|node| node.host == NodeHost::Local).cloned().collect();
    let coordinator = Coordinator::bind(config, key, Box::new(spawner))?;
    if !local.is_empty() {
        let needs = Needs {
            cpus: local.iter().map(|node| node.spec.cpus).max().unwrap_or(0),
            memory: local.iter().map(|node| node.spec.memory).sum(),
        };
        doctor::check_can_run(&needs).map_err(|why| anyhow::anyhow!("{why} (`gestalt doctor` says more)"))?;
    }
    let (asked, requests) = channel::unbounded();
    // Without it the machine runs as well, and cannot be changed meanwhile.
    let server = Server::start(&operator::place::folder(), &name, asked)
        .inspect_err(|error| tracing::warn!("`gestalt device` cannot reach this machine: {error}"));
    let outcome = hold(coordinator, (server.ok(), requests), args.dump_dir, report)?;
    match outcome {
        Outcome::PoweredOff => Ok(0),
        Outcome::Interrupted(Interrupt::Escape) => Ok(0),
        Outcome::Interrupted(Interrupt::Signal(signal)) => Ok(128 + signal as u8),
        Outcome::Failed(why) => Err(anyhow::anyhow!(why)),
    }
}

/// In which way the fabric's frames travel unprotected, if they do.
fn unprotected(config: &MachineConfig) -> Option<&'static str> {
    match config.fabric {
        FabricKind::Rdma => Some("is RDMA, which is neither encrypted nor authenticated"),
        FabricKind::Tcp if config.plaintext_fabric => Some("is in plaintext"),
        FabricKind::Tcp => None,
    }
}

/// Connects the coordinator to terminal and signals and runs it.
fn hold(
    coordinator: Coordinator,
    (server, requests): (Option<Server>, Receiver<Asked>),
    dumps: Option<PathBuf>,
    report: Option<(PathBuf, File)>,
) -> anyhow::Result<Outcome> {
    let (typed, input) = channel::bounded(TYPED);
    let (interrupt, interrupts) = channel::unbounded();
    terminal::end_on_panic();
    let _restore = terminal::Restore;
    signals::watch(interrupt.clone())?;
    let gap = |bytes| {
        tracing::warn!("standard output stood still: {bytes} bytes of what the guest wrote were left out");
        // Not among the guest's output.
        Vec::new()
    };
    let output = Output::start(std::io::stdout(), gap)?;
    let guest = output.clone();
    let mut reader = Some((typed, interrupt));
    let attach = move |attached: bool| {
        if !attached {
            return terminal::leave_raw();
        }
        match terminal::enter_raw() {
            Ok(true) => terminal::say(terminal::ESCAPE_HINT),
            Ok(false) => {}
            Err(error) => tracing::warn!("the terminal stays in its usual mode: {error}"),
        }
        // Once: the thread outlives reboots.
        if let Some((typed, interrupt)) = reader.take() {
            // A closed channel means that the machine is over anyway.
            let leave = move || {
                let _ = interrupt.send(Interrupt::Escape);
            };
            if let Err(error) = terminal::read_input(typed, leave) {
                tracing::warn!("nothing can be typed: {error}");
            }
        }
    };
    let console = Console {
        input,
        interrupts,
        requests,
        attach: Box::new(attach),
        output: Box::new(move |bytes| guest.push(bytes)),
        dumps,
    };
    let ended = coordinator.run(console)?;
    terminal::leave_raw();
    let reported = report.map_or(Ok(()), |(path, mut file)| {
        let text = format!("{:#}\n", ended.report);
        file.write_all(text.as_bytes()).with_context(|| format!("{} cannot be written", path.display()))
    });
    drop(server);
    // The machine is over, and a slow terminal may take long: whoever does not want to wait for it need not.
    signals::release();
    if !output.settle(LAST_OUTPUT) {
        tracing::warn!("standard output stands still: the guest's last output is lost");
    }
    reported?;
    Ok(ended.outcome)
}

/// Finds out at once, not after the run, whether the report can be written.
fn open_report(path: &Path) -> anyhow::Result<(PathBuf, File)> {
    let file = File::create(path).with_context(|| {
        format!("the report cannot be written to {}: choose another file", path.display())
    })?;
    Ok((path.to_path_buf(), file))
}

/// Kernel and initrd are on node 0's host; if that is this one, they can be looked at now.
fn check_files(config: &CheckedMachine) -> anyhow::Result<()> {
    if config.nodes[0].host == NodeHost::Local && !config.boots_from_disk() {
        let source =
            BootSource { kernel: &config.kernel, initrd: config.initrd.as_deref(), cmdline: &config.cmdline };
        boot::check(&source, &config.spec())?;
    }
    Ok(())
}

impl RunArgs {
    /// The machine that file and flags describe together; not checked yet.
    fn config(&self) -> Result<MachineConfig, ConfigError> {
        let mut config = match &self.machine {
            Some(path) => file::read(path)?,
            None => MachineConfig { nodes: self.flag_nodes(), ..MachineConfig::default() },
        };
        fn set<T: Clone>(to: &mut T, from: &Option<T>) {
            if let Some(value) = from {
                *to = value.clone();
            }
        }
        set(&mut config.kernel, &self.kernel);
        set(&mut config.cmdline, &self.cmdline);
        set(&mut config.name, &self.name);
        set(&mut config.silence, &self.silence);
        set(&mut config.hold, &self.hold);
        set(&mut config.ship, &self.ship.map(ShipMode::from));
        set(&mut config.fabric, &self.fabric.map(FabricKind::from));
        config.devices.extend(self.disk.iter().chain(&self.net).cloned());
        let seed = Seed {
            hostname: self.hostname.clone(),
            ssh_keys: self.ssh_key.clone(),
            user_data: self.user_data.clone(),
            network_config: self.network_config.clone(),
        };
        if !seed.is_empty() {
            config.devices.push(seed.request(&config.name)?);
        }
        if self.entropy {
            config.devices.push(DeviceRequest::new(None, RequestedKind::Entropy));
        }
        config.devices.extend(self.console.iter().chain(&self.channel).chain(&self.balloon).cloned());
        config.listen = self.listen.or(config.listen);
        config.shards = self.shards.or(config.shards);
        config.initrd = self.initrd.clone().or(config.initrd);
        config.key = self.key.clone().or(config.key);
        config.plaintext_fabric |= self.plaintext_fabric;
        config.join_timeout = self.join_timeout.or(config.join_timeout);
        Ok(config)
    }

    fn flag_nodes(&self) -> Vec<NodeConfig> {
        if !self.node.is_empty() {
            return self.node.clone();
        }
        let (cpus, memory) = (self.cpus.unwrap_or(DEFAULT_CPUS), self.memory.unwrap_or(DEFAULT_MEMORY));
        let node =
            |index| NodeConfig { budget: self.budget, ..NodeConfig::new(&format!("n{index}"), cpus, memory) };
        (0..self.nodes.unwrap_or(1)).map(node).collect()
    }
}

/// A node from `name=n0,cpus=2,memory=1G[,budget=1200M][,where=remote][,fabric=ADDRESS]`.
fn parse_node(text: &str) -> Result<NodeConfig, ConfigError> {
    let wrong = |why: String| ConfigError(format!("{why}: write for example name=n0,cpus=2,memory=1G"));
    let mut name = None;
    let mut node = NodeConfig::new("", DEFAULT_CPUS, DEFAULT_MEMORY);
    for part in text.split(',') {
        let (key, value) =
            part.split_once('=').ok_or_else(|| wrong(format!("{part:?} is not of the form key=value")))?;
        match (key, value) {
            ("name", value) => name = Some(value.to_string()),
            ("cpus", value) => {
                node.spec.cpus =
                    value.parse().map_err(|_| wrong(format!("{value:?} is not a number of CPUs")))?;
            }
            ("memory", value) => node.spec.memory = parse_size(value)?,
            ("budget", value) => node.budget = Some(parse_size(value)?),
            ("where", "local") => node.host = NodeHost::Local,
            ("where", "remote") => node.host = NodeHost::Remote,
            ("where", value) => return Err(wrong(format!("where={value} is neither local nor remote"))),
            ("fabric", value) => node.fabric_listen.push(parse_fabric(value)?),
            (key, value) if node.capacity.set(key, value)? => {}
            (key, _) => return Err(wrong(format!("a node has no {key:?}"))),
        }
    }
    node.spec.name = name.ok_or_else(|| wrong(format!("{text:?} gives the node no name")))?;
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Command, FromArgMatches};

    /// As far as [`run`] goes before it touches what a machine names: kernel, key and disks are not on the
    /// host of a test.
    #[test]
    fn every_example_is_accepted_and_told_of() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
        let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let examples: Vec<_> =
            files.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
        assert!(!examples.is_empty(), "{} has no machine file", folder.display());
        let told = std::fs::read_to_string(folder.join("README.md")).unwrap();
        for path in examples {
            let command = RunArgs::augment_args(Command::new("run"));
            let given = command.try_get_matches_from([Path::new("run"), &path]).unwrap();
            let args = RunArgs::from_arg_matches(&given).unwrap();
            if let Err(why) = args.config().and_then(MachineConfig::check) {
                panic!("{} is refused: {why}", path.display());
            }
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(told.contains(&format!("| `{name}` |")), "examples/README.md does not tell of {name}");
        }
    }

    #[test]
    fn a_fabric_that_protects_nothing_is_named_for_it() {
        let tcp = MachineConfig::default();
        let rdma = MachineConfig { fabric: FabricKind::Rdma, ..tcp.clone() };
        let plaintext = MachineConfig { plaintext_fabric: true, ..tcp.clone() };
        assert_eq!(unprotected(&tcp), None);
        assert_eq!(unprotected(&rdma), Some("is RDMA, which is neither encrypted nor authenticated"));
        assert_eq!(unprotected(&plaintext), Some("is in plaintext"));
    }

    #[test]
    fn the_readme_says_that_rdma_is_not_protected_wherever_it_says_that_pages_travel_sealed() {
        let readme =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
        let text = readme.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains("Over TCP pages and interrupts travel sealed; over RDMA they do not"));
        assert!(text.contains("**RDMA traffic is neither encrypted nor authenticated**"));
    }

    #[test]
    fn a_node_flag_describes_a_node() {
        let node =
            parse_node("name=a,cpus=0,memory=1G,where=remote,fabric=192.0.2.2:1,fabric=192.0.3.2").unwrap();
        assert_eq!(node.spec, firmware::NodeSpec { name: "a".into(), cpus: 0, memory: 1 << 30 });
        assert_eq!(node.host, NodeHost::Remote);
        let rails = ["192.0.2.2:1", "192.0.3.2:0"].map(|address| address.parse().unwrap());
        assert_eq!(node.fabric_listen, rails);
        let node = parse_node("name=a,disk_iops=500,net_bandwidth=1M").unwrap();
        assert_eq!((node.capacity.disks.iops, node.capacity.cards.bandwidth), (Some(500), Some(1 << 20)));
    }

    #[test]
    fn a_bad_node_flag_is_explained() {
        for (text, part) in [
            ("cpus=2", "no name"),
            ("name=a,cpus=two", "\"two\" is not a number"),
            ("name=a,memory=big", "\"big\" is not a size"),
            ("name=a,where=moon", "neither local nor remote"),
            ("name=a,colour=red", "no \"colour\""),
            ("name=a,disk_colour=red", "no \"disk_colour\""),
            ("name", "key=value"),
        ] {
            let said = parse_node(text).unwrap_err().0;
            assert!(said.contains(part), "{said}");
        }
    }
}
