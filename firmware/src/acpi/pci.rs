//! PCI in ACPI: the host bridges with the node they are near to, and the MCFG.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bridge_name, hotplug, serialize};
use crate::pci::{ECAM_BASE, ECAM_BUS_LEN, ecam, window};
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Memory32Fixed, Name, ResourceTemplate, ZERO,
};
use acpi_tables::mcfg::MCFG;

/// AML bytes that one host bridge takes at most.
pub(super) const BRIDGE_BOUND: u64 = 192 + hotplug::BUS_BOUND;

/// One host bridge for each bus (PCI Firmware Specification 3.3, 4.1.3 and 4.3), and a device that claims the
/// configuration space: Linux uses that of the MCFG only if it is reserved so.
///
/// There are no interrupt pins, so there is no `_PRT`: devices have MSI-X only.
pub(super) fn host_bridges(buses: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    if buses == 0 {
        return bytes;
    }
    let len = buses as u64 * ECAM_BUS_LEN;
    let space = Memory32Fixed::new(true, ECAM_BASE as u32, len as u32);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&space]));
    Device::new("ECAM".into(), vec![&hid, &crs]).to_aml_bytes(&mut bytes);
    for bus in 0..buses as u16 {
        host_bridge(bus as u8, &mut bytes);
    }
    bytes
}

fn host_bridge(bus: u8, bytes: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let segment = Name::new("_SEG".into(), &ZERO);
    let first = Name::new("_BBN".into(), &bus);
    let uid = Name::new("_UID".into(), &bus);
    let node = Name::new("_PXM".into(), &bus);
    let number = AddressSpace::<u16>::new_bus_number(bus.into(), bus.into());
    let window = window(bus);
    let (first_gpa, last_gpa) = (window.start as u32, (window.end - 1) as u32);
    let memory =
        AddressSpace::<u32>::new_memory(AddressSpaceCacheable::NotCacheable, true, first_gpa, last_gpa, None);
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&number, &memory]));
    let name = bridge_name(bus);
    let slots = hotplug::Slots { bus };
    let children: Vec<&dyn Aml> = vec![&hid, &cid, &segment, &first, &uid, &node, &crs, &slots];
    Device::new(name.as_str().into(), children).to_aml_bytes(bytes);
}

/// The MCFG: where configuration space is.
pub(super) fn mcfg(buses: usize) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // The base is that of bus 0, whatever the first bus is.
    mcfg.add_ecam(ecam(0).start, 0, 0, (buses - 1) as u8);
    serialize(&mcfg)
}
