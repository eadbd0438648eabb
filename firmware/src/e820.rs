//! The memory map in the form the BIOS call e820 gave it, which Linux's boot protocol still uses.

use crate::addresses::{BIOS_END, LOW_MEMORY_END};
use crate::layout::Layout;
use std::ops::Range;

/// What a range of guest physical memory is for; the value is the e820 type (ACPI 6.5, 15.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM for the kernel to use.
    Usable = 1,
    /// Not for the kernel to use.
    Reserved = 2,
    /// ACPI tables; RAM once the kernel has read them.
    Acpi = 3,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// What it is for.
    pub kind: Kind,
}

/// The memory map of a machine for its kernel, in address order.
pub fn map(layout: &Layout) -> Vec<Entry> {
    let acpi = layout.acpi_range();
    let mut entries = Vec::new();
    let mut push = |range: Range<u64>, kind| {
        if range.start < range.end {
            entries.push(Entry { addr: range.start, len: range.end - range.start, kind });
        }
    };
    push(0..LOW_MEMORY_END, Kind::Usable);
    push(LOW_MEMORY_END..BIOS_END, Kind::Reserved);
    for range in layout.ram_ranges() {
        let (start, end) = (range.gpa.max(BIOS_END), range.gpa + range.len);
        if acpi.start >= start && acpi.end <= end {
            push(start..acpi.start, Kind::Usable);
            push(acpi.clone(), Kind::Acpi);
            push(acpi.end..end, Kind::Usable);
        } else {
            push(start..end, Kind::Usable);
        }
    }
    entries
}
