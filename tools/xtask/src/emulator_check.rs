//! `cargo xtask emulator-check`: whether the installed emulator runs code that is no longer in memory, and
//! whether it breaks a CPU's flags.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use testbed::emulator::{self, Count, Flags};
use testbed::{exec, qemu, setup};

use crate::report;

/// Flags of the task.
#[derive(Args)]
pub struct EmulatorCheck {
    /// How often code is patched
    #[arg(long, default_value_t = 20_000)]
    patches: u32,
    /// For how many seconds at most
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// How many emulated CPUs: one patches, the others run what is patched
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=16))]
    cpus: u32,
}

/// `target/report/emulator-check.json`.
#[derive(Serialize)]
struct Report {
    emulator: String,
    flags: Flags,
    flags_are_right: bool,
    count: Count,
    stale_int3_per_million: f64,
    seconds: f64,
}

impl EmulatorCheck {
    /// Does the task. What is wrong with the emulator is a finding, no failure.
    ///
    /// # Errors
    /// The check cannot be run.
    pub fn run(&self) -> Result<()> {
        report::forget("emulator-check")?;
        setup::ensure(&[setup::TO_COMPILE, setup::TO_EMULATE])?;
        let version = exec::run(Command::new(qemu::program()).arg("--version"), None)?;
        let limit = Duration::from_secs(self.seconds);
        let flags = emulator::flags(limit)?;
        let begin = Instant::now();
        let count = emulator::stale_code(self.cpus, self.patches, limit)?;
        let report = Report {
            emulator: version.lines().next().unwrap_or_default().into(),
            flags,
            flags_are_right: flags.are_right(),
            count,
            stale_int3_per_million: count.stale_int3 as f64 * 1e6 / count.patches.max(1) as f64,
            seconds: begin.elapsed().as_secs_f64(),
        };
        println!("{}", report.emulator);
        println!(
            "flags after an addition and CMPXCHG8B: {:#x} and {:#x}, which is {}",
            flags.sum,
            flags.small,
            if report.flags_are_right { "right" } else { "WRONG: 0x82 and 0x2 would be right" }
        );
        println!(
            "{} patches of code that {} other CPUs ran, in {:.1} s",
            count.patches,
            count.cpus - 1,
            report.seconds
        );
        println!(
            "  after {} of them a CPU met an int3 that memory no longer held: {:.0} in a million",
            count.stale_int3, report.stale_int3_per_million
        );
        println!("  after {} of them a CPU ran the code of before", count.stale_code);
        println!("written to {}", report::write("emulator-check", &report)?.display());
        Ok(())
    }
}
