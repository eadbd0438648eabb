//! `cargo xtask fuzz`: runs the fuzz targets of `tests/fuzz`, with the stable compiler and libFuzzer.
//!
//! What they find goes to `tests/fuzz/artifacts`; inputs worth keeping to `target/fuzz/corpus`, beside the
//! small corpus in `tests/fuzz/corpus` that every run begins with. `cargo xtask test` runs each target for
//! [`SHORTLY`].
//!
//! Time is CPU time: a target that shares its cores with other work gets as much of it as one that has them
//! to itself.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::Signal;
use serde::Serialize;
use testbed::artifacts::{target_dir, workspace};
use testbed::{exec, setup};

use crate::allowance::{self, Allowance};
use crate::report;

/// How long each target runs among the other tests: time for the corpus and thousands of inputs beyond. On a
/// busy machine it gets less, so that the tests take no longer.
pub const SHORTLY: Span = Span { cpu: 2, wall: 2 };

/// What the compiler does for libFuzzer: counters on every edge, and what is compared with what. As `cargo
/// fuzz` does it, without a sanitizer: those need the nightly compiler, and this code is safe Rust with
/// overflow checks.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Last lines of a failed target's output that its error carries.
const REPORT_LINES: usize = 40;
/// A target that got its time is asked to end between two inputs, and one input takes this many seconds at
/// most.
const INPUT_LIMIT: u32 = 60;
/// What a target ends within beyond its time by the clock and its last input; then it is killed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time by the clock for a target, as a multiple of its CPU time, if nothing else was asked for.
const WALL_PER_CPU: u32 = 10;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Flags of the task.
#[derive(Args)]
pub struct Fuzz {
    /// How much CPU time each target gets, in seconds
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// How long each target may take by the clock, in seconds; one that did not get its CPU time by then
    /// counts as failed [default: ten times --seconds]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    wall_seconds: Option<u32>,
    /// Only targets whose name contains this
    #[arg(long)]
    target: Option<String>,
    /// How many targets run at a time
    #[arg(long, default_value_t = 1)]
    at_once: usize,
}

/// What came of one target: a row of `target/report/fuzz.json`.
#[derive(Serialize)]
pub struct Finding {
    /// The target's name.
    pub target: String,
    /// How long it ran by the clock.
    wall_seconds: f64,
    /// How much CPU time it used.
    cpu_seconds: f64,
    /// How many inputs it was given.
    inputs: Option<u64>,
    /// Edges of the code that they reached.
    coverage: Option<u64>,
    /// What it found, and where the input is.
    pub failure: Option<String>,
}

/// How long a target runs: until it has used so much CPU time, or so much time has gone by, in seconds.
#[derive(Clone, Copy)]
pub struct Span {
    /// CPU time.
    pub cpu: u32,
    /// Time by the clock.
    pub wall: u32,
}

impl Fuzz {
    /// Does the task.
    ///
    /// # Errors
    /// A target finds something, does not get its CPU time, or cannot be built.
    pub fn run(&self) -> Result<()> {
        report::forget("fuzz")?;
        let part = self.target.as_deref().unwrap_or("");
        let wall = self.wall_seconds.unwrap_or(self.seconds.saturating_mul(WALL_PER_CPU));
        let mut findings = run_all(part, Span { cpu: self.seconds, wall }, self.at_once)?;
        for finding in &mut findings {
            finding.expect(self.seconds);
        }
        println!("written to {}", report::write("fuzz", &findings)?.display());
        let failed: Vec<&str> = findings.iter().filter_map(|finding| finding.failure.as_deref()).collect();
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        println!("{} fuzz targets found nothing in {} s of CPU time each", findings.len(), self.seconds);
        Ok(())
    }
}

impl Finding {
    /// Makes it a failure that the target found nothing in less than `seconds` of CPU time.
    fn expect(&mut self, seconds: u32) {
        if self.failure.is_none() && self.cpu_seconds < f64::from(seconds) {
            let (target, cpu, wall) = (&self.target, self.cpu_seconds, self.wall_seconds);
            self.failure = Some(format!(
                "the fuzz target {target} got only {cpu:.1} s of CPU time in {wall:.0} s, and not {seconds} s: \
                 give it more with --wall-seconds"
            ));
        }
    }
}

/// Runs the targets whose name contains `part`, `at_once` of them at a time.
///
/// # Errors
/// There is none, or one cannot be built or started. That one finds something is no error.
pub fn run_all(part: &str, span: Span, at_once: usize) -> Result<Vec<Finding>> {
    setup::ensure(&[setup::TO_COMPILE, setup::TO_FUZZ])?;
    let folder = workspace().join("tests/fuzz");
    let mut names = names(&folder.join("targets"))?;
    names.retain(|name| name.contains(part));
    ensure!(!names.is_empty(), "no fuzz target's name contains {part:?}");
    let built = target_dir()?.join("fuzz");
    build(&folder, &built)?;
    let left = Mutex::new(names.iter());
    let next = || left.lock().expect("no holder panics").next();
    let work = || std::iter::from_fn(next).map(|name| run_one(&folder, &built, name, span)).collect();
    let findings: Result<Vec<Vec<Finding>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once.max(1)).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("no worker panics")).collect()
    });
    let mut findings: Vec<Finding> = findings?.into_iter().flatten().collect();
    findings.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(findings)
}

fn names(targets: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(targets).with_context(|| format!("reading {}", targets.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn build(folder: &Path, built: &Path) -> Result<()> {
    // The same versions as everywhere else; libFuzzer's crate comes on top.
    std::fs::copy(workspace().join("Cargo.lock"), folder.join("Cargo.lock")).context("copying Cargo.lock")?;
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    // A triple keeps the flags from what runs while building.
    command.args(["build", "--release", "--bins", "--target", TRIPLE]).current_dir(folder);
    command.env("RUSTFLAGS", FLAGS).env("CARGO_TARGET_DIR", built);
    let status = exec::tether(&mut command).status().context("running cargo")?;
    ensure!(status.success(), "the fuzz targets cannot be built: see above");
    Ok(())
}

fn run_one(folder: &Path, built: &Path, name: &str, span: Span) -> Result<Finding> {
    let (found, kept) = (folder.join("artifacts").join(name), built.join("corpus").join(name));
    for made in [&found, &kept] {
        std::fs::create_dir_all(made).with_context(|| format!("making {}", made.display()))?;
    }
    let mut command = Command::new(built.join(TRIPLE).join("release").join(name));
    // libFuzzer itself minds the clock; it knows nothing of CPU time.
    command
        .arg(format!("-max_total_time={}", span.wall))
        .arg(format!("-timeout={INPUT_LIMIT}"))
        .arg(format!("-artifact_prefix={}/", found.display()));
    // An input takes milliseconds; a busy machine may make that seconds.
    command.args(["-print_final_stats=1", "-report_slow_units=60", "-rss_limit_mb=2048"]);
    command.arg(&kept);
    let begin = folder.join("corpus").join(name);
    if begin.is_dir() {
        command.arg(begin);
    }
    let ended = allowance::run(
        &mut command,
        Allowance {
            cpu: Duration::from_secs(span.cpu.into()),
            wall: Duration::from_secs(u64::from(span.wall) + u64::from(INPUT_LIMIT)) + PATIENCE,
            // Between two inputs it then prints its statistics and ends with 0. SIGINT would end it amid one,
            // with an error.
            stop: Signal::SIGUSR1,
        },
    )?;
    let (wall_seconds, cpu_seconds) = (ended.wall.as_secs_f64(), ended.cpu.as_secs_f64());
    let said = ended.said;
    let (inputs, coverage) =
        (last_number(&said, "stat::number_of_executed_units:"), last_number(&said, " cov: "));
    let failure = (!ended.status.success()).then(|| {
        let lines: Vec<&str> = said.lines().collect();
        let end = lines[lines.len().saturating_sub(REPORT_LINES)..].join("\n");
        if ended.killed {
            return format!("the fuzz target {name} did not end when asked to, and was killed:\n{end}");
        }
        format!("the fuzz target {name} found something; the input is in {}:\n{end}", found.display())
    });
    let verdict = if failure.is_none() { "nothing" } else { "SOMETHING" };
    println!(
        "fuzz {name}: {verdict} in {} inputs, {cpu_seconds:.1} s of CPU time, {wall_seconds:.0} s by the clock",
        inputs.unwrap_or_default()
    );
    Ok(Finding { target: name.into(), wall_seconds, cpu_seconds, inputs, coverage, failure })
}

/// The number behind the last `label` in what libFuzzer says.
fn last_number(said: &str, label: &str) -> Option<u64> {
    let digits = said.rsplit_once(label)?.1.trim_start();
    digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len())].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(cpu_seconds: f64) -> Finding {
        let target = "frames".to_owned();
        Finding { target, wall_seconds: 50.0, cpu_seconds, inputs: Some(9), coverage: Some(1), failure: None }
    }

    #[test]
    fn a_target_that_did_not_get_its_cpu_time_has_not_passed() {
        let mut starved = finding(4.9);
        starved.expect(5);
        assert!(starved.failure.is_some_and(|why| why.contains("4.9 s of CPU time in 50 s, and not 5 s")));
        let mut served = finding(5.0);
        served.expect(5);
        assert_eq!(served.failure, None);
    }

    #[test]
    fn the_last_numbers_of_a_fuzzer_are_read() {
        let said =
            "#2 INITED cov: 12 ft: 13\n#9 DONE   cov: 1285 ft: 3555\nstat::number_of_executed_units: 376\n";
        assert_eq!(last_number(said, " cov: "), Some(1285));
        assert_eq!(last_number(said, "stat::number_of_executed_units:"), Some(376));
        assert_eq!(last_number("ERROR", " cov: "), None);
    }
}
