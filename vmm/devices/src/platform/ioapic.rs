//! The I/O APIC as a device: register window in, routed messages out.

use super::BusDevice;
use crate::irq::Message;
use crate::irq::ioapic::IoApic;

/// The I/O APIC on the memory-mapped bus (one page at 0xfec00000).
///
/// Share it ([`super::bus::share`]): devices raise their pins, and the router reports finished vectors,
/// through the same lock. Messages are handed on with the lock held, so they arrive in the order in which
/// they arose; `route` must not call back into the I/O APIC.
pub struct IoApicDevice {
    ioapic: IoApic,
    route: Box<dyn Fn(Message) + Send>,
}

impl IoApicDevice {
    /// The I/O APIC with id `id` (0..=15), whose messages go to `route`.
    pub fn new(id: u8, route: impl Fn(Message) + Send + 'static) -> Self {
        Self { ioapic: IoApic::new(id), route: Box::new(route) }
    }

    /// A device asserts or releases its line.
    pub fn set_pin(&mut self, pin: u8, asserted: bool) {
        let message = self.ioapic.set_pin(pin, asserted);
        self.send(message);
    }

    /// A device's line goes up and down again: one edge.
    pub fn pulse(&mut self, pin: u8) {
        let message = self.ioapic.pulse(pin);
        self.send(message);
    }

    /// A CPU finished a level-triggered vector ([`crate::irq::Effect::Eoi`]).
    pub fn eoi(&mut self, vector: u8) {
        let messages = self.ioapic.eoi(vector);
        self.send(messages);
    }

    fn send(&self, messages: impl IntoIterator<Item = Message>) {
        messages.into_iter().for_each(|message| (self.route)(message));
    }
}

impl BusDevice for IoApicDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.ioapic.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let messages = self.ioapic.write(offset, data);
        self.send(messages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::{Destination, Mode};
    use crate::platform::bus::{Bus, share};
    use base::lock;
    use std::sync::mpsc;

    #[test]
    fn pins_and_eois_become_routed_messages() {
        let (sender, messages) = mpsc::channel();
        let ioapic =
            share(IoApicDevice::new(0, move |message| sender.send(message).expect("the test listens")));
        let mut bus = Bus::new();
        bus.insert(0xfec0_0000, 0x1000, ioapic.clone()).expect("free");
        // Pin 9: vector 0x41, level-triggered, CPU 0.
        bus.write(0xfec0_0000, &(0x10u32 + 18).to_le_bytes());
        bus.write(0xfec0_0010, &0x8041u32.to_le_bytes());
        lock(&ioapic).set_pin(9, true);
        lock(&ioapic).eoi(0x41);
        let message =
            Message { dest: Destination::Physical(0), mode: Mode::Fixed { vector: 0x41, level: true } };
        assert_eq!(messages.try_iter().collect::<Vec<_>>(), [message, message]);
        lock(&ioapic).pulse(4);
        assert_eq!(messages.try_iter().count(), 0, "a masked pin");
    }
}
