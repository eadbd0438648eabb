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
    let mut recipe = format!("{RECIPE_VERSION} {COMPILE:?}\n{INIT}");
    for file in smp_check_sources()? {
        recipe.push_str(&fs::read_to_string(file)?);
    }
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
    let sources =
        smp_check_sources()?.into_iter().filter(|path| path.extension().is_some_and(|end| end == "c"));
    exec::run(Command::new("gcc").args(COMPILE).arg("-o").arg(output).args(sources), None).map(drop)
}

/// Its C files and headers, in a stable order.
fn smp_check_sources() -> Result<Vec<PathBuf>> {
    let dir = workspace().join("tools/smp-check");
    let listing = fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut files: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "c" || end == "h"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup;

    #[test]
    fn smp_check_passes_on_this_machine() {
        if setup::missing(setup::TO_COMPILE) {
            eprintln!("skipped: gcc or a static libc is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("smp-check");
        compile_smp_check(&program).unwrap();
        let said = exec::run(Command::new(&program).args(["--scale", "0.2"]), None).unwrap();
        assert!(said.lines().last().is_some_and(|line| line.starts_with("smp-check: all ok")), "{said}");
    }
}
