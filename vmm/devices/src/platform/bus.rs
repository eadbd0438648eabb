//! The bus: the devices by port or guest physical address.

use super::BusDevice;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use base::lock;

/// A device, shared between its bus and whoever feeds it from outside; it has its own lock.
pub type Shared<D> = Arc<Mutex<D>>;

/// Wraps a device for [`Bus::insert`].
pub fn share<D: BusDevice>(device: D) -> Shared<D> {
    Arc::new(Mutex::new(device))
}

/// An error: a range that a device cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or goes past the end of the address space.
    #[error(
        "a device cannot have {len:#x} addresses from {base:#x} on: give it a range that is not empty and fits"
    )]
    Range {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
    },
    /// Another device has some of these addresses.
    #[error(
        "a device cannot have {len:#x} addresses from {base:#x} on: the device at {other:#x} has some of them"
    )]
    Overlap {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

struct Range {
    /// The last address, so that a range may end with the address space.
    last: u64,
    device: Shared<dyn BusDevice>,
}

/// The device that has an address, and the address's offset in its range.
type Owner<'a> = Option<(&'a Shared<dyn BusDevice>, u64)>;

/// A port or memory-mapped bus. Built once, then read by all threads.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, Range>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `len` addresses from `base` on.
    ///
    /// # Errors
    /// [`BusError`] if the range is empty, too long, or partly taken.
    pub fn insert(&mut self, base: u64, len: u64, device: Shared<dyn BusDevice>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|rest| base.checked_add(rest));
        let last = last.ok_or(BusError::Range { base, len })?;
        match self.ranges.range(..=last).next_back() {
            Some((other, range)) if range.last >= base => Err(BusError::Overlap { base, len, other: *other }),
            _ => {
                self.ranges.insert(base, Range { last, device });
                Ok(())
            }
        }
    }

    /// The guest reads. Bytes that no device has read as 0xff; an access over a device's end is split there.
    /// True if some device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let mut answered = false;
        let mut done = 0;
        while done < data.len() {
            let (length, device) = self.part(address.wrapping_add(done as u64), data.len() - done);
            let part = &mut data[done..done + length];
            match device {
                Some((device, offset)) => {
                    lock(device).read(offset, part);
                    answered = true;
                }
                None => part.fill(0xff),
            }
            done += length;
        }
        answered
    }

    /// The guest writes. Bytes that no device has are dropped; an access over a device's end is split there.
    /// True if some device took part of it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let mut answered = false;
        let mut done = 0;
        while done < data.len() {
            let (length, device) = self.part(address.wrapping_add(done as u64), data.len() - done);
            if let Some((device, offset)) = device {
                lock(device).write(offset, &data[done..done + length]);
                answered = true;
            }
            done += length;
        }
        answered
    }

    /// How many of the `length` (at least 1) bytes from `address` on belong together, and to whom.
    fn part(&self, address: u64, length: usize) -> (usize, Owner<'_>) {
        match self.ranges.range(..=address).next_back() {
            Some((base, range)) if range.last >= address => {
                let rest = usize::try_from(range.last - address).unwrap_or(usize::MAX).saturating_add(1);
                (length.min(rest), Some((&range.device, address - base)))
            }
            _ => (1, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Memory that remembers what was written.
    struct Ram(Vec<u8>);

    impl BusDevice for Ram {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let offset = offset as usize;
            data.copy_from_slice(&self.0[offset..offset + data.len()]);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            let offset = offset as usize;
            self.0[offset..offset + data.len()].copy_from_slice(data);
        }
    }

    fn ram(len: u64) -> Shared<dyn BusDevice> {
        share(Ram(vec![0; len as usize]))
    }

    #[test]
    fn an_access_over_the_end_is_split_and_the_rest_reads_as_ones() {
        let mut bus = Bus::new();
        bus.insert(0x10, 4, ram(4)).expect("free");
        bus.insert(0x14, 2, ram(2)).expect("free");
        assert!(bus.write(0x12, &[1, 2, 3, 4, 5, 6]));
        let mut data = [0; 8];
        assert!(bus.read(0x11, &mut data));
        assert_eq!(data, [0, 1, 2, 3, 4, 0xff, 0xff, 0xff]);
        assert!(!bus.read(0x20, &mut data) && data == [0xff; 8]);
        assert!(!bus.write(0x20, &data));
    }

    #[test]
    fn the_end_of_the_address_space_is_no_trap() {
        let mut bus = Bus::new();
        bus.insert(u64::MAX, 1, ram(1)).expect("free");
        assert!(bus.write(u64::MAX, &[7, 8]));
        let mut data = [0; 2];
        assert!(bus.read(u64::MAX, &mut data));
        assert_eq!(data, [7, 0xff]);
        assert_eq!(bus.insert(u64::MAX, 2, ram(2)), Err(BusError::Range { base: u64::MAX, len: 2 }));
        assert_eq!(bus.insert(5, 0, ram(1)), Err(BusError::Range { base: 5, len: 0 }));
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_each_address_finds_its_device(
            wanted in proptest::collection::vec((0u64..64, 1u64..12), 0..12), address in 0u64..80, size in 1usize..9,
        ) {
            let mut bus = Bus::new();
            let mut owner = [None; 80];
            for (index, (base, len)) in wanted.iter().enumerate() {
                let cells = &mut owner[*base as usize..(base + len) as usize];
                let free = cells.iter().all(Option::is_none);
                let device = share(Ram(vec![index as u8; *len as usize]));
                prop_assert_eq!(bus.insert(*base, *len, device).is_ok(), free);
                if free {
                    cells.fill(Some(index as u8));
                }
            }
            let mut data = vec![0x55; size];
            bus.read(address, &mut data);
            for (index, byte) in data.iter().enumerate() {
                let expected = owner.get(address as usize + index).copied().flatten().unwrap_or(0xff);
                prop_assert_eq!(*byte, expected);
            }
        }
    }
}
