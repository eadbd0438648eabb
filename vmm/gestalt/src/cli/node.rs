//! `gestalt node`: joins a machine and is one of its nodes until the machine ends.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::NodeMain;
use crate::doctor::{self, Needs, probe};
use crate::terminal;
use machine::config::file::parse_fabric;
use machine::config::units::{check_name, parse_duration};
use machine::control::join::{JoinOptions, Watchdog, join};
use machine::control::wire::Hello;
use machine::control::{Control, ControlError, Exit, ToCoordinator};
use machine::keys::KeyFile;

/// How long last words may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Flags of `gestalt node`.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// The coordinator's host:port, as `gestalt run` prints it
    #[arg(long, value_name = "HOST:PORT")]
    join: String,
    /// Which node of the machine to be
    #[arg(long)]
    name: String,
    /// The node's key, or the machine's, of `gestalt key`; - reads it from standard input
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Where other nodes reach this one, once for each rail; default: what the machine file says, or else the
    /// address that the coordinator is reached from
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = parse_fabric)]
    fabric_listen: Vec<SocketAddr>,
    /// How long to try if nobody answers
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    join_timeout: Duration,
    /// `gestalt run` started this process, and starts it again after a reboot
    #[arg(long, hide = true)]
    spawned: bool,
}

/// Joins and runs; the exit code.
///
/// # Errors
/// Why the node could not join, or failed. The coordinator has been told what it can be told.
pub fn node(args: NodeArgs, node_main: NodeMain) -> anyhow::Result<u8> {
    // Threads of the guest have something to say as well.
    terminal::queue_lines().context("messages cannot be queued")?;
    check_name(&args.name)?;
    let key = if args.key.as_os_str() == "-" {
        KeyFile::read_from(std::io::stdin())
    } else {
        KeyFile::read(&args.key)
    };
    let key = key?.for_node(&args.name)?;
    let options = JoinOptions {
        address: args.join,
        hello: Hello {
            name: args.name,
            host: probe::host_name(),
            kernel: probe::kernel_release(),
            emulated: probe::emulated(),
        },
        key,
        fabric_listen: args.fabric_listen,
        patience: args.join_timeout,
        watchdog: Watchdog::EndProcess {
            flush: || {
                terminal::flush_lines_soon();
            },
        },
    };
    let (assignment, control) = join(&options)?;
    let spec = &assignment.machine.spec.nodes[usize::from(assignment.node)];
    tracing::debug!("joined machine {} as node {}", assignment.machine.name, spec.name);
    let needs = Needs { cpus: spec.cpus, memory: spec.memory };
    let ended = match doctor::check_can_run(&needs) {
        Ok(()) => node_main(assignment, control.clone()),
        Err(why) => Err(anyhow::anyhow!(why)),
    };
    match ended {
        Ok(exit) => {
            finish(&control);
            if exit == Exit::Restart && !args.spawned {
                return Err(start_over());
            }
            Ok(0)
        }
        // The machine ended before this node had begun: the coordinator knows why.
        Err(error) if matches!(error.downcast_ref(), Some(ControlError::Stopped(_))) => Ok(0),
        Err(error) => {
            // If the coordinator is gone, standard error has to do.
            let _ = control.send(ToCoordinator::Failed { why: format!("{error:#}"), dump: None });
            finish(&control);
            Err(error)
        }
    }
}

fn finish(control: &Control) {
    if !control.flush(LAST_WORDS) {
        tracing::debug!("the coordinator did not hear this node's last words");
    }
}

/// Becomes a fresh process that joins the machine's next start; returns only if that is impossible.
fn start_over() -> anyhow::Error {
    tracing::info!("the machine starts again: joining it again");
    let mut arguments = std::env::args_os();
    let program = std::env::current_exe();
    // The thread that writes them does not live on. Not for long: the other nodes wait for this one.
    terminal::flush_lines_soon();
    let error = match program {
        Ok(program) => Command::new(program).args(arguments.by_ref().skip(1)).exec(),
        Err(error) => error,
    };
    anyhow::Error::new(error).context("this node could not start itself again after the reboot")
}
