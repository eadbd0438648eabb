//! The first 256 bytes of a function's configuration space (PCI Local Bus Specification 3.0, chapter 6).

use super::REGISTERS;

/// Bytes that exist; the rest of the 4096 reads as 0, which means "no extended capabilities".
const LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// The function answers at its registers' address.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory, bus master, parity and system error reporting; interrupt disable (bit 10) is in the upper byte.
const COMMAND_WRITABLE: u16 = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who a function is.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as in `0x010000`.
    pub class: u32,
    /// Vendor of the board.
    pub subsystem_vendor: u16,
    /// Number of the board.
    pub subsystem: u16,
}

/// The bytes, and which of their bits the guest may change.
pub struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    next: usize,
    /// Where the pointer to the next capability goes.
    link: usize,
}

impl ConfigSpace {
    /// A function with memory registers ([`REGISTERS`] bytes) at the 32-bit address `registers`.
    pub fn new(identity: &Identity, registers: u32) -> ConfigSpace {
        let mut this =
            ConfigSpace { bytes: [0; LEN], writable: [0; LEN], next: FIRST_CAPABILITY, link: CAPABILITIES };
        this.set(0, &identity.vendor.to_le_bytes());
        this.set(2, &identity.device.to_le_bytes());
        this.set(8, &[identity.revision]);
        this.set(9, &identity.class.to_le_bytes()[..3]);
        this.set(BAR0, &registers.to_le_bytes());
        this.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        this.set(0x2e, &identity.subsystem.to_le_bytes());
        this.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Low address bits that cannot be changed tell the guest the length.
        this.allow(BAR0, &(!(REGISTERS as u32 - 1)).to_le_bytes());
        // The interrupt line is the guest's to keep a note in.
        this.allow(0x3c, &[0xff]);
        this
    }

    /// Appends a capability: `body` is what follows its id and the pointer to the next one, `writable` has
    /// the bits of it that the guest may change (missing bytes: none). Returns its offset.
    ///
    /// # Panics
    /// If there is no room left, which is a mistake of this program: devices are fixed.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        assert!(at + 2 + body.len() <= LEN, "the capabilities do not fit");
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.bytes[self.link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// The guest reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset as usize + index).copied().unwrap_or(0);
        }
    }

    /// The guest writes: what may change does.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = offset as usize + index;
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// The 16-bit word at `offset`.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The 32-bit word at `offset`.
    pub fn long(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// Where the registers answer; `None` while memory decoding is off.
    pub fn registers(&self) -> Option<u64> {
        let on = self.bytes[COMMAND] & COMMAND_MEMORY != 0;
        on.then(|| u64::from(self.long(BAR0) & !(REGISTERS as u32 - 1)))
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_0203,
            subsystem_vendor: 0x1af4,
            subsystem: 7,
        };
        ConfigSpace::new(&identity, 0xc000_8000)
    }

    #[test]
    fn a_guest_reads_who_it_is_and_how_long_its_registers_are() {
        let mut space = space();
        assert_eq!(space.long(0), 0x1042_1af4);
        assert_eq!(space.long(8), 0x0102_0301);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.long(0x10), 0xffff_8000, "memory, 32 bits, 32 KiB");
        space.write(0x14, &[0xff; 4]);
        assert_eq!(space.long(0x14), 0, "there is no other");
        space.write(0, &[0; 4]);
        assert_eq!(space.long(0), 0x1042_1af4);
    }

    #[test]
    fn registers_move_and_answer_only_when_switched_on() {
        let mut space = space();
        assert_eq!(space.registers(), None);
        space.write(4, &[6, 0]);
        assert_eq!(space.registers(), Some(0xc000_8000));
        space.write(0x10, &0xc001_0000u32.to_le_bytes());
        assert_eq!(space.registers(), Some(0xc001_0000));
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let mut space = space();
        assert_eq!((space.bytes[CAPABILITIES], space.bytes[STATUS]), (0, 0));
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.bytes[CAPABILITIES], 0x40);
        assert_eq!(space.bytes[0x40..0x45], [9, 0x48, 1, 2, 3]);
        assert_eq!(space.bytes[0x48..0x4a], [0x11, 0]);
        space.write(0x48, &[0xff; 12]);
        assert_eq!(space.bytes[0x48..0x54], [0x11, 0, 0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn any_write_leaves_what_is_fixed(offset in 0u64..4096, data in proptest::collection::vec(any::<u8>(), 1..9)) {
            let mut space = space();
            let before = space.bytes;
            space.write(offset, &data);
            for (at, old) in before.iter().enumerate() {
                prop_assert_eq!(space.bytes[at] & !space.writable[at], old & !space.writable[at]);
            }
            let mut back = vec![0; data.len()];
            space.read(offset, &mut back);
            prop_assert!(offset < 256 || back.iter().all(|byte| *byte == 0));
        }
    }
}
