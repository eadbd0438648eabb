//! Bochs itself, built from Debian's source, and the firmware that it runs.
//!
//! Debian's own binary would do, but it is slower (the debugger and instrumentation are in it), needs a
//! display, and brings a desktop's libraries with it. The build takes some three minutes of one CPU, once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{self, Suite};
use crate::cache::Cache;
use crate::exec;
use crate::progress::Step;

/// Raised when the way of building changes in a manner that the recipe's other parts do not show.
const RECIPE_VERSION: u32 = 1;
/// Where source and firmware come from: its Bochs is 3.0.
const SUITE: &str = "trixie";
/// What is built in: 64-bit CPUs, several of them, with VMX or SVM, and no display.
const CONFIGURE: &[&str] = &[
    "--with-nogui",
    "--disable-plugins",
    "--disable-docbook",
    "--enable-all-optimizations",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-smp",
    "--enable-vmx=2",
    "--enable-svm",
    "--enable-avx",
    "--enable-evex",
    "--enable-pci",
];
const COMPILER_FLAGS: &str = "-O3 -fno-strict-aliasing";
/// Seconds that the build may take: it gets there even on a machine that is busy with much else.
const BUILD_SECONDS: &str = "3600";
/// Lines that the build prints, roughly: for the progress bar.
const BUILD_LINES: u64 = 1350;

/// What emulates an Intel host.
pub struct Program {
    /// The emulator.
    pub bochs: PathBuf,
    /// The BIOS.
    pub bios: PathBuf,
    /// The BIOS of the graphics card, without which the BIOS does not start.
    pub vga_bios: PathBuf,
}

/// Builds Bochs, or finds it in the cache.
///
/// # Errors
/// No network, no C++ compiler, or the build fails or takes longer than an hour.
pub fn build(cache: &Cache) -> Result<Program> {
    let recipe = format!("{RECIPE_VERSION} {} {SUITE} {CONFIGURE:?} {COMPILER_FLAGS}", apt::mirror());
    let entry = cache.entry("bochs", &recipe, make)?;
    let file = |name: &str| entry.join(name);
    Ok(Program { bochs: file("bochs"), bios: file("bios"), vga_bios: file("vga-bios") })
}

fn make(dir: &Path) -> Result<()> {
    let step = Step::with_length("building Bochs from Debian's source", BUILD_LINES);
    let work = tempfile::tempdir_in(dir)?;
    let suite = Suite::open_with_sources(SUITE, &step)?;
    let firmware = work.path().join("firmware");
    for package in ["bochsbios", "vgabios"] {
        apt::unpack(&suite.download(package, work.path(), &step)?, &firmware)?;
    }
    for (from, to) in [("bochs/BIOS-bochs-latest", "bios"), ("vgabios/vgabios.bin", "vga-bios")] {
        fs::copy(firmware.join("usr/share").join(from), dir.join(to))
            .with_context(|| format!("Debian's firmware for Bochs has no {from}"))?;
    }
    let archive = suite.download_source("bochs", work.path(), &step)?;
    let source = work.path().join("source");
    fs::create_dir(&source)?;
    let mut unpack = Command::new("tar");
    unpack.arg("-xf").arg(&archive).args(["--strip-components=1", "-C"]).arg(&source);
    exec::run(&mut unpack, Some(&step))?;
    let mut configure = bounded(&source);
    configure.arg("./configure").args(CONFIGURE);
    configure.arg(format!("CXXFLAGS={COMPILER_FLAGS}")).arg(format!("CFLAGS={COMPILER_FLAGS}"));
    exec::run(&mut configure, Some(&step)).context("configuring Bochs")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    exec::run(bounded(&source).args(["make", &format!("-j{jobs}"), "bochs"]), Some(&step))
        .with_context(|| format!("building Bochs, for which {BUILD_SECONDS} s are given"))?;
    exec::run(Command::new("strip").arg("-o").arg(dir.join("bochs")).arg(source.join("bochs")), Some(&step))?;
    step.done();
    Ok(())
}

/// A command in `dir` that is ended when it takes too long.
fn bounded(dir: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.arg(BUILD_SECONDS).current_dir(dir);
    command
}
