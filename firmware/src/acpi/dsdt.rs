//! DSDT: devices at fixed ports, PCI host bridges, and the power-off state (ACPI 6.5, 5.2.11.1).

use super::{hotplug, pci, table};
use crate::addresses::{ACPI_S5_TYPE, COM1_GSI, COM1_LEN, COM1_PORT, RTC_LEN, RTC_PORT};
use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate, Scope, ZERO};

/// Revision 2 makes AML integers 64 bits wide.
const REVISION: u8 = 2;

/// The table, with a host bridge for each of `buses` PCI buses.
pub(super) fn bytes(buses: usize) -> Vec<u8> {
    let com1_ports = IO::new(COM1_PORT, COM1_PORT, 1, COM1_LEN as u8);
    // Consumer, edge-triggered, active high, exclusive.
    let com1_irq = Interrupt::new(true, true, false, false, COM1_GSI);
    let com1_name = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let com1_uid = Name::new("_UID".into(), &ZERO);
    let com1_crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&com1_ports, &com1_irq]));
    let com1 = Device::new("COM1".into(), vec![&com1_name, &com1_uid, &com1_crs]);

    // No interrupt: its alarm is not needed, and Linux then uses the clock alone.
    let rtc_ports = IO::new(RTC_PORT, RTC_PORT, 1, RTC_LEN as u8);
    let rtc_name = Name::new("_HID".into(), &EISAName::new("PNP0B00"));
    let rtc_crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&rtc_ports]));
    let rtc = Device::new("RTC_".into(), vec![&rtc_name, &rtc_crs]);

    let devices = Scope::new("_SB_".into(), vec![&com1, &rtc]);
    // Element 0 is SLP_TYP for the sleep control register (ACPI 6.5, 7.4.2.6); there is no second register.
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&ACPI_S5_TYPE, &ZERO]));

    let mut body = Vec::new();
    devices.to_aml_bytes(&mut body);
    s5.to_aml_bytes(&mut body);
    if buses > 0 {
        body.extend(Scope::raw("_SB_".into(), [hotplug::registers(), pci::host_bridges(buses)].concat()));
        body.extend(Scope::raw("_SB_".into(), hotplug::events(buses)));
    }
    table(*b"DSDT", REVISION, &body)
}
