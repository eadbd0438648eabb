//! `cargo xtask test`: checks of the sources, unit tests, integration tests, each fuzz target for a moment,
//! guest boots. Ends with where the time went and the skips with their reasons, and the line `N passed, N
//! failed, N skipped`.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use testbed::machine::Machine;
use testbed::rig::Rig;
use testbed::{artifacts, setup};

use crate::options::Options;
use crate::scenarios::{self, Plan, Scenario};
use crate::skips::Expected;
use crate::tally::Tally;
use crate::{cargo_tests, checks, fuzz, over_rdma, report};

/// How often a device comes and goes; `soak` does it more often.
const HOT_PLUGS: usize = 3;

/// Flags of the task.
#[derive(Args)]
pub struct Test {
    /// Only checks of the sources, unit and integration tests, and fuzz targets
    #[arg(long)]
    no_guests: bool,
    /// Only guest boots whose name contains this
    #[arg(long)]
    guest: Option<String>,
    /// Show the consoles of the guests
    #[arg(long)]
    console: bool,
    /// Emulate the hosts even if this machine has VMX or SVM
    #[arg(long)]
    emulate: bool,
    /// Let tests skip that `expected-skips.txt` does not list: it is the development machine's
    #[arg(long)]
    any_skips: bool,
}

impl Test {
    /// Does the task.
    ///
    /// # Errors
    /// A test fails, or cannot be run.
    pub fn run(&self) -> Result<()> {
        let begin = Instant::now();
        let mut tally = Tally::default();
        report::forget("test")?;
        if self.guest.is_none() {
            setup::ensure(&[setup::TO_COMPILE])?;
            checks::run(&mut tally)?;
            cargo_tests::run(&mut tally)?;
            fuzz_targets(&mut tally)?;
        }
        if !self.no_guests {
            self.guests(&mut tally)?;
        }
        if !self.any_skips {
            let expected = Expected::read()?;
            tally.judge_skips(&expected);
            if self.guest.is_none() {
                let needless = expected.needless(&tally.skipped);
                needless.iter().for_each(|test| println!("no skip any more, and still listed: {test}"));
            }
        }
        tally.seconds = begin.elapsed().as_secs_f64();
        report::write("test", &tally)?;
        tally.print();
        ensure!(tally.failed == 0, "{} tests failed", tally.failed);
        Ok(())
    }

    fn guests(&self, tally: &mut Tally) -> Result<()> {
        let wanted =
            |scenario: &Scenario| self.guest.as_ref().is_none_or(|part| scenario.name.contains(part));
        let binaries = tally.time("building the programs of hosts and guests", artifacts::build)?;
        let with_memory_node = scenarios::with_memory_node;
        let kill = |node, after_ms| Plan::Kill { node, after_ms };
        let mut quick = vec![
            Scenario::new("two nodes boot", Machine::equal(2, 2, 512), Plan::Whole),
            Scenario::new("one node boots", Machine::equal(1, 2, 512), Plan::Whole),
            Scenario::new("a memory-only node serves", with_memory_node(), Plan::Whole),
            Scenario::new("a guest reboots and then powers off", with_memory_node(), Plan::Reboot),
            Scenario::new("the loss of node 1 ends the machine", with_memory_node(), kill(1, 700)),
            Scenario::new("the loss of node 0 ends the machine", with_memory_node(), kill(0, 300)),
        ];
        quick.push(scenarios::over_rdma());
        quick.extend([scenarios::devices(HOT_PLUGS), scenarios::from_disk(), scenarios::balloon()]);
        quick.extend(scenarios::kernels());
        let mut scenarios: Vec<Scenario> = quick.into_iter().filter(wanted).collect();
        if scenarios.is_empty() {
            return Ok(());
        }
        scenarios.iter_mut().for_each(|scenario| scenario.show = self.console);
        let machines: Vec<&Machine> = scenarios.iter().map(|scenario| &scenario.machine).collect();
        let options = Options::for_tests(self.emulate).rig(&machines);
        let mut rig = tally.time("starting the hosts", || Rig::start(&options, &binaries))?;
        eprintln!(
            "guests run on {}",
            rig.emulated().map_or("this machine".into(), |why| format!("emulated hosts ({why})"))
        );
        tally.emulated = Some(rig.emulated().is_some());
        if self.guest.is_none() {
            tally.guest("gestalt doctor finds the host fit", &mut rig, doctor);
        }
        let over_rdma = "the fabric keeps its contract over RDMA";
        if self.guest.as_ref().is_none_or(|part| over_rdma.contains(part)) && rig.emulated().is_some() {
            tally.guest(over_rdma, &mut rig, over_rdma::run);
        }
        if rig.emulated().is_none() && scenarios.iter().any(|scenario| scenario.machine.rdma) {
            let why = "hosts are not emulated; on this host: cargo xtask quickstart -- --fabric rdma";
            tally.skip("a guest over RDMA", why);
            scenarios.retain(|scenario| !scenario.machine.rdma);
        }
        for scenario in &scenarios {
            tally.guest(&scenario.name, &mut rig, |rig| scenario.run(rig));
        }
        Ok(())
    }
}

/// `gestalt doctor` on every host: exit code 0.
fn doctor(rig: &Rig) -> Result<()> {
    for host in rig.hosts() {
        let script = format!("{}/gestalt doctor", host.bin().display());
        let mut said = Vec::new();
        let code = host.run(&script, Duration::from_secs(120), |event| {
            if let testbed::host::Event::Stdout(bytes) | testbed::host::Event::Stderr(bytes) = event {
                said.extend_from_slice(bytes);
            }
        })?;
        ensure!(code == 0, "exit code {code} on {}:\n{}", host.name(), String::from_utf8_lossy(&said));
    }
    Ok(())
}

/// Runs every fuzz target shortly; each is a test.
fn fuzz_targets(tally: &mut Tally) -> Result<()> {
    let findings = tally.time("building and running fuzz targets", || fuzz::run_all("", fuzz::SHORTLY, 1))?;
    let count = findings.len();
    let failures: Vec<String> = findings.into_iter().filter_map(|finding| finding.failure).collect();
    tally.passed += count - failures.len();
    tally.failed += failures.len();
    tally.findings.extend(failures);
    Ok(())
}
