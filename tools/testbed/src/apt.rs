//! Fetching single Debian packages of any suite, without touching this machine's own package state.
//!
//! apt runs with its state, cache and sources in a temporary directory; proxies and the like still come from
//! `/etc/apt/apt.conf.d`. Signatures are checked against Debian's archive keyring.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::exec;
use crate::progress::Step;

/// Debian's archive keyring, of package `debian-archive-keyring`.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The Debian mirror: `$GESTALT_DEBIAN_MIRROR`, else deb.debian.org.
pub fn mirror() -> String {
    std::env::var("GESTALT_DEBIAN_MIRROR").unwrap_or_else(|_| "http://deb.debian.org/debian".into())
}

/// A private apt for one suite.
pub struct Suite {
    dir: tempfile::TempDir,
}

impl Suite {
    /// Fetches the package lists of `suite` (`trixie`, `bookworm`).
    ///
    /// # Errors
    /// The mirror cannot be reached or its signature is bad.
    pub fn open(suite: &str, step: &Step) -> Result<Self> {
        Self::with_lists(suite, &["deb"], step)
    }

    /// [`Suite::open`] with the lists of source packages too.
    ///
    /// # Errors
    /// Those of [`Suite::open`].
    pub fn open_with_sources(suite: &str, step: &Step) -> Result<Self> {
        Self::with_lists(suite, &["deb", "deb-src"], step)
    }

    fn with_lists(suite: &str, kinds: &[&str], step: &Step) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("gestalt-apt-").tempdir()?;
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.path().join(sub))?;
        }
        fs::write(dir.path().join("state/status"), "")?;
        let line = |kind| format!("{kind} [signed-by={KEYRING}] {} {suite} main\n", mirror());
        fs::write(dir.path().join("sources.list"), kinds.iter().map(line).collect::<String>())?;
        let this = Self { dir };
        exec::run(this.apt("apt-get").arg("update"), Some(step))
            .with_context(|| format!("reading the package lists of Debian {suite} from {}", mirror()))?;
        Ok(this)
    }

    /// Downloads the newest version of `package` into `into` and returns the .deb's path.
    ///
    /// # Errors
    /// No such package, or no network.
    pub fn download(&self, package: &str, into: &Path, step: &Step) -> Result<PathBuf> {
        exec::run(self.apt("apt-get").args(["download", package]).current_dir(into), Some(step))?;
        file_of(package, ".deb", into)
    }

    /// Downloads the upstream source of source package `package`, as Debian has it, into `into` and returns
    /// the archive's path. The suite was opened with its sources.
    ///
    /// # Errors
    /// No such package, or no network.
    pub fn download_source(&self, package: &str, into: &Path, step: &Step) -> Result<PathBuf> {
        let args = ["source", "--tar-only", "--download-only", package];
        exec::run(self.apt("apt-get").args(args).current_dir(into), Some(step))?;
        file_of(package, ".orig.tar.xz", into)
    }

    /// The first package that `package` depends on: what a `linux-image-*` metapackage stands for.
    ///
    /// # Errors
    /// No such package, or it has no dependency.
    pub fn first_dependency(&self, package: &str) -> Result<String> {
        let shown = exec::run(self.apt("apt-cache").args(["show", "--no-all-versions", package]), None)?;
        let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "));
        let first = depends.and_then(|depends| depends.split([' ', ',']).next());
        Ok(first.ok_or_else(|| anyhow!("Debian package {package} has no dependency"))?.to_owned())
    }

    fn apt(&self, program: &str) -> Command {
        let dir = self.dir.path().display();
        let mut command = Command::new(program);
        for option in [
            format!("Dir::State={dir}/state"),
            format!("Dir::State::status={dir}/state/status"),
            format!("Dir::Cache={dir}/cache"),
            format!("Dir::Etc::SourceList={dir}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".into(),
            "APT::Architecture=amd64".into(),
            "APT::Architectures::=amd64".into(),
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=3".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// The file of `package` with this ending that apt left in `dir`.
fn file_of(package: &str, ending: &str, dir: &Path) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    let mut files = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    files
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&prefix) && name.ends_with(ending)
        })
        .ok_or_else(|| anyhow!("apt-get fetched {package} but left no file {prefix}*{ending}"))
}

/// Unpacks a .deb into `into`.
///
/// # Errors
/// Not a .deb, or no room.
pub fn unpack(deb: &Path, into: &Path) -> Result<()> {
    exec::run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(into), None).map(drop)
}
