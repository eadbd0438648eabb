//! A check of the emulator: how often it runs code that is no longer in memory. See [`crate::emulator_fault`].

use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::{exec, qemu};

/// The program that patches itself, a machine's only one; its first comment tells what it does.
const PROGRAM: &str = include_str!("../files/stale-code.c");
/// How it is compiled: for a 32-bit processor without an operating system, as multiboot wants it.
const COMPILE: &[&str] = &[
    "-m32",
    "-O2",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-mno-sse",
    "-mno-mmx",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none,-z,noexecstack,-Ttext=0x100000,-e,start",
];

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    /// CPUs: one patches, the others run what is patched.
    pub cpus: u64,
    /// Patches made.
    pub patches: u64,
    /// Breakpoints met while a patch was under way, as is right.
    pub expected_int3: u64,
    /// Patches after which a CPU met a breakpoint that memory no longer held.
    pub stale_int3: u64,
    /// Patches after which a CPU ran what had been there before the patch.
    pub stale_code: u64,
}

/// Runs the program on so many emulated CPUs (2 to 16) until it has made so many patches, or for `limit`: a busy machine
/// seldom lets two emulated CPUs run at the same time, and a patch then takes some time slices. Needs gcc and the emulator.
///
/// # Errors
/// It cannot be compiled or run, or has not made a hundred patches within `limit`.
pub fn check(cpus: u32, patches: u32, limit: Duration) -> Result<Count> {
    let dir = tempfile::tempdir()?;
    let (source, program) = (dir.path().join("stale-code.c"), dir.path().join("stale-code"));
    std::fs::write(&source, PROGRAM)?;
    exec::run(Command::new("gcc").args(COMPILE).arg("-o").arg(&program).arg(&source), None)?;
    let said = run(&program, cpus, patches, limit)?;
    said.lines().rev().find_map(parse).with_context(|| {
        format!("the emulator came to nothing within {limit:?}: it said {said:?}; let it run for longer")
    })
}

/// What the program and the emulator said, all of it.
fn run(program: &Path, cpus: u32, patches: u32, limit: Duration) -> Result<String> {
    let (mut reader, writer) = io::pipe().context("making a pipe")?;
    let mut command = Command::new(qemu::program());
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "64", "-smp", &cpus.to_string()])
        .arg("-kernel")
        .arg(program)
        .args(["-append", &format!("{cpus} {patches}"), "-debugcon", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4"])
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    // Its exit code is that of isa-debug-exit, never 0: what counts is what the program says.
    let mut child = exec::spawn_tethered(command)
        .with_context(|| format!("cannot start {}: is qemu-system-x86 installed?", qemu::program()))?;
    let output = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map(|_| bytes)
    });
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline && child.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Nothing happens if it has ended.
    let _ = child.kill();
    child.wait()?;
    let bytes =
        output.join().map_err(|_| anyhow!("the thread that reads the emulator's output panicked"))??;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads `cpus=2 patches=10 ...`.
fn parse(said: &str) -> Option<Count> {
    let number = |name: &str| {
        let words = said.split_whitespace().filter_map(|word| word.split_once('='));
        words.into_iter().find(|(key, _)| *key == name)?.1.parse().ok()
    };
    Some(Count {
        cpus: number("cpus")?,
        patches: number("patches")?,
        expected_int3: number("expected_int3")?,
        stale_int3: number("stale_int3")?,
        stale_code: number("stale_code")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup;

    #[test]
    fn a_count_is_read_from_what_the_program_says() {
        let said = "cpus=2 patches=10 expected_int3=55 stale_int3=1 stale_code=0\n";
        let count = Count { cpus: 2, patches: 10, expected_int3: 55, stale_int3: 1, stale_code: 0 };
        assert_eq!(parse(said), Some(count));
        assert_eq!(parse("cpus=2 patches=10"), None);
    }

    #[test]
    fn other_cpus_run_what_one_patches() {
        if setup::missing(setup::TO_COMPILE) || setup::missing(setup::TO_EMULATE) {
            eprintln!("skipped: gcc or the emulator is not installed");
            return;
        }
        let count = check(2, 20, Duration::from_secs(300)).unwrap();
        assert_eq!((count.cpus, count.patches), (2, 20));
        // Or the other CPU was never there, and nothing could have been stale.
        assert!(count.expected_int3 > 0, "{count:?}");
        assert!(count.stale_int3 <= 20 && count.stale_code <= 20, "{count:?}");
    }
}
