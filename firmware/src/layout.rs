//! Where everything is: guest physical addresses, homes, APIC ids.
//!
//! Guest RAM is numbered by **RAM page** index 0.. without gaps; guest physical addresses (GPA) are the
//! same numbers with a hole from 3 GiB to 4 GiB for devices. Nodes follow each other in address order.
//!
//! ```text
//!  RAM pages   0 ............ 0xbffff | 0xc0000 ............
//!  GPA         0 ........... 3 GiB    | 4 GiB ..............
//!                              [MMIO]
//! ```

use crate::acpi;
use crate::spec::MachineSpec;
use crate::{FirmwareError, e820};
use std::ops::Range;

/// Bytes of one guest page.
pub const PAGE_SIZE: u64 = 4096;
/// First GPA of the device hole.
pub const HOLE_START: u64 = 3 << 30;
/// First GPA after the device hole.
pub const HOLE_END: u64 = 4 << 30;

/// GPA of the I/O APIC's registers.
pub const IOAPIC_ADDR: u64 = 0xfec0_0000;
/// Bytes of the I/O APIC's register window.
pub const IOAPIC_LEN: u64 = 0x1000;
/// Input pins of the I/O APIC; pin n is global system interrupt n.
pub const IOAPIC_PINS: u8 = 24;
/// Id of the I/O APIC in its own register and in the MADT.
pub const IOAPIC_ID: u8 = 0;
/// GPA of the local APICs' page (unused in x2APIC mode, but named in the MADT and in APIC_BASE).
pub const LAPIC_ADDR: u64 = 0xfee0_0000;

/// First port of the serial console (8 ports).
pub const COM1_PORT: u16 = 0x3f8;
/// Ports of the serial console.
pub const COM1_LEN: u16 = 8;
/// Global system interrupt of the serial console (edge, active high).
pub const COM1_GSI: u32 = 4;
/// Index port of the real-time clock; the data port follows it.
pub const RTC_PORT: u16 = 0x70;
/// Ports of the real-time clock.
pub const RTC_LEN: u16 = 2;
/// Data port of the second channel of an interval timer (PIT), which there is not. Reads of it must not give
/// 0xff, as those of other absent ports do: on AMD CPUs Linux looks for a PIT in spite of everything and reads
/// 0xff 100,000 times before it gives up (`quick_pit_calibrate`), but any other value only twice.
pub const PIT_CHANNEL2_PORT: u16 = 0x42;
/// ACPI sleep control register, one byte (ACPI 6.5, 4.8.3.7).
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, one byte.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// First port of the registers through which PCI devices come and go (8 ports); the AML of the DSDT uses them.
pub const HOTPLUG_PORT: u16 = 0x610;
/// Global system interrupt of the same (level, active high).
pub const HOTPLUG_GSI: u32 = 20;
/// What the guest writes to [`ACPI_RESET_PORT`] to reboot.
pub const ACPI_RESET_VALUE: u8 = 1;
/// SLP_TYP of power-off: what `\_S5` holds.
pub const ACPI_S5_TYPE: u8 = 5;
/// What the guest writes to [`ACPI_SLEEP_CONTROL_PORT`] to power off: SLP_TYP at bit 2, SLP_EN at bit 5.
pub const ACPI_POWER_OFF_VALUE: u8 = ACPI_S5_TYPE << 2 | 1 << 5;

/// First GPA of the legacy BIOS area in which the ACPI tables lie when they fit.
pub const BIOS_START: u64 = 0xe_0000;
/// End of the legacy BIOS area.
pub const BIOS_END: u64 = 0x10_0000;
/// End of the part of the BIOS area that ACPI tables may use.
pub const BIOS_TABLES_END: u64 = 0xf_f000;
/// Where a real-mode jump to `ffff:0` lands, which once was the BIOS's start: code that resets the machine.
pub const BIOS_RESET_ENTRY: u64 = 0xf_fff0;
/// End of conventional memory; from here to 1 MiB is reserved.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;

/// Guest RAM that is contiguous both in guest physical addresses and in the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address.
    pub gpa: u64,
    /// Offset in the memory file, which holds RAM page n at `n * 4096`.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// One virtual CPU: where it runs and what it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuPlace {
    /// Index in the whole machine, 0.. in node order; 0 is the boot processor.
    pub vcpu: u32,
    /// The node that runs it.
    pub node: u16,
    /// Its x2APIC id, unique in the machine: `node << shift | local`.
    pub apic_id: u32,
    /// Index within its node, 0..
    pub local: u32,
}

/// The address and topology map of one machine.
#[derive(Clone, Debug)]
pub struct Layout {
    ram: Vec<RamRange>,
    homes: Vec<Range<u64>>,
    cpus: Vec<CpuPlace>,
    cpus_per_node: Vec<u32>,
    shift: u32,
    acpi: Range<u64>,
}

impl Layout {
    /// The map of the machine `spec`, once [`MachineSpec::check`] finds nothing wrong with it.
    pub fn new(spec: &MachineSpec) -> Result<Layout, FirmwareError> {
        spec.check()?;
        let mut homes = Vec::with_capacity(spec.nodes.len());
        let mut page = 0;
        for node in &spec.nodes {
            let end = page + node.memory / PAGE_SIZE;
            homes.push(page..end);
            page = end;
        }
        let ram = gpa_ranges(0..page)
            .into_iter()
            .map(|range| RamRange {
                gpa: range.start,
                offset: if range.start < HOLE_START {
                    range.start
                } else {
                    range.start - (HOLE_END - HOLE_START)
                },
                len: range.end - range.start,
            })
            .collect();

        let shift = apic_id_shift(spec);
        let mut cpus = Vec::new();
        for (node, spec) in spec.nodes.iter().enumerate() {
            for local in 0..spec.cpus {
                cpus.push(CpuPlace {
                    vcpu: cpus.len() as u32,
                    node: node as u16,
                    apic_id: ((node as u32) << shift) + local,
                    local,
                });
            }
        }

        let mut layout = Layout {
            ram,
            homes,
            cpus,
            cpus_per_node: spec.nodes.iter().map(|node| node.cpus).collect(),
            shift,
            acpi: BIOS_START..BIOS_TABLES_END,
        };
        let room = acpi::size_bound(layout.nodes(), layout.cpus.len());
        if room > BIOS_TABLES_END - BIOS_START {
            let top = layout.node_gpa_ranges(0)[0].end;
            layout.acpi = top - room.next_multiple_of(PAGE_SIZE)..top;
        }
        Ok(layout)
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.homes.len()
    }

    /// How many RAM pages there are.
    pub fn pages(&self) -> u64 {
        self.homes.last().map_or(0, |range| range.end)
    }

    /// Bytes of guest RAM, which is also the length of the memory file.
    pub fn ram_bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// The one or two KVM memory slots, in address order.
    pub fn ram_ranges(&self) -> &[RamRange] {
        &self.ram
    }

    /// For each node, the RAM pages whose home it is; they follow each other without gaps.
    pub fn home_ranges(&self) -> &[Range<u64>] {
        &self.homes
    }

    /// The home of a RAM page; `None` beyond the last page.
    pub fn home_of(&self, page: u64) -> Option<u16> {
        let node = self.homes.partition_point(|range| range.end <= page);
        (node < self.homes.len()).then_some(node as u16)
    }

    /// The GPA of a RAM page; `None` beyond the last page.
    pub fn page_to_gpa(&self, page: u64) -> Option<u64> {
        (page < self.pages()).then(|| page_to_gpa(page))
    }

    /// The RAM page that holds the byte at `gpa`; `None` where there is no RAM.
    pub fn gpa_to_page(&self, gpa: u64) -> Option<u64> {
        let page = match gpa {
            0..HOLE_START => gpa / PAGE_SIZE,
            HOLE_START..HOLE_END => return None,
            _ => (gpa - (HOLE_END - HOLE_START)) / PAGE_SIZE,
        };
        (page < self.pages()).then_some(page)
    }

    /// The guest physical ranges of a node's memory: two for the node that straddles the hole, none for a
    /// node that does not exist.
    pub fn node_gpa_ranges(&self, node: usize) -> Vec<Range<u64>> {
        self.homes.get(node).map_or_else(Vec::new, |pages| gpa_ranges(pages.clone()))
    }

    /// First GPA that no RAM has, counting up from 4 GiB: where 64-bit device windows may start.
    pub fn ram_end(&self) -> u64 {
        self.ram.last().map_or(0, |range| range.gpa + range.len).max(HOLE_END)
    }

    /// End of node 0's memory below the device hole: the loader may use RAM below it.
    pub fn node0_low_end(&self) -> u64 {
        self.node_gpa_ranges(0).first().map_or(0, |range| range.end)
    }

    /// The GPA range that the ACPI tables lie in; part of node 0's memory.
    pub fn acpi_range(&self) -> Range<u64> {
        self.acpi.clone()
    }

    /// The memory map for the guest's kernel, in address order.
    pub fn e820(&self) -> Vec<e820::Entry> {
        e820::map(&self.ram, &self.acpi)
    }

    /// Every CPU of the machine, by its index.
    pub fn cpus(&self) -> &[CpuPlace] {
        &self.cpus
    }

    /// The CPUs that run on a node.
    pub fn node_cpus(&self, node: usize) -> &[CpuPlace] {
        let start = self.cpus.partition_point(|cpu| usize::from(cpu.node) < node);
        let end = self.cpus.partition_point(|cpu| usize::from(cpu.node) <= node);
        &self.cpus[start..end]
    }

    /// CPUs on a node; 0 for a memory-only node or one that does not exist.
    pub fn cpus_on(&self, node: usize) -> u32 {
        self.cpus_per_node.get(node).copied().unwrap_or(0)
    }

    /// The CPU with an x2APIC id.
    pub fn cpu_of_apic_id(&self, apic_id: u32) -> Option<&CpuPlace> {
        let index = self.cpus.binary_search_by_key(&apic_id, |cpu| cpu.apic_id).ok()?;
        self.cpus.get(index)
    }

    /// Low bits of an APIC id that number the CPUs within a node; the rest is the node.
    pub fn apic_id_shift(&self) -> u32 {
        self.shift
    }
}

/// Bits that number the CPUs of the largest node.
pub(crate) fn apic_id_shift(spec: &MachineSpec) -> u32 {
    let largest = spec.nodes.iter().map(|node| node.cpus).max().unwrap_or(0);
    u64::from(largest.max(1)).next_power_of_two().trailing_zeros()
}

fn page_to_gpa(page: u64) -> u64 {
    let linear = page * PAGE_SIZE;
    if linear < HOLE_START { linear } else { linear + (HOLE_END - HOLE_START) }
}

/// The one or two GPA ranges of a range of RAM pages.
fn gpa_ranges(pages: Range<u64>) -> Vec<Range<u64>> {
    let split = HOLE_START / PAGE_SIZE;
    [pages.start..pages.end.min(split), pages.start.max(split)..pages.end]
        .into_iter()
        .filter(|part| part.start < part.end)
        .map(|part| page_to_gpa(part.start)..page_to_gpa(part.end - 1) + PAGE_SIZE)
        .collect()
}

#[cfg(test)]
mod tests;
