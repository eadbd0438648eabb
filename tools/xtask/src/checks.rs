//! `cargo xtask ci-checks`: formatting, lints, one version of every rust-vmm crate, the walls between our own.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use testbed::artifacts::workspace;
use testbed::exec;

use crate::layers;

/// Crates of the rust-vmm project. Two versions of one in the same program do not understand each other's types.
const RUST_VMM: &[&str] = &[
    "acpi_tables",
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "vfio-bindings",
    "vfio-ioctls",
    "vhost",
    "vhost-user-backend",
    "virtio-bindings",
    "virtio-queue",
    "virtio-vsock",
    "vm-allocator",
    "vm-device",
    "vm-fdt",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

/// Runs all checks.
///
/// # Errors
/// The first check that fails.
pub fn run() -> Result<()> {
    one_version(&workspace().join("Cargo.lock"))?;
    println!("ok: one version of every rust-vmm crate");
    layers::check()?;
    println!("ok: no dependency runs up");
    cargo(&["fmt", "--all", "--check"])?;
    println!("ok: cargo fmt");
    cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    println!("ok: cargo clippy");
    Ok(())
}

fn cargo(args: &[&str]) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    let status =
        exec::tether(command.args(args).current_dir(workspace())).status().context("running cargo")?;
    if !status.success() {
        bail!("`cargo {}` objects: see above", args.join(" "));
    }
    Ok(())
}

fn one_version(lock: &Path) -> Result<()> {
    let text = std::fs::read_to_string(lock).with_context(|| format!("reading {}", lock.display()))?;
    let twice = several_versions(&text)?;
    if !twice.is_empty() {
        bail!("several versions of rust-vmm crates, align them in Cargo.toml: {}", twice.join("; "));
    }
    Ok(())
}

/// The rust-vmm crates of a lock file that come in several versions.
fn several_versions(lock: &str) -> Result<Vec<String>> {
    let lock: toml::Table = lock.parse().context("Cargo.lock is not TOML")?;
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock.get("package").and_then(toml::Value::as_array).into_iter().flatten() {
        let field = |key: &str| package.get(key).and_then(toml::Value::as_str).unwrap_or_default();
        if RUST_VMM.contains(&field("name")) {
            versions.entry(field("name")).or_default().push(field("version"));
        }
    }
    let twice = versions.into_iter().filter(|(_, versions)| versions.len() > 1);
    Ok(twice.map(|(name, versions)| format!("{name} {}", versions.join(", "))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_version_of_a_rust_vmm_crate_is_found() {
        let package =
            |name: &str, version: &str| format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n");
        let lock = package("vm-memory", "0.17.1") + &package("syn", "1.0.0") + &package("syn", "2.0.0");
        assert!(several_versions(&lock).unwrap().is_empty());
        let lock = lock + &package("vm-memory", "0.18.0");
        assert_eq!(several_versions(&lock).unwrap(), ["vm-memory 0.17.1, 0.18.0"]);
    }
}
