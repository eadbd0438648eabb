//! The reset code where a BIOS begins: a jump there resets the machine (Linux `reboot=bios`).

use crate::addresses::{ACPI_RESET_PORT, ACPI_RESET_VALUE, BIOS_END, BIOS_RESET_ENTRY};

/// 16-bit code for [`BIOS_RESET_ENTRY`]: write to ACPI's reset register and wait.
#[rustfmt::skip]
pub(super) const CODE: [u8; 9] = [
    0xba, ACPI_RESET_PORT as u8, (ACPI_RESET_PORT >> 8) as u8, // mov dx, ACPI_RESET_PORT
    0xb0, ACPI_RESET_VALUE,                                    // mov al, ACPI_RESET_VALUE
    0xee,                                                      // out dx, al
    0xf4,                                                      // hlt
    0xeb, 0xfd,                                                // jmp to the hlt
];
const _: () = assert!(CODE.len() as u64 <= BIOS_END - BIOS_RESET_ENTRY);
