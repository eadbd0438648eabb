//! The study of a host in Bochs, beside the boot of a guest: whether `gestalt doctor` finds the host fit,
//! whether micro guests do what they should on its KVM, and why nested paging stopped the guest.
//!
//! On Intel the last is the point: with EPT's accessed and dirty bits every walk of the guest's page tables
//! counts as a write to them, as it always does on AMD, and then nodes cannot share page tables.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use testbed::artifacts;
use testbed::bochs::Processor;
use testbed::host::{Event, Host};
use testbed::rig::{Emulator, RigConfig};

/// The doctor and the micro guests take seconds of the host's time; a busy machine needs much longer for
/// these.
const DOCTOR_LIMIT: Duration = Duration::from_secs(600);
const MICRO_GUESTS_LIMIT: Duration = Duration::from_secs(3600);
/// The same by the host's own clock.
const MICRO_GUESTS_SECONDS: u32 = 120;
/// The tests to run. Those of clocks are left out: one spins two CPUs against each other, and came to no end
/// on a host of one CPU. And those that spin with interrupts off: of eight runs four stood still there, the
/// host's own time-out with it, as if no interrupt of the host's ended the guest's stay.
const MICRO_GUESTS: &str = "interrupts:: vcpu:: startup:: nodes:: --skip spins_with_interrupts_off \
                            --skip spinning_vcpu_with_interrupts_off";
/// A small job on a slow host.
const SHORT: Duration = Duration::from_secs(300);
/// Where the host's kernel has the trace point of nested page faults.
const TRACE_POINT: &str = "/sys/kernel/tracing/events/kvm/kvm_page_fault";
/// What its histogram is called.
const HISTOGRAM: &str = "hist:keys=error_code.hex:size=4096";

/// What was found on a host in Bochs; `bochs` in the report.
#[derive(Serialize)]
pub struct Findings {
    /// `intel` or `amd`.
    processor: &'static str,
    /// Whether EPT kept accessed and dirty bits; null on AMD, where walks always count as writes.
    ept_accessed_dirty: Option<bool>,
    host_cpus: u32,
    /// What `gestalt doctor` said, line by line.
    doctor: Vec<String>,
    micro_guests: MicroGuests,
    /// From the start of the vCPUs to their end, by the host's clock, which ticks once an instruction.
    run_seconds: Option<f64>,
    /// EPT violations, or nested page faults on AMD, of all nodes by cause.
    violations: Violations,
}

/// How the micro guests went.
#[derive(Clone, Default, Serialize)]
pub struct MicroGuests {
    passed: u32,
    failed: u32,
    /// Whether all came to an end within [`MICRO_GUESTS_SECONDS`].
    ended: bool,
    /// What tests said that had nothing to test there.
    skipped: Vec<String>,
}

/// Why nested paging stopped the guest.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Violations {
    /// Walks of the guest's page tables that needed them writable.
    walk_write: u64,
    /// Other walks of the guest's page tables.
    walk_read: u64,
    /// The guest's own writes.
    write: u64,
    /// Its reads.
    read: u64,
    /// Its instruction fetches.
    fetch: u64,
}

/// A study of a host in Bochs, from before a boot to after it.
pub struct Study {
    processor: Processor,
    host_cpus: u32,
    /// The test program with the micro guests.
    program: PathBuf,
    doctor: Vec<String>,
    micro_guests: MicroGuests,
}

impl Study {
    /// A study, if the rig is to be a host in Bochs. Builds the micro guests, which the host must find beside
    /// `gestalt`.
    ///
    /// # Errors
    /// They do not compile.
    pub fn of(rig: &RigConfig) -> Result<Option<Study>> {
        let Some(Emulator::Bochs(processor)) = rig.emulate else { return Ok(None) };
        let program = artifacts::test_program("vmm", "micro_guests")?;
        Ok(Some(Study {
            processor,
            host_cpus: rig.hardware.cpus,
            program,
            doctor: Vec::new(),
            micro_guests: MicroGuests::default(),
        }))
    }

    /// The program to have on the host.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// What there is to do before the boot. From its end on, violations are counted.
    ///
    /// # Errors
    /// The host is gone, or has no such trace point.
    pub fn before(&mut self, host: &Host) -> Result<()> {
        println!("gestalt doctor on the host:");
        let gestalt = host.bin().join("gestalt").display().to_string();
        let (code, said) = shown(host, &format!("{gestalt} doctor"), DOCTOR_LIMIT)?;
        ensure!(code == 0, "gestalt doctor finds the host in Bochs unfit, with exit code {code}");
        self.doctor = said.lines().map(String::from).collect();
        println!("\nmicro guests on the host:");
        let program = host.bin().join(self.program.file_name().unwrap_or_default());
        let script = format!(
            "timeout {MICRO_GUESTS_SECONDS} {} --test-threads=1 --nocapture {MICRO_GUESTS} 2>&1",
            program.display()
        );
        let (_, said) = shown(host, &script, MICRO_GUESTS_LIMIT)?;
        self.micro_guests = micro_guests(&said);
        host.output(&format!("echo '{HISTOGRAM}' >{TRACE_POINT}/trigger"), SHORT)
            .context("counting EPT violations")?;
        Ok(())
    }

    /// What there is to know after the boot; `counters` are those of `gestalt run`.
    ///
    /// # Errors
    /// The host is gone.
    pub fn after(self, host: &Host, counters: Option<&Value>) -> Result<Findings> {
        let histogram = host.output(&format!("cat {TRACE_POINT}/hist"), SHORT)?;
        let causes = causes(&histogram)?;
        let (processor, ept_accessed_dirty) = match self.processor {
            Processor::Intel { accessed_dirty } => ("intel", Some(accessed_dirty)),
            Processor::Amd => ("amd", None),
        };
        Ok(Findings {
            processor,
            ept_accessed_dirty,
            host_cpus: self.host_cpus,
            doctor: self.doctor,
            micro_guests: self.micro_guests,
            run_seconds: counters.and_then(|counters| counters.get("run_seconds")?.as_f64()),
            violations: Violations::of(self.processor, &causes),
        })
    }
}

impl Findings {
    /// What was wrong, in sentences.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let MicroGuests { passed, failed, ended, .. } = self.micro_guests;
        if failed > 0 || passed == 0 {
            faults.push(format!("of the micro guests, {failed} failed and {passed} passed"));
        }
        if !ended {
            faults.push(format!(
                "the micro guests came to no end within {MICRO_GUESTS_SECONDS} s of the host's time"
            ));
        }
        faults
    }

    /// Shows it.
    pub fn print(&self) {
        let walks = match self.ept_accessed_dirty {
            Some(true) => "eptad=1, so page-table walks count as writes",
            Some(false) => "eptad=0, so page-table walks are reads",
            None => "nested paging, whose walks count as writes",
        };
        println!("The host in Bochs ({}, {} CPUs, {walks}):", self.processor, self.host_cpus);
        let MicroGuests { passed, failed, skipped, .. } = &self.micro_guests;
        println!("  micro guests: {passed} passed, {failed} failed, {} skipped", skipped.len());
        skipped.iter().for_each(|why| println!("    skipped: {why}"));
        if let Some(seconds) = self.run_seconds {
            println!("  {seconds:.1} s from the start of the CPUs to their end, by the host's clock");
        }
        let Violations { walk_write, walk_read, write, read, fetch } = self.violations;
        println!(
            "  nested paging stopped walks of page tables {walk_write} times for writing, {walk_read} for reading;"
        );
        println!(
            "  and the guest itself {write} times for writing, {read} for reading, {fetch} for an instruction"
        );
    }
}

impl Violations {
    /// Adds up what a histogram says; keys are exit qualifications on Intel, page-fault error codes on AMD.
    fn of(processor: Processor, causes: &BTreeMap<u64, u64>) -> Self {
        let mut sum = Self::default();
        for (&code, &count) in causes {
            let has = |bit: u32| code >> bit & 1 == 1;
            // SDM vol. 3, "Exit Qualification for EPT Violations": 1 a write, 2 a fetch, 7 the linear address
            // is valid, 8 the access was to its translation and not to a paging structure. APM vol. 2,
            // "Nested Paging": 1 a write, 4 a fetch, 33 a walk.
            let (walk, write, fetch) = match processor {
                Processor::Intel { .. } => (has(7) && !has(8), has(1), has(2)),
                Processor::Amd => (has(33), has(1), has(4)),
            };
            let cause = match (walk, write, fetch) {
                (true, true, _) => &mut sum.walk_write,
                (true, false, _) => &mut sum.walk_read,
                (false, true, _) => &mut sum.write,
                (false, false, true) => &mut sum.fetch,
                (false, false, false) => &mut sum.read,
            };
            *cause += count;
        }
        sum
    }
}

/// Runs a script, shows what it prints as it comes, and returns that and its exit code.
fn shown(host: &Host, script: &str, limit: Duration) -> Result<(i32, String)> {
    let mut said = Vec::new();
    let code = host.run(script, limit, |event| {
        if let Event::Stdout(bytes) | Event::Stderr(bytes) = event {
            // A reader that went away does not stop the run.
            let _ = io::stdout().write_all(bytes).and_then(|()| io::stdout().flush());
            said.extend_from_slice(bytes);
        }
    })?;
    Ok((code, String::from_utf8_lossy(&said).into_owned()))
}

/// Reads what a test program prints: `test NAME ... ok` or `FAILED` for each test, with what it says itself
/// before the result, and `test result: ...` at the end.
fn micro_guests(said: &str) -> MicroGuests {
    let (mut found, mut skips) = (MicroGuests::default(), false);
    for line in said.lines() {
        if let Some((_, why)) = line.split_once("skipped: ") {
            found.skipped.push(why.to_owned());
            skips = true;
        }
        // Lines of a test's own may stand between its name and the result.
        match line.rsplit(' ').next() {
            _ if line.starts_with("test result: ") => found.ended = true,
            // Who skips ends as if it had passed.
            Some("ok") => found.passed += u32::from(!std::mem::take(&mut skips)),
            Some("FAILED") => found.failed += 1,
            _ => {}
        }
    }
    found
}

/// Reads a histogram of the kernel: `{ error_code: 18a } hitcount: 125`, keys in hexadecimal.
fn causes(histogram: &str) -> Result<BTreeMap<u64, u64>> {
    let mut causes = BTreeMap::new();
    for line in histogram.lines().filter(|line| line.starts_with('{')) {
        let entry = line.split_once("error_code:").and_then(|(_, rest)| rest.split_once('}'));
        let entry = entry.and_then(|(key, rest)| {
            let key = key.trim().trim_start_matches("0x");
            let count = rest.split_once("hitcount:")?.1.trim().parse::<u64>().ok()?;
            Some((u64::from_str_radix(key, 16).ok()?, count))
        });
        let (key, count) = entry.with_context(|| format!("no line of a histogram: {line:?}"))?;
        *causes.entry(key).or_default() += count;
    }
    ensure!(histogram.contains("Hits:"), "the kernel's histogram of page faults is not whole");
    ensure!(!causes.is_empty(), "the kernel counted no page fault of the guest");
    Ok(causes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: Processor = Processor::Intel { accessed_dirty: true };

    fn histogram(entries: &[(u64, u64)]) -> String {
        let lines = entries
            .iter()
            .map(|(key, count)| format!("{{ error_code: {key:>20x} }} hitcount: {count:>10}\n"));
        format!("# event histogram\n\n{}\nTotals:\n    Hits: 1\n", lines.collect::<String>())
    }

    #[test]
    fn causes_on_intel_follow_the_exit_qualification() {
        let text = histogram(&[(0x83, 10), (0x81, 2), (0x182, 3), (0x18a, 4), (0x181, 5), (0x184, 6)]);
        let found = Violations::of(INTEL, &causes(&text).unwrap());
        assert_eq!(found, Violations { walk_write: 10, walk_read: 2, write: 7, read: 5, fetch: 6 });
    }

    #[test]
    fn causes_on_amd_follow_the_error_code() {
        let walk = 1 << 33;
        let end = 1 << 32;
        let entries = [(walk | 6, 10), (walk | 4, 2), (end | 6, 3), (end | 4, 5), (end | 0x14, 6)];
        let found = Violations::of(Processor::Amd, &causes(&histogram(&entries)).unwrap());
        assert_eq!(found, Violations { walk_write: 10, walk_read: 2, write: 3, read: 5, fetch: 6 });
    }

    #[test]
    fn a_histogram_that_is_cut_off_or_empty_is_an_error() {
        let whole = histogram(&[(0x83, 10)]);
        assert!(causes(&whole).is_ok());
        assert!(causes(&whole[..whole.len() - 8]).is_err());
        assert!(causes(&histogram(&[])).is_err());
        assert!(causes("{ error_code: zz } hitcount: 1\nHits: 1").is_err());
    }

    #[test]
    fn results_of_micro_guests_are_read() {
        let cut = "running 3 tests\ntest vcpu::a ... skipped: no TSC\nok\ntest vcpu::b ... ok\ntest vcpu::c ... FAILED\n";
        let found = micro_guests(cut);
        assert_eq!((found.passed, found.failed, found.ended), (1, 1, false));
        assert_eq!(found.skipped, ["no TSC"]);
        assert!(micro_guests(&format!("{cut}test result: FAILED. 2 passed; 1 failed; 0 ignored")).ended);
    }
}
