//! `gestalt doctor`: prints the findings of [`crate::doctor`].

use std::io::Write;

use clap::Args;

use crate::doctor::{Level, Needs, evaluate, probe};
use machine::config::units::parse_size;

/// Flags of `gestalt doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// CPUs that a node here is to have
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Guest memory that the nodes here are to have, such as 8G
    #[arg(long, value_parser = parse_size)]
    memory: Option<u64>,
}

/// Prints the findings; 0 if a machine can run here, else 1.
pub fn doctor(args: &DoctorArgs) -> u8 {
    let needs = Needs { cpus: args.cpus, memory: args.memory.unwrap_or(0) };
    let findings = evaluate(&probe::host(), &needs);
    let mut text: String = findings.iter().map(|finding| format!("{finding}\n")).collect();
    let failed = findings.iter().any(|finding| finding.level == Level::Fail);
    text += if failed { "No machine can run on this host.\n" } else { "A machine can run on this host.\n" };
    // A reader that went away does not change the answer.
    let _ = std::io::stdout().write_all(text.as_bytes());
    u8::from(failed)
}
