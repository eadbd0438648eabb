//! Device accesses: served at the node that has the device, forwarded from all others.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Sender, TrySendError};
use fabric::NodeId;
use firmware::pci::bus_of;

use super::Router;
use super::place::Place;
use crate::node_msg::{Access, NodeMsg};
use crate::vcpu::{Devices, Space};
use devices::pci::{RootBus, is_doorbell};
use devices::platform::bus::Bus;

/// Longest wait for another node's answer to one access.
const ANSWER: Duration = Duration::from_secs(10);
/// How often a waiting vCPU checks whether the machine has ended.
const LOOK: Duration = Duration::from_millis(100);

/// A node's own devices: node 0's platform devices, and the PCI bus that each node has.
#[derive(Default)]
pub struct LocalDevices {
    /// Ports.
    pub ports: Bus,
    /// Memory space, without PCI.
    pub memory: Bus,
    /// The node's PCI bus, if the machine has PCI.
    pub pci: Option<Arc<RootBus>>,
}

impl LocalDevices {
    fn pci_at(&self, space: Space, addr: u64) -> Option<&RootBus> {
        self.pci.as_deref().filter(|pci| space == Space::Memory && pci.covers(addr))
    }

    fn bus(&self, space: Space) -> &Bus {
        match space {
            Space::Port => &self.ports,
            Space::Memory => &self.memory,
        }
    }
}

impl Devices for LocalDevices {
    fn read(&self, _cpu: u32, space: Space, addr: u64, data: &mut [u8]) {
        match self.pci_at(space, addr) {
            Some(pci) => pci.read(addr, data),
            None => drop(self.bus(space).read(addr, data)),
        }
    }

    fn write(&self, _cpu: u32, space: Space, addr: u64, data: &[u8]) {
        match self.pci_at(space, addr) {
            Some(pci) => pci.write(addr, data),
            None => drop(self.bus(space).write(addr, data)),
        }
    }
}

/// A node's thread for the other nodes' device accesses: a device may take its time (a console, a disk), and
/// lane 0 must not. Accesses of one node stay in order.
pub struct DeviceServer {
    queue: Sender<(NodeId, Access)>,
    devices: Arc<dyn Devices>,
    thread: JoinHandle<()>,
}

impl DeviceServer {
    /// Starts the thread. It ends when the server is stopped.
    ///
    /// # Errors
    /// What the operating system says of a new thread.
    pub fn start(router: Arc<Router>, devices: Arc<dyn Devices>) -> std::io::Result<DeviceServer> {
        let (queue, accesses) = channel::bounded::<(NodeId, Access)>(router.cpus.len());
        let served = devices.clone();
        let thread = std::thread::Builder::new().name("devices".into()).spawn(move || {
            for (from, access) in accesses {
                serve(&router, &*served, from, &access);
            }
        })?;
        Ok(DeviceServer { queue, devices, thread })
    }

    /// Where the lane thread puts accesses.
    pub fn queue(&self) -> DeviceQueue {
        DeviceQueue { queue: self.queue.clone(), devices: self.devices.clone() }
    }

    /// Ends the thread once the lane thread has ended and all accesses are served.
    pub fn stop(self) {
        drop(self.queue);
        // A panic there has been printed; the machine ends anyway.
        let _ = self.thread.join();
    }
}

fn serve(router: &Router, devices: &dyn Devices, from: NodeId, access: &Access) {
    let space = if access.memory { Space::Memory } else { Space::Port };
    let size = usize::from(access.size).min(8);
    let mut data = access.write.unwrap_or(0).to_le_bytes();
    match access.write {
        Some(_) => devices.write(access.cpu, space, access.addr, &data[..size]),
        None => devices.read(access.cpu, space, access.addr, &mut data[..size]),
    }
    let read = if access.write.is_some() { 0 } else { u64::from_le_bytes(data) };
    router.send(from, &NodeMsg::Reply { cpu: access.cpu, seq: access.seq, data: read });
}

/// The lane thread's end of a [`DeviceServer`].
pub struct DeviceQueue {
    queue: Sender<(NodeId, Access)>,
    devices: Arc<dyn Devices>,
}

impl DeviceQueue {
    /// Queues an access; a doorbell, which nobody waits for and which never blocks, is rung at once. `false`
    /// if no correct node sends it: more than one of each CPU, or posted to anything but a doorbell.
    pub fn push(&self, from: NodeId, access: Access) -> bool {
        if access.posted {
            let doorbell = access.memory && bus_of(access.addr).is_some() && is_doorbell(access.addr);
            let data = access.write.unwrap_or(0).to_le_bytes();
            if doorbell {
                let size = usize::from(access.size).min(8);
                self.devices.write(access.cpu, Space::Memory, access.addr, &data[..size]);
            }
            return doorbell;
        }
        match self.queue.try_send((from, access)) {
            Ok(()) => true,
            // The server has ended with the machine.
            Err(TrySendError::Disconnected(_)) => true,
            Err(TrySendError::Full(_)) => false,
        }
    }
}

/// All devices of the machine as the vCPUs of one node reach them: its own at once, those of other nodes by
/// message ([`Place`] says which is which).
///
/// A write waits for its answer too, as OUT does on a processor: registers that are selected by one write and
/// used by the next (real-time clock, I/O APIC) are guarded by guest locks in coherent memory, and a lock
/// that is released before its writes arrive would let another node's accesses in between. Doorbells need no
/// such order, and are posted.
pub struct AllDevices {
    router: Arc<Router>,
    buses: usize,
    local: Arc<dyn Devices>,
    slots: Box<[Slot]>,
}

#[derive(Default)]
struct Slot {
    pending: Mutex<Pending>,
    answered: Condvar,
}

#[derive(Default)]
struct Pending {
    seq: u32,
    /// Who is asked.
    at: Option<NodeId>,
    waiting: bool,
    data: Option<u64>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        base::lock(&self.pending)
    }
}

impl AllDevices {
    /// For the vCPUs of this node, whose own devices are `local`, in a machine with `buses` PCI buses.
    pub fn new(router: Arc<Router>, buses: usize, local: Arc<dyn Devices>) -> AllDevices {
        let slots = (0..router.table().len()).map(|_| Slot::default()).collect();
        AllDevices { router, buses, local, slots }
    }

    /// Takes a node's answer; `false` if it was not asked.
    pub fn reply(&self, from: NodeId, cpu: u32, seq: u32, data: u64) -> bool {
        let Some(slot) = self.slots.get(cpu as usize) else { return false };
        let mut pending = slot.lock();
        if !pending.waiting || pending.at != Some(from) || pending.seq != seq || pending.data.is_some() {
            return false;
        }
        pending.data = Some(data);
        slot.answered.notify_one();
        true
    }

    /// Where an access to `addr` goes; `None` if that is here.
    fn elsewhere(&self, space: Space, addr: u64) -> Option<Place> {
        Some(Place::of(self.buses, space, addr)).filter(|place| place.node != self.router.node())
    }

    /// One access of at most 8 bytes, a power of two. `None` if the machine ended before the answer.
    fn access(
        &self,
        cpu: u32,
        place: Place,
        space: Space,
        addr: u64,
        size: u8,
        write: Option<u64>,
    ) -> Option<u64> {
        let slot = self.slots.get(cpu as usize)?;
        let memory = space == Space::Memory;
        let posted = write.is_some() && place.doorbell;
        let mut pending = slot.lock();
        pending.at = Some(place.node);
        pending.seq = pending.seq.wrapping_add(1);
        pending.data = None;
        pending.waiting = !posted;
        let access = Access { memory, write, posted, size, cpu, seq: pending.seq, addr };
        self.router.send(place.node, &NodeMsg::Access(access));
        if posted {
            return Some(0);
        }
        let deadline = Instant::now() + ANSWER;
        while pending.data.is_none() && !self.router.is_ended() {
            if Instant::now() > deadline {
                let why = format!("it did not answer a device access within {} s", ANSWER.as_secs());
                self.router.peers().lost(place.node, &why);
                break;
            }
            let waited = slot.answered.wait_timeout(pending, LOOK);
            pending = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        pending.waiting = false;
        pending.data.take()
    }
}

/// The first piece of `len` bytes that one message can carry.
fn piece(len: usize) -> usize {
    match len {
        0..=1 => len,
        2..=3 => 2,
        4..=7 => 4,
        _ => 8,
    }
}

impl Devices for AllDevices {
    fn read(&self, cpu: u32, space: Space, addr: u64, data: &mut [u8]) {
        let Some(place) = self.elsewhere(space, addr) else {
            return self.local.read(cpu, space, addr, data);
        };
        let mut done = 0;
        while done < data.len() {
            let size = piece(data.len() - done);
            let at = addr.wrapping_add(done as u64);
            let value = self.access(cpu, place, space, at, size as u8, None).unwrap_or(u64::MAX);
            data[done..done + size].copy_from_slice(&value.to_le_bytes()[..size]);
            done += size;
        }
    }

    fn write(&self, cpu: u32, space: Space, addr: u64, data: &[u8]) {
        let Some(place) = self.elsewhere(space, addr) else {
            return self.local.write(cpu, space, addr, data);
        };
        let mut done = 0;
        while done < data.len() {
            let size = piece(data.len() - done);
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(&data[done..done + size]);
            let at = addr.wrapping_add(done as u64);
            self.access(cpu, place, space, at, size as u8, Some(u64::from_le_bytes(bytes)));
            done += size;
        }
    }
}
