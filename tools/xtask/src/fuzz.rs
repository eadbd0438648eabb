//! `cargo xtask fuzz`: runs the fuzz targets of `tests/fuzz`, with the stable compiler and libFuzzer.
//!
//! What they find goes to `tests/fuzz/artifacts`; inputs worth keeping to `target/fuzz/corpus`, beside the small corpus
//! in `tests/fuzz/corpus` that every run begins with. `cargo xtask test` runs each target for [`SHORTLY`].

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;
use testbed::artifacts::{target_dir, workspace};
use testbed::{exec, setup};

use crate::report;

/// How long each target runs among the other tests, in seconds: time for the corpus and thousands of inputs beyond.
pub const SHORTLY: u32 = 2;

/// What the compiler does for libFuzzer: counters on every edge, and what is compared with what. As `cargo fuzz` does it,
/// without a sanitizer: those need the nightly compiler, and this code is safe Rust with overflow checks.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Last lines of a failed target's output that its error carries.
const REPORT_LINES: usize = 40;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Flags of the task.
#[derive(Args)]
pub struct Fuzz {
    /// How long each target runs, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u32,
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
    /// How long it ran.
    seconds: f64,
    /// How many inputs it was given.
    inputs: Option<u64>,
    /// Edges of the code that they reached.
    coverage: Option<u64>,
    /// What it found, and where the input is.
    pub failure: Option<String>,
}

impl Fuzz {
    /// Does the task.
    ///
    /// # Errors
    /// A target finds something, or cannot be built.
    pub fn run(&self) -> Result<()> {
        report::forget("fuzz")?;
        let part = self.target.as_deref().unwrap_or("");
        let findings = run_all(part, self.seconds, self.at_once)?;
        println!("written to {}", report::write("fuzz", &findings)?.display());
        let failed: Vec<&str> = findings.iter().filter_map(|finding| finding.failure.as_deref()).collect();
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        println!("{} fuzz targets found nothing in {} s each", findings.len(), self.seconds);
        Ok(())
    }
}

/// Runs the targets whose name contains `part`, `at_once` of them at a time.
///
/// # Errors
/// There is none, or one cannot be built or started. That one finds something is no error.
pub fn run_all(part: &str, seconds: u32, at_once: usize) -> Result<Vec<Finding>> {
    setup::ensure(&[setup::TO_COMPILE, setup::TO_FUZZ])?;
    let folder = workspace().join("tests/fuzz");
    let mut names = names(&folder.join("targets"))?;
    names.retain(|name| name.contains(part));
    ensure!(!names.is_empty(), "no fuzz target's name contains {part:?}");
    let built = target_dir()?.join("fuzz");
    build(&folder, &built)?;
    let left = Mutex::new(names.iter());
    let next = || left.lock().expect("no holder panics").next();
    let work = || std::iter::from_fn(next).map(|name| run_one(&folder, &built, name, seconds)).collect();
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

fn run_one(folder: &Path, built: &Path, name: &str, seconds: u32) -> Result<Finding> {
    let (found, kept) = (folder.join("artifacts").join(name), built.join("corpus").join(name));
    for made in [&found, &kept] {
        std::fs::create_dir_all(made).with_context(|| format!("making {}", made.display()))?;
    }
    let mut command = Command::new(built.join(TRIPLE).join("release").join(name));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-artifact_prefix={}/", found.display()));
    // An input takes milliseconds; a busy machine may make that seconds.
    command.args(["-print_final_stats=1", "-timeout=60", "-report_slow_units=60", "-rss_limit_mb=2048"]);
    command.arg(&kept);
    let begin = folder.join("corpus").join(name);
    if begin.is_dir() {
        command.arg(begin);
    }
    let started = Instant::now();
    let output = exec::tether(&mut command).output().with_context(|| format!("running {name}"))?;
    let seconds = started.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    let (inputs, coverage) =
        (last_number(&said, "stat::number_of_executed_units:"), last_number(&said, " cov: "));
    let failure = (!output.status.success()).then(|| {
        let lines: Vec<&str> = said.lines().collect();
        let end = lines[lines.len().saturating_sub(REPORT_LINES)..].join("\n");
        format!("the fuzz target {name} found something; the input is in {}:\n{end}", found.display())
    });
    let verdict = if failure.is_none() { "nothing" } else { "SOMETHING" };
    println!("fuzz {name}: {verdict} in {} inputs, {seconds:.0} s", inputs.unwrap_or_default());
    Ok(Finding { target: name.into(), seconds, inputs, coverage, failure })
}

/// The number behind the last `label` in what libFuzzer says.
fn last_number(said: &str, label: &str) -> Option<u64> {
    let digits = said.rsplit_once(label)?.1.trim_start();
    digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len())].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_numbers_of_a_fuzzer_are_read() {
        let said =
            "#2 INITED cov: 12 ft: 13\n#9 DONE   cov: 1285 ft: 3555\nstat::number_of_executed_units: 376\n";
        assert_eq!(last_number(said, " cov: "), Some(1285));
        assert_eq!(last_number(said, "stat::number_of_executed_units:"), Some(376));
        assert_eq!(last_number("ERROR", " cov: "), None);
    }
}
