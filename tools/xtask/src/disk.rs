//! `cargo xtask quickstart -- --disk`: a Debian boots from its own disk over several nodes, somebody logs in
//! over ssh and uses the disks of all nodes from the CPUs of all nodes.
//!
//! ```text
//! Debian image -> gestalt run -> ssh -> disk-check.sh: each disk from each node, a striped file system -> poweroff
//!                                        └ COUNT: bytes that the hosts' network carried until now
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::artifacts;
use testbed::boot::Boot;
use testbed::debian;
use testbed::login::{self, Login};
use testbed::machine::Machine;
use testbed::rig::Rig;

use crate::image::debian_for_checks;
use crate::options::Options;
use crate::report;

const CHECK: &str = include_str!("../../testbed/files/disk-check.sh");
/// Where an emulated host has the first disk that it is given.
const EMULATED_DISK: &str = "/dev/vdb";
/// From the start until somebody can log in. An emulated host takes about a minute.
const LOGIN_LIMIT: Duration = Duration::from_secs(600);
/// Until systemd has started all it has to.
const SYSTEM_LIMIT: Duration = Duration::from_secs(300);
/// For all that is done with the disks.
const CHECK_LIMIT: Duration = Duration::from_secs(1200);
/// From the order to power off to the end.
const OFF_LIMIT: Duration = Duration::from_secs(180);
/// Bytes that each run with verification writes and reads.
const VERIFIED: u64 = 512 << 10;
/// Bytes of each measured run.
const MEASURED: u64 = 2 << 20;

/// `target/report/disk.json`.
#[derive(Default, Serialize)]
struct Report {
    nodes: usize,
    hosts: usize,
    emulated: bool,
    /// `uname -r` of the guest.
    kernel: Option<String>,
    /// The root file system and its device.
    root: Option<String>,
    /// From the start of `gestalt run` to the first login.
    ssh_seconds: f64,
    /// What systemd says of the whole system: `running` if all is well.
    system_state: String,
    units_failed: Vec<String>,
    /// Each disk from a CPU of each node.
    pairs: Vec<Pair>,
    /// Level and members of the striped file system.
    stripe: Option<String>,
    /// Files of it that were read and found right after it was mounted again, by the nodes of the reader and
    /// the writer.
    stripe_verified: Vec<(usize, usize)>,
    /// Whether the guest ended by itself and `gestalt run` with 0.
    clean_poweroff: bool,
    /// Counters of the whole run, of `gestalt run --report`.
    counters: Option<Value>,
}

/// A disk used from a CPU.
#[derive(Serialize)]
struct Pair {
    cpu_node: usize,
    disk_node: usize,
    /// Bytes that were written at random places, read back and found right.
    verified_bytes: u64,
    read: Way,
    write: Way,
}

/// Through the page cache, from the beginning on.
#[derive(Serialize)]
struct Way {
    /// Until it was read, or on the disk.
    mib_per_second: f64,
    /// Bytes between nodes for each byte read or written, as the network of the hosts counts them: its
    /// headers included, and all that the machine does meanwhile; less what two counts in a row differ by.
    /// Null over RDMA on one host, which no interface counts.
    moved_per_byte: Option<f64>,
}

/// What the check has said.
#[derive(Default)]
struct Said {
    facts: BTreeMap<String, String>,
    runs: BTreeMap<String, Value>,
    counts: BTreeMap<String, u64>,
    done: bool,
}

/// Does the task.
///
/// # Errors
/// The step that failed, and the end of the guest's console.
pub fn run(options: &Options) -> Result<()> {
    report::forget("disk")?;
    options.refuse_bochs()?;
    let mut machine = options.machine()?;
    ensure!(machine.nodes[0].cpus > 0, "--disk needs a CPU on the first node");
    ensure!(machine.nodes.len() <= 8, "--disk is for 8 nodes at most");
    machine.disks = (0..machine.nodes.len()).collect();
    machine.cards.clone_from(&machine.disks);
    let image = debian_for_checks()?;
    let binaries = artifacts::build()?;
    let mut config = options.rig(&[&machine]);
    config.hardware.disks = vec![image.clone()];
    let rig = Rig::start(&config, &binaries)?;
    let host = &rig.hosts()[0];
    machine.system = Some(if rig.emulated().is_some() {
        EMULATED_DISK.to_owned()
    } else {
        let copy = rig.stage().join("share/debian.raw");
        debian::copy(&image, &copy)?;
        copy.display().to_string()
    });
    machine.flags.extend(login::prepare(host, rig.stage(), machine.cards.len())?);
    println!("booting Debian over {} nodes; this takes minutes on emulated hosts", machine.nodes.len());
    let boot = Boot::start(&rig, &machine, None)?;
    let mut course = Course { rig: &rig, machine: &machine, boot, step: String::new() };
    let report = match course.follow() {
        Ok(report) => report,
        Err(error) => {
            let (step, console) = (&course.step, course.boot.outcome().tail());
            bail!("failed while {step}: {error:#}\n{console}\n{}", rig.diagnosis())
        }
    };
    report.print();
    println!("written to {}", report::write("disk", &report)?.display());
    report.judge(&machine).with_context(|| course.boot.outcome().tail())
}

/// A machine on its way through all steps.
struct Course<'a> {
    rig: &'a Rig,
    machine: &'a Machine,
    boot: Boot,
    /// What it is at.
    step: String,
}

impl Course<'_> {
    fn enter(&mut self, step: &str) {
        println!("{:6.1} s  {step}", self.boot.started().elapsed().as_secs_f64());
        step.clone_into(&mut self.step);
    }

    fn follow(&mut self) -> Result<Report> {
        let mut report = Report {
            nodes: self.machine.nodes.len(),
            hosts: self.machine.hosts,
            emulated: self.rig.emulated().is_some(),
            ..Report::default()
        };
        let login = Login::new(&self.rig.hosts()[0], "10.9.0.2");
        self.enter("waiting until somebody can log in");
        login.wait(&mut self.boot, LOGIN_LIMIT)?;
        report.ssh_seconds = self.boot.started().elapsed().as_secs_f64();
        self.enter("waiting until systemd has started everything");
        let ask = "systemctl is-system-running --wait; systemctl list-units --failed --no-legend --plain";
        let said = login.output(&mut self.boot, ask, SYSTEM_LIMIT)?;
        let mut lines = said.lines().filter(|line| !line.is_empty());
        lines.next().unwrap_or_default().clone_into(&mut report.system_state);
        report.units_failed =
            lines.map(|line| line.split_whitespace().next().unwrap_or(line).into()).collect();
        let said = self.check(&login)?;
        self.enter("powering off");
        // The connection may end before the command does.
        login.run(&mut self.boot, "sudo systemctl poweroff", OFF_LIMIT, |_| Ok(None)).map(drop).or_else(
            |error| {
                if self.boot.outcome().code.is_some() { Ok(()) } else { Err(error) }
            },
        )?;
        let end = match self.boot.outcome().code {
            Some(_) => Some(self.boot.outcome().clone()),
            None => self.boot.wait_end(OFF_LIMIT)?,
        };
        let end = end.with_context(|| format!("the machine still runs after {OFF_LIMIT:?}"))?;
        self.enter("off");
        report.clean_poweroff = end.code == Some(0);
        report.counters = end.counters;
        said.put_into(&mut report, self.machine)?;
        Ok(report)
    }

    /// Runs the script in the guest.
    fn check(&mut self, login: &Login) -> Result<Said> {
        self.enter("copying the script of the checks");
        let quoted = CHECK.replace('\'', "'\\''");
        login.output(&mut self.boot, &format!("printf %s '{quoted}' > /tmp/check"), SYSTEM_LIMIT)?;
        let command = format!("sudo sh /tmp/check {VERIFIED} {MEASURED}");
        let mut said = Said::default();
        let (rig, hosts, begin) = (self.rig, self.machine.hosts, self.boot.started());
        let step = &mut self.step;
        let code = login.run(&mut self.boot, &command, CHECK_LIMIT, |line| {
            let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
            match kind {
                "STEP" => {
                    println!("{:6.1} s  {rest}", begin.elapsed().as_secs_f64());
                    rest.clone_into(step);
                }
                "FACT" => {
                    let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
                    ensure!(key != "failed", "{value}");
                    said.facts.insert(key.into(), value.trim().into());
                }
                "FIO" => {
                    let (name, json) = rest.split_once(' ').unwrap_or((rest, ""));
                    let run = serde_json::from_str(json).with_context(|| format!("reading fio's {name}"))?;
                    said.runs.insert(name.into(), run);
                }
                "COUNT" => {
                    said.counts.insert(rest.into(), carried(rig, hosts)?);
                    return Ok(Some("counted".into()));
                }
                "DONE" => said.done = true,
                _ => println!("          {line}"),
            }
            Ok(None)
        })?;
        ensure!(code == 0 && said.done, "the checks in the guest ended with exit code {code}");
        Ok(said)
    }
}

/// Bytes that nodes have sent each other until now, by the counters of the interfaces that they use.
fn carried(rig: &Rig, hosts: usize) -> Result<u64> {
    let interface = if hosts == 1 { "lo" } else { "eth0" };
    let ask = format!("cat /sys/class/net/{interface}/statistics/tx_bytes");
    let mut sum = 0;
    for host in &rig.hosts()[..hosts] {
        let said = host.output(&ask, Duration::from_secs(60))?;
        sum += said.trim().parse::<u64>().with_context(|| format!("{said:?} is no count of bytes"))?;
    }
    Ok(sum)
}

impl Said {
    fn fact(&self, key: &str) -> Result<&str> {
        self.facts.get(key).map(String::as_str).with_context(|| format!("the guest did not say {key:?}"))
    }

    /// The node numbers of a list such as `0:/dev/vdb 1:/dev/vdc`.
    fn nodes(&self, key: &str) -> Result<Vec<usize>> {
        let words = self.fact(key)?.split_whitespace();
        let node = |word: &str| word.split(':').next().and_then(|node| node.parse().ok());
        words.map(|word| node(word).with_context(|| format!("{word:?} names no node"))).collect()
    }

    /// The jobs of a run of fio, all without an error, by name: the bytes that each has read.
    fn verified(&self, run: &str) -> Result<BTreeMap<&str, u64>> {
        let jobs = self.runs.get(run).and_then(|run| run.get("jobs")?.as_array());
        let jobs = jobs.with_context(|| format!("fio's run {run} is missing"))?;
        let mut read = BTreeMap::new();
        for job in jobs {
            ensure!(job["error"].as_u64() == Some(0), "fio's run {run} ended with error {}", job["error"]);
            let (name, bytes) = (job["jobname"].as_str(), job["read"]["io_bytes"].as_u64());
            read.insert(name.context("fio did not name a job")?, bytes.context("fio did not count")?);
        }
        Ok(read)
    }

    /// Bytes that were counted during `what`.
    fn counted(&self, what: &str) -> Result<u64> {
        let at = |end: &str| {
            let key = format!("{what}.{end}");
            self.counts.get(&key).copied().with_context(|| format!("nothing was counted at {key}"))
        };
        Ok(at("end")?.saturating_sub(at("begin")?))
    }

    fn way(&self, cpu_node: usize, disk_node: usize, way: &str, counted: bool) -> Result<Way> {
        let name = format!("{cpu_node}.{disk_node}.{way}");
        let seconds: f64 = self.fact(&name)?.parse().with_context(|| format!("{name} is no time"))?;
        ensure!(seconds > 0.0, "{name} took no time");
        let moved = self.counted(&name)?.saturating_sub(self.counted(&format!("{cpu_node}.idle"))?);
        Ok(Way {
            mib_per_second: MEASURED as f64 / f64::from(1 << 20) / seconds,
            moved_per_byte: counted.then_some(moved as f64 / MEASURED as f64),
        })
    }

    fn put_into(&self, report: &mut Report, machine: &Machine) -> Result<()> {
        report.kernel = Some(self.fact("kernel")?.into());
        report.root = Some(self.fact("root")?.into());
        report.stripe = Some(self.fact("stripe")?.into());
        let (cpus, disks) = (self.nodes("cpus")?, self.nodes("disks")?);
        let counted = !machine.rdma || machine.hosts > 1;
        for &disk_node in &disks {
            for &cpu_node in &cpus {
                let verified = self.verified(&format!("{cpu_node}.{disk_node}.verify"))?;
                report.pairs.push(Pair {
                    cpu_node,
                    disk_node,
                    verified_bytes: verified.get("disk").copied().unwrap_or(0),
                    read: self.way(cpu_node, disk_node, "read", counted)?,
                    write: self.way(cpu_node, disk_node, "write", counted)?,
                });
            }
        }
        for &reader in &cpus {
            let verified = self.verified(&format!("stripe.{reader}.verify"))?;
            let right = |writer: &usize| verified.get(&*format!("file{writer}")) == Some(&VERIFIED);
            report
                .stripe_verified
                .extend(cpus.iter().filter(|writer| right(writer)).map(|writer| (reader, *writer)));
        }
        Ok(())
    }
}

impl Report {
    fn print(&self) {
        println!("\nLinux {}, root {}", shown(&self.kernel), shown(&self.root));
        println!(
            "  ssh after {:.1} s; systemd: {}; failed units: {:?}",
            self.ssh_seconds, self.system_state, self.units_failed
        );
        println!("  CPU of  disk of  verified    read                      write");
        for pair in &self.pairs {
            let way = |way: &Way| {
                let moved = way.moved_per_byte.map_or("?".into(), |moved| format!("{moved:.2}"));
                format!("{:6.2} MiB/s, {moved} B/B", way.mib_per_second)
            };
            println!(
                "  node {}  node {}   {} KiB    {}    {}",
                pair.cpu_node,
                pair.disk_node,
                pair.verified_bytes >> 10,
                way(&pair.read),
                way(&pair.write)
            );
        }
        println!("  (B/B: bytes between nodes for each byte read or written)");
        println!("  stripe: {}; verified (reader, writer): {:?}", shown(&self.stripe), self.stripe_verified);
    }

    /// Whether all was as it should be.
    fn judge(&self, machine: &Machine) -> Result<()> {
        ensure!(self.units_failed.is_empty(), "units failed: {}", self.units_failed.join(", "));
        ensure!(
            self.system_state == "running",
            "systemd says {:?} instead of \"running\"",
            self.system_state
        );
        let with_cpus = machine.nodes.iter().filter(|node| node.cpus > 0).count();
        let wanted = with_cpus * machine.nodes.len();
        let verified = self.pairs.iter().filter(|pair| pair.verified_bytes == VERIFIED).count();
        ensure!(verified == wanted, "{verified} of {wanted} pairs of CPU and disk were verified");
        let (verified, wanted) = (self.stripe_verified.len(), with_cpus * with_cpus);
        ensure!(verified == wanted, "{verified} of {wanted} readings of the striped files were verified");
        ensure!(self.clean_poweroff, "the machine did not power off cleanly");
        Ok(())
    }
}

fn shown(value: &Option<String>) -> &str {
    value.as_deref().unwrap_or("?")
}
