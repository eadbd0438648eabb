//! The configurations of boot loaders: which kernels there are, which one starts when nobody chooses, and its
//! command line.
//!
//! | file | whose |
//! |---|---|
//! | [`specification`] | entries of the Boot Loader Specification: systemd-boot, and GRUB with `blscfg` |
//! | [`grub`] | grub.cfg |
//! | this one | which of them a file system has; `/vmlinuz`, the link that Debian keeps |
//!
//! Each either says what its boot loader would start, or refuses: what is not understood is never passed
//! over.

pub mod grub;
pub mod specification;

use super::filesystem::FileSystem;
use super::limits::LARGEST_TEXT;
use specification::SpecificationEntry;

const GRUB: [&str; 4] = ["/grub/grub.cfg", "/boot/grub/grub.cfg", "/grub2/grub.cfg", "/boot/grub2/grub.cfg"];

/// Something to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The file that names it.
    pub origin: String,
    /// Path of the kernel.
    pub kernel: String,
    /// Paths of the initrds, in order.
    pub initrds: Vec<String>,
    /// The command line.
    pub options: String,
    /// What a person should know of the choice.
    pub note: Option<String>,
}

/// Something of a boot loader that is not understood here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotUnderstood {
    /// The line, from 1 on, where it can be told.
    pub line: Option<usize>,
    /// What it is.
    pub what: String,
}

/// A file system as its boot loader sees it.
pub struct Loader<'a> {
    /// The one with the loader's files.
    pub system: &'a FileSystem,
    /// The others of the disk.
    pub others: Vec<&'a FileSystem>,
}

/// What a file system's boot loader comes to.
pub struct Found {
    /// The titles or names of its menu.
    pub menu: Vec<String>,
    /// What starts when nobody chooses, or what is not understood, with the file that it is in.
    pub choice: Result<Entry, (String, NotUnderstood)>,
}

impl Loader<'_> {
    /// What would be booted; `None` if there is nothing of a boot loader. `root` is what the kernel would be
    /// told of this file system's device.
    pub fn find(&self, root: &str) -> Option<Found> {
        let script = GRUB.iter().find(|path| self.system.len_of(path).is_some());
        let entries = self.specification_entries();
        if let Some(path) = script {
            let Some(text) = &self.system.read_text(path) else {
                return Some(Found { menu: Vec::new(), choice: Err(((*path).into(), unreadable())) });
            };
            let outcome = grub::default_entry(self, path, text);
            let made_of_entries = outcome.as_ref().is_ok_and(|outcome| outcome.uses_loader_entries)
                || outcome.is_err() && text.lines().any(|line| line.trim() == "blscfg");
            // Entries that its script does not ask for are another boot loader's.
            if made_of_entries || entries.as_ref().is_ok_and(Vec::is_empty) {
                return Some(match outcome {
                    Ok(outcome) => {
                        let nothing = NotUnderstood { line: None, what: "it loads no Linux kernel".into() };
                        Found {
                            menu: outcome.titles,
                            choice: outcome.entry.ok_or_else(|| ((*path).into(), nothing)),
                        }
                    }
                    Err(error) => Found { menu: Vec::new(), choice: Err(((*path).into(), error)) },
                });
            }
        }
        match entries {
            Err(error) => {
                return Some(Found { menu: Vec::new(), choice: Err(("/loader/entries".into(), error)) });
            }
            Ok(entries) if !entries.is_empty() => {
                let shown = |(name, entry): (String, SpecificationEntry)| entry.title.unwrap_or(name);
                let menu = entries.into_iter().map(shown).collect();
                let nothing =
                    || NotUnderstood { line: None, what: "none of its entries is for this machine".into() };
                let choice = self.default_of_the_specification().and_then(|entry| entry.ok_or_else(nothing));
                return Some(Found {
                    menu,
                    choice: choice.map_err(|error| ("/loader/entries".into(), error)),
                });
            }
            Ok(_) => {}
        }
        self.system.len_of("/vmlinuz")?;
        let initrd = "/initrd.img";
        let initrds = self.system.len_of(initrd).map(|_| initrd.to_owned()).into_iter().collect();
        let options = format!("root={root} ro");
        let origin = "its name".to_owned();
        let entry = Entry { origin, kernel: "/vmlinuz".into(), initrds, options, note: None };
        Some(Found { menu: vec!["/vmlinuz".into()], choice: Ok(entry) })
    }

    /// Whether a file is on any file system of the disk.
    fn has(&self, path: &str) -> bool {
        let mut all = std::iter::once(&self.system).chain(&self.others);
        all.any(|system| system.len_of(path).is_some())
    }

    /// GRUB's environment block at `path`. On machines with UEFI it is often a link to the EFI system
    /// partition.
    fn read_environment(&self, path: &str) -> Option<String> {
        self.system.read_text(path).or_else(|| {
            let on = |system: &&FileSystem| {
                let vendors = system.list("/EFI").into_iter();
                vendors.filter_map(|vendor| system.read_text(&format!("/EFI/{vendor}/grubenv"))).next()
            };
            self.others.iter().find_map(on)
        })
    }
}

fn unreadable() -> NotUnderstood {
    NotUnderstood { line: None, what: format!("it cannot be read, or has more than {LARGEST_TEXT} bytes") }
}

/// Lines `name=value`, as in grubenv.
fn assignments(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('=')).map(|(n, v)| (n.trim().into(), v.into())).collect()
}
