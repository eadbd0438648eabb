//! The rails of `cargo xtask soak -- --rails N`: cut and restored in turn under a guest that checks its
//! memory without end, and cut all at once at last.
//!
//! ```text
//! hosts 0 and 1:   first network ── the coordinator's, left alone
//!                  rail 0, rail 1 ── one is cut: its lanes move to the other; restored: they return; at last both are cut
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use testbed::boot::{Boot, Outcome, Watch};
use testbed::machine::Machine;
use testbed::rack::Rack;
use testbed::rig::Rig;

use crate::scenarios::LOSS_LIMIT;

/// The host whose cables are pulled.
const FAR: usize = 1;
/// A guest gets to user space within this even on busy emulated hosts.
const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// A check of the guest's memory takes a minute or two there.
const CHECK_LIMIT: Duration = Duration::from_secs(300);
/// Within this lanes have left a rail, or are back on it: well beyond what they need.
const MOVE_LIMIT: Duration = Duration::from_secs(20);
/// How long a rail stays cut once its lanes have moved, and whole once they are back.
const HOLD: Duration = Duration::from_secs(2);
/// How long a machine without rails is watched before it counts as hanging.
const LOSS_PATIENCE: Duration = Duration::from_secs(30);

/// What came of it.
#[derive(Default, Serialize)]
pub struct Trial {
    /// The cuts that were survived, in order.
    pub cuts: Vec<Cut>,
    /// Checks of its memory that the guest finished meanwhile, none of them with a failure.
    pub checks: usize,
    /// From the cut of all rails to the end of `gestalt run`.
    pub end_seconds: Option<f64>,
    /// What went wrong.
    pub failure: Option<String>,
}

/// One rail, cut and restored.
#[derive(Serialize)]
pub struct Cut {
    /// Which.
    pub rail: usize,
    /// When, since the start of `gestalt run`.
    pub at_seconds: f64,
    /// From the cut until its lanes were on another rail.
    pub moved_seconds: f64,
    /// From the restoration until they were back.
    pub returned_seconds: f64,
}

/// Two nodes with a CPU on a host each, which two rails connect.
pub fn machine(rdma: bool) -> Machine {
    Machine { hosts: 2, rails: 2, rdma, ..Machine::equal(2, 1, 384) }
}

/// Boots `machine`, cuts its rails in turn, `count` times in all, and then all of them.
pub fn run(rig: &Rig, machine: &Machine, count: usize) -> Trial {
    let mut trial = Trial::default();
    let result = match rig.rack() {
        Some(rack) => trial.follow(rig, rack, machine, count),
        None => Err(anyhow::anyhow!("rails can only be cut on emulated hosts: add --emulate")),
    };
    trial.failure = result.err().map(|error| format!("{error:#}"));
    trial
}

impl Trial {
    /// Says it in a few lines.
    pub fn print(&self) {
        let sorted = |of: fn(&Cut) -> f64| {
            let mut all: Vec<f64> = self.cuts.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let median = |all: &[f64]| all.get(all.len() / 2).copied().unwrap_or_default();
        let most = |all: &[f64]| all.last().copied().unwrap_or_default();
        let (moved, returned) = (sorted(|cut| cut.moved_seconds), sorted(|cut| cut.returned_seconds));
        println!("{} cuts of a rail went unnoticed by {} checks of the guest", self.cuts.len(), self.checks);
        println!(
            "  lanes were on another rail {:.2} s later (median; {:.2} s at most), and back {:.2} s after its return \
             ({:.2} s at most)",
            median(&moved),
            most(&moved),
            median(&returned),
            most(&returned)
        );
        if let Some(seconds) = self.end_seconds {
            println!(
                "  without any rail gestalt run ended {seconds:.2} s later (limit {} s)",
                LOSS_LIMIT.as_secs()
            );
        }
    }

    fn follow(&mut self, rig: &Rig, rack: &Rack, machine: &Machine, count: usize) -> Result<()> {
        let mut machine = machine.clone();
        machine.actions = "loop-smp-check".into();
        let mut boot = Boot::start(rig, &machine, None)?;
        boot.watch(Watch::until_userspace(BOOT_LIMIT), |_| ())?;
        let lines = if machine.rdma { OVER_RDMA } else { OVER_TCP };
        for number in 0..count {
            let rail = number % machine.rails;
            let cut = self
                .cut(rack, &mut boot, rail, lines)
                .with_context(|| format!("cut {} of {count}", number + 1))?;
            eprintln!(
                "rails: cut {} of {count}, rail {rail}: lanes on another one after {:.2} s, back after {:.2} s",
                number + 1,
                cut.moved_seconds,
                cut.returned_seconds
            );
            self.cuts.push(cut);
        }
        // Whatever a cut spoilt shows at the latest in a check that ends after the last one.
        let before = checks(boot.outcome(), "ok");
        let finished = boot.wait_until(CHECK_LIMIT, |outcome| checks(outcome, "ok") > before)?;
        self.checks = healthy(boot.outcome())?;
        ensure!(finished, "no check was finished within {CHECK_LIMIT:?}\n{}", boot.outcome().tail());
        self.all(rack, &mut boot, machine.rails)
    }

    /// Cuts a rail, waits until its lanes have moved, and restores it until they are back.
    fn cut(&mut self, rack: &Rack, boot: &mut Boot, rail: usize, lines: Lines) -> Result<Cut> {
        let left = |outcome: &Outcome| moves(outcome, lines, rail, 1 - rail);
        let back = |outcome: &Outcome| moves(outcome, lines, 1 - rail, rail);
        let (left_before, back_before) = (left(boot.outcome()), back(boot.outcome()));
        let at_seconds = boot.started().elapsed().as_secs_f64();
        let began = Instant::now();
        rack.set_connected(1 + rail, FAR, false);
        let moved = boot.wait_until(MOVE_LIMIT, |outcome| left(outcome) > left_before)?;
        let moved_seconds = began.elapsed().as_secs_f64();
        ensure!(moved, "no lane left the rail within {MOVE_LIMIT:?}\n{}", boot.outcome().tail());
        boot.wait_until(HOLD, |_| false)?;
        let began = Instant::now();
        rack.set_connected(1 + rail, FAR, true);
        let returned = boot
            .wait_until(MOVE_LIMIT, |outcome| back(outcome) - back_before == left(outcome) - left_before)?;
        let returned_seconds = began.elapsed().as_secs_f64();
        ensure!(returned, "not all lanes are back after {MOVE_LIMIT:?}\n{}", boot.outcome().tail());
        boot.wait_until(HOLD, |_| false)?;
        healthy(boot.outcome())?;
        Ok(Cut { rail, at_seconds, moved_seconds, returned_seconds })
    }

    /// Cuts all rails: the machine must end in time, with an error that names the node.
    fn all(&mut self, rack: &Rack, boot: &mut Boot, rails: usize) -> Result<()> {
        let began = Instant::now();
        (1..=rails).for_each(|network| rack.set_connected(network, FAR, false));
        let end = boot.wait_end(LOSS_PATIENCE)?;
        let took = began.elapsed();
        let end = end
            .with_context(|| format!("gestalt run still runs {LOSS_PATIENCE:?} after all rails were cut"))?;
        self.end_seconds = Some(took.as_secs_f64());
        ensure!(end.code != Some(0), "gestalt run ended with 0 after all rails were cut");
        ensure!(took <= LOSS_LIMIT, "the machine ended {took:?} after all rails were cut\n{}", end.tail());
        let named = end.messages.lines().any(|line| line.starts_with("gestalt:") && line.contains("n1"));
        ensure!(named, "the error does not name node n1\n{}", end.tail());
        eprintln!("rails: all cut: gestalt run ended {:.2} s later", took.as_secs_f64());
        Ok(())
    }
}

/// How many checks of the guest ended so.
fn checks(outcome: &Outcome, how: &str) -> usize {
    outcome.console.matches(&format!("GESTALT-REPORT smp_check={how}")).count()
}

/// The checks that were finished, if none of them failed.
fn healthy(outcome: &Outcome) -> Result<usize> {
    ensure!(checks(outcome, "failed") == 0, "smp-check failed\n{}", outcome.tail());
    Ok(checks(outcome, "ok"))
}

/// What the first node says when a lane has gone from one rail to another.
type Lines = fn(usize, usize) -> String;

const OVER_TCP: Lines = |from, to| format!("is on rail {to}, and was on rail {from}");
const OVER_RDMA: Lines = |_, to| format!("goes on over rail {to}");

/// How many times lanes went from a rail to another one.
fn moves(outcome: &Outcome, lines: Lines, from: usize, to: usize) -> usize {
    outcome.messages.matches(&lines(from, to)).count()
}
