//! MSI-X (PCI Local Bus Specification 3.0, 6.8.2): interrupts that a device sends as memory writes.
//!
//! ```text
//!  raise(vector) ── masked? ── no ──> message
//!                       └─ yes ─> pending bit ── unmasked later ──> message
//! ```

use std::sync::{Mutex, MutexGuard};

use super::{MSIX_PENDING, MSIX_TABLE};
use crate::irq::{Message, msi};

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Bits of the capability's message control, at its offset 2, that the guest may change: enable and mask.
pub const CONTROL_WRITABLE: u16 = ENABLE | MASK_ALL;
/// The most vectors that fit the table.
pub const MOST: usize = ((MSIX_TABLE.end - MSIX_TABLE.start) / ENTRY as u64) as usize;

const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// Bytes of a table entry: address, upper address, data, control.
const ENTRY: usize = 16;
/// Bit of an entry's control.
const MASKED: u8 = 1;

/// The table and the pending bits: a pure state machine.
#[derive(Debug)]
pub struct Msix {
    table: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
    control: u16,
}

impl Msix {
    /// `vectors` (1..=[`MOST`]) masked entries.
    pub fn new(vectors: usize) -> Msix {
        let vectors = vectors.clamp(1, MOST);
        let mut masked = [0; ENTRY];
        masked[12] = MASKED;
        Msix { table: vec![masked; vectors], pending: vec![false; vectors], control: 0 }
    }

    /// What follows the capability's id and pointer: message control, and where table and pending bits are in
    /// BAR 0.
    pub fn capability(&self) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.table.len() as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(MSIX_TABLE.start as u32).to_le_bytes());
        body[6..].copy_from_slice(&(MSIX_PENDING.start as u32).to_le_bytes());
        body
    }

    /// The guest reads the table, `offset` from its start.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset as usize + index;
            *byte = self.table.get(at / ENTRY).map_or(0, |entry| entry[at % ENTRY]);
        }
    }

    /// The guest writes the table; the messages that this sets free.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Vec<Message> {
        for (index, byte) in data.iter().enumerate() {
            let at = offset as usize + index;
            if let Some(entry) = self.table.get_mut(at / ENTRY) {
                entry[at % ENTRY] = *byte;
            }
        }
        self.unmasked()
    }

    /// The guest reads the pending bits, `offset` from their start.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize + index) * 8;
            let bits = (0..8).filter(|bit| self.pending.get(first + bit).copied().unwrap_or(false));
            *byte = bits.fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// The guest has written message control; the messages that this sets free.
    pub fn set_control(&mut self, control: u16) -> Vec<Message> {
        self.control = control & CONTROL_WRITABLE;
        self.unmasked()
    }

    /// Whether the guest uses MSI-X.
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> usize {
        self.table.len()
    }

    /// The device raises `vector`: the message to send, if it may be sent now and is an interrupt at all.
    pub fn raise(&mut self, vector: u16) -> Option<Message> {
        let vector = usize::from(vector);
        if !self.enabled() || vector >= self.table.len() {
            return None;
        }
        if self.is_masked(vector) {
            self.pending[vector] = true;
            return None;
        }
        self.message(vector)
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        *self = Msix::new(self.table.len());
    }

    fn is_masked(&self, vector: usize) -> bool {
        self.control & MASK_ALL != 0 || self.table[vector][12] & MASKED != 0
    }

    fn message(&self, vector: usize) -> Option<Message> {
        let entry = &self.table[vector];
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        msi::decode(u64::from(word(4)) << 32 | u64::from(word(0)), word(8))
    }

    fn unmasked(&mut self) -> Vec<Message> {
        if !self.enabled() || !self.pending.contains(&true) {
            return Vec::new();
        }
        let free: Vec<_> = (0..self.table.len()).filter(|&v| self.pending[v] && !self.is_masked(v)).collect();
        free.into_iter()
            .filter_map(|vector| {
                self.pending[vector] = false;
                self.message(vector)
            })
            .collect()
    }
}

/// A device's interrupts: its [`Msix`], shared by whoever raises them and whoever serves the registers, and
/// the way to the CPUs. A message goes straight to the node of the CPU that it names.
pub struct Interrupts {
    msix: Mutex<Msix>,
    deliver: Box<dyn Fn(Message) + Send + Sync>,
}

impl Interrupts {
    /// `vectors` vectors, whose messages go to `deliver`, which must not wait and must not call back.
    pub fn new(vectors: usize, deliver: impl Fn(Message) + Send + Sync + 'static) -> Interrupts {
        Interrupts { msix: Mutex::new(Msix::new(vectors)), deliver: Box::new(deliver) }
    }

    /// Raises a vector; one that does not exist raises nothing.
    pub fn raise(&self, vector: u16) {
        let message = self.lock().raise(vector);
        if let Some(message) = message {
            (self.deliver)(message);
        }
    }

    /// Changes something, and delivers what this sets free.
    pub fn change(&self, change: impl FnOnce(&mut Msix) -> Vec<Message>) {
        let messages = change(&mut self.lock());
        messages.into_iter().for_each(&self.deliver);
    }

    /// Looks at the table.
    pub fn lock(&self) -> MutexGuard<'_, Msix> {
        // What a thread that panicked left behind is at worst an odd table.
        base::lock(&self.msix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::{Destination, Mode};
    use proptest::prelude::*;

    fn to(cpu: u32, vector: u8) -> Message {
        Message { dest: Destination::Physical(cpu), mode: Mode::Fixed { vector, level: false } }
    }

    /// Two vectors, enabled; vector 0 goes to CPU 3 as 0x41, vector 1 is masked and goes to CPU 5 as 0x42.
    fn msix() -> Msix {
        let mut msix = Msix::new(2);
        for (vector, (cpu, number)) in [(3u32, 0x41u32), (5, 0x42)].into_iter().enumerate() {
            let words = [0xfee0_0000 | cpu << 12, 0, number, vector as u32];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert!(msix.write_table(vector as u64 * 16, &bytes).is_empty());
        }
        assert!(msix.set_control(ENABLE).is_empty());
        msix
    }

    #[test]
    fn a_raised_vector_is_the_message_of_its_entry() {
        let mut msix = msix();
        assert_eq!(msix.raise(0), Some(to(3, 0x41)));
        assert_eq!(msix.raise(2), None, "there is no such vector");
        assert_eq!(msix.raise(0xffff), None);
        msix.set_control(0);
        assert_eq!(msix.raise(0), None, "switched off");
    }

    #[test]
    fn a_masked_vector_waits_in_the_pending_bits_until_it_is_unmasked() {
        let mut msix = msix();
        assert_eq!(msix.raise(1), None);
        assert_eq!(msix.raise(1), None);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(msix.write_table(16 + 12, &[0; 4]), [to(5, 0x42)]);
        assert_eq!(msix.raise(1), Some(to(5, 0x42)));
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_mask_of_all_vectors_holds_them_back_together() {
        let mut msix = msix();
        msix.set_control(ENABLE | MASK_ALL);
        assert_eq!(msix.raise(0), None);
        assert_eq!(msix.set_control(ENABLE), [to(3, 0x41)]);
    }

    #[test]
    fn the_capability_says_how_many_and_where() {
        assert_eq!(Msix::new(3).capability(), [2, 0, 0, 0x30, 0, 0, 0, 0x40, 0, 0]);
        assert_eq!((Msix::new(0).vectors(), Msix::new(9999).vectors()), (1, MOST));
    }

    proptest! {
        #[test]
        fn no_sequence_of_accesses_panics_or_loses_a_pending_vector(
            steps in proptest::collection::vec((0u8..4, 0u64..4096, any::<[u8; 8]>(), 1usize..9), 0..60),
        ) {
            let mut msix = Msix::new(5);
            for (kind, offset, data, len) in steps {
                match kind {
                    0 => drop(msix.write_table(offset.min(4096 - len as u64), &data[..len])),
                    1 => drop(msix.set_control(u16::from_le_bytes([data[0], data[1]]))),
                    2 => drop(msix.raise(u16::from(data[0] & 7))),
                    _ => msix.read_table(offset.min(4096 - len as u64), &mut [0; 8][..len]),
                }
                for vector in 0..5 {
                    prop_assert!(!msix.enabled() || !msix.pending[vector] || msix.is_masked(vector));
                }
            }
        }
    }
}
