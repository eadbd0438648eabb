//! The ACPI tables: how the kernel learns of CPUs, interrupt controllers, NUMA nodes and power-off.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no PIC, no PIT, no PM timer and no fixed event registers; three
//! byte-wide ports do all of power management. The tables point at each other like this:
//!
//! ```text
//! RSDP -> XSDT -> FADT -> DSDT   (devices with fixed ports, the power-off state)
//!             \-> MADT           (CPUs by x2APIC id, the I/O APIC)
//!             \-> SRAT           (which CPU and which memory belong to which node)
//!             \-> MCFG           (where PCI configuration space is, if there is PCI)
//!             \-> SLIT           (how far the nodes are from each other)
//! ```

use crate::FirmwareError;
use crate::layout::Layout;
use crate::spec::MachineSpec;
use acpi_tables::{Aml, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};

mod dsdt;
mod fadt;
mod hotplug;
mod madt;
mod numa;
mod pci;

/// Who made the tables, in every header.
const OEM_ID: [u8; 6] = *b"GESTLT";
/// What the tables describe, in every header.
const OEM_TABLE_ID: [u8; 8] = *b"GESTALT ";
/// Version of the tables.
const OEM_REVISION: u32 = 1;

/// Bytes of the header that all tables but the RSDP begin with (ACPI 6.5, 5.2.6).
const HEADER_LEN: usize = 36;

/// Tables begin at multiples of this.
const ALIGN: u64 = 64;

/// The tables with the addresses they must lie at.
#[derive(Clone, Debug)]
pub struct AcpiTables {
    /// Guest physical address of the RSDP, for the kernel's boot parameters.
    pub rsdp_gpa: u64,
    /// Guest physical address and bytes of each table, in address order, not overlapping, all within
    /// [`Layout::acpi_range`].
    pub blocks: Vec<(u64, Vec<u8>)>,
}

/// The tables of the machine `spec`, whose map is `layout`.
///
/// # Errors
/// [`FirmwareError::Spec`] if they do not fit [`Layout::acpi_range`], which a layout made from the same
/// description rules out.
pub fn build(layout: &Layout, spec: &MachineSpec) -> Result<AcpiTables, FirmwareError> {
    let mut writer = Writer { next: layout.acpi_range().start, blocks: Vec::new() };
    // The RSDP comes first, where a kernel that searches the BIOS area finds it at once, but it points at
    // the XSDT, which in turn points at tables that must have their addresses by then.
    let rsdp_gpa = writer.place(vec![0; Rsdp::len()]);
    let buses = if spec.pci { crate::pci::buses(layout.nodes()) } else { 0 };
    let dsdt = writer.place(dsdt::bytes(buses));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for bytes in [fadt::bytes(dsdt), madt::bytes(layout), numa::srat(layout), numa::slit(layout, spec)] {
        xsdt.add_entry(writer.place(bytes));
    }
    if buses > 0 {
        xsdt.add_entry(writer.place(pci::mcfg(buses)));
    }
    let xsdt_gpa = writer.place(serialize(&xsdt));
    writer.blocks[0].1 = serialize(&Rsdp::new(OEM_ID, xsdt_gpa));

    if writer.next > layout.acpi_range().end {
        return Err(FirmwareError::Spec(format!(
            "the ACPI tables of {} nodes and {} CPUs do not fit their place: describe a smaller machine",
            layout.nodes(),
            layout.cpus().len()
        )));
    }
    Ok(AcpiTables { rsdp_gpa, blocks: writer.blocks })
}

/// Bytes that the tables of the machine `spec` need at most: what its [`Layout`] must have room for.
pub fn size_bound(spec: &MachineSpec) -> u64 {
    let (nodes, cpus) = (spec.nodes.len(), spec.nodes.iter().map(|node| node.cpus as usize).sum());
    // RSDP, XSDT, FADT, MCFG and DSDT without host bridges are about 1 KiB together.
    let fixed = 9 * ALIGN + 2048 + crate::pci::buses(nodes) as u64 * pci::BRIDGE_BOUND;
    (nodes * nodes) as u64 + madt::size(cpus) + numa::srat_size(nodes, cpus) + fixed
}

/// Places tables one after the other.
struct Writer {
    next: u64,
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Writer {
    fn place(&mut self, table: Vec<u8>) -> u64 {
        let gpa = self.next;
        self.next = (gpa + table.len() as u64).next_multiple_of(ALIGN);
        self.blocks.push((gpa, table));
        gpa
    }
}

/// The name of a bus's host bridge in the ACPI namespace.
fn bridge_name(bus: u8) -> String {
    format!("PC{bus:02X}")
}

/// A table with its header and checksum.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, HEADER_LEN as u32, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn serialize(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
