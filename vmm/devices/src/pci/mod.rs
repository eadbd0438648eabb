//! PCI Express as the guest finds it: one root bus on each node, with the node's devices on it.
//!
//! | file | concept |
//! |---|---|
//! | this one | a bus: from an address to a device's configuration space or registers |
//! | [`config_space`] | the 256 bytes that describe a device: identity, capabilities, where its registers are |
//! | [`msix`] | interrupts as messages (MSI-X): table, masks, pending bits |
//!
//! Bus `n` is node `n`'s ([`firmware::pci`]): any node can tell from an address whose it is, and forwards the
//! access there (the router). Each device has one function with one range of registers ("BAR 0") of
//! [`REGISTERS`] bytes, laid out alike in all of them:
//!
//! ```text
//!  0x0000  registers of the device's own
//!  0x3000  MSI-X table, 256 entries of 16 bytes
//!  0x4000  MSI-X pending bits
//!  0x5000  doorbells, 4 bytes each: written without waiting for the node that has the device
//!  0x6000  nothing
//! ```
//!
//! The ranges have addresses from the start ([`RootBus::registers_of`]) and the guest may move them inside
//! the bus's window. There are no interrupt pins and no I/O ports.

pub mod config_space;
pub mod msix;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use firmware::pci::{ECAM_BUS_LEN, SLOTS, ecam, window};

/// Bytes of each device's registers; their address is a multiple of this.
pub const REGISTERS: u64 = 0x8000;
/// The MSI-X table in a device's registers.
pub const MSIX_TABLE: Range<u64> = 0x3000..0x4000;
/// The MSI-X pending bits in a device's registers.
pub const MSIX_PENDING: Range<u64> = 0x4000..0x5000;
/// The doorbells in a device's registers.
pub const DOORBELLS: Range<u64> = 0x5000..0x6000;
/// Bytes from one doorbell to the next.
pub const DOORBELL_STRIDE: u64 = 4;

/// Bytes of one function's configuration space, of which [`config_space`] has the first 256.
const FUNCTION_LEN: u64 = 4096;
/// Functions that a slot can have; there is one.
const FUNCTIONS: u64 = 8;

/// Whether the address, in some bus's window, is a doorbell of whatever device is there.
pub fn is_doorbell(gpa: u64) -> bool {
    !firmware::pci::bus_of(gpa).is_some_and(|bus| ecam(bus).contains(&gpa))
        && DOORBELLS.contains(&(gpa % REGISTERS))
}

/// A PCI device with one function. Its methods are called by vCPU threads and must not wait for anything
/// slow.
///
/// The guest chooses offsets and lengths: every offset must be answered, within the ranges given.
pub trait Function: Send + Sync {
    /// The guest reads configuration space; `offset + data.len() <= 4096`.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The guest writes configuration space; `offset + data.len() <= 4096`.
    fn write_config(&self, offset: u64, data: &[u8]);

    /// The first GPA of the registers; `None` while the guest has them switched off.
    fn registers(&self) -> Option<u64>;

    /// The guest reads registers; `offset + data.len() <= REGISTERS`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes registers; `offset + data.len() <= REGISTERS`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The root bus of one node. Devices come and go while CPUs use it.
#[derive(Default)]
pub struct RootBus {
    bus: u8,
    functions: RwLock<Vec<(u8, Arc<dyn Function>)>>,
}

impl RootBus {
    /// Bus number `bus`, which is the node's number, with nothing on it.
    pub fn new(bus: u8) -> RootBus {
        RootBus { bus, functions: RwLock::default() }
    }

    /// Where the registers of the device in `slot` are at first.
    pub fn registers_of(bus: u8, slot: u8) -> u64 {
        window(bus).start + u64::from(slot % SLOTS) * REGISTERS
    }

    /// Puts a device into a slot (`0..32`), in the place of the one that is there.
    pub fn insert(&self, slot: u8, function: Arc<dyn Function>) {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.retain(|(taken, _)| *taken != slot);
        functions.push((slot, function));
    }

    /// Takes the device out of a slot. A CPU may be about to end its last access to it.
    pub fn remove(&self, slot: u8) {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        functions.retain(|(taken, _)| *taken != slot);
    }

    /// Whether an address belongs to this bus.
    pub fn covers(&self, gpa: u64) -> bool {
        ecam(self.bus).contains(&gpa) || window(self.bus).contains(&gpa)
    }

    /// The guest reads; what no device has reads as 0xff.
    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        match self.target(gpa, data.len()) {
            Some(Target::Config(function, offset)) => function.read_config(offset, data),
            Some(Target::Registers(function, offset)) => function.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes; what no device has is lost.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        match self.target(gpa, data.len()) {
            Some(Target::Config(function, offset)) => function.write_config(offset, data),
            Some(Target::Registers(function, offset)) => function.write(offset, data),
            None => {}
        }
    }

    /// What an access goes to; nothing if it is nowhere or reaches over an end.
    fn target(&self, gpa: u64, len: usize) -> Option<Target> {
        let space = ecam(self.bus);
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        if space.contains(&gpa) {
            let offset = (gpa - space.start) % ECAM_BUS_LEN;
            let number = offset / FUNCTION_LEN;
            let within = offset % FUNCTION_LEN;
            if !number.is_multiple_of(FUNCTIONS) || within + len as u64 > FUNCTION_LEN {
                return None;
            }
            let slot = (number / FUNCTIONS) as u8;
            let (_, function) = functions.iter().find(|(taken, _)| *taken == slot)?;
            return Some(Target::Config(function.clone(), within));
        }
        functions.iter().find_map(|(_, function)| {
            let offset = gpa.checked_sub(function.registers()?)?;
            let fits = offset.checked_add(len as u64)? <= REGISTERS;
            fits.then(|| Target::Registers(function.clone(), offset))
        })
    }
}

/// What an access goes to, kept for as long as the access takes.
enum Target {
    Config(Arc<dyn Function>, u64),
    Registers(Arc<dyn Function>, u64),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Says where it was accessed.
    struct Probe {
        at: u64,
        seen: Mutex<Vec<(&'static str, u64)>>,
    }

    impl Function for Probe {
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            self.seen.lock().unwrap().push(("config", offset));
            data.fill(1);
        }
        fn write_config(&self, _: u64, _: &[u8]) {}
        fn registers(&self) -> Option<u64> {
            Some(self.at)
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.seen.lock().unwrap().push(("registers", offset));
            data.fill(2);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn read(bus: &RootBus, gpa: u64) -> u8 {
        let mut data = [0; 4];
        bus.read(gpa, &mut data);
        data[0]
    }

    #[test]
    fn addresses_lead_to_the_device_in_its_slot() {
        let probe = Arc::new(Probe { at: RootBus::registers_of(1, 5), seen: Mutex::default() });
        let bus = RootBus::new(1);
        bus.insert(5, probe.clone());
        let config = ecam(1).start + 5 * 0x8000;
        assert_eq!(read(&bus, config + 0xff0), 1);
        assert_eq!(read(&bus, config + 0xfff), 0xff, "over the function's end");
        assert_eq!(read(&bus, config + 0x1000), 0xff, "another function of the slot");
        assert_eq!(read(&bus, config + 0x8000), 0xff, "another slot");
        assert_eq!(read(&bus, RootBus::registers_of(1, 5) + 0x7ffc), 2);
        assert_eq!(read(&bus, RootBus::registers_of(1, 5) + 0x7ffe), 0xff, "over the end");
        assert_eq!(read(&bus, RootBus::registers_of(1, 4)), 0xff);
        assert_eq!(*probe.seen.lock().unwrap(), [("config", 0xff0), ("registers", 0x7ffc)]);
        bus.remove(5);
        assert_eq!((read(&bus, config), read(&bus, RootBus::registers_of(1, 5))), (0xff, 0xff), "it is gone");
        assert!(bus.covers(config) && !bus.covers(ecam(0).start) && !bus.covers(window(2).start));
    }

    #[test]
    fn only_doorbells_are_doorbells() {
        let registers = RootBus::registers_of(3, 31);
        assert!(is_doorbell(registers + DOORBELLS.start) && is_doorbell(registers + DOORBELLS.end - 4));
        assert!(!is_doorbell(registers) && !is_doorbell(registers + DOORBELLS.end));
        assert!(!is_doorbell(ecam(0).start + DOORBELLS.start), "configuration space");
    }
}
