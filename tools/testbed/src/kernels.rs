//! Stock Debian kernels, as guests (and the emulated hosts) boot them.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::apt::{self, Suite};
use crate::cache::Cache;
use crate::drivers;
use crate::progress::Step;

/// Raised when what an entry contains changes, so that old entries are not used.
const RECIPE_VERSION: u32 = 2;

/// A stock kernel that guests boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 13's cloud kernel (6.12): the quick one.
    TrixieCloud,
    /// Debian 13's full kernel (6.12); the emulated hosts run it too.
    Trixie,
    /// Debian 12's cloud kernel (6.1).
    BookwormCloud,
}

impl Kernel {
    /// Every kernel, in the order of [`Kernel::name`]'s help.
    pub const ALL: [Self; 3] = [Self::TrixieCloud, Self::Trixie, Self::BookwormCloud];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::TrixieCloud => "trixie-cloud",
            Self::Trixie => "trixie",
            Self::BookwormCloud => "bookworm-cloud",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::TrixieCloud | Self::Trixie => "trixie",
            Self::BookwormCloud => "bookworm",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::TrixieCloud | Self::BookwormCloud => "linux-image-cloud-amd64",
            Self::Trixie => "linux-image-amd64",
        }
    }
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|kernel| kernel.name() == name)
            .ok_or(format!("no kernel is called {name}; there are {names}"))
    }
}

/// A fetched kernel.
pub struct KernelFiles {
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// Its modules' directory, named after the release; kept for [`Kernel::Trixie`] only.
    pub modules: Option<PathBuf>,
    /// An initramfs with the drivers of its virtio devices ([`drivers`]), to append to another.
    pub drivers: PathBuf,
}

/// Fetches `kernel` from Debian, or finds it in the cache.
///
/// # Errors
/// No network, or the package does not look like a kernel.
pub fn fetch(cache: &Cache, kernel: Kernel) -> Result<KernelFiles> {
    let recipe = format!("{RECIPE_VERSION} {} {} {}", apt::mirror(), kernel.suite(), kernel.package());
    let entry = cache.entry(&format!("kernel-{}", kernel.name()), &recipe, |dir| build(kernel, dir))?;
    let modules = entry.join("modules");
    let modules = if modules.is_dir() { Some(only_child(&modules)?) } else { None };
    Ok(KernelFiles { vmlinuz: entry.join("vmlinuz"), modules, drivers: entry.join("drivers.cpio") })
}

fn build(kernel: Kernel, dir: &Path) -> Result<()> {
    let step = Step::start(format!("fetching Debian's kernel {}", kernel.name()));
    let suite = Suite::open(kernel.suite(), &step)?;
    let package = suite.first_dependency(kernel.package())?;
    let work = tempfile::tempdir_in(dir)?;
    let deb = suite.download(&package, work.path(), &step)?;
    step.note(&format!("unpacking {package}"));
    let tree = work.path().join("tree");
    apt::unpack(&deb, &tree)?;
    let boot = fs::read_dir(tree.join("boot")).with_context(|| format!("{package} has no /boot"))?;
    for path in boot.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for kept in ["vmlinuz", "config"] {
            if name.starts_with(&format!("{kept}-")) {
                fs::rename(&path, dir.join(kept))?;
            }
        }
    }
    if !dir.join("vmlinuz").is_file() {
        bail!("Debian package {package} holds no /boot/vmlinuz-*");
    }
    // Debian 12 still has them in /lib.
    let modules = [tree.join("usr/lib/modules"), tree.join("lib/modules")];
    let modules = modules.iter().find(|dir| dir.is_dir());
    let modules = modules.with_context(|| format!("{package} holds no /usr/lib/modules"))?;
    fs::write(dir.join("drivers.cpio"), drivers::archive(&only_child(modules)?)?)?;
    if kernel == Kernel::Trixie {
        fs::rename(modules, dir.join("modules"))?;
    }
    step.done();
    Ok(())
}

/// The one entry of a directory.
fn only_child(dir: &Path) -> Result<PathBuf> {
    let mut children = fs::read_dir(dir)?;
    let first = children.next().with_context(|| format!("{} is empty", dir.display()))??;
    Ok(first.path())
}
