//! A virtio device as a PCI function (4.1): capabilities, registers, doorbells, interrupts.
//!
//! ```text
//!  BAR 0   0x0000 common registers   0x1000 ISR status   0x2000 the device's own registers
//!          0x3000 MSI-X table        0x4000 pending bits 0x5000 doorbells, one for each queue
//! ```

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use machine::control::fence::Fence;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{ISR_CONFIG, LiveQueue, QueueContext, Signals};
use super::registers::{self, Registers, Request};
use super::{Activation, GuestRam, VirtioDevice, Workers};
use crate::irq::Message;
use crate::pci::config_space::{ConfigSpace, Identity};
use crate::pci::msix::{self, Interrupts};
use crate::pci::{DOORBELL_STRIDE, DOORBELLS, Function, MSIX_PENDING, MSIX_TABLE, REGISTERS};

const VENDOR: u16 = 0x1af4;
/// PCI device ids of virtio 1.x devices are the device's number plus this (4.1.2).
const DEVICE_BASE: u16 = 0x1040;
const REVISION: u8 = 1;
const CAPABILITY_VENDOR: u8 = 9;

const ISR: u64 = 0x1000;
const OWN: u64 = 0x2000;
/// Bytes of the device's own registers.
const OWN_LEN: u64 = 0x1000;

/// How often a device that is taken away checks whether its threads have ended.
const CLOSING: Duration = Duration::from_millis(2);

/// Kinds of virtio capability (4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// A device's context: the memory of its node's guest, and the way of its interrupts.
#[derive(Clone)]
pub struct DeviceContext {
    /// Guest memory.
    pub memory: GuestRam,
    /// Where interrupts go.
    pub deliver: Arc<dyn Fn(Message) + Send + Sync>,
    /// Asked before each request.
    pub fence: Arc<Fence>,
}

/// A virtio device in a PCI slot.
pub struct VirtioPciDevice {
    state: Mutex<State>,
    /// Rung without the lock.
    bells: Vec<Arc<EventFd>>,
    /// Where the registers are, 0 for nowhere: read without the lock.
    base: AtomicU64,
    signals: Signals,
    /// Offset of the capability through which registers can be reached in configuration space.
    window: usize,
    /// Offset of the MSI-X capability.
    msix: usize,
}

struct State {
    space: ConfigSpace,
    registers: Registers,
    device: Box<dyn VirtioDevice>,
    workers: Workers,
    context: QueueContext,
    /// The driver has asked for a reset, and not all workers have ended.
    resetting: bool,
    /// The device is being taken away.
    closed: bool,
}

impl VirtioPciDevice {
    /// `device`, called `name` in messages, with its registers at the 32-bit address `base`.
    ///
    /// # Errors
    /// The system has no more file descriptors.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        base: u64,
        around: &DeviceContext,
    ) -> std::io::Result<VirtioPciDevice> {
        let queues = device.queues();
        let vectors = (queues.len() + 1).min(msix::MOST);
        let deliver = around.deliver.clone();
        let interrupts = Arc::new(Interrupts::new(vectors, move |message| deliver(message)));
        let offered = device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        let registers = Registers::new(offered, &queues, vectors as u16);
        let bells: Vec<_> = queues.iter().map(|_| EventFd::new(0).map(Arc::new)).collect::<Result<_, _>>()?;
        let signals = Signals {
            name: name.into(),
            interrupts,
            isr: Arc::new(AtomicU8::new(0)),
            config_vector: registers.config_vector().clone(),
            broken: Arc::new(AtomicBool::new(false)),
        };
        let (space, window, msix) = space(&*device, queues.len(), base, &signals.interrupts);
        let context = QueueContext {
            memory: around.memory.clone(),
            signals: signals.clone(),
            fence: around.fence.clone(),
        };
        let workers = Workers::new(name, bells.clone(), around.fence.clone());
        let state = State { space, registers, device, workers, context, resetting: false, closed: false };
        Ok(VirtioPciDevice {
            state: Mutex::new(state),
            bells,
            base: AtomicU64::new(0),
            signals,
            window,
            msix,
        })
    }

    /// Ends the device for good: its threads are told to end, and what its driver still writes is lost.
    /// `false` if some thread has not ended within `limit`.
    pub fn close(&self, limit: Duration) -> bool {
        let begin = Instant::now();
        {
            let mut state = self.lock();
            state.closed = true;
            state.workers.stop();
        }
        while !self.lock().workers.ended() {
            if begin.elapsed() > limit {
                return false;
            }
            std::thread::sleep(CLOSING);
        }
        true
    }

    /// Tells the driver that the device's own registers have changed.
    pub fn changed(&self) {
        self.lock().registers.config_changed();
        self.signals.raise(&self.signals.config_vector, ISR_CONFIG);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a thread that panicked left behind is at worst an odd register.
        base::lock(&self.state)
    }

    /// An access through configuration space (4.1.4.9), if [`offset`, `offset + len`) is its data register:
    /// where in the registers, and how long.
    fn through(&self, space: &ConfigSpace, offset: u64, len: usize) -> Option<(u64, usize)> {
        if offset != self.window as u64 + 16 {
            return None;
        }
        let bar = space.word(self.window + 4) & 0xff;
        let (at, wanted) = (space.long(self.window + 8), space.long(self.window + 12));
        let valid = bar == 0 && matches!(wanted, 1 | 2 | 4) && wanted as usize <= len && at % wanted == 0;
        (valid && u64::from(at) + u64::from(wanted) <= REGISTERS).then_some((at.into(), wanted as usize))
    }

    fn ring(&self, doorbell: u64) {
        // Fails only when the counter is full, and then the worker does not sleep.
        let bell = self.bells.get((doorbell / DOORBELL_STRIDE) as usize);
        let _ = bell.map(|bell| bell.write(1));
    }
}

impl State {
    fn status(&mut self) -> u8 {
        if self.resetting && self.workers.ended() {
            self.forget();
        }
        let broken = self.context.signals.broken.load(Ordering::SeqCst);
        // While it resets, the old status stays readable; it is never 0, since only a device in use has to
        // wait.
        self.registers.status() | if broken { registers::NEEDS_RESET } else { 0 }
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        if self.closed || self.resetting && self.status() != 0 {
            return;
        }
        match self.registers.write(offset, data) {
            Some(Request::Start) => self.start(),
            Some(Request::Reset) => {
                self.workers.stop();
                self.resetting = true;
                self.status();
            }
            None => {}
        }
    }

    fn forget(&mut self) {
        self.resetting = false;
        self.registers.reset();
        let signals = &self.context.signals;
        signals.isr.store(0, Ordering::SeqCst);
        signals.broken.store(false, Ordering::SeqCst);
    }

    fn start(&mut self) {
        let features = self.registers.features();
        let event_index = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let bells = self.workers.bells().to_vec();
        let live = |(setup, bell): (&registers::QueueSetup, Arc<EventFd>)| {
            let stop = self.workers.stop_flag().clone();
            let queue = || LiveQueue::new(setup, event_index, bell, stop, self.context.clone());
            setup.enabled.then(queue).transpose()
        };
        let queues = self.registers.queues().iter().zip(bells).map(live).collect::<Result<Vec<_>, _>>();
        let started = match queues {
            Ok(queues) => self
                .device
                .activate(Activation { features, queues }, &mut self.workers)
                .map_err(|error| format!("it could not be started: {error}")),
            Err(error) => Err(error.to_string()),
        };
        if let Err(why) = started {
            self.workers.stop();
            self.context.signals.give_up(&why);
        }
    }
}

impl Function for VirtioPciDevice {
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        state.space.read(offset, data);
        if let Some((at, len)) = self.through(&state.space, offset, data.len()) {
            drop(state);
            self.read(at, &mut data[..len]);
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        state.space.write(offset, data);
        self.base.store(state.space.registers().unwrap_or(0), Ordering::Relaxed);
        let control = state.space.word(self.msix + 2);
        // Under the state's lock, so that two writes of the control take effect in their order.
        self.signals.interrupts.change(|msix| msix.set_control(control));
        if let Some((at, len)) = self.through(&state.space, offset, data.len()) {
            drop(state);
            self.write(at, &data[..len]);
        }
    }

    fn registers(&self) -> Option<u64> {
        Some(self.base.load(Ordering::Relaxed)).filter(|base| *base != 0)
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0..ISR => {
                let mut state = self.lock();
                // Before the status is read, it may change.
                let status = state.status();
                state.registers.read(offset, data);
                let at = (registers::STATUS as u64).checked_sub(offset).unwrap_or(u64::MAX);
                if let Some(byte) = usize::try_from(at).ok().and_then(|at| data.get_mut(at)) {
                    *byte = status;
                }
            }
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.signals.isr.swap(0, Ordering::SeqCst);
                }
            }
            OWN..MSIX_START => self.lock().device.read_config(offset - OWN, data),
            MSIX_START..PENDING_START => {
                self.signals.interrupts.lock().read_table(offset - MSIX_TABLE.start, data);
            }
            PENDING_START..DOORBELL_START => {
                self.signals.interrupts.lock().read_pending(offset - MSIX_PENDING.start, data);
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            DOORBELL_START..DOORBELL_END => self.ring(offset - DOORBELLS.start),
            0..ISR => self.lock().write_common(offset, data),
            OWN..MSIX_START => self.lock().device.write_config(offset - OWN, data),
            MSIX_START..PENDING_START => {
                self.signals.interrupts.change(|msix| msix.write_table(offset - MSIX_TABLE.start, data));
            }
            _ => {}
        }
    }
}

// Range patterns take constants only.
const MSIX_START: u64 = MSIX_TABLE.start;
const PENDING_START: u64 = MSIX_PENDING.start;
const DOORBELL_START: u64 = DOORBELLS.start;
const DOORBELL_END: u64 = DOORBELLS.end;

/// Configuration space with all capabilities; the offsets of that for access through configuration space and
/// of MSI-X.
fn space(
    device: &dyn VirtioDevice,
    queues: usize,
    base: u64,
    interrupts: &Interrupts,
) -> (ConfigSpace, usize, usize) {
    let identity = Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device.id(),
        revision: REVISION,
        class: device.class(),
        subsystem_vendor: VENDOR,
        subsystem: device.id(),
    };
    let mut space = ConfigSpace::new(&identity, base as u32);
    let area = |kind: u8, offset: u64, len: u64, more: &[u8]| {
        // Length, kind, BAR, id, padding; then where in the BAR.
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((len as u32).to_le_bytes());
        body.extend(more);
        body
    };
    space.add_capability(CAPABILITY_VENDOR, &area(COMMON_CFG, 0, registers::LEN as u64, &[]), &[]);
    space.add_capability(CAPABILITY_VENDOR, &area(ISR_CFG, ISR, 1, &[]), &[]);
    space.add_capability(CAPABILITY_VENDOR, &area(DEVICE_CFG, OWN, OWN_LEN, &[]), &[]);
    let stride = (DOORBELL_STRIDE as u32).to_le_bytes();
    let doorbells = area(NOTIFY_CFG, DOORBELLS.start, queues as u64 * DOORBELL_STRIDE, &stride);
    space.add_capability(CAPABILITY_VENDOR, &doorbells, &[]);
    let mut writable = vec![0, 0, 0xff, 0, 0, 0];
    writable.extend([0xff; 12]);
    let window = space.add_capability(CAPABILITY_VENDOR, &area(PCI_CFG, 0, 0, &[0; 4]), &writable);
    let body = interrupts.lock().capability();
    let msix = space.add_capability(msix::CAPABILITY, &body, &msix::CONTROL_WRITABLE.to_le_bytes());
    (space, window, msix)
}

#[cfg(test)]
mod tests;
