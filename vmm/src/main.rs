//! The `gestalt` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::cli::main(vmm::node::run)
}
