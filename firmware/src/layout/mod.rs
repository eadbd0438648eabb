//! The layout of one machine: guest physical addresses, the homes of pages, APIC ids.
//!
//! Guest RAM is numbered by **RAM page** index 0.. without gaps; guest physical addresses (GPA) are the
//! same numbers with a hole from 3 GiB to 4 GiB for devices. Nodes follow each other in address order.
//!
//! ```text
//!  RAM pages   0 ............ 0xbffff | 0xc0000 ............
//!  GPA         0 ........... 3 GiB    | 4 GiB ..............
//!                              [MMIO]
//! ```

use crate::FirmwareError;
use crate::addresses::{BIOS_START, BIOS_TABLES_END, HOLE_END, HOLE_START, PAGE_SIZE};
use crate::spec::MachineSpec;
use std::ops::Range;

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
    /// The map of the machine `spec`, with room for ACPI tables of `acpi` bytes
    /// ([`crate::acpi::size_bound`]).
    ///
    /// # Errors
    /// What [`MachineSpec::check`] finds wrong with the description.
    pub fn new(spec: &MachineSpec, acpi: u64) -> Result<Layout, FirmwareError> {
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

        let shift = spec.apic_id_shift();
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
        if acpi > BIOS_TABLES_END - BIOS_START {
            let top = layout.node0_low_end();
            layout.acpi = top.saturating_sub(acpi.next_multiple_of(PAGE_SIZE))..top;
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
