//! The router: interrupts and device accesses between this node and the others, over lane 0 of the fabric.
//!
//! The way of one interrupt to another node: a local APIC says [`devices::irq::Effect::Ipi`] ->
//! [`Router::deliver`] finds the CPUs -> those here get it in their mailboxes, and each other node that has
//! some gets one [`NodeMsg::Interrupt`] -> its [`lane`] thread decodes, checks and posts it to the mailboxes
//! there.
//!
//! The way of one port access from node 2: KVM exits -> [`remote::AllDevices`] finds by [`place`] that node 0
//! has the port, sends it [`NodeMsg::Access`] and waits -> node 0's lane thread hands it to the
//! [`remote::DeviceServer`] thread -> the bus -> a [`NodeMsg::Reply`] -> node 2's lane thread wakes the vCPU
//! thread.
//!
//! | file | concept |
//! |---|---|
//! | this one | sending: interrupts, EOIs, clock messages |
//! | [`peers`] | who is there, who was heard when, heartbeats, losses |
//! | [`lane`] | receiving: the thread that owns lane 0 |
//! | [`place`] | which node has which device |
//! | [`remote`] | device accesses, forwarded and served |

pub mod lane;
pub mod peers;
pub mod place;
pub mod remote;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use base::lock;
use fabric::{FabricError, NodeId, Transport};
use firmware::layout::CpuPlace;

use crate::clock::thread::ClockLink;
use crate::node_msg::{NodeMsg, Signal};
use crate::trace;
use crate::vcpu::{Interrupts, Table};
use devices::irq::{Destination, Ipi, Message, Mode, route};
use devices::platform::ioapic::IoApicDevice;
use peers::Peers;

/// The lane of all control messages.
pub const CONTROL_LANE: fabric::LaneId = 0;

/// Why the machine must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkFailure {
    /// A peer is gone, silent, or sends what makes no sense.
    #[error("{peer} was lost: {why}")]
    PeerLost {
        /// Who.
        peer: NodeId,
        /// How it was noticed, as a clause.
        why: String,
    },
    /// This node's own fabric does not work.
    #[error("the fabric of this node failed: {0}")]
    Fabric(String),
}

/// Sends what this node's CPUs and devices have for others. Shared by all threads of the node; nothing here
/// blocks.
pub struct Router {
    node: NodeId,
    /// All CPUs of the machine, in the order of their APIC ids.
    cpus: Vec<CpuPlace>,
    apic_ids: Vec<u32>,
    table: Arc<Table>,
    transport: Arc<dyn Transport>,
    peers: Arc<Peers>,
    ioapic: OnceLock<Weak<std::sync::Mutex<IoApicDevice>>>,
    ended: AtomicBool,
}

impl Router {
    /// A router for the CPUs `cpus` of the whole machine ([`firmware::layout::Layout::cpus`]), of which
    /// `table` has those of this node.
    pub fn new(
        cpus: &[CpuPlace],
        table: Arc<Table>,
        transport: Arc<dyn Transport>,
        peers: Arc<Peers>,
    ) -> Router {
        let mut cpus = cpus.to_vec();
        cpus.sort_by_key(|cpu| cpu.apic_id);
        let apic_ids = cpus.iter().map(|cpu| cpu.apic_id).collect();
        Router {
            node: transport.node(),
            cpus,
            apic_ids,
            table,
            transport,
            peers,
            ioapic: OnceLock::new(),
            ended: AtomicBool::new(false),
        }
    }

    /// Node 0 only: where EOIs go. Held weakly, since the I/O APIC in turn holds the router.
    pub fn set_ioapic(&self, ioapic: &Arc<std::sync::Mutex<IoApicDevice>>) {
        let _ = self.ioapic.set(Arc::downgrade(ioapic));
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The other nodes.
    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// This node's CPUs.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// How many CPUs `node` has.
    pub fn cpus_on(&self, node: NodeId) -> usize {
        self.cpus.iter().filter(|cpu| cpu.node == node.0).count()
    }

    /// The machine ends: nobody waits for answers any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
    }

    /// Whether [`Router::end`] was called or a peer was lost.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst) || self.peers.any_lost()
    }

    /// Tells every peer that this node ends in good order.
    pub fn leave(&self) {
        for peer in self.peers.present() {
            self.send(peer, &NodeMsg::Leaving);
        }
    }

    /// Sends a message on lane 0. A lost peer is reported through [`Peers`]; there is nothing else that a
    /// caller could do.
    pub fn send(&self, to: NodeId, message: &NodeMsg) {
        if !self.peers.is_present(to) {
            return;
        }
        trace::event(trace::Event::ControlSend, message.kind().into(), to.index() as u64);
        match self.transport.send(to, CONTROL_LANE, &[message.encode().as_bytes()]) {
            Ok(()) => {}
            Err(FabricError::PeerLost { peer, why }) => self.peers.lost(peer, &why),
            Err(error) => self.peers.failed(&error.to_string()),
        }
    }

    /// Delivers an interrupt of a device (I/O APIC, MSI).
    pub fn deliver_message(&self, message: Message) {
        self.deliver(&message.dest, &message.mode, None);
    }

    /// Delivers an interrupt to every CPU that `dest` means; `from` is the sending CPU's APIC id.
    /// Destinations that do not exist get nothing, as on hardware.
    pub fn deliver(&self, dest: &Destination, mode: &Mode, from: Option<u32>) {
        let signal = match *mode {
            Mode::Fixed { vector, level } | Mode::LowestPriority { vector, level } => {
                Signal::Vector { vector, level }
            }
            Mode::Nmi => Signal::Nmi,
            Mode::Init => Signal::Init,
            Mode::Sipi { vector } => Signal::Sipi { vector },
        };
        let mut batch = Batch::new(self, signal);
        match (*dest, mode) {
            // The common ones, without a list.
            (Destination::Physical(id), _) => batch.add_id(id),
            (Destination::Logical(word), mode) if !matches!(mode, Mode::LowestPriority { .. }) => {
                let cluster = (word >> 16) << 4;
                (0..16).filter(|bit| word >> bit & 1 != 0).for_each(|bit| batch.add_id(cluster | bit));
            }
            _ => {
                for index in route::resolve(dest, mode, from, &self.apic_ids) {
                    batch.add(self.cpus[index]);
                }
            }
        }
        batch.flush();
    }

    /// A level-triggered vector was finished by a CPU of this node, or, at node 0, of any.
    pub fn finish(&self, vector: u8) {
        if self.node.0 != 0 {
            return self.send(NodeId(0), &NodeMsg::Eoi { vector });
        }
        if let Some(ioapic) = self.ioapic.get().and_then(Weak::upgrade) {
            lock(&ioapic).eoi(vector);
        }
    }
}

impl Interrupts for Router {
    fn ipi(&self, ipi: Ipi) {
        trace::event(trace::Event::Ipi, ipi.from.into(), icr_word(&ipi));
        self.deliver(&ipi.dest, &ipi.mode, Some(ipi.from));
    }

    fn eoi(&self, vector: u8) {
        self.finish(vector);
    }
}

impl ClockLink for Router {
    fn ping(&self, seq: u32, t1: u64) {
        self.send(NodeId(0), &NodeMsg::ClockPing { seq, t1 });
    }

    fn ahead(&self, offset: u64) {
        self.send(NodeId(0), &NodeMsg::ClockAhead { offset });
    }
}

/// An IPI for the trace: destination in the high half, then delivery mode << 8 | vector as in the ICR.
fn icr_word(ipi: &Ipi) -> u64 {
    let dest = match ipi.dest {
        Destination::Physical(id) | Destination::Logical(id) => id,
        Destination::All | Destination::AllButSelf => u32::MAX,
    };
    let low = match ipi.mode {
        Mode::Fixed { vector, .. } => u64::from(vector),
        Mode::LowestPriority { vector, .. } => 1 << 8 | u64::from(vector),
        Mode::Nmi => 4 << 8,
        Mode::Init => 5 << 8,
        Mode::Sipi { vector } => 6 << 8 | u64::from(vector),
    };
    u64::from(dest) << 32 | low
}

/// Gathers the CPUs of one remote node into one message. CPUs come in APIC id order, so node by node.
struct Batch<'a> {
    router: &'a Router,
    signal: Signal,
    to: NodeId,
    first: u32,
    set: u64,
}

impl<'a> Batch<'a> {
    fn new(router: &'a Router, signal: Signal) -> Batch<'a> {
        Batch { router, signal, to: NodeId(0), first: 0, set: 0 }
    }

    fn add_id(&mut self, apic_id: u32) {
        if let Ok(index) = self.router.apic_ids.binary_search(&apic_id) {
            self.add(self.router.cpus[index]);
        }
    }

    fn add(&mut self, cpu: CpuPlace) {
        if cpu.node == self.router.node.0 {
            self.router.table.post(cpu.local, self.signal);
            return;
        }
        let (to, first) = (NodeId(cpu.node), cpu.local & !63);
        if (to, first) != (self.to, self.first) {
            self.flush();
            (self.to, self.first) = (to, first);
        }
        self.set |= 1 << (cpu.local & 63);
    }

    fn flush(&mut self) {
        if self.set != 0 {
            let message = NodeMsg::Interrupt { signal: self.signal, first: self.first, set: self.set };
            self.router.send(self.to, &message);
            self.set = 0;
        }
    }
}

#[cfg(test)]
mod tests;
