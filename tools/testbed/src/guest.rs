//! The guest's small initramfs: busybox, `smp-check` and an `/init` that says what the guest sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive::Initramfs;
use crate::artifacts::workspace;
use crate::cache::Cache;
use crate::exec;
use crate::image;
use crate::progress::Step;

/// Raised when what is put in changes in a manner that the recipe's other parts do not show.
const RECIPE_VERSION: u32 = 1;
const INIT: &str = include_str!("../files/guest-init.sh");

/// How `smp-check` is compiled: static, so that it needs nothing else in the guest.
const COMPILE: &[&str] = &["-O2", "-Wall", "-Wextra", "-fopenmp", "-static", "-pthread"];

/// Builds the initramfs, or finds it in the cache.
///
/// # Errors
/// No compiler, no network.
pub fn initramfs(cache: &Cache) -> Result<PathBuf> {
    let busybox = image::busybox(cache)?;
    let source = fs::read_to_string(smp_check_source()).context("reading smp-check's source")?;
    let recipe = format!("{RECIPE_VERSION} {COMPILE:?}\n{INIT}\n{source}");
    let entry = cache.entry("guest-initramfs", &recipe, |dir| {
        let step = Step::start("making the guest's initramfs");
        let smp_check = dir.join("smp-check");
        compile_smp_check(&smp_check)?;
        let mut archive = Initramfs::new()?;
        archive.program("bin/busybox", &busybox)?;
        archive.program("bin/smp-check", &smp_check)?;
        archive.file("init", 0o755, INIT.as_bytes())?;
        fs::write(dir.join("initramfs"), archive.finish()?)?;
        step.done();
        Ok(())
    })?;
    Ok(entry.join("initramfs"))
}

/// Compiles `smp-check` to `output`.
///
/// # Errors
/// The compiler is missing or objects.
pub fn compile_smp_check(output: &Path) -> Result<()> {
    let source = smp_check_source();
    exec::run(Command::new("gcc").args(COMPILE).arg("-o").arg(output).arg(source), None).map(drop)
}

fn smp_check_source() -> PathBuf {
    workspace().join("tools/smp-check/smp-check.c")
}
