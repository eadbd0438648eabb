//! The stage: one directory per run that all hosts see.
//!
//! ```text
//! bin/     the programs under test, copied so that a rebuild does not disturb a running rack
//! guest/   guest kernels and the guest initramfs
//! share/   for the jobs' own use, read and write
//! ```
//!
//! An emulated host sees it as [`IN_HOST`]; this machine sees it where it is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where emulated hosts mount the stage.
pub const IN_HOST: &str = "/gestalt";

/// Prefix of the stage's directory in the temporary directory, followed by the owner's process id.
const PREFIX: &str = "gestalt-stage-";

/// The directory that hosts share; removed when dropped.
pub struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    /// Makes an empty stage, and clears those that killed processes left.
    ///
    /// # Errors
    /// The temporary directory is not writable.
    pub fn new() -> Result<Self> {
        clear_abandoned(&std::env::temp_dir());
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let dir =
            tempfile::Builder::new().prefix(&prefix).tempdir().context("making a temporary directory")?;
        for sub in ["bin", "guest", "share"] {
            fs::create_dir(dir.path().join(sub))?;
        }
        Ok(Self { dir })
    }

    /// The directory, as this machine sees it.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Copies a file to `place` (relative to the stage), rights included.
    ///
    /// # Errors
    /// It cannot be read, or there is no room.
    pub fn put(&self, from: &Path, place: &str) -> Result<PathBuf> {
        let to = self.path().join(place);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, &to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
        Ok(to)
    }
}

/// Removes stages in `temp` whose owner no longer runs.
fn clear_abandoned(temp: &Path) {
    for path in fs::read_dir(temp).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Best effort: it may belong to another user.
            let _ = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stages_of_dead_processes_are_cleared() {
        let temp = tempfile::tempdir().unwrap();
        let dead = temp.path().join(format!("{PREFIX}{}-abc", u32::MAX));
        let alive = temp.path().join(format!("{PREFIX}{}-abc", std::process::id()));
        let foreign = temp.path().join("something-else");
        for dir in [&dead, &alive, &foreign] {
            fs::create_dir(dir).unwrap();
        }
        clear_abandoned(temp.path());
        assert!(!dead.exists() && alive.exists() && foreign.exists());
    }
}
