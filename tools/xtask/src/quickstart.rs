//! `cargo xtask quickstart`: one guest over several nodes, and what it says of itself.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use testbed::boot::{Boot, Outcome, Watch};
use testbed::machine::Machine;
use testbed::rig::Rig;
use testbed::terminal::{self, RawTerminal};
use testbed::{artifacts, verdict};

use crate::intel::{Findings, Study};
use crate::options::Options;
use crate::{disk, report};

/// A boot with its checks takes about a minute on an emulated host.
const LIMIT: Duration = Duration::from_secs(900);
/// In Bochs it takes minutes of one idle CPU, and the guest may be silent for many of them if the CPU is not
/// idle.
const BOCHS_LIMIT: Duration = Duration::from_secs(4 * 3600);
const BOCHS_SILENCE: Duration = Duration::from_secs(1800);
/// A person may stay in the guest's shell for long.
const INTERACTIVE_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Flags of the task.
#[derive(Args)]
pub struct Quickstart {
    #[command(flatten)]
    options: Options,
    /// Stay at a shell in the guest; leaving it powers the machine off
    #[arg(long)]
    interactive: bool,
    /// Boot a whole Debian from its own disk, log in over ssh and use a disk of each node from each node's
    /// CPUs
    #[arg(long, conflicts_with = "interactive")]
    disk: bool,
}

/// `target/report/quickstart.json`. Counters are null if `gestalt` did not report them.
#[derive(Serialize)]
struct Report {
    nodes: usize,
    hosts: usize,
    emulated: bool,
    /// `uname -r` of the guest.
    kernel: Option<String>,
    cpus_online: Option<u64>,
    mem_total_kib: Option<u64>,
    numa_nodes: Option<u64>,
    /// What the guest says of each NUMA node.
    numa: Vec<Numa>,
    smp_check: Option<String>,
    /// From the start of `gestalt run` until the guest is in user space with all its CPUs. In Bochs it is the
    /// guest's own clock that says so, when it reports: this machine's says nothing of an emulated one's.
    boot_seconds: Option<f64>,
    remote_read_faults: Option<u64>,
    remote_write_faults: Option<u64>,
    invalidations: Option<u64>,
    bytes_moved: Option<u64>,
    fault_p50_us: Option<f64>,
    fault_p99_us: Option<f64>,
    /// What else was found on a host in Bochs.
    #[serde(skip_serializing_if = "Option::is_none")]
    bochs: Option<Findings>,
    /// What was wrong; empty when all was as it should be.
    faults: Vec<String>,
}

#[derive(Serialize)]
struct Numa {
    node: usize,
    cpus: Option<String>,
    mem_total_kib: Option<u64>,
    distance: Option<String>,
}

impl Quickstart {
    /// Does the task.
    ///
    /// # Errors
    /// Anything that keeps the guest from saying all it should.
    pub fn run(&self) -> Result<()> {
        if self.disk {
            return disk::run(&self.options);
        }
        report::forget("quickstart")?;
        let mut machine = self.options.machine()?;
        if self.interactive {
            machine.actions = "report,smp-check,shell,poweroff".into();
        }
        let binaries = artifacts::build()?;
        let mut config = self.options.rig(&[&machine]);
        let mut study = Study::of(&config)?;
        config.programs.extend(study.iter().map(|study| study.program().to_owned()));
        let rig = Rig::start(&config, &binaries)?;
        let host = &rig.hosts()[0];
        if let Some(study) = &mut study {
            study.before(host)?;
        }
        let outcome = self.boot(&rig, &machine, study.is_some())?;
        let findings = study.map(|study| study.after(host, outcome.counters.as_ref())).transpose()?;
        let report = Report::new(&rig, &machine, &outcome, findings);
        report.print(&rig);
        let path = report::write("quickstart", &report)?;
        println!("written to {}", path.display());
        if !report.faults.is_empty() {
            bail!("{}\n{}", report.faults.join("; "), outcome.tail());
        }
        Ok(())
    }

    fn boot(&self, rig: &Rig, machine: &Machine, in_bochs: bool) -> Result<Outcome> {
        let terminal = self.interactive.then(|| terminal::size().unwrap_or((24, 80)));
        let mut boot = Boot::start(rig, machine, terminal)?;
        let mut watch = Watch::to_the_end(LIMIT);
        if in_bochs {
            (watch.limit, watch.silence) = (BOCHS_LIMIT, BOCHS_SILENCE);
        }
        let mut _raw = None;
        if self.interactive {
            (watch.limit, watch.silence) = (INTERACTIVE_LIMIT, INTERACTIVE_LIMIT);
            _raw = Some(RawTerminal::enter()?);
            terminal::forward_input(boot.input());
        }
        boot.watch(watch, |bytes| {
            // A reader that went away does not stop the boot.
            let _ = io::stdout().write_all(bytes).and_then(|()| io::stdout().flush());
        })
    }
}

impl Report {
    fn new(rig: &Rig, machine: &Machine, outcome: &Outcome, bochs: Option<Findings>) -> Self {
        let facts = &outcome.facts;
        let counter = |name: &str| outcome.counters.as_ref()?.get(name)?.as_u64();
        let micros = |name: &str| outcome.counters.as_ref()?.get(name)?.as_f64();
        let numa = (0..machine.nodes.len()).map(|node| Numa {
            node,
            cpus: facts.text(&format!("node{node}.cpus")).map(Into::into),
            mem_total_kib: facts.number(&format!("node{node}.mem_total_kib")),
            distance: facts.text(&format!("node{node}.distance")).map(Into::into),
        });
        let mut faults = verdict::faults(machine, outcome, true);
        for name in ["remote_read_faults", "remote_write_faults", "invalidations", "bytes_moved"] {
            if counter(name).is_none() {
                faults.push(format!("gestalt's report has no {name}"));
            }
        }
        let emulated = outcome.counters.as_ref().and_then(|counters| counters.get("emulated")?.as_bool());
        if rig.emulated().is_some() && emulated != Some(true) {
            faults.push(format!("gestalt says {emulated:?} of whether its emulated hosts are emulated"));
        }
        faults.extend(bochs.iter().flat_map(Findings::faults));
        let boot_seconds = match &bochs {
            Some(_) => facts.text("uptime").and_then(|seconds| seconds.parse().ok()),
            None => outcome.boot_seconds(),
        };
        Self {
            nodes: machine.nodes.len(),
            hosts: machine.hosts,
            emulated: rig.emulated().is_some(),
            kernel: facts.text("kernel").map(Into::into),
            cpus_online: facts.number("cpus_online"),
            mem_total_kib: facts.number("mem_total_kib"),
            numa_nodes: facts.number("numa_nodes"),
            numa: numa.collect(),
            smp_check: facts.text("smp_check").map(Into::into),
            boot_seconds,
            remote_read_faults: counter("remote_read_faults"),
            remote_write_faults: counter("remote_write_faults"),
            invalidations: counter("invalidations"),
            bytes_moved: counter("bytes_moved"),
            fault_p50_us: micros("fault_p50_us"),
            fault_p99_us: micros("fault_p99_us"),
            bochs,
            faults,
        }
    }

    fn print(&self, rig: &Rig) {
        fn shown<T: ToString>(value: &Option<T>) -> String {
            value.as_ref().map_or_else(|| "?".into(), ToString::to_string)
        }
        println!("\nThe guest says:");
        println!("  Linux {}", shown(&self.kernel));
        println!("  {} CPUs online, {} KiB of memory", shown(&self.cpus_online), shown(&self.mem_total_kib));
        println!("  {} NUMA nodes", shown(&self.numa_nodes));
        for numa in &self.numa {
            println!(
                "    node {}: CPUs {}, {} KiB, distances {}",
                numa.node,
                shown(&numa.cpus),
                shown(&numa.mem_total_kib),
                shown(&numa.distance)
            );
        }
        println!("  smp-check: {}", shown(&self.smp_check));
        match rig.emulated() {
            Some(why) => println!("The hosts ({} nodes on {} EMULATED: {why}):", self.nodes, self.hosts),
            None => println!("The host ({} nodes on this machine):", self.nodes),
        }
        let seconds = self.boot_seconds.map(|seconds| format!("{seconds:.1}"));
        println!("  {} s from the start to user space with all CPUs", shown(&seconds));
        println!(
            "  {} remote read faults, {} remote write faults, {} invalidations, {} bytes moved",
            shown(&self.remote_read_faults),
            shown(&self.remote_write_faults),
            shown(&self.invalidations),
            shown(&self.bytes_moved)
        );
        println!(
            "  remote fault latency: p50 {} us, p99 {} us",
            shown(&self.fault_p50_us),
            shown(&self.fault_p99_us)
        );
        if let Some(bochs) = &self.bochs {
            bochs.print();
        }
    }
}
