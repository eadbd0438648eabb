//! The `gestalt` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::node::block_dump_signal();
    gestalt::cli::main(vmm::node::run)
}
