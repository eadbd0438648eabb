//! Addresses, ports and interrupt lines that are the same in every machine: the device hole, the registers of
//! interrupt controllers, legacy devices and power management, and what lies in the first megabyte.

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
/// 0xff, as those of other absent ports do: on AMD CPUs Linux looks for a PIT in spite of everything and
/// reads 0xff 100,000 times before it gives up (`quick_pit_calibrate`), but any other value only twice.
pub const PIT_CHANNEL2_PORT: u16 = 0x42;
/// ACPI sleep control register, one byte (ACPI 6.5, 4.8.3.7).
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, one byte.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// First port of the registers through which PCI devices come and go (8 ports); the AML of the DSDT uses
/// them.
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
