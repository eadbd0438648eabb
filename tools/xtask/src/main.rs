//! Development tasks: `cargo xtask <task>`.
//!
//! | task | file | what it does |
//! |---|---|---|
//! | `quickstart` | [`quickstart`] | one guest over several nodes, with what it says of itself |
//! | `quickstart --disk` | [`disk`] | a Debian that boots from its own disk, and the disks of all nodes |
//! | `quickstart --emulate intel` | [`intel`] | what else there is to know of a host in Bochs |
//! | `image` | [`image`] | disks to boot |
//! | `test` | [`mod@test`] | checks of the sources, unit tests, integration tests, guest boots |
//! | `soak` | [`soak`] | many boots, other shapes of machine, killed nodes |
//! | `simulate` | [`simulate`] | the coherence protocol at many nodes, in virtual time, by seed |
//! | `fuzz` | [`fuzz`] | everything that reads a stranger's bytes, with bytes that nobody thought of |
//! | `emulator-check` | [`emulator_check`] | how often the emulator runs code that is no longer in memory |
//! | `ci-checks` | [`checks`], [`layers`] | what `test` checks of the sources, and nothing else |
//!
//! [`rails`] are the cut rails of `soak`, [`options`] what tasks that boot have in common, [`scenarios`] the
//! boots of `test` and `soak`, [`over_rdma`] the fabric's tests on soft-RoCE, [`cargo_tests`] those of `cargo
//! test`, [`skips`] which of them lack something here, [`tally`] what `test` has found so far, [`report`] the
//! files in `target/report`, [`allowance`] a command with so much CPU time.

mod allowance;
mod cargo_tests;
mod checks;
mod devices;
mod disk;
mod emulator_check;
mod fuzz;
mod image;
mod intel;
mod layers;
mod options;
mod over_rdma;
mod quickstart;
mod rails;
mod report;
mod scenarios;
mod simulate;
mod skips;
mod soak;
mod tally;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development tasks of Gestalt")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot one guest over several nodes and show what it says of itself
    Quickstart(quickstart::Quickstart),
    /// Make a disk to boot
    Image(image::Image),
    /// Run unit tests, integration tests and guest boots
    Test(test::Test),
    /// Boot many times in a row, in other shapes, and kill nodes
    Soak(soak::Soak),
    /// Run the coherence protocol at many nodes in virtual time, by seed
    Simulate(simulate::Simulate),
    /// Measure disks and network cards from CPUs of their own node and of another, and those of QEMU
    Devices(devices::Devices),
    /// Feed what reads strangers' bytes with bytes that nobody thought of
    Fuzz(fuzz::Fuzz),
    /// Count how often the emulator runs code that is no longer in memory
    EmulatorCheck(emulator_check::EmulatorCheck),
    /// Check formatting, lints, documentation, licences and versions
    CiChecks,
}

fn main() -> ExitCode {
    // `cargo xtask quickstart -- --nodes 3` and `cargo xtask quickstart --nodes 3` are the same: no task
    // takes anything but flags, so a lone `--` says nothing.
    let args = std::env::args_os().filter(|arg| arg != "--");
    let result = match Cli::parse_from(args).task {
        Task::Quickstart(task) => task.run(),
        Task::Image(task) => task.run(),
        Task::Test(task) => task.run(),
        Task::Soak(task) => task.run(),
        Task::Simulate(task) => task.run(),
        Task::Devices(task) => task.run(),
        Task::Fuzz(task) => task.run(),
        Task::EmulatorCheck(task) => task.run(),
        Task::CiChecks => checks::alone(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
