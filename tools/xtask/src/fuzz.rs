//! `cargo xtask fuzz`: runs the fuzz targets of `tests/fuzz`, with the stable compiler and libFuzzer.
//!
//! What they find goes to `tests/fuzz/artifacts`; inputs worth keeping to `target/fuzz/corpus`, beside the small corpus
//! in `tests/fuzz/corpus` that every run begins with.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use testbed::artifacts::{target_dir, workspace};
use testbed::{exec, setup};

/// What the compiler does for libFuzzer: counters on every edge, and what is compared with what. As `cargo fuzz` does it,
/// without a sanitizer: those need the nightly compiler, and this code is safe Rust with overflow checks.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";
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
}

impl Fuzz {
    /// Does the task.
    ///
    /// # Errors
    /// A target finds something, or cannot be built.
    pub fn run(&self) -> Result<()> {
        let part = self.target.as_deref().unwrap_or("");
        let names = run_all(part, self.seconds)?;
        println!("{} fuzz targets found nothing in {} s each", names, self.seconds);
        Ok(())
    }
}

/// Runs the targets whose name contains `part`; how many there are.
///
/// # Errors
/// A target finds something, or cannot be built.
pub fn run_all(part: &str, seconds: u32) -> Result<usize> {
    setup::ensure(&[setup::TO_COMPILE, setup::TO_FUZZ])?;
    let folder = workspace().join("tests/fuzz");
    let names = names(&folder.join("targets"))?;
    let names: Vec<&String> = names.iter().filter(|name| name.contains(part)).collect();
    ensure!(!names.is_empty(), "no fuzz target's name contains {part:?}");
    let built = target_dir()?.join("fuzz");
    build(&folder, &built)?;
    for name in &names {
        run_one(&folder, &built, name, seconds)?;
    }
    Ok(names.len())
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

fn run_one(folder: &Path, built: &Path, name: &str, seconds: u32) -> Result<()> {
    let (found, kept) = (folder.join("artifacts").join(name), built.join("corpus").join(name));
    for made in [&found, &kept] {
        std::fs::create_dir_all(made).with_context(|| format!("making {}", made.display()))?;
    }
    let mut command = Command::new(built.join(TRIPLE).join("release").join(name));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-artifact_prefix={}/", found.display()));
    command.args(["-print_final_stats=1", "-timeout=10", "-rss_limit_mb=2048", "-verbosity=0"]);
    command.arg(&kept);
    let begin = folder.join("corpus").join(name);
    if begin.is_dir() {
        command.arg(begin);
    }
    let output = exec::tether(&mut command).output().with_context(|| format!("running {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("the fuzz target {name} found something ({}):\n{said}", found.display());
    }
    let executed = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units: "));
    println!("fuzz {name}: nothing in {} inputs", executed.map_or("?", str::trim));
    Ok(())
}
