//! The image that emulated hosts boot: Debian 13 with its stock kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};

use crate::apt::{self, Suite};
use crate::archive::Initramfs;
use crate::cache::Cache;
use crate::drivers::decompressed;
use crate::exec;
use crate::kernels::{self, Kernel};
use crate::progress::Step;

/// Raised when the way of building changes in a manner that the recipe's other parts do not show.
const RECIPE_VERSION: u32 = 1;
/// Packages beside debootstrap's minimal base: what jobs on a host use.
const PACKAGES: &[&str] = &[
    "ethtool",
    "gdb-minimal",
    "ibverbs-utils",
    "iproute2",
    "iputils-ping",
    "kmod",
    "numactl",
    "openssh-client",
    "perftest",
    "procps",
    "rdma-core",
    "strace",
];
/// Modules needed before the image is mounted; modprobe finds the rest in the image.
///
/// ext4 asks the crypto layer for crc32c by name, so `modules.dep` does not show it.
const EARLY_MODULES: &[&str] =
    &["crc32c_generic", "virtio_blk", "ext4", "overlay", "9pnet_virtio", "9p", "virtio_net"];
const INIT: &str = include_str!("../files/host-initramfs-init.sh");
/// Lines that debootstrap prints for this image, roughly: for the progress bar.
const DEBOOTSTRAP_LINES: u64 = 700;
/// Size of the file system in MiB; the file is sparse.
const IMAGE_MIB: u32 = 1200;

/// What QEMU boots.
#[derive(Clone, Debug)]
pub struct HostImage {
    /// The kernel.
    pub vmlinuz: PathBuf,
    /// The initramfs that mounts the rest.
    pub initramfs: PathBuf,
    /// The ext4 file system, never written to.
    pub root: PathBuf,
}

/// Builds the image, or finds it in the cache.
///
/// # Errors
/// No network, not root, or no room (2 GiB are needed while it is built).
pub fn build(cache: &Cache) -> Result<HostImage> {
    let kernel = kernels::fetch(cache, Kernel::Trixie)?;
    let modules = kernel.modules.ok_or_else(|| anyhow!("the host kernel came without modules"))?;
    let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let recipe = format!("{RECIPE_VERSION} {} {release} {PACKAGES:?} {IMAGE_MIB}", apt::mirror());
    let host = cache.entry("host", &recipe, |dir| make(dir, &modules, &release))?;
    let busybox = busybox(cache)?;
    let recipe = format!("{recipe} {EARLY_MODULES:?}\n{INIT}");
    let small = cache.entry("host-initramfs", &recipe, |dir| {
        let dependencies = fs::read_to_string(host.join("modules.dep"))?;
        Ok(fs::write(dir.join("initramfs"), initramfs(&modules, &dependencies, &busybox)?)?)
    })?;
    Ok(HostImage {
        vmlinuz: kernel.vmlinuz,
        initramfs: small.join("initramfs"),
        root: host.join("root.ext4"),
    })
}

fn make(dir: &Path, modules: &Path, release: &str) -> Result<()> {
    let step = Step::with_length("building the image of the emulated hosts (Debian 13)", DEBOOTSTRAP_LINES);
    let work = tempfile::tempdir_in(dir)?;
    let tree = work.path().join("tree");
    debootstrap(&tree, &step)?;
    step.note("adding the kernel's modules");
    let into = tree.join("usr/lib/modules");
    fs::create_dir_all(&into)?;
    exec::run(Command::new("cp").arg("-a").arg(modules).arg(&into), Some(&step))?;
    exec::run(Command::new("chroot").arg(&tree).args(["depmod", release]), Some(&step))?;
    fs::copy(into.join(release).join("modules.dep"), dir.join("modules.dep"))?;
    step.note("making the file system");
    fs::create_dir_all(tree.join("gestalt"))?;
    let size = format!("{IMAGE_MIB}M");
    exec::run(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal,^metadata_csum", "-d"])
            .arg(&tree)
            .arg(dir.join("root.ext4"))
            .arg(&size),
        Some(&step),
    )?;
    step.done();
    Ok(())
}

/// Runs debootstrap where its processes and mounts vanish with it, however it ends.
fn debootstrap(tree: &Path, step: &Step) -> Result<()> {
    let include = format!("--include={}", PACKAGES.join(","));
    exec::run(
        Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "debootstrap", "--variant=minbase"])
            .arg(format!("--keyring={}", apt::KEYRING))
            .args(["--arch=amd64", &include, "trixie"])
            .arg(tree)
            .arg(apt::mirror()),
        Some(step),
    )
    .map(drop)
    .context("debootstrap of Debian 13; it needs root and a way to the mirror (GESTALT_DEBIAN_MIRROR names another)")?;
    // The package files and lists are of no use in the image.
    for left in ["var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"] {
        let left = tree.join(left);
        if left.exists() {
            fs::remove_dir_all(left)?;
        }
    }
    Ok(())
}

/// busybox, the early modules in the order to load them, and `/init`.
fn initramfs(modules: &Path, dependencies: &str, busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = Initramfs::new()?;
    archive.program("bin/busybox", busybox)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let mut order: Vec<String> = Vec::new();
    for module in EARLY_MODULES {
        for path in load_order(dependencies, module)? {
            let name = module_name(path).to_owned() + ".ko";
            if !order.contains(&name) {
                archive.file(&format!("modules/{name}"), 0o644, &decompressed(&modules.join(path))?)?;
                order.push(name);
            }
        }
    }
    archive.file("modules/order", 0o644, (order.join("\n") + "\n").as_bytes())?;
    archive.finish()
}

/// The files of `modules.dep` to load for `module`, in order: `a: b c` means c, b, a.
fn load_order<'a>(dependencies: &'a str, module: &str) -> Result<Vec<&'a str>> {
    let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let (path, needed) = lines
        .into_iter()
        .find(|(path, _)| module_name(path) == module)
        .ok_or_else(|| anyhow!("the host kernel has no module {module}"))?;
    Ok(needed.split_whitespace().rev().chain([path]).collect())
}

/// A module's name as modprobe takes it.
fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default()
}

/// Debian's statically linked busybox, which both kinds of initramfs are made of.
///
/// # Errors
/// No network.
pub fn busybox(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("{RECIPE_VERSION} {}", apt::mirror());
    let entry = cache.entry("busybox", &recipe, |dir| {
        let step = Step::start("fetching Debian's static busybox");
        let work = tempfile::tempdir_in(dir)?;
        let deb = Suite::open("trixie", &step)?.download("busybox-static", work.path(), &step)?;
        apt::unpack(&deb, work.path())?;
        fs::copy(work.path().join("usr/bin/busybox"), dir.join("busybox"))
            .context("the package busybox-static holds no /usr/bin/busybox")?;
        step.done();
        Ok(())
    })?;
    Ok(entry.join("busybox"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_loaded_after_what_it_needs() {
        let dep = "kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/mbcache.ko.xz\nkernel/lib/crc16.ko.xz:\n";
        let order = load_order(dep, "ext4").unwrap();
        assert_eq!(order, ["kernel/fs/mbcache.ko.xz", "kernel/lib/crc16.ko.xz", "kernel/fs/ext4/ext4.ko.xz"]);
        assert_eq!(load_order(dep, "crc16").unwrap(), ["kernel/lib/crc16.ko.xz"]);
        assert!(load_order(dep, "nothing").is_err());
    }
}
