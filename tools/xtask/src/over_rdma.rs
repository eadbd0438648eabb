//! The fabric's tests over soft-RoCE on an emulated host: this machine need not have an RDMA device for them.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::artifacts::workspace;
use testbed::exec;
use testbed::host::Event;
use testbed::rig::Rig;

/// They take less than two minutes on an emulated host.
const LIMIT: Duration = Duration::from_secs(600);
/// The test programs, which of their tests, and how many of these at once: those of the second program take
/// down a device that they share.
const TESTS: [(&str, &str, u32); 2] = [("conformance", "rdma", 3), ("rdma", "", 1)];
/// A second device, on an interface of which nobody depends: a test takes it down.
const SET_UP: &str = "ip link add dummy0 type dummy && ip link set dummy0 mtu 4500 up && \
                      ip address add 10.99.0.1/24 dev dummy0 && rdma link add rxe9 type rxe netdev dummy0";
const TEAR_DOWN: &str = "rdma link delete rxe9; ip link delete dummy0";

/// Runs them on the first host.
///
/// # Errors
/// A test fails or skips, or cannot be built.
pub fn run(rig: &Rig) -> Result<()> {
    let host = &rig.hosts()[0];
    let mut script = format!("{SET_UP} || exit 9; ulimit -n 4096; code=0; ");
    for (name, filter, at_once) in TESTS {
        let copy = rig.stage().join("share").join(format!("test-{name}"));
        std::fs::copy(executable(name)?, &copy)?;
        let path = host.dir().join("share").join(format!("test-{name}"));
        script += &format!("{} {filter} --test-threads={at_once} --nocapture || code=1; ", path.display());
    }
    script += &format!("{TEAR_DOWN}; exit $code");
    let mut said = Vec::new();
    let code = host.run(&script, LIMIT, |event| {
        if let Event::Stdout(bytes) | Event::Stderr(bytes) = event {
            said.extend_from_slice(bytes);
        }
    })?;
    let said = String::from_utf8_lossy(&said);
    ensure!(code == 0, "exit code {code} on {}:\n{said}", host.name());
    ensure!(!said.contains("skipped:"), "tests were skipped on {}:\n{said}", host.name());
    Ok(())
}

/// Builds an integration test of the fabric; its program.
fn executable(test: &str) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["test", "--package", "fabric", "--test", test, "--no-run", "--message-format=json"]);
    let said = exec::run(command.current_dir(workspace()), None)?;
    let messages = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let path = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back();
    path.with_context(|| format!("cargo built no program of the fabric's test {test}"))
}
