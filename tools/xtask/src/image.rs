//! `cargo xtask image`: disks to boot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use testbed::artifacts::workspace;
use testbed::cache::Cache;
use testbed::debian::{self, Recipe};
use testbed::setup;

/// Size of a disk with Debian if nothing is said, in MiB.
const SIZE_MIB: u64 = 2048;

/// Flags of the task.
#[derive(Args)]
pub struct Image {
    #[command(subcommand)]
    system: System,
}

#[derive(Subcommand)]
enum System {
    /// Debian 13 with systemd, an SSH server and cloud-init, from Debian's packages
    Debian(Debian),
}

#[derive(Args)]
struct Debian {
    /// Further Debian packages, such as fio,mdadm
    #[arg(long, value_delimiter = ',')]
    packages: Vec<String>,
    /// Size of the disk in MiB, or with M or G; the file is sparse
    #[arg(long, default_value_t = SIZE_MIB, value_parser = mebibytes)]
    size: u64,
    /// Where to put it [default: target/image/debian.raw]
    #[arg(long)]
    output: Option<PathBuf>,
}

impl Image {
    /// Does the task.
    ///
    /// # Errors
    /// Something is missing, cannot be fetched, or there is no room.
    pub fn run(&self) -> Result<()> {
        let System::Debian(debian) = &self.system;
        let output = debian.output.clone().unwrap_or_else(|| workspace().join("target/image/debian.raw"));
        let image = debian_image(&debian.packages, debian.size)?;
        if let Some(above) = output.parent().filter(|above| *above != Path::new("")) {
            std::fs::create_dir_all(above).with_context(|| format!("making {}", above.display()))?;
        }
        debian::copy(&image, &output)?;
        println!("{}", output.display());
        println!("boot it with: gestalt run --disk {} --ssh-key KEY.pub --net tap=tap0", output.display());
        Ok(())
    }
}

/// The cached image of a Debian with these packages beside the usual ones.
///
/// # Errors
/// Those of making it.
pub fn debian_image(packages: &[String], size_mib: u64) -> Result<PathBuf> {
    setup::ensure(&[setup::TO_INSTALL])?;
    debian::build(&Cache::open()?, &Recipe { packages: packages.to_vec(), size_mib })
}

/// The same for tasks that boot it: with fio and mdadm, which they use.
///
/// # Errors
/// Those of making it.
pub fn debian_for_checks() -> Result<PathBuf> {
    debian_image(&["fio".to_owned(), "mdadm".to_owned()], SIZE_MIB)
}

fn mebibytes(text: &str) -> Result<u64, String> {
    crate::options::mebibytes(text).map(u64::from)
}
