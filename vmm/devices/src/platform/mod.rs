//! The devices that node 0 emulates for the whole machine, and the buses they sit on.
//!
//! | file | concept |
//! |---|---|
//! | [`bus`] | which device answers at which port or address |
//! | [`hotplug`] | what comes to and goes from PCI slots, as the guest is told |
//! | [`ioapic`] | the I/O APIC as a device: register window in, routed messages out |
//! | [`serial`] | COM1, the console |
//! | [`rtc`] | the real-time clock |
//! | [`power`] | ACPI power-off and reset |
//!
//! None of them knows KVM, threads or clocks: interrupts, output, time and power events go through closures
//! that the node gives. Each device has its own lock. A device calls its closures with its lock held, so the
//! order is device, then I/O APIC, then router, and nothing calls back.

pub mod bus;
pub mod hotplug;
pub mod ioapic;
pub mod power;
pub mod rtc;
pub mod serial;

/// A device with registers on a bus.
///
/// Offsets count from the device's first port or address and `offset + data.len()` stays within its range;
/// otherwise the guest chooses them, so every offset and every length must be answered.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes at `offset`; every byte must be filled.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// The offsets of an access's bytes; wraps rather than overflows.
fn offsets(first: u64) -> impl Iterator<Item = u64> {
    (0..=u64::MAX).map(move |index| first.wrapping_add(index))
}
