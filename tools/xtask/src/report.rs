//! The files in `target/report`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use testbed::artifacts::workspace;

/// Writes `target/report/<name>.json` and returns its path.
///
/// # Errors
/// The directory is not writable.
pub fn write(name: &str, value: &impl Serialize) -> Result<PathBuf> {
    let dir = workspace().join("target/report");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let path = dir.join(format!("{name}.json"));
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}
