//! The whole of an emulated Intel host as one initramfs: busybox, KVM's modules, and copies of what is on the
//! stage.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Processor;
use crate::archive::Initramfs;
use crate::drivers::decompressed;
use crate::exec;
use crate::stage::IN_HOST;

const INIT: &str = include_str!("../../files/bochs-init.sh");

/// Puts it together. `stage` is copied to where other hosts see it; the programs in its `bin/` are stripped,
/// and bring the libraries that they are linked to. `modules` are the host kernel's.
///
/// # Errors
/// A file is missing, or a program is linked to a library that this machine does not have.
pub fn make(busybox: &Path, modules: &Path, processor: Processor, stage: &Path) -> Result<Vec<u8>> {
    let mut archive = Initramfs::new()?;
    archive.program("bin/busybox", busybox)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    let mut order = String::new();
    for (path, parameters) in processor.modules() {
        let name = path.rsplit('/').next().unwrap_or_default();
        let file = modules.join("kernel").join(format!("{path}.ko.xz"));
        archive.file(&format!("modules/{name}.ko"), 0o644, &decompressed(&file)?)?;
        order += &format!("{name}.ko {parameters}\n");
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    let place = IN_HOST.trim_start_matches('/');
    let mut libraries = BTreeSet::new();
    for program in files(&stage.join("bin"))? {
        libraries.extend(libraries_of(&program)?);
        archive.file(&format!("{place}/bin/{}", name(&program)), 0o755, &stripped(&program)?)?;
    }
    for library in libraries {
        let path = library.to_string_lossy();
        archive.program(path.trim_start_matches('/'), &library)?;
    }
    for file in files(&stage.join("guest"))? {
        archive.file(&format!("{place}/guest/{}", name(&file)), 0o644, &fs::read(&file)?)?;
    }
    archive.directory(&format!("{place}/share"))?;
    archive.finish()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The files of a directory, by name.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let listing = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut files: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

/// A program without its symbols, which are most of it.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let smaller = tempfile::NamedTempFile::new()?;
    exec::run(Command::new("strip").arg("-o").arg(smaller.path()).arg(program), None)?;
    Ok(fs::read(smaller.path())?)
}

/// The libraries that a program is linked to, and what loads them, as this machine has them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    linked(&exec::run(Command::new("ldd").arg(program), None)?)
        .with_context(|| format!("finding the libraries of {}", program.display()))
}

/// Reads what `ldd` prints: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, and the loader without an
/// arrow.
fn linked(listing: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in listing.lines() {
        anyhow::ensure!(!line.contains("not found"), "one is missing: {}", line.trim());
        let path = line.split("=>").last().unwrap_or_default().split_whitespace().next();
        found.extend(path.filter(|path| path.starts_with('/')).map(PathBuf::from));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_loader_are_found_in_what_ldd_prints() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let found = linked(listing).unwrap();
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(found, expected.map(PathBuf::from));
        assert!(linked("\tstatically linked\n").unwrap().is_empty());
        assert!(linked("\tlibx.so => not found\n").is_err());
    }

    #[test]
    fn this_program_brings_its_libraries() {
        let found = libraries_of(&std::env::current_exe().unwrap()).unwrap();
        assert!(found.iter().any(|path| name(path) == "libc.so.6"), "{found:?}");
        assert!(found.iter().all(|path| path.is_file()));
    }
}
