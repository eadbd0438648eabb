//! The files in `target/report`.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::artifacts::workspace;

/// Removes `target/report/<name>.json` of an earlier run, so that a run that fails midway does not leave it
/// to be taken for its own.
///
/// # Errors
/// It exists and cannot be removed.
pub fn forget(name: &str) -> Result<()> {
    let path = path(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Writes `target/report/<name>.json` and returns its path.
///
/// # Errors
/// The directory is not writable.
pub fn write(name: &str, value: &impl Serialize) -> Result<PathBuf> {
    let path = path(name);
    let dir = path.parent().expect("it is a file in a directory");
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

fn path(name: &str) -> PathBuf {
    workspace().join(format!("target/report/{name}.json"))
}
