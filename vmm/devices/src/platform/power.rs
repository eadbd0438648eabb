//! Power-off and reset as hardware-reduced ACPI has them (ACPI 6.5, 4.8.3.6 and 4.8.3.7): three one-byte
//! ports.

use super::{BusDevice, offsets};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Ports, from the sleep control register's on.
pub const LEN: u64 = 3;

/// SLP_TYP (bits 4..2) and SLP_EN (bit 5) of the sleep control register.
const SLEEP_BITS: u8 = 0b0011_1100;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// The machine shall go off.
    PowerOff,
    /// The machine shall start again.
    Reset,
}

/// The three registers. They read as 0: nothing sleeps here, so nothing ever woke.
pub struct Power {
    power_off: u8,
    reset: u8,
    event: Box<dyn Fn(PowerEvent) + Send>,
}

impl Power {
    /// `power_off` is what the guest writes to the sleep control register for S5 (SLP_TYP from the DSDT's
    /// `\_S5` at bit 2, SLP_EN at bit 5), `reset` what the FADT names as the reset value. `event` is called
    /// for each request, on the thread of the CPU that made it.
    pub fn new(power_off: u8, reset: u8, event: impl Fn(PowerEvent) + Send + 'static) -> Self {
        Self { power_off, reset, event: Box::new(event) }
    }
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (value, offset) in data.iter().zip(offsets(offset)) {
            match offset {
                SLEEP_CONTROL if value & SLEEP_BITS == self.power_off & SLEEP_BITS => {
                    (self.event)(PowerEvent::PowerOff)
                }
                RESET if *value == self.reset => (self.event)(PowerEvent::Reset),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const POWER_OFF: u8 = 5 << 2 | 1 << 5;

    fn power() -> (Power, mpsc::Receiver<PowerEvent>) {
        let (sender, events) = mpsc::channel();
        (Power::new(POWER_OFF, 1, move |event| sender.send(event).expect("the test listens")), events)
    }

    #[test]
    fn s5_with_sleep_enable_powers_off_and_nothing_else_does() {
        let (mut power, events) = power();
        for value in 0..=255 {
            power.write(SLEEP_CONTROL, &[value]);
            let expected = (value & SLEEP_BITS == POWER_OFF).then_some(PowerEvent::PowerOff);
            assert_eq!(events.try_recv().ok(), expected, "{value:#x}");
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (mut power, events) = power();
        power.write(RESET, &[0]);
        power.write(RESET, &[6]);
        assert_eq!(events.try_recv().ok(), None);
        power.write(RESET, &[1]);
        assert_eq!(events.try_recv(), Ok(PowerEvent::Reset));
    }

    #[test]
    fn clearing_the_wake_status_does_nothing_and_all_reads_are_zero() {
        let (mut power, events) = power();
        power.write(SLEEP_STATUS, &[0x80]);
        let mut data = [9; 3];
        power.read(SLEEP_CONTROL, &mut data);
        assert_eq!((data, events.try_recv().ok()), ([0; 3], None));
    }
}
