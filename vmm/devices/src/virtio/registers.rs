//! The common configuration registers (4.1.4.3): features, status, queues. A pure state machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

/// Bytes of the registers.
pub const LEN: usize = 0x40;
/// "No interrupt" in a vector register.
pub const NO_VECTOR: u16 = 0xffff;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// The device cannot go on until it is reset.
pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const QUEUES: usize = 0x12;
/// Offset of the device status.
pub const STATUS: usize = 0x14;
const GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFFSET: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;

/// What the driver's write asks of the device.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Start: the driver is ready.
    Start,
    /// Stop everything and forget.
    Reset,
}

/// A queue as its driver has set it up.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// The largest size.
    pub max: u16,
    /// The size, a power of two of at most `max`.
    pub size: u16,
    /// The driver uses it.
    pub enabled: bool,
    /// GPA of the descriptor table.
    pub descriptors: u64,
    /// GPA of the available ring.
    pub driver: u64,
    /// GPA of the used ring.
    pub device: u64,
    /// The MSI-X vector, [`NO_VECTOR`] for none. Shared with whoever raises it.
    pub vector: Arc<AtomicU16>,
}

impl QueueSetup {
    fn reset(&mut self) {
        (self.size, self.enabled) = (self.max, false);
        (self.descriptors, self.driver, self.device) = (0, 0, 0);
        self.vector.store(NO_VECTOR, Ordering::Relaxed);
    }
}

/// The registers.
#[derive(Debug)]
pub struct Registers {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    status: u8,
    generation: u8,
    queue_select: u16,
    vectors: u16,
    config_vector: Arc<AtomicU16>,
    queues: Vec<QueueSetup>,
}

impl Registers {
    /// The registers of a device that offers `offered` features, has queues of at most these sizes and
    /// `vectors` interrupt vectors.
    pub fn new(offered: u64, queues: &[u16], vectors: u16) -> Registers {
        let queue = |&max: &u16| QueueSetup {
            max,
            size: max,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            vector: Arc::new(AtomicU16::new(NO_VECTOR)),
        };
        Registers {
            offered,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            status: 0,
            generation: 0,
            queue_select: 0,
            vectors,
            config_vector: Arc::new(AtomicU16::new(NO_VECTOR)),
            queues: queues.iter().map(queue).collect(),
        }
    }

    /// The features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.accepted & self.offered
    }

    /// The queues.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// The vector of configuration changes.
    pub fn config_vector(&self) -> &Arc<AtomicU16> {
        &self.config_vector
    }

    /// The device's own registers have changed.
    pub fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// As after power-on, but with the same identity.
    pub fn reset(&mut self) {
        (self.accepted, self.device_select, self.driver_select) = (0, 0, 0);
        (self.status, self.queue_select) = (0, 0);
        self.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        self.queues.iter_mut().for_each(QueueSetup::reset);
    }

    /// The driver reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        super::read_block(&self.image(), offset, data);
    }

    /// The driver writes. Anything but a whole register is ignored; so is setting up a queue that is in use.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Request> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (usize::try_from(offset).ok()?, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_select = value as u32,
            (DRIVER_FEATURE, 4) => self.accept(value as u32),
            (CONFIG_VECTOR, 2) => {
                self.config_vector.store(self.known_vector(value as u16), Ordering::Relaxed);
            }
            (STATUS, 1) => return self.set_status(value as u8),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => {
                let vector = self.known_vector(value as u16);
                if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
                    queue.vector.store(vector, Ordering::Relaxed);
                }
            }
            (at @ QUEUE_SIZE..LEN, len) => self.set_up_queue(at, len, value),
            _ => {}
        }
        None
    }

    fn accept(&mut self, bits: u32) {
        if self.status & FEATURES_OK == 0 {
            match self.driver_select {
                0 => self.accepted = self.accepted & !0xffff_ffff | u64::from(bits),
                1 => self.accepted = self.accepted & 0xffff_ffff | u64::from(bits) << 32,
                _ => {}
            }
        }
    }

    /// What a vector register becomes: a vector that does not exist reads back as none.
    fn known_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn set_status(&mut self, value: u8) -> Option<Request> {
        if value == 0 {
            return Some(Request::Reset);
        }
        let mut next = value & !NEEDS_RESET;
        let allowed = self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0;
        if self.status & FEATURES_OK == 0 && !allowed {
            // The driver reads it back and sees that its choice is not possible.
            next &= !FEATURES_OK;
        }
        if next & FEATURES_OK == 0 {
            next &= !DRIVER_OK;
        }
        let start = next & DRIVER_OK != 0 && self.status & DRIVER_OK == 0;
        // A driver that takes back what it said without a reset is not heard.
        self.status |= next;
        start.then_some(Request::Start)
    }

    fn set_up_queue(&mut self, at: usize, len: usize, value: u64) {
        let running = self.status & DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled || running {
            return;
        }
        let mut address = |which: fn(&mut QueueSetup) -> &mut u64, half: usize| {
            let field = which(queue);
            match (half, len) {
                (0, 8) => *field = value,
                (0, 4) => *field = *field & !0xffff_ffff | value,
                (4, 4) => *field = *field & 0xffff_ffff | value << 32,
                _ => {}
            }
        };
        match (at, len) {
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max {
                    queue.size = size;
                }
            }
            (QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (QUEUE_DESCRIPTORS..QUEUE_DRIVER, _) => {
                address(|queue| &mut queue.descriptors, at - QUEUE_DESCRIPTORS);
            }
            (QUEUE_DRIVER..QUEUE_DEVICE, _) => address(|queue| &mut queue.driver, at - QUEUE_DRIVER),
            (QUEUE_DEVICE..0x38, _) => address(|queue| &mut queue.device, at - QUEUE_DEVICE),
            _ => {}
        }
    }

    fn image(&self) -> [u8; LEN] {
        let mut image = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(DEVICE_FEATURE_SELECT, &self.device_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered, self.device_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.accepted, self.driver_select).to_le_bytes());
        put(CONFIG_VECTOR, &self.config_vector.load(Ordering::Relaxed).to_le_bytes());
        put(QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status]);
        put(GENERATION, &[self.generation]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.load(Ordering::Relaxed).to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

    fn registers() -> Registers {
        Registers::new(VERSION_1 | 0b101, &[256, 64], 3)
    }

    fn read(registers: &Registers, offset: usize, len: usize) -> u64 {
        let mut bytes = [0; 8];
        registers.read(offset as u64, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn write(registers: &mut Registers, offset: usize, len: usize, value: u64) -> Option<Request> {
        registers.write(offset as u64, &value.to_le_bytes()[..len])
    }

    fn accept(registers: &mut Registers, features: u64) {
        for (select, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            write(registers, DRIVER_FEATURE_SELECT, 4, select);
            write(registers, DRIVER_FEATURE, 4, bits);
        }
    }

    #[test]
    fn a_driver_negotiates_features_and_starts() {
        let mut registers = registers();
        write(&mut registers, DEVICE_FEATURE_SELECT, 4, 1);
        assert_eq!(read(&registers, DEVICE_FEATURE, 4), VERSION_1 >> 32);
        accept(&mut registers, VERSION_1 | 1);
        assert_eq!(write(&mut registers, STATUS, 1, 3), None);
        assert_eq!(write(&mut registers, STATUS, 1, 11), None);
        assert_eq!(read(&registers, STATUS, 1), 11);
        assert_eq!(write(&mut registers, STATUS, 1, 15), Some(Request::Start));
        assert_eq!(write(&mut registers, STATUS, 1, 15), None, "only once");
        assert_eq!(registers.features(), VERSION_1 | 1);
        assert_eq!(write(&mut registers, STATUS, 1, 0), Some(Request::Reset));
    }

    #[test]
    fn features_that_were_not_offered_or_of_an_old_driver_are_refused() {
        for wrong in [VERSION_1 | 2, 1] {
            let mut registers = registers();
            accept(&mut registers, wrong);
            write(&mut registers, STATUS, 1, 3);
            assert_eq!(write(&mut registers, STATUS, 1, 15), None);
            assert_eq!(read(&registers, STATUS, 1), 3, "{wrong:#x}");
        }
    }

    #[test]
    fn a_queue_is_set_up_in_halves_and_fixed_once_enabled() {
        let mut registers = registers();
        write(&mut registers, QUEUE_SELECT, 2, 1);
        assert_eq!(read(&registers, QUEUE_SIZE, 2), 64);
        write(&mut registers, QUEUE_SIZE, 2, 128);
        write(&mut registers, QUEUE_SIZE, 2, 31);
        assert_eq!(read(&registers, QUEUE_SIZE, 2), 64, "too large, and no power of two");
        write(&mut registers, QUEUE_SIZE, 2, 16);
        write(&mut registers, QUEUE_DESCRIPTORS, 4, 0x1000);
        write(&mut registers, QUEUE_DESCRIPTORS + 4, 4, 0x2);
        write(&mut registers, QUEUE_DRIVER, 8, 0x3_0000_4000);
        write(&mut registers, QUEUE_VECTOR, 2, 2);
        write(&mut registers, QUEUE_ENABLE, 2, 1);
        write(&mut registers, QUEUE_SIZE, 2, 32);
        let queue = &registers.queues()[1];
        assert_eq!((queue.size, queue.enabled, queue.descriptors), (16, true, 0x2_0000_1000));
        assert_eq!((queue.driver, read(&registers, QUEUE_NOTIFY_OFFSET, 2)), (0x3_0000_4000, 1));
        write(&mut registers, QUEUE_VECTOR, 2, 3);
        assert_eq!(read(&registers, QUEUE_VECTOR, 2), 0xffff, "there is no vector 3");
        write(&mut registers, QUEUE_SELECT, 2, 2);
        assert_eq!(read(&registers, QUEUE_SIZE, 2), 0, "there is no queue 2");
    }

    proptest! {
        #[test]
        fn any_accesses_leave_every_register_in_its_range(
            steps in proptest::collection::vec((0u64..72, any::<u64>(), prop_oneof![Just(1usize), Just(2), Just(4), Just(8)]), 0..80),
        ) {
            let mut registers = registers();
            for (offset, value, len) in steps {
                if registers.write(offset, &value.to_le_bytes()[..len]) == Some(Request::Reset) {
                    registers.reset();
                }
                registers.read(offset, &mut [0; 8][..len]);
                prop_assert_eq!(registers.features() & !(VERSION_1 | 5), 0);
                for queue in registers.queues() {
                    prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max);
                    let vector = queue.vector.load(Ordering::Relaxed);
                    prop_assert!(vector < 3 || vector == NO_VECTOR);
                }
            }
        }
    }
}
