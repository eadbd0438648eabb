//! A small driver for tests: sets a device up through its registers, as Linux does, and puts requests into
//! its queues.
//!
//! [`hostile`] is one that does anything at all.

pub mod hostile;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use machine::control::fence::Fence;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::irq::{Message, Mode};
use crate::pci::{DOORBELLS, Function, MSIX_TABLE};
use crate::virtio::VirtioDevice;
use crate::virtio::memory::GuestRam;
use crate::virtio::pci_device::{DeviceContext, VirtioPciDevice};

/// Bytes of guest memory.
pub const RAM: u64 = 1 << 20;
/// Descriptors of every queue.
pub const SIZE: u16 = 16;
/// Where tests put their buffers: above the rings.
pub const DATA: u64 = 0x4_0000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// A device with its driver.
pub struct Driver {
    pub transport: Arc<VirtioPciDevice>,
    pub memory: GuestRam,
    /// The device's.
    #[cfg_attr(fuzzing, allow(dead_code))]
    pub fence: Arc<Fence>,
    messages: Receiver<Message>,
    /// The next index of each available ring, and how much of each used ring has been seen.
    indices: Vec<(u16, u16)>,
}

impl Driver {
    /// A device that has not been touched yet.
    pub fn new(device: Box<dyn VirtioDevice>) -> Driver {
        Driver::fenced(device, Arc::new(Fence::open()))
    }

    /// The same on a node with this fence.
    pub fn fenced(device: Box<dyn VirtioDevice>, fence: Arc<Fence>) -> Driver {
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let memory = GuestRam::plain(map);
        Driver::build(device, memory.clone(), memory, fence)
    }

    /// A device where device and driver see the memory each in its own way.
    #[cfg(test)]
    pub fn with(device: Box<dyn VirtioDevice>, devices: GuestRam, memory: GuestRam) -> Driver {
        Driver::build(device, devices, memory, Arc::new(Fence::open()))
    }

    fn build(
        device: Box<dyn VirtioDevice>,
        devices: GuestRam,
        memory: GuestRam,
        fence: Arc<Fence>,
    ) -> Driver {
        let queues = device.queues().len();
        let (sender, messages): (Sender<Message>, _) = channel();
        let sender = Mutex::new(sender);
        let around = DeviceContext {
            memory: devices,
            // A test that has ended needs no interrupts.
            deliver: Arc::new(move |message| {
                let _ = sender.lock().unwrap().send(message);
            }),
            fence: fence.clone(),
        };
        let transport = Arc::new(VirtioPciDevice::new("the device", device, 0xc000_0000, &around).unwrap());
        Driver { transport, memory, fence, messages, indices: vec![(0, 0); queues] }
    }

    /// Interrupts that came until now are of no interest.
    pub fn forget(&self) {
        while self.messages.try_recv().is_ok() {}
    }

    /// Sets everything up; accepts `features` beside those of the transport (version 1 and indirect buffers).
    pub fn start(&mut self, features: u64) {
        self.configure(features);
        self.status(0xf);
    }

    /// Sets everything up but does not say that the driver is ready.
    pub fn configure(&mut self, features: u64) {
        self.write_config(4, &6u16.to_le_bytes());
        assert_eq!(self.transport.registers(), Some(0xc000_0000));
        self.enable_msix();
        self.status(3);
        let features = features | 1 << 32 | 1 << 28;
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.status(0xb);
        assert_eq!(self.read(0x14, 1), 0xb, "the features are refused");
        self.write(0x10, &0u16.to_le_bytes());
        for queue in 0..self.indices.len() as u16 {
            self.indices[usize::from(queue)] = (0, 0);
            let [descriptors, available, used] = rings(queue);
            self.memory.map().write_slice(&[0; 0x1000], GuestAddress(descriptors)).unwrap();
            self.write(0x16, &queue.to_le_bytes());
            self.write(0x18, &SIZE.to_le_bytes());
            self.write(0x1a, &(queue + 1).to_le_bytes());
            for (register, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
                self.write(register, &address.to_le_bytes());
            }
            self.write(0x1c, &1u16.to_le_bytes());
        }
    }

    /// Vector `n` goes to CPU 0 as interrupt `0x40 + n`.
    fn enable_msix(&self) {
        for vector in 0..=self.indices.len() as u64 {
            let words = [0xfee0_0000, 0, 0x40 + vector as u32, 0];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.write(MSIX_TABLE.start + vector * 16, &bytes[..8]);
            self.write(MSIX_TABLE.start + vector * 16 + 8, &bytes[8..]);
        }
        let at = self.find_capability(0x11);
        self.write_config(at + 2, &0x8000u16.to_le_bytes());
    }

    /// The offset of the first capability with this id.
    pub fn find_capability(&self, id: u8) -> u64 {
        let mut at = self.read_config(0x34, 1);
        while at != 0 && self.read_config(at, 1) != u64::from(id) {
            at = self.read_config(at + 1, 1);
        }
        assert_ne!(at, 0, "there is no capability {id:#x}");
        at
    }

    pub fn status(&self, status: u8) {
        self.write(0x14, &[status]);
    }

    /// Resets the device and waits for it.
    pub fn reset(&self) {
        self.status(0);
        let deadline = Instant::now() + PATIENCE;
        while self.read(0x14, 1) != 0 {
            assert!(Instant::now() < deadline, "the reset does not end");
            std::thread::yield_now();
        }
    }

    pub fn read(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    /// Reads registers one byte after the other.
    #[cfg(test)]
    pub fn read_bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        (offset..offset + len).map(|at| self.read(at, 1) as u8).collect()
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        self.transport.write(offset, data);
    }

    pub fn read_config(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.read_config(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.transport.write_config(offset, data);
    }

    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.map().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.map().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let at = table + u64::from(index) * 16;
        self.put(at, &gpa.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes a chain from descriptor 0 on: (address, length, for the device to write).
    pub fn chain(&self, queue: u16, buffers: &[(u64, u32, bool)]) {
        for (index, (gpa, len, write)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(rings(queue)[0], index as u16, *gpa, *len, flags, index as u16 + 1);
        }
    }

    /// Makes the chain that begins at `head` available and rings the doorbell.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let available = rings(queue)[1];
        let (next, _) = &mut self.indices[usize::from(queue)];
        let slot = available + 4 + u64::from(*next % SIZE) * 2;
        *next = next.wrapping_add(1);
        let next = *next;
        self.put(slot, &head.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.put(available + 2, &next.to_le_bytes());
        self.write(DOORBELLS.start + u64::from(queue) * 4, &queue.to_le_bytes());
    }

    /// Waits for the queue's interrupt, and for the next chain that the device gives back: its head, and the
    /// bytes written.
    pub fn wait(&mut self, queue: u16) -> (u16, u32) {
        let used = rings(queue)[2];
        let seen = self.indices[usize::from(queue)].1;
        while self.get(used + 2, 2) == seen.to_le_bytes() {
            let message = self.messages.recv_timeout(PATIENCE).expect("an interrupt");
            let Mode::Fixed { vector, .. } = message.mode else { panic!("{message:?}") };
            assert!((0x40..0x50).contains(&vector), "{vector:#x}");
        }
        self.indices[usize::from(queue)].1 = seen.wrapping_add(1);
        let element = self.get(used + 4 + u64::from(seen % SIZE) * 8, 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        (word(0) as u16, word(4))
    }

    /// How many chains the device has given back since the start.
    #[cfg(test)]
    pub fn given_back(&self, queue: u16) -> u16 {
        u16::from_le_bytes(self.get(rings(queue)[2] + 2, 2).try_into().unwrap())
    }

    /// Waits for the interrupt that says that the device's registers have changed.
    #[cfg(test)]
    pub fn wait_config_interrupt(&self) {
        let message = self.messages.recv_timeout(PATIENCE).expect("an interrupt");
        assert!(matches!(message.mode, Mode::Fixed { vector: 0x40, .. }), "{message:?}");
    }

    /// One request from start to end; the bytes written.
    pub fn request(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> u32 {
        self.chain(queue, buffers);
        self.offer(queue, 0);
        let (head, written) = self.wait(queue);
        assert_eq!(head, 0);
        written
    }

    /// Waits until the device says that it needs a reset.
    #[cfg(test)]
    pub fn wait_broken(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.read(0x14, 1) & 0x40 == 0 {
            assert!(Instant::now() < deadline, "the device goes on");
            std::thread::yield_now();
        }
    }
}

/// Where a queue's descriptors, available ring and used ring are.
pub fn rings(queue: u16) -> [u64; 3] {
    let base = 0x1000 * (1 + u64::from(queue));
    [base, base + 0x400, base + 0x800]
}

/// A file of `sectors` sectors, sector n full of n + 1.
#[cfg(test)]
pub fn image(sectors: u8) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..sectors {
        std::io::Write::write_all(&mut file, &[sector + 1; 512]).unwrap();
    }
    file
}
