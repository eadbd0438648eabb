//! The kernel inside a disk image: what its own boot loader would start, or why that cannot be told.
//!
//! | file | concept |
//! |---|---|
//! | this one | the survey of a disk, and what it comes to |
//! | [`source`] | the disk's bytes: a raw image, a block device, or what another format holds |
//! | [`partitions`] | where the file systems are: GPT, MBR, or the whole disk |
//! | [`filesystem`] | reading files from ext2/3/4 and FAT, and naming what cannot be read |
//! | [`loader`] | what boot loaders leave behind: entries of the Boot Loader Specification, and grub.cfg |
//! | [`limits`] | what a search may take |
//!
//! ```text
//!  image ── partitions ── file systems ──> loader entries, grub.cfg, or /vmlinuz ──> an entry, or a refusal
//!                              └─────────> kernel, initrds (from the same file system, else from any) ──> BootFiles
//! ```
//!
//! Nothing is written. Nothing on the disk is trusted: every size, count and depth has a limit. Nothing is
//! passed over: a boot loader's file that is not understood is a refusal that says where, because another
//! kernel, or another command line, could mount the wrong system.

pub mod filesystem;
pub mod limits;
pub mod loader;
pub mod partitions;
pub mod source;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use self::filesystem::{Content, FileSystem};
use self::limits::{LARGEST_INITRDS, LARGEST_KERNEL, Metered};
use self::loader::{Entry, Loader};
use self::source::Source;
use crate::FirmwareError;

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// Where it was found, for messages.
    pub origin: String,
    /// The kernel's bytes.
    pub kernel: Vec<u8>,
    /// The initial ramdisk's bytes; several follow each other. Empty: none.
    pub initrd: Vec<u8>,
    /// The command line.
    pub cmdline: String,
    /// What a person should know of the choice.
    pub notes: Vec<String>,
}

/// What is on a disk, and what would be booted from it.
#[derive(Debug, Serialize)]
pub struct Survey {
    /// The partitions in the order of their numbers, or the whole disk.
    pub partitions: Vec<PartitionReport>,
    /// What the menus of its boot loaders offer.
    pub entries: Vec<EntryReport>,
    /// What would be booted, if anything.
    pub boots: Option<Boots>,
    /// Why nothing would be booted: a sentence.
    pub refused: Option<String>,
    /// What a person should know of the choice.
    pub notes: Vec<String>,
}

/// A partition.
#[derive(Debug, Serialize)]
pub struct PartitionReport {
    /// `partition 1` and so on, or `the whole disk`.
    pub name: String,
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// What is in it, such as `ext4` or `XFS`.
    pub content: String,
    /// Whether its files can be read here.
    pub readable: bool,
    /// Why not, where there is more to say.
    pub why: Option<String>,
}

/// An entry of a boot loader's menu.
#[derive(Debug, Serialize)]
pub struct EntryReport {
    /// The partition with the boot loader's files.
    pub partition: String,
    /// Its title or name; of a submenu's entry with the submenu's before it.
    pub title: String,
}

/// What would be booted.
#[derive(Debug, Serialize)]
pub struct Boots {
    /// Where the kernel is.
    pub kernel: String,
    /// Where the initrds are, in order.
    pub initrd: Vec<String>,
    /// The command line.
    pub cmdline: String,
    /// What says so: the partition and the boot loader's file.
    pub from: String,
}

/// Finds what the boot loader of the raw image or block device at `path` would start.
///
/// # Errors
/// [`FirmwareError::Disk`]: the image cannot be read, there is nothing to boot on it, or what its boot loader would do is not
/// understood; it says what was found.
pub fn find(path: &Path) -> Result<BootFiles, FirmwareError> {
    let file = File::open(path).map_err(|error| nothing_on(path, &error.to_string()))?;
    find_on(Arc::new(file), path)
}

/// The same on a disk that is not simply the content of a file; `path` names it in messages.
///
/// # Errors
/// Those of [`find`].
pub fn find_on(disk: Arc<dyn Source>, path: &Path) -> Result<BootFiles, FirmwareError> {
    let (survey, plan) = look_at(disk);
    let Some(plan) = plan else {
        let why = survey.refused.unwrap_or_else(|| "nothing is on it".into());
        return Err(nothing_on(path, &format!("{why}: name a kernel with --kernel FILE")));
    };
    plan.read(survey.notes).map_err(|why| nothing_on(path, &why))
}

/// What is on a disk and what would be booted from it, without reading kernel and initrds.
pub fn survey(disk: Arc<dyn Source>) -> Survey {
    look_at(disk).0
}

fn nothing_on(path: &Path, why: &str) -> FirmwareError {
    FirmwareError::Disk(format!("no kernel can be booted from {}: {why}", path.display()))
}

/// A file system with the name of its partition.
struct Volume {
    name: String,
    number: Option<u32>,
    system: FileSystem,
}

/// What is to be read: a file system's index and a path, for kernel and initrds.
struct Plan {
    volumes: Vec<Volume>,
    kernel: (usize, String),
    initrds: Vec<(usize, String)>,
    cmdline: String,
    from: String,
}

fn look_at(disk: Arc<dyn Source>) -> (Survey, Option<Plan>) {
    let mut survey =
        Survey { partitions: Vec::new(), entries: Vec::new(), boots: None, refused: None, notes: Vec::new() };
    let metered = Arc::new(Metered::new(disk));
    let plan = plan(&metered, &mut survey);
    match plan {
        Ok(plan) => {
            metered.found();
            let place = |(index, path): &(usize, String)| format!("{}: {path}", plan.volumes[*index].name);
            survey.boots = Some(Boots {
                kernel: place(&plan.kernel),
                initrd: plan.initrds.iter().map(place).collect(),
                cmdline: plan.cmdline.clone(),
                from: plan.from.clone(),
            });
            (survey, Some(plan))
        }
        Err(why) => {
            let exhausted =
                metered.exhausted().then_some("; looking at it was given up, because it had no end");
            survey.refused = Some(format!("{why}{}", exhausted.unwrap_or_default()));
            (survey, None)
        }
    }
}

fn plan(metered: &Arc<Metered>, survey: &mut Survey) -> Result<Plan, String> {
    let disk: Arc<dyn Source> = metered.clone();
    let len = disk.len().map_err(|error| error.to_string())?;
    let ranges = partitions::list(&disk).map_err(|error| error.to_string())?;
    let mut volumes = Vec::new();
    for range in &ranges {
        let mut report = PartitionReport {
            name: range.name(),
            start: range.start,
            bytes: range.len,
            content: "nothing that is known".into(),
            readable: false,
            why: None,
        };
        if range.end() > len {
            report.content = "cut off".into();
            report.why = Some(format!(
                "it ends at byte {}, and the disk at {len}: the image is incomplete",
                range.end()
            ));
        } else {
            match Content::of(&disk, range.start, range.len) {
                Content::Readable(system) => {
                    report.content = system.kind().into();
                    report.readable = true;
                    volumes.push(Volume { name: range.name(), number: range.number, system });
                }
                Content::Other { what, why } => {
                    report.content = what.into();
                    report.why = why;
                }
            }
        }
        survey.partitions.push(report);
    }
    for index in 0..volumes.len() {
        let volume = &volumes[index];
        let others = volumes.iter().enumerate().filter(|(other, _)| *other != index);
        let loader =
            Loader { system: &volume.system, others: others.map(|(_, other)| &other.system).collect() };
        let root = format!("/dev/vda{}", volume.number.map(|number| number.to_string()).unwrap_or_default());
        let Some(found) = loader.find(&root) else { continue };
        let partition = &volume.name;
        survey
            .entries
            .extend(found.menu.into_iter().map(|title| EntryReport { partition: partition.clone(), title }));
        let entry = found.choice.map_err(|(file, error)| {
            let line = error.line.map(|line| format!(" line {line}")).unwrap_or_default();
            format!("its boot loader's choice is not understood ({partition}, {file}{line}: {})", error.what)
        })?;
        let Entry { origin, kernel, initrds, options, note } = entry;
        survey.notes.extend(note);
        let from = format!("{partition}: {origin}");
        let lost = |path: &str| {
            format!(
                "{from} names {path}, which is not there{}",
                unreadable(survey).map(|what| format!(" ({what})")).unwrap_or_default()
            )
        };
        let kernel = place(&volumes, index, &kernel).ok_or_else(|| lost(&kernel))?;
        let initrds: Result<Vec<_>, String> =
            initrds.iter().map(|path| place(&volumes, index, path).ok_or_else(|| lost(path))).collect();
        let initrds = initrds?;
        return Ok(Plan { volumes, kernel, initrds, cmdline: options, from });
    }
    let looked: Vec<_> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    let others = unreadable(survey);
    Err(match (looked.is_empty(), others) {
        (true, None) => "it has no file system that can be read (ext2, ext3, ext4, FAT)".into(),
        (true, Some(others)) => format!("{others}; only ext2, ext3, ext4 and FAT can be read here"),
        (false, others) => {
            let others = others.map(|others| format!("; {others}")).unwrap_or_default();
            format!(
                "there are no loader entries, no grub.cfg and no /vmlinuz in {}{others}",
                looked.join(", ")
            )
        }
    })
}

/// What cannot be read, in words; `None` if all can, or if nothing is known of it.
fn unreadable(survey: &Survey) -> Option<String> {
    let others = survey
        .partitions
        .iter()
        .filter(|part| !part.readable && (part.why.is_some() || part.content != "nothing that is known"));
    let words: Vec<_> = others
        .map(|part| match &part.why {
            Some(why) => format!("{} is {}, which cannot be read: {why}", part.name, part.content),
            None => format!("{} is {}, which cannot be read here", part.name, part.content),
        })
        .collect();
    (!words.is_empty()).then(|| words.join("; "))
}

/// Where a file is: on the file system that names it, else on any other, because a loader's own partition may
/// name files of another.
fn place(volumes: &[Volume], first: usize, path: &str) -> Option<(usize, String)> {
    let others = (0..volumes.len()).filter(|index| *index != first);
    let has = |index: &usize| volumes[*index].system.len_of(path).is_some();
    std::iter::once(first).chain(others).find(has).map(|index| (index, path.to_owned()))
}

impl Plan {
    fn read(self, notes: Vec<String>) -> Result<BootFiles, String> {
        let name = |(index, path): &(usize, String)| format!("{}: {path}", self.volumes[*index].name);
        let read = |file: &(usize, String), most: u64| {
            let bytes = self.volumes[file.0].system.read(&file.1, most);
            bytes.ok_or_else(|| format!("{} cannot be read, or has more than {most} bytes", name(file)))
        };
        let kernel = read(&self.kernel, LARGEST_KERNEL)?;
        // Before any is read: an entry may name one file many times.
        let len = |file: &(usize, String)| self.volumes[file.0].system.len_of(&file.1).unwrap_or(0);
        let together = self.initrds.iter().map(len).fold(0, u64::saturating_add);
        if together > LARGEST_INITRDS {
            return Err(format!(
                "the initrds of {} have more than {LARGEST_INITRDS} bytes together",
                self.from
            ));
        }
        let mut initrd = Vec::new();
        for file in &self.initrds {
            initrd.extend(read(file, LARGEST_INITRDS - (initrd.len() as u64).min(LARGEST_INITRDS))?);
            // The kernel wants each at a multiple of 4 bytes.
            initrd.resize(initrd.len().next_multiple_of(4), 0);
        }
        let origin = format!("{} (by {})", name(&self.kernel), self.from);
        Ok(BootFiles { origin, kernel, initrd, cmdline: self.cmdline, notes })
    }
}

#[cfg(test)]
mod tests;
