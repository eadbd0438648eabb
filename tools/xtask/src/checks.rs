//! `cargo xtask ci-checks`, and the first part of `cargo xtask test`: formatting, lints, documentation,
//! licences, one version of every rust-vmm crate, the walls between our own.
//!
//! Advisories are not among them: their database is a git repository that a build machine may not reach.
//! Where it can be reached, `cargo deny --config tools/deny.toml check advisories` reads it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testbed::artifacts::workspace;
use testbed::cache::Cache;
use testbed::exec;
use testbed::progress::Step;

use crate::layers;
use crate::tally::Tally;

/// Crates of the rust-vmm project. Two versions of one in the same program do not understand each other's
/// types.
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

/// The release of cargo-deny that licences and versions are checked with.
const CARGO_DENY: &str = "0.20.2";

/// What rustdoc objects to. Private items are documented too, so that links to them lead somewhere.
const RUSTDOC: &str = "-D warnings -A rustdoc::private_intra_doc_links";

/// Runs all checks as tests of `tally`.
///
/// # Errors
/// None of a check that fails: `tally` has those. Only what keeps checks from being made.
pub fn run(tally: &mut Tally) -> Result<()> {
    let lock = workspace().join("Cargo.lock");
    tally.check("one version of every rust-vmm crate", || one_version(&lock));
    tally.check("every crate builds with the stated minimum of Rust, by its own word", minimum_rust);
    tally.check("no dependency of our own crates runs up", layers::check);
    tally.check("cargo fmt", || cargo(&["fmt", "--all", "--check"], &[]));
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    tally.check("cargo clippy", || cargo(&clippy, &[]));
    let doc = ["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"];
    tally.check("cargo doc", || cargo(&doc, &[("RUSTDOCFLAGS", RUSTDOC)]));
    let deny = tally.time("having cargo-deny", cargo_deny)?;
    tally.check("cargo deny: licences, sources, banned crates", || {
        let check = ["check", "--hide-inclusion-graph", "licenses", "sources", "bans"];
        let mut command = Command::new(&deny);
        command.args(["--offline", "--log-level", "error", "--workspace", "--config", "tools/deny.toml"]);
        status(command.args(check).current_dir(workspace()))
    });
    Ok(())
}

/// `cargo xtask ci-checks`.
///
/// # Errors
/// A check fails.
pub fn alone() -> Result<()> {
    let mut tally = Tally::default();
    run(&mut tally)?;
    ensure!(tally.failed == 0, "{}", tally.findings.join("\n"));
    Ok(())
}

fn cargo(args: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    status(command.args(args).envs(environment.iter().copied()).current_dir(workspace()))
}

fn status(command: &mut Command) -> Result<()> {
    let status =
        exec::tether(command).status().with_context(|| format!("running {}", exec::shown(command)))?;
    ensure!(status.success(), "`{}` objects: see above", exec::shown(command));
    Ok(())
}

/// cargo-deny: the installed one of this release, or one built into the cache.
fn cargo_deny() -> Result<PathBuf> {
    let said = Command::new("cargo-deny").arg("--version").output();
    if said
        .is_ok_and(|said| String::from_utf8_lossy(&said.stdout).trim() == format!("cargo-deny {CARGO_DENY}"))
    {
        return Ok("cargo-deny".into());
    }
    let root =
        Cache::open()?.entry("cargo-deny", &format!("cargo-deny {CARGO_DENY}, quickly built"), |into| {
            let step = Step::start(format!("building cargo-deny {CARGO_DENY}, once"));
            let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let build = tempfile::Builder::new().prefix("gestalt-deny-").tempdir()?;
            let mut command = Command::new(program);
            command
                .args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--no-track", "--root"])
                .arg(into);
            // It runs for a second: what its optimisation would take is not worth it.
            for setting in ["opt-level=1", "lto=false", "codegen-units=16", "debug=0"] {
                command.args(["--config", &format!("profile.release.{setting}")]);
            }
            exec::run(command.env("CARGO_TARGET_DIR", build.path()), Some(&step))?;
            step.done();
            Ok(())
        })?;
    Ok(root.join("bin/cargo-deny"))
}

/// Fails if a crate that the workspace uses says that it needs a newer Rust than the workspace says it does.
/// (That the workspace's own code keeps to it is for clippy's `incompatible_msrv`, and for CI wherever that
/// Rust is installed.)
fn minimum_rust() -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.args(["metadata", "--format-version", "1", "--locked"]).current_dir(workspace());
    let output = exec::tether(&mut command).output().context("running cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("reading what cargo metadata says")?;
    let newer = newer_than_stated(&metadata);
    ensure!(newer.is_empty(), "raise rust-version in Cargo.toml: {}", newer.join("; "));
    Ok(())
}

/// The packages that need a newer Rust than the least that a member of the workspace states.
fn newer_than_stated(metadata: &Value) -> Vec<String> {
    let packages = || metadata["packages"].as_array().into_iter().flatten();
    let version = |package: &Value| package["rust_version"].as_str().and_then(numbers);
    let ours = |package: &&Value| package["source"].is_null();
    let stated = packages().filter(ours).filter_map(version).min().unwrap_or_default();
    let newer = packages().filter(|package| version(package).is_some_and(|needs| needs > stated));
    newer.map(|package| format!("{} needs Rust {}", package["name"], package["rust_version"])).collect()
}

/// `1.90` or `1.90.2` as numbers.
fn numbers(version: &str) -> Option<[u32; 3]> {
    let mut numbers = [0; 3];
    for (number, text) in numbers.iter_mut().zip(version.split('.')) {
        *number = text.parse().ok()?;
    }
    Some(numbers)
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
    #[test]
    fn a_crate_that_needs_a_newer_rust_is_found() {
        let package = |name: &str, rust: Option<&str>, source: Option<&str>| serde_json::json!({"name": name, "rust_version": rust, "source": source});
        let registry = Some("registry");
        let mut packages = vec![
            package("ours", Some("1.90"), None),
            package("old", Some("1.56.1"), registry),
            package("silent", None, registry),
        ];
        let found = |packages: &[Value]| newer_than_stated(&serde_json::json!({ "packages": packages }));
        assert!(found(&packages).is_empty());
        packages.push(package("new", Some("1.90.1"), registry));
        assert_eq!(found(&packages), [r#""new" needs Rust "1.90.1""#]);
    }
}
