//! A driver that does anything: what a guest's kernel could do to a device, read from bytes, so that a fuzzer
//! and the property tests choose it alike.
//!
//! Whatever it did, the device must come back with a reset, and then do a correct driver's request.

use vm_memory::{Bytes, GuestAddress};

use super::{DATA, Driver, INDIRECT, NEXT, RAM, SIZE, WRITE, rings};
use crate::pci::{DOORBELL_STRIDE, DOORBELLS, REGISTERS, RootBus};
use crate::virtio::VirtioDevice;

/// Steps of one input at most: enough for a reset and a start between any two deeds.
const MOST_STEPS: usize = 200;
/// The most that one chain has in these steps.
const MOST_BUFFERS: u8 = 6;

/// Bytes that say what happens; 0 when they have ended.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// The next `len` bytes (at most 8) as a number.
    pub fn number(&mut self, len: usize) -> u64 {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(self.take(len)) {
            *to = *from;
        }
        u64::from_le_bytes(bytes)
    }

    /// The next `len` bytes, or as many as there are.
    fn take(&mut self, len: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// An address: mostly where something is, or the end of memory.
    fn address(&mut self) -> u64 {
        match self.byte() % 8 {
            0 => self.number(8),
            1 => (RAM - 32).wrapping_add(self.number(1)),
            2 => self.number(3),
            3 => rings(u16::from(self.byte() % 4))[usize::from(self.byte() % 3)] + self.number(1),
            _ => DATA + self.number(2),
        }
    }

    /// A length: mostly one that fits.
    fn len(&mut self) -> u32 {
        match self.byte() % 4 {
            0 => self.number(4) as u32,
            1 => self.number(2) as u32,
            _ => self.number(1) as u32,
        }
    }

    /// How wide an access is, and its bytes.
    fn value(&mut self) -> ([u8; 8], usize) {
        let width = [1, 2, 4, 8][usize::from(self.byte() % 4)];
        (self.number(8).to_le_bytes(), width)
    }
}

/// Has a driver do to `device` what `input` says, and everything else that may happen to the device with
/// `outside`. Then the device is reset, started as `features` say and shown to `after`.
pub fn drive(
    device: Box<dyn VirtioDevice>,
    mut input: Input,
    mut outside: impl FnMut(&mut Input),
    features: u64,
    after: impl FnOnce(&mut Driver),
) {
    let queues = device.queues().len() as u16;
    let mut driver = Driver::new(device);
    let bus = RootBus::new(0);
    bus.insert(0, driver.transport.clone());
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        step(&mut driver, &bus, queues, &mut input, &mut outside);
    }
    // Found again wherever the driver had moved it.
    bring_back(&driver);
    driver.start(features);
    after(&mut driver);
    driver.reset();
}

/// Resets the device, moves it to where it was at first, and forgets its interrupts.
fn bring_back(driver: &Driver) {
    driver.reset();
    driver.write_config(4, &[0, 0]);
    driver.write_config(0x10, &0xc000_0000u32.to_le_bytes());
    driver.write_config(driver.find_capability(0x11) + 2, &[0, 0]);
    driver.forget();
}

fn step(
    driver: &mut Driver,
    bus: &RootBus,
    queues: u16,
    input: &mut Input,
    outside: &mut impl FnMut(&mut Input),
) {
    let ram = driver.memory.clone();
    // Where there is no memory nothing is written.
    let put = |gpa: u64, bytes: &[u8]| drop(ram.map().write(bytes, GuestAddress(gpa)));
    let ring = |driver: &Driver, queue: u16| {
        driver.write(DOORBELLS.start + u64::from(queue) * DOORBELL_STRIDE, &queue.to_le_bytes());
    };
    let queue = |input: &mut Input| u16::from(input.byte()) % queues;
    match input.byte() % 14 {
        0 => {
            let (offset, (bytes, width)) = (input.number(2) % REGISTERS, input.value());
            driver.write(offset.min(REGISTERS - width as u64), &bytes[..width]);
        }
        1 => {
            let offset = input.number(2) % (REGISTERS - 8);
            driver.read(offset, 1 + usize::from(input.byte() % 8));
        }
        2 => {
            // One of the registers that set queues up, whole.
            let (offset, width) = [
                (0x00, 4),
                (0x08, 4),
                (0x0c, 4),
                (0x10, 2),
                (0x14, 1),
                (0x16, 2),
                (0x18, 2),
                (0x1a, 2),
                (0x1c, 2),
                (0x20, 8),
                (0x28, 8),
                (0x30, 8),
            ][usize::from(input.byte() % 12)];
            let value = if width == 8 { input.address() } else { input.number(width) };
            driver.write(offset, &value.to_le_bytes()[..width]);
        }
        3 => {
            let (at, (bytes, width)) = (anywhere(input), input.value());
            bus.write(at, &bytes[..width]);
        }
        4 => {
            let at = anywhere(input);
            bus.read(at, &mut [0; 8][..1 + usize::from(input.byte() % 8)]);
        }
        5 => {
            // Only what is offered, so that it gets somewhere.
            bring_back(driver);
            driver.write(0x00, &0u32.to_le_bytes());
            let offered = driver.read(0x04, 4) & !(1 << 29 | 1 << 28);
            let features = offered & input.number(4);
            driver.start(features | u64::from(input.byte() % 2) << 29);
        }
        6 => driver.status(0),
        7 => {
            let gpa = input.address();
            let len = usize::from(input.byte() % 48);
            put(gpa, input.take(len));
        }
        8 => {
            let table = if input.byte().is_multiple_of(4) { input.address() } else { rings(queue(input))[0] };
            let at = table.wrapping_add(u64::from(input.byte()) % 20 * 16);
            put(at, &input.address().to_le_bytes());
            put(at.wrapping_add(8), &input.len().to_le_bytes());
            put(at.wrapping_add(12), &u16::from(input.byte() % 8).to_le_bytes());
            put(at.wrapping_add(14), &u16::from(input.byte() % 20).to_le_bytes());
        }
        9 => {
            let (queue, head) = (queue(input), u16::from(input.byte()) % (SIZE + 4));
            driver.offer(queue, head);
        }
        10 => {
            let queue = queue(input);
            put(rings(queue)[1] + 2, &input.number(2).to_le_bytes()[..2]);
            ring(driver, queue);
        }
        11 => outside(input),
        12 => ring(driver, input.number(1) as u16),
        _ => {
            // A chain that is mostly correct.
            let (queue, count, indirect) = (queue(input), 1 + input.byte() % MOST_BUFFERS, input.byte());
            let table = if indirect.is_multiple_of(4) { DATA + 0x8000 } else { rings(queue)[0] };
            for index in 0..count {
                let last = index + 1 == count;
                let kind = input.byte();
                let flags = if last { 0 } else { NEXT } | if kind % 2 == 1 { WRITE } else { 0 };
                let (gpa, len) = (input.address(), input.len());
                driver.descriptor(table, index.into(), gpa, len, flags, u16::from(index) + 1);
            }
            if indirect.is_multiple_of(4) {
                driver.descriptor(rings(queue)[0], 0, table, u32::from(count) * 16, INDIRECT, 0);
            }
            driver.offer(queue, 0);
        }
    }
}

/// An address in or near what the bus has.
fn anywhere(input: &mut Input) -> u64 {
    let base = match input.byte() % 4 {
        0 => return input.number(8),
        1 => RootBus::registers_of(0, 0),
        _ => firmware::pci::ecam(0).start,
    };
    base + input.number(2)
}
