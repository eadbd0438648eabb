//! The memory map in the boot parameters.
//!
//! The boot parameters list node 0's memory; the other nodes' follows in an extension (`SETUP_E820_EXT`).
//! To the kernel both are one map. But its decompressor, which picks a random place for the kernel (KASLR),
//! looks at the first list only: so the kernel's code and data stay in node 0's memory, where they are
//! unpacked, instead of being written page by page across the fabric.

use crate::e820::{self, Entry};
use crate::layout::Layout;
use linux_loader::loader::bootparam::{SETUP_E820_EXT, boot_e820_entry, boot_params};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// `struct setup_data` without its data (Linux `arch/x86/include/uapi/asm/setup_data.h`).
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct SetupData {
    next: U64,
    kind: U32,
    len: U32,
}
const _: () = assert!(size_of::<SetupData>() == 16);

/// `struct boot_e820_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct E820Entry {
    addr: U64,
    len: U64,
    kind: U32,
}
const _: () = assert!(size_of::<E820Entry>() == 20 && size_of::<boot_e820_entry>() == 20);

/// The memory map in two parts: node 0's, and the others'.
pub(super) fn memory_map(layout: &Layout) -> (Vec<Entry>, Vec<Entry>) {
    let (mut local, mut remote) = (Vec::new(), Vec::new());
    let home = layout.node_gpa_ranges(0);
    for entry in e820::map(layout) {
        let end = entry.addr + entry.len;
        // Node 0 is lowest on either side of the hole, so its part of an entry is the entry's beginning.
        let within = home.iter().find(|range| range.contains(&entry.addr));
        let cut = within.map_or(entry.addr, |range| range.end.min(end));
        if cut > entry.addr {
            local.push(Entry { len: cut - entry.addr, ..entry });
        }
        if cut < end {
            remote.push(Entry { addr: cut, len: end - cut, ..entry });
        }
    }
    (local, remote)
}

/// Puts node 0's map, which has a handful of entries, into the boot parameters.
pub(super) fn set_memory_map(params: &mut boot_params, entries: &[Entry]) {
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(entries) {
        *slot = boot_e820_entry { addr: entry.addr, size: entry.len, r#type: entry.kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = entries.len().min(table.len()) as u8;
}

/// The other nodes' map as the kernel reads it from `hdr.setup_data`.
pub(super) fn memory_map_extension(entries: &[Entry]) -> Vec<u8> {
    let len = entries.len() * size_of::<E820Entry>();
    let head = SetupData { next: 0.into(), kind: SETUP_E820_EXT.into(), len: (len as u32).into() };
    let mut bytes = head.as_bytes().to_vec();
    for entry in entries {
        let entry =
            E820Entry { addr: entry.addr.into(), len: entry.len.into(), kind: (entry.kind as u32).into() };
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}
