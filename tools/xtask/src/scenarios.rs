//! Guest boots with a name and an expectation: what `test` and `soak` run.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use testbed::boot::{Boot, Outcome, Watch};
use testbed::host::Host;
use testbed::kernels::Kernel;
use testbed::machine::{Machine, Node};
use testbed::rig::Rig;
use testbed::stale::{StaleCode, Whose};
use testbed::verdict;

/// A boot with its checks takes about a minute on an emulated host; a loaded one gets much more.
const LIMIT: Duration = Duration::from_secs(600);
/// Within this the rest of a machine ends when a node is lost.
pub const LOSS_LIMIT: Duration = Duration::from_secs(5);
/// What `occupy` in the guest's init takes of each node's memory, in MiB.
const OCCUPIED_MIB: u64 = 64;
/// How long a guest may take to give a balloon what it asks for, or to take it back.
const BALLOON: Duration = Duration::from_secs(60);
/// How long `gestalt device` may take.
const DEVICE: Duration = Duration::from_secs(100);
/// How long a machine that lost a node is watched before it counts as hanging.
const LOSS_PATIENCE: Duration = Duration::from_secs(30);

/// What is to happen.
#[derive(Clone, Debug)]
pub enum Plan {
    /// Boot, report, `smp-check`, power off.
    Whole,
    /// Boot, report, power off.
    Quick,
    /// Boot, report, use every disk and network card from every node, power off.
    Devices,
    /// Boot, report, `smp-check`, fill half of the memory and read it back, power off.
    Full,
    /// Boot, take memory and free it: the nodes must give it back. Then the balloon grows and shrinks.
    Vacate,
    /// Boot, report, use every disk and network card; then a disk comes and goes so many times, now on one
    /// node and now on another, and a network card once; power off.
    HotPlug {
        /// How often.
        rounds: usize,
    },
    /// Talk to the guest over its console, reboot it from inside, power it off the second time.
    Reboot,
    /// Kill the process of this node so many milliseconds after the guest's user space has begun.
    Kill {
        /// The node's index.
        node: usize,
        /// Milliseconds.
        after_ms: u64,
    },
}

/// One named boot.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it shows.
    pub name: String,
    /// The machine; its actions are set by the plan.
    pub machine: Machine,
    /// What is to happen.
    pub plan: Plan,
    /// Show the guest's console while it runs.
    pub show: bool,
}

/// What a scenario that went well took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// From the start of `gestalt run` to user space with all CPUs.
    pub boot_seconds: Option<f64>,
    /// From the kill of a node to the end of `gestalt run`.
    pub loss_seconds: Option<f64>,
}

impl Scenario {
    /// A scenario on `machine`.
    pub fn new(name: impl Into<String>, machine: Machine, plan: Plan) -> Self {
        let mut machine = machine;
        machine.actions = match plan {
            Plan::Whole => "report,smp-check,poweroff".into(),
            Plan::Quick if machine.boots_from_disk => "report,drivers,devices,poweroff".into(),
            Plan::Quick => "report,poweroff".into(),
            Plan::Devices => "report,drivers,devices,disks,network,poweroff".into(),
            Plan::HotPlug { rounds } => {
                format!("report,drivers,devices,disks,network,hotplug={rounds},poweroff")
            }
            Plan::Full => "report,smp-check,fill,poweroff".into(),
            Plan::Vacate => "report,drivers,occupy,ask".into(),
            Plan::Reboot => "report,ask".into(),
            Plan::Kill { .. } => "loop-smp-check".into(),
        };
        Self { name: name.into(), machine, plan, show: false }
    }

    /// Runs it on hosts that are up.
    ///
    /// # Errors
    /// The expectation is not met. The error holds a [`testbed::stale::StaleCode`] if the emulator is to
    /// blame.
    pub fn run(&self, rig: &Rig) -> Result<Times> {
        let mut console = String::new();
        self.run_to_the_end(rig, &mut console).map_err(|error| match rig.stale_code(&console) {
            Some(stale) if stale.whose == Whose::Guest && self.machine.nodes_with_cpus() > 1 => error
                .context(format!("{stale}, unless a node gave the guest wrong memory: several have CPUs")),
            Some(stale) => error.context(stale),
            None => error,
        })
    }

    /// `console` gets what the guest said.
    fn run_to_the_end(&self, rig: &Rig, console: &mut String) -> Result<Times> {
        let mut boot = Boot::start(rig, &self.machine, None)?;
        let followed = self.follow(rig, &mut boot);
        console.clone_from(&boot.outcome().console);
        let times = followed.map_err(|error| {
            // While the machine, hanging perhaps, is still there.
            anyhow!("{error:#}\n{}", rig.diagnosis())
        })?;
        let left = boot.left_behind(&rig.hosts()[0])?;
        ensure!(left.trim().is_empty(), "processes were left behind:\n{left}");
        Ok(times)
    }

    /// Shows the guest's console, if it is to be shown.
    fn see(&self, bytes: &[u8]) {
        if self.show {
            // A reader that went away does not stop the boot.
            let _ = io::stdout().write_all(bytes).and_then(|()| io::stdout().flush());
        }
    }

    fn follow(&self, rig: &Rig, boot: &mut Boot) -> Result<Times> {
        match self.plan {
            Plan::Whole | Plan::Quick | Plan::Devices | Plan::Full => {
                let outcome = boot.watch(Watch::to_the_end(LIMIT), |bytes| self.see(bytes))?;
                self.judge(&outcome, matches!(self.plan, Plan::Whole | Plan::Full))?;
                Ok(Times { boot_seconds: outcome.boot_seconds(), loss_seconds: None })
            }
            Plan::Vacate => self.memory(rig, boot),
            Plan::HotPlug { rounds } => self.hot_plug(rig, boot, rounds),
            Plan::Reboot => self.reboot(boot),
            Plan::Kill { node, after_ms } => self.kill(rig, boot, node, after_ms),
        }
    }

    fn judge(&self, outcome: &Outcome, checked: bool) -> Result<()> {
        let faults = verdict::faults(&self.machine, outcome, checked);
        if !faults.is_empty() {
            bail!("{}\n{}", faults.join("; "), outcome.tail());
        }
        Ok(())
    }

    /// What the guest has taken and freed leaves its nodes.
    fn memory(&self, rig: &Rig, boot: &mut Boot) -> Result<Times> {
        let mut until = |mark: &str, answer: &str| -> Result<u64> {
            let mut watch = Watch::to_the_end(LIMIT);
            watch.until_mark = Some(mark.into());
            watch.answers = [answer.to_owned()].into();
            boot.watch(watch, |bytes| self.see(bytes))?;
            boot.memory_kib(&rig.hosts()[0])
        };
        let (before, after) = (until("occupied", "")?, until("vacated", "vacate")?);
        resize_balloon(&rig.hosts()[0])?;
        let outcome = boot.watch(Watch::to_the_end(LIMIT), |bytes| self.see(bytes))?;
        self.judge(&outcome, false)?;
        let (gone, expected) =
            (before.saturating_sub(after) / 1024, OCCUPIED_MIB * self.machine.nodes.len() as u64);
        eprintln!(
            "the nodes held {} MiB and gave {gone} MiB back, of {expected} that were freed",
            before / 1024
        );
        // Pieces smaller than 2 MiB, and those whose neighbours are used, stay.
        ensure!(gone >= expected * 3 / 4, "the nodes gave only {gone} MiB back\n{}", outcome.tail());
        Ok(Times { boot_seconds: outcome.boot_seconds(), loss_seconds: None })
    }

    fn reboot(&self, boot: &mut Boot) -> Result<Times> {
        let mut watch = Watch::to_the_end(LIMIT);
        watch.answers = ["sh echo sum=$((6*7))", "reboot", "poweroff"].map(String::from).into();
        let outcome = boot.watch(watch, |bytes| self.see(bytes))?;
        self.judge(&outcome, false)?;
        // The command itself is echoed too, but with the sum not yet done.
        ensure!(
            outcome.console.contains("sum=42"),
            "the guest did not run what was typed\n{}",
            outcome.tail()
        );
        let starts = outcome.count("userspace");
        ensure!(starts == 2, "the guest came up {starts} times instead of 2\n{}", outcome.tail());
        Ok(Times { boot_seconds: outcome.boot_seconds(), loss_seconds: None })
    }

    /// Adds and removes devices as the guest's marks ask for it.
    fn hot_plug(&self, rig: &Rig, boot: &mut Boot, rounds: usize) -> Result<Times> {
        let host = &rig.hosts()[0];
        let mut reach = |mark: String| -> Result<()> {
            let watch = Watch { until_mark: Some(mark.clone()), ..Watch::to_the_end(LIMIT) };
            let outcome = boot.watch(watch, |bytes| self.see(bytes))?;
            ensure!(outcome.count(&mark) > 0, "the guest ended before it said {mark}\n{}", outcome.tail());
            Ok(())
        };
        let image = "/tmp/gestalt-hot.img";
        host.output(&format!("rm -f {image} && truncate -s 16M {image}"), DEVICE)?;
        for round in 1..=rounds {
            reach(format!("want{round}"))?;
            let node = round % self.machine.nodes.len();
            device(host, &format!("add --disk {image},name=hot,node=n{node}"))?;
            reach(format!("used{round}"))?;
            device(host, "remove hot")?;
        }
        reach("want-card".into())?;
        host.output(
            "ip link del gestalt99 2>/dev/null; ip tuntap add gestalt99 mode tap && \
             ip addr add 10.9.99.1/24 dev gestalt99 && ip link set gestalt99 up",
            DEVICE,
        )?;
        device(host, "add --net tap=gestalt99,name=card,node=n1,mac=02:00:00:00:00:63")?;
        reach("used-card".into())?;
        device(host, "remove card")?;
        let outcome = boot.watch(Watch::to_the_end(LIMIT), |bytes| self.see(bytes))?;
        self.judge(&outcome, false)?;
        let said = |key: &str| outcome.facts.text(key).unwrap_or("nothing").to_owned();
        ensure!(said("hotplug") == "ok", "the guest said {}\n{}", said("hotplug"), outcome.tail());
        let busy = said("busy");
        ensure!(busy.ends_with(", 0 wrong"), "the busy disk: {busy}\n{}", outcome.tail());
        for round in 1..=rounds {
            let (near, wanted) =
                (said(&format!("hot.node{round}")), (round % self.machine.nodes.len()).to_string());
            ensure!(near == wanted, "in round {round} the disk was near node {near} instead of {wanted}");
        }
        eprintln!("guest: a disk came and went {rounds} times, and the other disk had {busy}");
        Ok(Times { boot_seconds: outcome.boot_seconds(), loss_seconds: None })
    }

    /// Kills a node of a running guest; everything else must end in time, with an error that names the node.
    fn kill(&self, rig: &Rig, boot: &mut Boot, node: usize, after_ms: u64) -> Result<Times> {
        let outcome = boot.watch(Watch::until_userspace(LIMIT), |bytes| self.see(bytes))?;
        if let Some(early) = boot.wait_end(Duration::from_millis(after_ms))? {
            bail!("the machine ended by itself before the kill\n{}", early.tail());
        }
        let killed = Instant::now();
        boot.kill_node(&rig.hosts()[0], node)?;
        let Some(end) = boot.wait_end(LOSS_PATIENCE)? else {
            bail!("gestalt run still runs {LOSS_PATIENCE:?} after node n{node} was killed");
        };
        let took = killed.elapsed();
        ensure!(end.code != Some(0), "gestalt run ended with 0 after node n{node} was killed");
        ensure!(took <= LOSS_LIMIT, "the rest ended {took:?} after node n{node} was killed\n{}", end.tail());
        let name = format!("n{node}");
        let named = end.messages.lines().any(|line| {
            line.starts_with("gestalt:")
                && line.split(|c: char| !c.is_alphanumeric()).any(|word| word == name)
        });
        ensure!(named, "the error does not name node {name}\n{}", end.tail());
        Ok(Times { boot_seconds: outcome.boot_seconds(), loss_seconds: Some(took.as_secs_f64()) })
    }
}

/// `gestalt device` on the host of the machine; what it says.
fn device(host: &Host, what: &str) -> Result<String> {
    let command = format!("{}/gestalt device --machine test {what}", host.bin().display());
    host.output(&command, DEVICE).with_context(|| format!("gestalt device {what}"))
}

/// Has the balloon take more from the guest, and then give it back.
fn resize_balloon(host: &Host) -> Result<()> {
    for mib in [OCCUPIED_MIB, 0] {
        device(host, &format!("set balloon0 size={mib}M"))?;
        let begin = Instant::now();
        loop {
            let devices: Vec<Value> = serde_json::from_str(&device(host, "list --json")?)?;
            let balloon = devices.iter().find(|device| device["name"] == "balloon0");
            let inflated = balloon.and_then(|device| device["balloon"]["given_up"]["inflated"].as_u64());
            if inflated == Some(mib << 20) {
                break;
            }
            ensure!(begin.elapsed() < BALLOON, "the balloon has {inflated:?} bytes instead of {mib} MiB");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(())
}

/// Two nodes, the second without CPUs: a machine of two nodes that boots quickly on emulated hosts, too.
pub fn with_memory_node() -> Machine {
    let nodes = vec![Node { cpus: 2, memory_mib: 512 }, Node { cpus: 0, memory_mib: 384 }];
    Machine { nodes, ..Machine::equal(1, 1, 512) }
}

/// Shapes of machine beside two equal nodes.
pub fn shapes() -> Vec<Scenario> {
    let of = |nodes: &[(u32, u32)]| {
        let nodes = nodes.iter().map(|&(cpus, memory_mib)| Node { cpus, memory_mib }).collect();
        Machine { nodes, ..Machine::equal(1, 1, 512) }
    };
    let whole = |name: &str, machine| Scenario::new(name, machine, Plan::Whole);
    vec![
        whole("one node boots", Machine::equal(1, 2, 512)),
        whole("three nodes boot", Machine::equal(3, 1, 384)),
        whole("four nodes boot", Machine::equal(4, 1, 384)),
        whole("unequal nodes boot", of(&[(1, 640), (3, 384)])),
        whole("a memory-only node serves", of(&[(2, 512), (0, 512)])),
        whole(
            "eight nodes boot, seven of them without CPUs",
            of(&[[(2, 512)].as_slice(), &[(0, 256); 7]].concat()),
        ),
    ]
}

/// The stock kernels beside the default one.
pub fn kernels() -> Vec<Scenario> {
    let with = |name: &str, kernel| {
        Scenario::new(name, Machine { kernel, ..Machine::equal(2, 1, 512) }, Plan::Quick)
    };
    vec![
        with("Debian 13's full kernel boots", Kernel::Trixie),
        with("Debian 12's cloud kernel boots", Kernel::BookwormCloud),
    ]
}

/// Two nodes that talk over RDMA, for hosts that have a port.
pub fn over_rdma() -> Scenario {
    let machine = Machine { rdma: true, ..Machine::equal(2, 1, 384) };
    Scenario::new("two nodes boot over RDMA", machine, Plan::Whole)
}

/// Each node has a disk and a network card of its own, and others come and go; the CPUs are on the first,
/// which boots quickly everywhere.
pub fn devices(rounds: usize) -> Scenario {
    let machine = Machine { disks: vec![0, 1], cards: vec![0, 1], ..with_memory_node() };
    Scenario::new("CPUs use the disks and network cards of two nodes", machine, Plan::HotPlug { rounds })
}

/// The same, with a disk that comes and goes fifty times.
pub fn hot_plug() -> Scenario {
    Scenario { name: "a disk comes and goes fifty times under I/O".into(), ..devices(50) }
}

/// The same with CPUs on both nodes.
pub fn devices_of_all() -> Scenario {
    let machine = Machine { disks: vec![0, 1], cards: vec![0, 1], ..Machine::equal(2, 2, 512) };
    Scenario::new("CPUs of two nodes use both nodes' disks and network cards", machine, Plan::Devices)
}

/// Nodes that may spend little more than their own part of the guest's memory, by which the kernel, too,
/// holds them.
pub fn budgets() -> Scenario {
    let machine = Machine { budget_mib: Some(282), ..Machine::equal(2, 1, 256) };
    Scenario::new("nodes keep to their budgets", machine, Plan::Full)
}

/// A balloon gives memory of two nodes back that the guest freed.
pub fn balloon() -> Scenario {
    let machine = Machine { balloon: true, ..with_memory_node() };
    Scenario::new("memory that the guest frees leaves its nodes", machine, Plan::Vacate)
}

/// Kernel and initrd come out of the guest's own disk.
pub fn from_disk() -> Scenario {
    let machine = Machine { disks: vec![0], boots_from_disk: true, ..with_memory_node() };
    Scenario::new("a guest boots the kernel on its disk", machine, Plan::Quick)
}

/// One node on each of two hosts.
pub fn two_hosts() -> Scenario {
    let machine = Machine { hosts: 2, ..Machine::equal(2, 2, 512) };
    Scenario::new("two hosts boot one guest", machine, Plan::Whole)
}

/// The same over RDMA, with the CPUs on the first host.
pub fn two_hosts_over_rdma() -> Scenario {
    let machine = Machine { hosts: 2, rdma: true, ..with_memory_node() };
    Scenario::new("two hosts boot one guest over RDMA", machine, Plan::Whole)
}

/// Runs `task` on hosts that are up afterwards too: dead ones are replaced. If the emulator killed a kernel,
/// `task` is run a second time, on new hosts; that is the only reason to do so, and `reruns` tells of it.
pub fn on_live_hosts<T>(
    name: &str,
    rig: &mut Rig,
    reruns: &mut Vec<String>,
    task: impl Fn(&Rig) -> Result<T>,
) -> Result<T> {
    let mut result = announce(name, || task(rig));
    let stale = result.as_ref().err().and_then(|error| error.downcast_ref::<StaleCode>());
    if let Some(stale) = stale.cloned() {
        eprintln!(
            "guest: {name}: {stale}. This is a fault of the rack: it is booted AGAIN, once, on new hosts"
        );
        reruns.push(format!("{name}: {stale}"));
        rig.renew().context("booting new hosts in place of those where stale code ran")?;
        result = announce(&format!("{name}, again"), || task(rig));
    }
    if result.is_err() && !rig.alive() {
        eprintln!("guest: a host is gone: new ones are booted");
        rig.renew().context("booting new hosts in place of dead ones")?;
    }
    result
}

/// Says that a scenario begins, and how it ended.
pub fn announce<T>(name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("guest: {name} ...");
    let begin = Instant::now();
    let result = run();
    let seconds = begin.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("guest: {name}: ok ({seconds:.1} s)"),
        Err(error) => eprintln!("guest: {name}: FAILED after {seconds:.1} s: {error:#}"),
    }
    result
}
