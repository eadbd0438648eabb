//! The programs under test: built by cargo, in the target directory that this program itself came from.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The workspace's top directory.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("tools/testbed is two levels down")
        .to_owned()
}

/// Builds the release binaries `gestalt` and `testbed` and returns the directory that has them. Cargo shows its own
/// progress.
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

/// The target directory: the one this executable is in, else cargo's default.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("finding this executable")?;
    let mark = ".rustc_info.json";
    let own = exe.ancestors().find(|dir| dir.join(mark).is_file());
    Ok(own.map_or_else(|| workspace().join("target"), Path::to_owned))
}
