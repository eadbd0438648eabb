//! The PCI address map: one root bus per node, with its configuration space and its window for device
//! registers.
//!
//! Bus `n` belongs to node `n`, so that the node that owns an address can be told from the address alone, and
//! the guest learns from the bus (`_PXM` of its host bridge) which NUMA node a device is near to. All of it
//! lies in the hole below 4 GiB:
//!
//! ```text
//!  0xc000_0000 + n MiB   memory window of bus n: device registers
//!  0xe000_0000 + n MiB   configuration space of bus n (PCI Express ECAM: 32 devices, 8 functions, 4 KiB each)
//! ```

use std::ops::Range;

/// First GPA of the configuration space (ECAM) of bus 0.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Bytes of one bus's configuration space (PCI Express Base Specification, 7.2.2).
pub const ECAM_BUS_LEN: u64 = 1 << 20;
/// First GPA of the memory window of bus 0.
pub const WINDOW_BASE: u64 = 0xc000_0000;
/// Bytes of one bus's memory window.
pub const WINDOW_LEN: u64 = 1 << 20;
/// Buses of one PCI segment: nodes from this number on can have no devices.
pub const MAX_BUSES: usize = 256;
/// Devices of one bus.
pub const SLOTS: u8 = 32;
/// The slots of each bus, from 0 on, in which devices can come and go while the machine runs. Linux says a
/// line for each of them when it boots.
pub const HOT_SLOTS: u8 = 16;

/// How many root buses a machine of `nodes` nodes has.
pub fn buses(nodes: usize) -> usize {
    nodes.min(MAX_BUSES)
}

/// The configuration space of a bus.
pub fn ecam(bus: u8) -> Range<u64> {
    let start = ECAM_BASE + u64::from(bus) * ECAM_BUS_LEN;
    start..start + ECAM_BUS_LEN
}

/// The memory window of a bus.
pub fn window(bus: u8) -> Range<u64> {
    let start = WINDOW_BASE + u64::from(bus) * WINDOW_LEN;
    start..start + WINDOW_LEN
}

/// The bus whose configuration space or memory window has an address.
pub fn bus_of(gpa: u64) -> Option<u8> {
    let spaces = [(ECAM_BASE, ECAM_BUS_LEN), (WINDOW_BASE, WINDOW_LEN)];
    spaces.into_iter().find_map(|(base, len)| u8::try_from(gpa.checked_sub(base)? / len).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::{HOLE_END, HOLE_START, IOAPIC_ADDR};

    #[test]
    fn every_address_of_a_bus_leads_back_to_it() {
        for bus in 0..=255 {
            for range in [ecam(bus), window(bus)] {
                assert_eq!((bus_of(range.start), bus_of(range.end - 1)), (Some(bus), Some(bus)));
                assert!(range.start >= HOLE_START && range.end <= IOAPIC_ADDR);
            }
        }
    }

    #[test]
    fn ram_and_other_devices_are_on_no_bus() {
        for gpa in [0, HOLE_START - 1, window(255).end, ecam(255).end, IOAPIC_ADDR, HOLE_END, u64::MAX] {
            assert_eq!(bus_of(gpa), None, "{gpa:#x}");
        }
    }
}
