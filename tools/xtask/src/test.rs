//! `cargo xtask test`: unit tests, integration tests, each fuzz target for a moment, guest boots. Ends with the line
//! `N passed, N failed`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use testbed::artifacts::{self, workspace};
use testbed::machine::Machine;
use testbed::rig::Rig;
use testbed::{exec, setup};

use crate::fuzz;
use crate::options::Options;
use crate::over_rdma;
use crate::report;
use crate::scenarios::{self, Plan, Scenario};

/// How often a device comes and goes; `soak` does it more often.
const HOT_PLUGS: usize = 3;

/// Flags of the task.
#[derive(Args)]
pub struct Test {
    /// Only unit and integration tests, and fuzz targets
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
}

/// `target/report/test.json`.
#[derive(Default, Serialize)]
struct Tally {
    passed: usize,
    failed: usize,
    /// `None` when no guest was booted.
    emulated: Option<bool>,
    seconds: f64,
    guests: Vec<GuestResult>,
    /// What was booted again because the emulator ran stale code.
    reruns: Vec<String>,
    /// What fuzz targets found.
    findings: Vec<String>,
}

#[derive(Serialize)]
struct GuestResult {
    name: String,
    seconds: f64,
    failure: Option<String>,
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
            cargo_tests(&mut tally)?;
            fuzz_targets(&mut tally)?;
        }
        if !self.no_guests {
            self.guests(&mut tally)?;
        }
        tally.seconds = begin.elapsed().as_secs_f64();
        report::write("test", &tally)?;
        for guest in &tally.guests {
            if let Some(failure) = &guest.failure {
                println!("failed: {}: {}", guest.name, failure.lines().next().unwrap_or_default());
            }
        }
        for failure in &tally.findings {
            println!("failed: {failure}");
        }
        for rerun in &tally.reruns {
            println!("BOOTED AGAIN: {rerun}");
        }
        println!("{} passed, {} failed", tally.passed, tally.failed);
        ensure!(tally.failed == 0, "{} tests failed", tally.failed);
        Ok(())
    }

    fn guests(&self, tally: &mut Tally) -> Result<()> {
        let wanted =
            |scenario: &Scenario| self.guest.as_ref().is_none_or(|part| scenario.name.contains(part));
        let binaries = artifacts::build()?;
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
        let mut rig = Rig::start(&Options::for_tests(self.emulate).rig(&machines), &binaries)?;
        eprintln!(
            "guests run on {}",
            rig.emulated().map_or("this machine".into(), |why| format!("emulated hosts ({why})"))
        );
        tally.emulated = Some(rig.emulated().is_some());
        if self.guest.is_none() {
            tally.note("gestalt doctor finds the host fit", &mut rig, doctor);
        }
        let over_rdma = "the fabric keeps its contract over RDMA";
        if self.guest.as_ref().is_none_or(|part| over_rdma.contains(part)) && rig.emulated().is_some() {
            tally.note(over_rdma, &mut rig, over_rdma::run);
        }
        if rig.emulated().is_none() && scenarios.iter().any(|scenario| scenario.machine.rdma) {
            eprintln!("skipped: a guest over RDMA (on this host: cargo xtask quickstart -- --fabric rdma)");
            scenarios.retain(|scenario| !scenario.machine.rdma);
        }
        for scenario in &scenarios {
            tally.note(&scenario.name, &mut rig, |rig| scenario.run(rig));
        }
        Ok(())
    }
}

impl Tally {
    fn note<T>(&mut self, name: &str, rig: &mut Rig, task: impl Fn(&Rig) -> Result<T>) {
        let begin = Instant::now();
        let result = scenarios::on_live_hosts(name, rig, &mut self.reruns, task);
        let failure = result.err().map(|error| format!("{error:#}"));
        match failure {
            None => self.passed += 1,
            Some(_) => self.failed += 1,
        }
        self.guests.push(GuestResult { name: name.into(), seconds: begin.elapsed().as_secs_f64(), failure });
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
    let findings = fuzz::run_all("", fuzz::SHORTLY, 1)?;
    let count = findings.len();
    tally.findings = findings.into_iter().filter_map(|finding| finding.failure).collect();
    tally.passed += count - tally.findings.len();
    tally.failed += tally.findings.len();
    Ok(())
}

/// Runs `cargo test` over the workspace and adds up what its test programs say.
fn cargo_tests(tally: &mut Tally) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(["test", "--workspace", "--no-fail-fast"]).current_dir(workspace()).stdout(Stdio::piped());
    let mut child = exec::tether(&mut command).spawn().context("running cargo")?;
    let (mut passed, mut failed) = (0, 0);
    for line in BufReader::new(child.stdout.take().expect("it is piped")).lines() {
        let line = line?;
        println!("{line}");
        if let Some((ok, bad)) = summary(&line) {
            passed += ok;
            failed += bad;
        }
    }
    let status = child.wait()?;
    tally.passed += passed;
    tally.failed += failed;
    if !status.success() && failed == 0 {
        // Something does not compile, or a test program died without a summary.
        bail!("`cargo test --workspace` failed: see above");
    }
    Ok(())
}

/// Passed and failed of a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; ...`.
fn summary(line: &str) -> Option<(usize, usize)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| counts.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse().ok());
    Some((count("passed")?, count("failed")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_test_programs_are_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.2s";
        assert_eq!(summary(line), Some((12, 3)));
        assert_eq!(summary("test a::b ... ok"), None);
    }
}
