//! Two rails beside one, each slower than what the CPUs can send.
//!
//! ```text
//! a network namespace of its own:   rail 0   127.0.1.0/24 ── MEGABITS ──┐
//!                                   rail 1   127.0.2.0/24 ── MEGABITS ──┴── loopback device, shaped by HTB
//! ```
//!
//! Unshaped, both rails of one host are the same memory copies on the same CPUs, and two are no faster than
//! one.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use super::end::over_tcp;
use super::measure::one_way;
use crate::fault_path::command::Polling;

/// What a rail carries, in megabits a second: a tenth of what a slow CPU can send.
pub const MEGABITS: u32 = 200;

/// Frames of one measurement, of 4 KiB each.
const FRAMES: usize = 4096;
const LANES: u16 = 2;

/// Microseconds for each 4 KiB frame that goes one way: over two rails, and over one. The best of `rounds`.
///
/// # Errors
/// This process may not shape a network (that needs root, `ip` and `tc`), or an end fails.
pub fn best_of(rounds: usize, polling: Polling, cpus: &[usize]) -> Result<[f64; 2]> {
    // What unshares a namespace is a thread, and what it starts stays in it.
    std::thread::scope(|scope| {
        let measured = scope.spawn(|| {
            shape()?;
            let mut best = [f64::INFINITY; 2];
            for _ in 0..rounds {
                for (best, rails) in best.iter_mut().zip([2, 1]) {
                    let rails: Vec<_> = (1..=rails).map(|rail| ([127, 0, rail, 1], 0).into()).collect();
                    let ends = over_tcp(&rails, LANES, false, polling)?;
                    *best = best.min(one_way(ends, cpus, 4096, FRAMES)?);
                }
            }
            Ok(best)
        });
        measured.join().unwrap_or_else(|_| anyhow::bail!("the measuring thread panicked"))
    })
}

/// Moves this thread to a network namespace whose loopback device carries two rails.
fn shape() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace, which takes root")?;
    run("ip link set lo up")?;
    run("tc qdisc add dev lo root handle 1: htb")?;
    for rail in 1..=2 {
        // A burst is what the device takes as one packet.
        run(&format!(
            "tc class add dev lo parent 1: classid 1:{rail} htb rate {MEGABITS}mbit burst 64k quantum 60000"
        ))?;
        for end in ["src", "dst"] {
            run(&format!(
                "tc filter add dev lo parent 1: u32 match ip {end} 127.0.{rail}.0/24 flowid 1:{rail}"
            ))?;
        }
    }
    Ok(())
}

fn run(command: &str) -> Result<()> {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    let output = Command::new(program).args(words).output().with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
