//! The `gestalt` command line.
//!
//! | command | file | what it does |
//! |---|---|---|
//! | `gestalt run` | [`run`] | brings a machine up and holds it: the coordinator |
//! | `gestalt node` | [`node`] | one node of a machine |
//! | `gestalt device` | [`device`] | shows and changes the devices of a running machine |
//! | `gestalt inspect` | [`inspect`] | what is on a disk, and what would boot |
//! | `gestalt key` | [`key`] | makes and shows keys |
//! | `gestalt doctor` | [`doctor`] | whether a node can run on this host |
//! | `gestalt completions` | [`completions`] | what makes a shell complete these |
//! | `gestalt man` | [`manual`] | the manual |
//!
//! Exit codes: 0 the guest switched itself off, the operator left, or the host is fine; 1 failure, with one
//! sentence on standard error; 2 a command line that cannot be understood; 128 + n ended by signal n.

pub mod completions;
pub mod device;
pub mod doctor;
pub mod inspect;
pub mod key;
pub mod manual;
pub mod node;
pub mod run;
mod signals;

use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::log_limit::LogLimit;
use crate::terminal;
use machine::control::{Assignment, Control, Exit};

/// What a node does once it has its assignment: `node::run`.
pub type NodeMain = fn(Assignment, Control) -> anyhow::Result<Exit>;

/// Many servers, one Linux machine.
#[derive(Debug, Parser)]
#[command(name = "gestalt", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more (-v: debug, -vv: trace). GESTALT_LOG takes a filter such as `vmm::coordinator=trace`.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a machine and stay at its console until it ends
    Run(Box<run::RunArgs>),
    /// Be one node of a machine that `gestalt run` holds
    Node(node::NodeArgs),
    /// Show and change the devices of a running machine
    Device(device::DeviceArgs),
    /// Say what is on a disk, and what a machine with it would boot
    Inspect(inspect::InspectArgs),
    /// Look into the disk on standard input: what `run` and `inspect` start as a process of its own
    #[command(name = vmm::disk_search::COMMAND, hide = true)]
    DiskSearch(inspect::SearchArgs),
    /// Make and show the keys by which the nodes of a machine know each other
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Say whether a node can run on this host, and how to mend what is not right
    Doctor(doctor::DoctorArgs),
    /// Print what makes a shell complete the commands and flags of `gestalt`
    Completions(completions::CompletionsArgs),
    /// Write the manual, a page for `gestalt` and for each of its commands
    Man(manual::ManArgs),
}

/// Parses the command line and does what it says.
pub fn main(node_main: NodeMain) -> ExitCode {
    let cli = Cli::parse();
    log(cli.verbose);
    let ended = match cli.command {
        Command::Run(args) => run::run(*args, cli.verbose),
        Command::Node(args) => node::node(args, node_main),
        Command::Device(args) => device::device(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::DiskSearch(args) => Ok(vmm::disk_search::child(&args.image, args.survey)),
        Command::Key(command) => key::key(&command),
        Command::Doctor(args) => Ok(doctor::doctor(&args)),
        Command::Completions(args) => completions::completions(&args, &Cli::command()),
        Command::Man(args) => manual::man(&args, Cli::command()),
    };
    terminal::leave_raw();
    let code = ended.map_or_else(
        |error| {
            terminal::say_last(&format!("gestalt: {error:#}"));
            ExitCode::FAILURE
        },
        ExitCode::from,
    );
    signals::release();
    // What is not written by then is lost: nobody reads it.
    terminal::flush_lines();
    code
}

fn log(verbose: u8) {
    let default = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("GESTALT_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt::layer().with_writer(|| terminal::Stderr);
    let log = log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).without_time();
    // Plain lines for operators; where they come from for whoever asked for more.
    let log = log.with_target(verbose > 0).with_filter(LogLimit::new(terminal::say));
    tracing_subscriber::registry().with(log).with(filter).init();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program, for tests of what is made from it.
    pub fn program() -> clap::Command {
        Cli::command()
    }

    /// Every command that is not hidden, as its words from `gestalt` on and the sentence that it says of
    /// itself.
    pub fn commands() -> Vec<(Vec<String>, String)> {
        fn add(command: &clap::Command, before: &[String], all: &mut Vec<(Vec<String>, String)>) {
            let words = [before, &[command.get_name().to_string()]].concat();
            all.push((words.clone(), command.get_about().expect("it says what it does").to_string()));
            let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
            shown.for_each(|command| add(command, &words, all));
        }
        let mut all = Vec::new();
        add(&Cli::command(), &[], &mut all);
        all
    }

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
