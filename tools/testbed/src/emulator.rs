//! Checks of the emulator, each by a program of its own without Linux and without Gestalt: how often it runs
//! code that is no longer in memory ([`crate::stale`]), and whether it keeps a CPU's flags whole.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::{exec, qemu};

/// The program that patches itself, a machine's only one; its first comment tells what it does.
const STALE_CODE: &str = include_str!("../files/stale-code.c");
/// The program that looks at its flags, likewise.
const BROKEN_FLAGS: &str = include_str!("../files/broken-flags.c");
/// The flags that it must find: SF alone, and none but the bit that is always 1.
const RIGHT_FLAGS: Flags = Flags { sum: 0x82, small: 0x02 };
/// How they are compiled: for a 32-bit processor without an operating system, as multiboot wants it.
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

/// The flags that a CPU had after an addition and CMPXCHG8B, for two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Flags {
    /// Of the operand 0xa0800480.
    pub sum: u32,
    /// Of the operand 1.
    pub small: u32,
}

impl Flags {
    /// Whether they are what every CPU has then.
    pub fn are_right(self) -> bool {
        self == RIGHT_FLAGS
    }
}

/// Runs the program that patches itself on so many emulated CPUs (2 to 16) until it has made so many patches,
/// or for `limit`: a busy machine seldom lets two emulated CPUs run at the same time, and a patch then takes
/// some time slices. Needs gcc and the emulator.
///
/// # Errors
/// It cannot be compiled or run, or has not made a hundred patches within `limit`.
pub fn stale_code(cpus: u32, patches: u32, limit: Duration) -> Result<Count> {
    let said = run(STALE_CODE, cpus, &format!("{cpus} {patches}"), limit)?;
    said.lines().rev().find_map(count_in).with_context(|| nothing_came(limit, &said))
}

/// Runs the program that looks at its flags, for `limit` at most. Needs gcc and the emulator.
///
/// # Errors
/// It cannot be compiled or run, or says nothing.
pub fn flags(limit: Duration) -> Result<Flags> {
    let said = run(BROKEN_FLAGS, 1, "", limit)?;
    said.lines().find_map(flags_in).with_context(|| nothing_came(limit, &said))
}

fn nothing_came(limit: Duration, said: &str) -> String {
    format!("the emulator came to nothing within {limit:?}: it said {said:?}; let it run for longer")
}

/// What a program and the emulator said, all of it.
fn run(source: &str, cpus: u32, arguments: &str, limit: Duration) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let program = compile(source, dir.path())?;
    let (mut reader, writer) = io::pipe().context("making a pipe")?;
    let mut command = Command::new(qemu::program());
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "64", "-smp", &cpus.to_string()])
        .arg("-kernel")
        .arg(program)
        .args(["-append", arguments, "-debugcon", "stdio"])
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

fn compile(source: &str, dir: &Path) -> Result<PathBuf> {
    let (file, program) = (dir.join("program.c"), dir.join("program"));
    std::fs::write(&file, source)?;
    exec::run(Command::new("gcc").args(COMPILE).arg("-o").arg(&program).arg(&file), None)?;
    Ok(program)
}

/// Reads `flags=00000082 00000002`.
fn flags_in(said: &str) -> Option<Flags> {
    let (sum, small) = said.strip_prefix("flags=")?.split_once(' ')?;
    let number = |digits| u32::from_str_radix(digits, 16).ok();
    Some(Flags { sum: number(sum)?, small: number(small)? })
}

/// Reads `cpus=2 patches=10 ...`.
fn count_in(said: &str) -> Option<Count> {
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
        assert_eq!(count_in(said), Some(count));
        assert_eq!(count_in("cpus=2 patches=10"), None);
    }

    #[test]
    fn flags_are_read_from_what_the_program_says() {
        let broken = flags_in("flags=a0800482 00000002").unwrap();
        assert_eq!(broken, Flags { sum: 0xa080_0482, small: 2 });
        assert!(!broken.are_right());
        assert!(flags_in("flags=00000082 00000002").unwrap().are_right());
        for nothing in ["", "flags=82", "flags=x 2", "qemu: 1 2"] {
            assert_eq!(flags_in(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn the_flags_are_right_or_hold_the_operand() {
        if setup::missing(setup::TO_COMPILE) || setup::missing(setup::TO_EMULATE) {
            eprintln!("skipped: gcc or the emulator is not installed");
            return;
        }
        let found = flags(Duration::from_secs(300)).unwrap();
        let broken = Flags { sum: 0xa080_0482, small: 0x03 };
        assert!(found.are_right() || found == broken, "{found:x?}");
    }

    #[test]
    fn other_cpus_run_what_one_patches() {
        if setup::missing(setup::TO_COMPILE) || setup::missing(setup::TO_EMULATE) {
            eprintln!("skipped: gcc or the emulator is not installed");
            return;
        }
        let count = stale_code(2, 20, Duration::from_secs(300)).unwrap();
        assert_eq!((count.cpus, count.patches), (2, 20));
        // Or the other CPU was never there, and nothing could have been stale.
        assert!(count.expected_int3 > 0, "{count:?}");
        assert!(count.stale_int3 <= 20 && count.stale_code <= 20, "{count:?}");
    }
}
