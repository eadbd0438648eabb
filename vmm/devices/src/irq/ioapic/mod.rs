//! The I/O APIC: Intel 82093AA registers, with the EOI register that version 0x20 has.
//!
//! It lives on node 0. Each of the 24 pins has a redirection entry:
//!
//! ```text
//!   edge pin:   set_pin low->high, not masked ----------------------> message
//!   level pin:  asserted, not masked, remote IRR clear -> message, remote IRR set
//!                    ^                                                |
//!                    +--------------- eoi(vector): remote IRR clear --+
//! ```
//!
//! An edge at a masked pin is lost, as on the real part; a level is seen when the pin is unmasked. "Asserted"
//! is what the device means: the polarity bit is kept for the guest to read back but turns nothing round,
//! because emulated devices have no wires. An entry's bits 55..49 are bits 14..8 of the destination id for
//! guests that use extended ids.

use super::{Message, Mode, msi};

/// Input pins; pin n is global system interrupt n.
pub const PINS: u8 = 24;

/// IOREGSEL: which register IOWIN shows.
const IOREGSEL: u64 = 0x00;
/// IOWIN: the selected register.
const IOWIN: u64 = 0x10;
/// EOI: finishes a vector, write-only.
const EOI: u64 = 0x40;

const REG_ID: u8 = 0;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const REG_ENTRIES: u8 = 0x10;
/// Version 0x20, highest entry 23.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask; extended destination and
/// destination.
const ENTRY_WRITABLE: u64 = 0xfffe_0000_0001_afff;

/// One input pin.
#[derive(Clone, Copy, Debug)]
struct Pin {
    /// The redirection entry.
    entry: u64,
    /// Whether the device asserts the line now.
    asserted: bool,
}

impl Pin {
    /// What the entry delivers; none for SMI, ExtINT and the reserved modes.
    fn message(&self) -> Option<Message> {
        let id = (self.entry >> 56 | (self.entry >> 49 & 0x7f) << 8) as u32;
        let mode = msi::delivery_mode((self.entry >> 8) as u32, self.entry as u8, self.entry & LEVEL != 0)?;
        Some(Message { dest: msi::destination(id, self.entry & 1 << 11 != 0), mode })
    }

    /// Whether it works by level. Only vectors do: nobody would ever finish a level-triggered NMI or INIT.
    fn is_level(&self) -> bool {
        let vector = matches!(
            self.message(),
            Some(Message { mode: Mode::Fixed { .. } | Mode::LowestPriority { .. }, .. })
        );
        self.entry & LEVEL != 0 && vector
    }

    /// The message that a level pin owes now, if any.
    fn service_level(&mut self) -> Option<Message> {
        if !self.asserted || !self.is_level() || self.entry & (MASKED | REMOTE_IRR) != 0 {
            return None;
        }
        self.entry |= REMOTE_IRR;
        self.message()
    }
}

/// The I/O APIC. Every message it returns must be routed ([`super::route::resolve`] with no sender), in the
/// order given.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    pins: [Pin; PINS as usize],
}

impl IoApic {
    /// An I/O APIC as power-on leaves it: every pin masked. `id` (0..=15) is what its ID register says, as in
    /// the MADT.
    pub fn new(id: u8) -> Self {
        let pin = Pin { entry: MASKED, asserted: false };
        Self { id: u32::from(id & 0xf) << 24, select: 0, pins: [pin; PINS as usize] }
    }

    /// The guest reads `data.len()` bytes at `offset` of the register window. What no register has reads as
    /// 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(0..) {
            let offset = offset.wrapping_add(index);
            let register = match offset & !0xf {
                IOREGSEL => u32::from(self.select),
                IOWIN => self.register(),
                _ => 0,
            };
            *byte = register.to_le_bytes().get((offset & 0xf) as usize).copied().unwrap_or(0);
        }
    }

    /// The guest writes `data` at `offset` of the register window; shorter writes than 32 bits are
    /// zero-extended, unaligned ones dropped.
    #[must_use = "the messages must be routed"]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Vec<Message> {
        let mut bytes = [0; 4];
        let count = data.len().min(4);
        if count == 0 {
            return Vec::new();
        }
        bytes[..count].copy_from_slice(&data[..count]);
        let value = u32::from_le_bytes(bytes);
        match offset {
            IOREGSEL => self.select = value as u8,
            IOWIN => return self.write_register(value).into_iter().collect(),
            EOI => return self.eoi(value as u8),
            _ => {}
        }
        Vec::new()
    }

    /// A device asserts (`true`) or releases its line. Lines beyond the last pin lead nowhere.
    #[must_use = "the message must be routed"]
    pub fn set_pin(&mut self, pin: u8, asserted: bool) -> Option<Message> {
        let pin = self.pins.get_mut(usize::from(pin))?;
        let rising = asserted && !pin.asserted;
        pin.asserted = asserted;
        if pin.is_level() {
            pin.service_level()
        } else {
            pin.message().filter(|_| rising && pin.entry & MASKED == 0)
        }
    }

    /// A device's line goes up and down again: one edge. On a level pin this is one interrupt unless one is
    /// unfinished.
    #[must_use = "the message must be routed"]
    pub fn pulse(&mut self, pin: u8) -> Option<Message> {
        let message = self.set_pin(pin, true);
        // A falling line never delivers.
        let falling = self.set_pin(pin, false);
        debug_assert_eq!(falling, None);
        message
    }

    /// A CPU finished `vector` ([`super::Effect::Eoi`]): level pins with it that are still asserted deliver
    /// again.
    #[must_use = "the messages must be routed"]
    pub fn eoi(&mut self, vector: u8) -> Vec<Message> {
        let finished = self.pins.iter_mut().filter(|pin| pin.is_level() && pin.entry as u8 == vector);
        finished
            .filter_map(|pin| {
                pin.entry &= !REMOTE_IRR;
                pin.service_level()
            })
            .collect()
    }

    /// The register that IOREGSEL selects.
    fn register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => VERSION,
            select => match self.half(select) {
                Some((pin, shift)) => (self.pins[pin].entry >> shift) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        if self.select == REG_ID {
            self.id = value & 0xf << 24;
            return None;
        }
        let (pin, shift) = self.half(self.select)?;
        let pin = &mut self.pins[pin];
        let writable = ENTRY_WRITABLE & 0xffff_ffff << shift;
        pin.entry = pin.entry & !writable | u64::from(value) << shift & writable;
        if !pin.is_level() {
            // Making an entry edge-triggered is how software without the EOI register finishes a level
            // interrupt.
            pin.entry &= !REMOTE_IRR;
        }
        pin.service_level()
    }

    /// The pin and the shift of the half of its entry that register `select` is.
    fn half(&self, select: u8) -> Option<(usize, u32)> {
        let index = select.checked_sub(REG_ENTRIES).filter(|index| *index < 2 * PINS)?;
        Some((usize::from(index / 2), 32 * u32::from(index % 2)))
    }
}

#[cfg(test)]
mod tests;
