//! The walls between the crates: which of them each may depend on. `cargo xtask ci-checks` holds the tree to
//! it, and so do this crate's tests.
//!
//! ```text
//! gestalt ─> vmm ─> devices ─> machine ─> coherence ─> fabric ─> base
//!                                   └───> firmware
//! ```
//! Nothing points up, and what is left out here must not be known there: `fabric` no pages, `coherence` no
//! devices, `firmware` nothing but bytes, `devices` no KVM.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use testbed::artifacts::workspace;

/// The crates of the workspace, each with those that it may depend on, for itself or its tests.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("firmware", &[]),
    ("fabric", &["base"]),
    ("coherence", &["base", "fabric"]),
    // The control connection is sealed by `fabric`, budgets are checked by `coherence`.
    ("machine", &["base", "firmware", "fabric", "coherence"]),
    // A device's memory is `coherence`'s. Its tests bring up engines over simulated fabrics.
    ("devices", &["base", "machine", "firmware", "fabric", "coherence"]),
    ("vmm", &["base", "devices", "machine", "firmware", "fabric", "coherence"]),
    ("gestalt", &["base", "vmm", "machine", "firmware", "fabric", "coherence"]),
    ("tests", &["base", "vmm", "fabric", "coherence"]),
    ("benches", &["base", "tests", "vmm", "devices", "firmware", "fabric", "coherence"]),
    ("testbed", &["firmware"]),
    ("xtask", &["testbed", "coherence"]),
];

/// The crates of a workspace, each with those of the same workspace that it depends on.
type Dependencies = BTreeMap<String, Vec<String>>;

/// Finds out whether the workspace keeps to the walls.
///
/// # Errors
/// A sentence with each dependency that does not, or cargo's.
pub fn check() -> Result<()> {
    let wrong = over_the_walls(&dependencies()?);
    if !wrong.is_empty() {
        bail!("{}: see tools/xtask/src/layers.rs", wrong.join("; "));
    }
    Ok(())
}

/// What cargo says of the workspace.
fn dependencies() -> Result<Dependencies> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(workspace())
        .output()
        .context("running cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    of_metadata(&serde_json::from_slice(&output.stdout).context("reading cargo's metadata")?)
}

fn of_metadata(metadata: &Value) -> Result<Dependencies> {
    let packages = metadata["packages"].as_array().context("cargo's metadata has no packages")?;
    let one = |package: &Value| {
        let name = package["name"].as_str()?.to_owned();
        // A dependency with a path is one of ours.
        let ours = package["dependencies"].as_array()?.iter().filter(|other| other["path"].is_string());
        Some((name, ours.filter_map(|other| other["name"].as_str().map(str::to_owned)).collect()))
    };
    packages.iter().map(|package| one(package).context("a package without a name")).collect()
}

/// A sentence about each dependency that no wall has a door for.
fn over_the_walls(dependencies: &Dependencies) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, others) in dependencies {
        let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(known, _)| known == name) else {
            wrong.push(format!("the crate {name} has no place among the others"));
            continue;
        };
        // A crate's tests may ask for a feature of their own crate.
        let others = others.iter().filter(|other| *other != name);
        let forbidden = others.filter(|other| !allowed.contains(&other.as_str()));
        wrong.extend(forbidden.map(|other| format!("{name} must not depend on {other}")));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_dependency_of_the_workspace_runs_up() {
        let found = dependencies().unwrap();
        assert_eq!(over_the_walls(&found), Vec::<String>::new());
        assert!(found["gestalt"].contains(&"vmm".to_owned()), "what cargo says is understood: {found:?}");
    }

    #[test]
    fn a_crate_depends_on_those_below_it_only() {
        for (place, (name, allowed)) in MAY_DEPEND_ON.iter().enumerate() {
            for other in *allowed {
                let below = MAY_DEPEND_ON[..place].iter().any(|(known, _)| known == other);
                assert!(below, "{name} -> {other}");
            }
        }
    }

    #[test]
    fn a_dependency_that_runs_up_is_named() {
        let mut found = dependencies().unwrap();
        found.get_mut("devices").unwrap().push("vmm".into());
        found.get_mut("fabric").unwrap().push("coherence".into());
        found.insert("stranger".into(), Vec::new());
        let wrong = over_the_walls(&found);
        assert_eq!(
            wrong,
            [
                "devices must not depend on vmm",
                "fabric must not depend on coherence",
                "the crate stranger has no place among the others"
            ]
        );
    }
}
