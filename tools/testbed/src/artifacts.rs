//! The programs under test: built by cargo, in the target directory that this program itself came from.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's top directory.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("tools/testbed is two levels down")
        .to_owned()
}

/// Builds the release binaries `gestalt` and `testbed` and returns the directory that has them. Cargo shows
/// its own progress.
///
/// # Errors
/// They do not compile.
pub fn build() -> Result<PathBuf> {
    let target = target_dir()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "gestalt",
            "--package",
            "testbed",
            "--bins",
            "--target-dir",
        ])
        .arg(&target)
        .current_dir(workspace());
    let status = crate::exec::tether(&mut command).status().context("running cargo")?;
    if !status.success() {
        bail!("the release build of gestalt failed: see cargo's messages above");
    }
    Ok(target.join("release"))
}

/// Builds the test program `test` of a package, in cargo's profile for tests, and returns its path.
///
/// # Errors
/// It does not compile.
pub fn test_program(package: &str, test: &str) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["test", "--quiet", "--no-run", "--package", package, "--test", test, "--target-dir"])
        .arg(target_dir()?)
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .current_dir(workspace());
    let output = crate::exec::tether(&mut command).output().context("running cargo")?;
    if !output.status.success() {
        bail!("the build of test program {test} failed: see cargo's messages above");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let path = messages.lines().find_map(|line| executable(line, test));
    path.with_context(|| format!("cargo built test program {test} but named no file"))
}

/// The program that one of cargo's messages names, if it is about the wanted test.
fn executable(message: &str, test: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let wanted = message.pointer("/target/name")?.as_str()? == test;
    message.get("executable")?.as_str().filter(|_| wanted).map(PathBuf::from)
}

/// The target directory: the one this executable is in, else cargo's default.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("finding this executable")?;
    let mark = ".rustc_info.json";
    let own = exe.ancestors().find(|dir| dir.join(mark).is_file());
    Ok(own.map_or_else(|| workspace().join("target"), Path::to_owned))
}
