//! A disk with an ordinary Debian 13 on it: systemd, an SSH server and cloud-init, from Debian's packages.
//!
//! ```text
//! | GPT | root: ext4 ........................................ | GPT |
//!         /vmlinuz, /initrd.img      links that Debian's kernel packages keep up to date
//!         /boot/loader/entries/      names them, and the root by its partition's id
//! ```
//!
//! There is no boot loader on it: [`gestalt run --disk`](firmware's `disk`) finds the entry, and so do others
//! that follow the Boot Loader Specification. cloud-init makes host keys, users and network at the first
//! start; without a seed nobody can log in. Nothing here needs a loop device: the tree is made by mmdebstrap,
//! the file system by `mke2fs -d` at its place in the image.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gpt::disk::LogicalBlockSize;

use crate::apt;
use crate::cache::Cache;
use crate::exec;
use crate::progress::Step;

/// Raised when the way of building changes in a manner that the recipe's other parts do not show.
const RECIPE_VERSION: u32 = 1;
/// What makes a Debian of the minimal system.
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "cloud-guest-utils",
    "cloud-init",
    "dbus",
    "e2fsprogs",
    "fdisk",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "linux-image-cloud-amd64",
    "netbase",
    "openssh-server",
    "procps",
    "sudo",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
    "zstd",
];
/// Services that Debian leaves off unless asked.
const ENABLED: &[&str] = &["systemd-networkd.service"];
/// Lines that mmdebstrap prints, roughly: for the progress bar.
const MMDEBSTRAP_LINES: u64 = 12;
/// Where the partition begins, and how much is kept free behind it for the second table, in bytes.
const MARGIN: u64 = 1 << 20;
/// The least size: what the packages take, and room to work.
const LEAST_MIB: u64 = 1024;
/// The file in a cache entry.
const IMAGE: &str = "debian.raw";

/// What to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Debian packages beside the usual ones.
    pub packages: Vec<String>,
    /// Size of the disk in MiB; the file is sparse.
    pub size_mib: u64,
}

/// Makes the image, or finds it in the cache. Whoever boots it works on a copy: the cached one stays as it
/// is.
///
/// # Errors
/// Not root, no network, no such package, or no room (about 2 GiB are needed while it is built).
pub fn build(cache: &Cache, recipe: &Recipe) -> Result<PathBuf> {
    ensure!(recipe.size_mib >= LEAST_MIB, "{} MiB are too small: give at least {LEAST_MIB}", recipe.size_mib);
    let mut packages: Vec<&str> =
        PACKAGES.iter().copied().chain(recipe.packages.iter().map(String::as_str)).collect();
    packages.sort_unstable();
    packages.dedup();
    for package in &packages {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.');
        ensure!(
            !package.is_empty() && package.bytes().all(plain),
            "{package:?} is no name of a Debian package"
        );
    }
    let key = format!("{RECIPE_VERSION} {} {packages:?} {ENABLED:?} {}", apt::mirror(), recipe.size_mib);
    let entry = cache.entry("debian", &key, |dir| make(dir, &packages, recipe.size_mib))?;
    Ok(entry.join(IMAGE))
}

fn make(dir: &Path, packages: &[&str], size_mib: u64) -> Result<()> {
    let step = Step::with_length("building a disk with Debian 13", MMDEBSTRAP_LINES);
    let work = tempfile::tempdir_in(dir)?;
    let tree = work.path().join("tree");
    mmdebstrap(&tree, packages, &step)?;
    step.note("making the file system");
    let image = dir.join(IMAGE);
    let id = partition(&image, size_mib << 20)?;
    finish(&tree, &id)?;
    exec::run(&mut mke2fs(&tree, &image, size_mib), Some(&step))?;
    step.done();
    Ok(())
}

/// Runs mmdebstrap where its processes and mounts vanish with it, however it ends.
fn mmdebstrap(tree: &Path, packages: &[&str], step: &Step) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "making a disk with Debian needs root, which its files belong to: run this as root"
    );
    let source = format!("deb [signed-by={}] {} trixie main", apt::KEYRING, apt::mirror());
    exec::run(
        Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "mmdebstrap", "--mode=root"])
            .args([
                "--variant=minbase",
                "--architectures=amd64",
                "--aptopt=APT::Install-Recommends \"false\"",
            ])
            .args(["--aptopt=Acquire::Retries \"3\"", "--dpkgopt=force-unsafe-io"])
            .arg(format!("--include={}", packages.join(",")))
            .args(["trixie"])
            .arg(tree)
            .arg(source),
        Some(step),
    )
    .map(drop)
    .context("mmdebstrap of Debian 13; it needs a way to the mirror (GESTALT_DEBIAN_MIRROR names another)")
}

/// Makes the empty image and its partition table; the partition's id.
fn partition(image: &Path, len: u64) -> Result<String> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(image)?;
    file.set_len(len)?;
    let sectors = u32::try_from(len / 512 - 1).unwrap_or(u32::MAX);
    gpt::mbr::ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut &file)?;
    let config = gpt::GptConfig::new().writable(true).logical_block_size(LogicalBlockSize::Lb512);
    let mut table = config.create_from_device(file, None)?;
    let kind = gpt::partition_types::LINUX_ROOT_X64;
    let number = table.add_partition_at("root", 1, MARGIN / 512, (len - 2 * MARGIN) / 512, kind, 0)?;
    let root = table.partitions().get(&number).context("the partition just made is missing")?;
    let id = root.part_guid.to_string().to_lowercase();
    table.write()?;
    Ok(id)
}

fn mke2fs(tree: &Path, image: &Path, size_mib: u64) -> Command {
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-L", "root", "-E", &format!("offset={MARGIN}"), "-d"]);
    let size = format!("{}k", ((size_mib << 20) - 2 * MARGIN) >> 10);
    command.arg(tree).arg(image).arg(size);
    command
}

/// What no package does: the table of file systems, the loader's entry, and no identity that copies would
/// share.
fn finish(tree: &Path, partition: &str) -> Result<()> {
    let put = |path: &str, text: &str| -> Result<()> {
        let path = tree.join(path);
        if let Some(above) = path.parent() {
            fs::create_dir_all(above)?;
        }
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    put("etc/fstab", &format!("PARTUUID={partition} / ext4 defaults,errors=remount-ro 0 1\n"))?;
    put(
        "boot/loader/entries/debian.conf",
        &format!(
            "title Debian GNU/Linux 13\nlinux /vmlinuz\ninitrd /initrd.img\n\
             options root=PARTUUID={partition} ro console=ttyS0\n"
        ),
    )?;
    put(
        "etc/apt/sources.list",
        "deb http://deb.debian.org/debian trixie main\n\
         deb http://deb.debian.org/debian trixie-updates main\n\
         deb http://security.debian.org/debian-security trixie-security main\n",
    )?;
    put("etc/hostname", "debian\n")?;
    put("etc/machine-id", "")?;
    for left in
        ["etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap", "var/lib/dbus/machine-id"]
    {
        let left = tree.join(left);
        if left.symlink_metadata().is_ok() {
            fs::remove_file(left)?;
        }
    }
    for key in fs::read_dir(tree.join("etc/ssh"))?.flatten() {
        if key.file_name().to_string_lossy().starts_with("ssh_host_") {
            fs::remove_file(key.path())?;
        }
    }
    let wanted = tree.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    for unit in ENABLED {
        let link = wanted.join(unit);
        if link.symlink_metadata().is_err() {
            symlink(format!("/usr/lib/systemd/system/{unit}"), link)?;
        }
    }
    Ok(())
}

/// Copies an image, holes included, to a file that somebody may boot and write.
///
/// # Errors
/// No room, or no right to write there.
pub fn copy(image: &Path, to: &Path) -> Result<()> {
    let mut cp = Command::new("cp");
    exec::run(cp.args(["--sparse=always", "--reflink=auto"]).arg(image).arg(to), None).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup;

    /// What the packages leave behind, as far as it matters here.
    fn tree() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for dir in ["boot", "etc/ssh", "etc/apt/apt.conf.d"] {
            fs::create_dir_all(tree.path().join(dir)).unwrap();
        }
        for (path, content) in [
            ("boot/vmlinuz-6.12", "the kernel"),
            ("boot/initrd.img-6.12", "ramdisk!"),
            ("etc/ssh/ssh_host_rsa_key", "secret"),
            ("etc/ssh/sshd_config", "UsePAM yes"),
            ("etc/apt/apt.conf.d/99mmdebstrap", "APT::Install-Recommends \"false\";"),
            ("etc/machine-id", "0123456789abcdef"),
        ] {
            fs::write(tree.path().join(path), content).unwrap();
        }
        symlink("boot/vmlinuz-6.12", tree.path().join("vmlinuz")).unwrap();
        symlink("boot/initrd.img-6.12", tree.path().join("initrd.img")).unwrap();
        tree
    }

    #[test]
    fn a_machine_finds_the_kernel_and_the_kernel_its_root() {
        if setup::missing(&[setup::Need { have: "mke2fs", package: "e2fsprogs" }]) {
            eprintln!("skipped: mke2fs is not installed");
            return;
        }
        let (tree, dir) = (tree(), tempfile::tempdir().unwrap());
        let image = dir.path().join(IMAGE);
        let id = partition(&image, 16 << 20).unwrap();
        finish(tree.path(), &id).unwrap();
        exec::run(&mut mke2fs(tree.path(), &image, 16), None).unwrap();
        let found = firmware::disk::find(&image).unwrap();
        assert_eq!((found.kernel, found.initrd), (b"the kernel".to_vec(), b"ramdisk!".to_vec()));
        assert_eq!(found.cmdline, format!("root=PARTUUID={id} ro console=ttyS0"));
        assert!(found.origin.starts_with("partition 1: /vmlinuz"), "{}", found.origin);
        assert_eq!(fs::metadata(&image).unwrap().len(), 16 << 20);
    }

    #[test]
    fn copies_share_no_identity() {
        let tree = tree();
        finish(tree.path(), "0000").unwrap();
        let here = |path: &str| tree.path().join(path);
        assert_eq!(fs::read_to_string(here("etc/machine-id")).unwrap(), "");
        assert!(!here("etc/ssh/ssh_host_rsa_key").exists() && here("etc/ssh/sshd_config").exists());
        assert!(!here("etc/apt/apt.conf.d/99mmdebstrap").exists());
        assert!(fs::read_to_string(here("etc/fstab")).unwrap().starts_with("PARTUUID=0000 / ext4"));
    }

    #[test]
    fn what_cannot_be_made_is_refused_before_anything_is_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().to_owned()).unwrap();
        let refusal = |packages: &[&str], size_mib| {
            let packages = packages.iter().map(|name| (*name).to_owned()).collect();
            build(&cache, &Recipe { packages, size_mib }).unwrap_err().to_string()
        };
        assert!(refusal(&[], 100).contains("at least"));
        assert!(refusal(&["fio", "--simulate=x"], 2048).contains("\"--simulate=x\""));
        assert!(refusal(&["../fio"], 2048).contains("no name"));
    }
}
