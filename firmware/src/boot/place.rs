//! The places of the kernel and its initrd in memory, and whether they fit.

use super::image::{self, Image};
use crate::FirmwareError;
use crate::addresses::{BIOS_END, PAGE_SIZE};
use crate::layout::Layout;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Places for everything of a boot that has a size of its own.
pub(super) struct Plan {
    /// Where the kernel is loaded.
    pub(super) kernel: u64,
    /// The first instruction.
    pub(super) entry: u64,
    pub(super) initrd: Option<Initrd>,
}

/// An initrd and its place.
pub(super) struct Initrd {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) addr: u64,
    pub(super) len: u64,
}

impl Plan {
    /// Places `image` where it asks to be and the initrd as high as it may be.
    pub(super) fn new(image: &Image, initrd: Option<&Path>, layout: &Layout) -> Result<Plan, FirmwareError> {
        let end = usable_end(layout);
        let kernel = image.span();
        if kernel.start < BIOS_END {
            return Err(FirmwareError::Boot(format!(
                "the kernel {} wants to be at {:#x}, below 1 MiB: use another kernel",
                image.path.display(),
                kernel.start
            )));
        }
        if kernel.end > end {
            return Err(FirmwareError::Boot(format!(
                "the kernel {} needs memory up to {} MiB and node 0's ends at {} MiB: give node 0 more memory",
                image.path.display(),
                kernel.end.div_ceil(1 << 20),
                end >> 20
            )));
        }
        let initrd = initrd.map(|path| place_initrd(path, image, kernel.end, end)).transpose()?;
        Ok(Plan { kernel: kernel.start, entry: image.entry(), initrd })
    }
}

fn place_initrd(path: &Path, image: &Image, start: u64, end: u64) -> Result<Initrd, FirmwareError> {
    let wrong = |why: String| FirmwareError::Boot(format!("the initrd {} {why}", path.display()));
    let (file, len) = image::open(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
    if len == 0 {
        return Err(wrong("is empty: leave it out, or give the right file".into()));
    }
    let highest = image.initrd_addr_max().saturating_add(1);
    let addr = end.min(highest).checked_sub(len).map(|addr| addr / PAGE_SIZE * PAGE_SIZE);
    match addr {
        Some(addr) if addr >= start => Ok(Initrd { path: path.into(), file, addr, len }),
        _ => {
            let room = end.min(highest).saturating_sub(start) >> 20;
            let advice = if end < highest { "give node 0 more memory or use" } else { "use" };
            Err(wrong(format!(
                "has {} MiB and does not fit beside the kernel, which leaves {room} MiB: {advice} a smaller initrd",
                len.div_ceil(1 << 20)
            )))
        }
    }
}

/// End of the memory that may be loaded into: node 0's below the hole, without ACPI tables at its top.
fn usable_end(layout: &Layout) -> u64 {
    let acpi = layout.acpi_range().start;
    if acpi < BIOS_END { layout.node0_low_end() } else { acpi }
}
