//! `cargo xtask devices`: how much faster a disk or a network card is for a CPU of its own node than for one
//! of another, and how both compare with QEMU, with the same guest, images and interfaces on the same host.
//!
//! The guest (`throughput` in `files/guest-init.sh`) moves some bytes through each device from each node,
//! three times; the best counts. QEMU runs it on one node, of course.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use testbed::artifacts;
use testbed::boot::{Boot, Watch};
use testbed::host::{Host, shell};
use testbed::machine::Machine;
use testbed::report::{Console, Facts, Said};
use testbed::rig::Rig;

use crate::image::debian_image;
use crate::options::Options;
use crate::report;

/// What the host needs: QEMU, and what talks to the guest's cards.
const PACKAGES: [&str; 2] = ["busybox-static", "qemu-system-x86"];
/// Size of the disk with these, in MiB.
const TOOLS_MIB: u64 = 3072;
/// Where an emulated host has it.
const TOOLS: &str = "/mnt";
/// A whole run.
const LIMIT: Duration = Duration::from_secs(900);
/// For commands on the host.
const SHORT: Duration = Duration::from_secs(60);

/// Flags of the task.
#[derive(Args)]
pub struct Devices {
    /// How much is moved at a time, in KiB, a multiple of 64
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..=8192))]
    kib: u64,
    /// Pairs of queues of each card [default: one for each CPU]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    card_queues: Option<u32>,
    #[command(flatten)]
    options: Options,
}

/// `target/report/devices.json`: MiB each second.
#[derive(Serialize)]
struct Report {
    emulated: bool,
    kib: u64,
    card_queues: u32,
    rows: Vec<Row>,
}

/// One way through a kind of device.
#[derive(Serialize)]
struct Row {
    /// `disk read`, and so on.
    what: String,
    /// From a CPU of the device's node; the better one of the nodes.
    own_node: f64,
    /// From a CPU of another node; the better one of the nodes.
    other_node: f64,
    /// With QEMU.
    qemu: f64,
}

impl Devices {
    /// Does the task.
    ///
    /// # Errors
    /// A guest does not come to its end, or something cannot be measured.
    pub fn run(&self) -> Result<()> {
        report::forget("devices")?;
        ensure!(self.kib.is_multiple_of(64), "--kib must be a multiple of 64");
        self.options.refuse_bochs()?;
        let mut machine = self.options.machine()?;
        ensure!(machine.hosts == 1, "QEMU runs on one host: leave --hosts out");
        machine.disks = (0..machine.nodes.len()).collect();
        machine.cards.clone_from(&machine.disks);
        machine.card_queues = self.card_queues.unwrap_or(machine.cpus().min(16));
        machine.actions = format!("report,drivers,throughput={},poweroff", self.kib << 10);
        let image = debian_image(&PACKAGES.map(String::from), TOOLS_MIB)?;
        let binaries = artifacts::build()?;
        let mut config = self.options.rig(&[&machine]);
        config.hardware.disks = vec![image];
        let rig = Rig::start(&config, &binaries)?;
        let host = &rig.hosts()[0];
        ensure!(rig.emulated().is_some(), "only emulated hosts have the disk with QEMU: add --emulate");
        host.output(&enter_tools(), SHORT).context("mounting the disk with QEMU")?;
        // Until the end of this function.
        let _servers = host.spawn(shell(&self.servers()))?;
        println!("measuring with gestalt ...");
        let mut boot = Boot::start(&rig, &machine, None)?;
        let outcome = boot.watch(Watch::to_the_end(LIMIT), |_| {})?;
        ensure!(outcome.code == Some(0), "gestalt ended with {:?}\n{}", outcome.code, outcome.tail());
        let gestalt = outcome.facts.clone();
        println!("measuring with QEMU ...");
        let qemu = run_qemu(host, &machine)?;
        for facts in [&gestalt, &qemu] {
            if let Some(failed) = facts.text("throughput_failed") {
                bail!("not all bytes came: {failed}\n{}", outcome.tail());
            }
        }
        let rows = self.rows(&machine, &gestalt, &qemu).with_context(|| outcome.tail())?;
        let report = Report { emulated: true, kib: self.kib, card_queues: machine.card_queues, rows };
        report.print();
        println!("written to {}", report::write("devices", &report)?.display());
        Ok(())
    }

    /// For the guest's cards: takes what comes on port 5001, and sends some on port 5002, again and again.
    fn servers(&self) -> String {
        let busybox = format!("chroot {TOOLS} busybox");
        let serve = |port: u16, way: &str| {
            format!("(while :; do {busybox} nc -l -p {port} {way} || sleep 0.2; done) 2> /dev/null &\n")
        };
        format!("head -c {} /dev/urandom > {TOOLS}/tmp/data; mkfifo {TOOLS}/tmp/never\n", self.kib << 10)
            + &serve(5001, &format!("0<>{TOOLS}/tmp/never > /dev/null"))
            + &serve(5002, &format!("< {TOOLS}/tmp/data > /dev/null"))
            + "wait\n"
    }

    fn rows(&self, machine: &Machine, gestalt: &Facts, qemu: &Facts) -> Result<Vec<Row>> {
        let with_cpus: Vec<usize> =
            (0..machine.nodes.len()).filter(|node| machine.nodes[*node].cpus > 0).collect();
        let mib = self.kib as f64 / 1024.0;
        // The best of all rounds of all these ways.
        let best = |facts: &Facts, ways: &[String]| {
            let rounds = ways.iter().flat_map(|way| (1..=3).map(move |round| format!("{way}.{round}")));
            let times = rounds.filter_map(|key| facts.text(&key)?.parse::<f64>().ok());
            let best = times.fold(f64::INFINITY, f64::min);
            ensure!(best.is_finite() && best > 0.0, "nothing was measured of {}", ways.join(", "));
            Ok(mib / best)
        };
        let mut rows = Vec::new();
        for (kind, way) in [("disk", "write"), ("disk", "read"), ("card", "send"), ("card", "receive")] {
            // Device i is on node i.
            let name = |device: usize| if kind == "disk" { format!("s{device}") } else { device.to_string() };
            let ways = |own: bool| -> Vec<String> {
                let pairs =
                    with_cpus.iter().flat_map(|&node| (0..machine.nodes.len()).map(move |d| (node, d)));
                let pairs = pairs.filter(|(node, device)| (node == device) == own);
                pairs.map(|(node, device)| format!("node{node}.{kind}.{}.{way}", name(device))).collect()
            };
            rows.push(Row {
                what: format!("{kind}, {way}"),
                own_node: best(gestalt, &ways(true))?,
                other_node: best(gestalt, &ways(false))?,
                qemu: best(qemu, &[format!("node0.{kind}.{}.{way}", name(0))])?,
            });
        }
        Ok(rows)
    }
}

/// Makes the programs on the disk with QEMU usable.
fn enter_tools() -> String {
    let binds = ["dev", "proc", "sys", "gestalt"]
        .map(|dir| format!("mkdir -p {TOOLS}/{dir}; mount --bind /{dir} {TOOLS}/{dir}"));
    // Images that the machine file names lie in the host's /tmp.
    format!(
        "mount /dev/vdb1 {TOOLS} && {{ {}; mkdir -p {TOOLS}/host-tmp; \
         mount --bind /tmp {TOOLS}/host-tmp; mount -t tmpfs tmpfs {TOOLS}/tmp; }}",
        binds.join("; ")
    )
}

/// The same guest with the same images and interfaces; what it says.
fn run_qemu(host: &Host, machine: &Machine) -> Result<Facts> {
    let guest = host.dir().join("guest");
    let (guest, kernel) = (guest.display(), machine.kernel.name());
    let mut script = machine.prepare(0);
    script += &format!(
        "exec chroot {TOOLS} qemu-system-x86_64 -accel kvm -cpu host -machine q35 -smp 1 -m {} -nodefaults -no-reboot \
         -display none -serial stdio -kernel {guest}/{kernel} -initrd {guest}/initramfs \
         -append 'console=ttyS0 nowatchdog gestalt.run={}'",
        machine.nodes[0].memory_mib, machine.actions
    );
    for (index, path) in machine.disk_paths().into_iter().enumerate() {
        let path = match path.strip_prefix("/tmp/") {
            Some(name) => format!("/host-tmp/{name}"),
            None => host.dir().join("share").join(path).display().to_string(),
        };
        script += &format!(
            " -drive if=none,id=d{index},file={path},format=raw,cache=writeback \
             -device virtio-blk-pci,drive=d{index},serial=s{index}"
        );
    }
    for index in 0..machine.cards.len() {
        let queues = machine.card_queues;
        let (several, pairs) = match queues {
            1 => (String::new(), String::new()),
            _ => (format!(",queues={queues}"), format!(",mq=on,vectors={}", 2 * queues + 2)),
        };
        script += &format!(
            " -netdev tap,id=c{index},ifname=gestalt{index},script=no,downscript=no{several} \
             -device virtio-net-pci,netdev=c{index},mac=02:00:00:00:00:{index:02x}{pairs}"
        );
    }
    let script = format!("cd {}\n{script} < /dev/null", host.dir().join("share").display());
    let said = host.output(&script, LIMIT).context("running QEMU")?;
    let mut facts = BTreeMap::new();
    for said in Console::default().take(said.as_bytes()) {
        if let Said::Fact(key, value) = said {
            facts.insert(key, value);
        }
    }
    Ok(Facts(facts))
}

impl Report {
    fn print(&self) {
        println!("\nMiB each second, {} KiB at a time, best of three; hosts are EMULATED", self.kib);
        println!("  way              own node  other node  other/own      QEMU   own/QEMU");
        for Row { what, own_node, other_node, qemu } in &self.rows {
            let (far, peer) = (other_node / own_node, own_node / qemu);
            println!("  {what:<15} {own_node:>9.2} {other_node:>11.2} {far:>10.3} {qemu:>9.2} {peer:>10.2}");
        }
    }
}
