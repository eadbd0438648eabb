//! The Debian packages that this machine needs, installed when they are missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::exec;
use crate::progress::Step;

/// A file or program, and the Debian package that brings it.
pub struct Need {
    /// A program looked up in `PATH`, or an absolute path that must exist.
    pub have: &'static str,
    /// The package to install when it is absent.
    pub package: &'static str,
}

/// For compiling the static programs that run inside guests (C with OpenMP).
pub const TO_COMPILE: &[Need] = &[
    Need { have: "gcc", package: "gcc" },
    Need { have: "/usr/lib/x86_64-linux-gnu/libc.a", package: "libc6-dev" },
];

/// For building fuzz targets: libFuzzer is C++.
pub const TO_FUZZ: &[Need] = &[Need { have: "g++", package: "g++" }];

/// For fetching guest kernels and making initramfs images.
pub const TO_FETCH: &[Need] = &[
    Need { have: "dpkg-deb", package: "dpkg" },
    Need { have: "/usr/share/keyrings/debian-archive-keyring.gpg", package: "debian-archive-keyring" },
    Need { have: "xz", package: "xz-utils" },
];

/// For building and running emulated hosts.
pub const TO_EMULATE: &[Need] = &[
    Need { have: "qemu-system-x86_64", package: "qemu-system-x86" },
    Need { have: "debootstrap", package: "debootstrap" },
    Need { have: "mke2fs", package: "e2fsprogs" },
    Need { have: "unshare", package: "util-linux" },
];

/// For building and running emulated Intel hosts.
pub const TO_EMULATE_INTEL: &[Need] = &[
    Need { have: "g++", package: "g++" },
    Need { have: "make", package: "make" },
    Need { have: "syslinux", package: "syslinux" },
    Need { have: "mformat", package: "mtools" },
];

/// For making disks with Debian on them.
pub const TO_INSTALL: &[Need] = &[
    Need { have: "mmdebstrap", package: "mmdebstrap" },
    Need { have: "mke2fs", package: "e2fsprogs" },
    Need { have: "unshare", package: "util-linux" },
    Need { have: "/usr/share/keyrings/debian-archive-keyring.gpg", package: "debian-archive-keyring" },
];

/// Installs what is missing of `needs`. Does nothing, and needs no privilege, when all is there.
///
/// # Errors
/// Something is missing and this is not root, or apt fails.
pub fn ensure(needs: &[&[Need]]) -> Result<()> {
    let mut missing: Vec<&str> =
        needs.iter().copied().flatten().filter(|need| !present(need.have)).map(|need| need.package).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!("packages are missing; run as root: apt-get install -y --no-install-recommends {list}");
    }
    let step = Step::start(format!("installing {list}"));
    exec::run(apt_get().arg("update"), Some(&step))?;
    exec::run(apt_get().args(["install", "-y", "--no-install-recommends"]).args(&missing), Some(&step))?;
    step.done();
    Ok(())
}

/// Whether something of `needs` is absent.
pub fn missing(needs: &[Need]) -> bool {
    needs.iter().any(|need| !present(need.have))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // Another apt may be at work on a freshly started machine: wait for it, but not without end.
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

fn present(what: &str) -> bool {
    if what.starts_with('/') {
        return Path::new(what).exists();
    }
    // mke2fs, debootstrap and others live in sbin, which a user's PATH may lack.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into);
    std::env::split_paths(&path).chain(sbin).any(|dir| dir.join(what).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_files_are_found() {
        assert!(present("sh"));
        assert!(present("/etc/passwd"));
        assert!(!present("no-such-program-here"));
        assert!(!present("/no/such/file"));
    }
}
