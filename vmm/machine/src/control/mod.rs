//! The boundary between a node process and the coordinator that `gestalt run` is.
//!
//! `gestalt node` connects, shakes hands and then calls `node::run(Assignment, Control)`. What passes
//! over [`Control`] from then on:
//!
//! ```text
//!        node                                   coordinator
//!          │ ── Joined(fabric address, CPUID, TSC) ──> │   waits for every node of the machine
//!          │ <── Start(addresses, CPUIDs of all) ───── │
//!   meshes, loads, maps                                │
//!          │ ── Ready ───────────────────────────────> │   waits for every node
//!          │ <── Go ────────────────────────────────── │
//!   vCPUs run                                          │
//!          │ ── Console (node 0) ────────────────────> │ terminal
//!          │ <── ConsoleInput (node 0) ─────────────── │
//!          │ <── Device(order) ─────────────────────── │ a device comes, goes or changes
//!          │ ── DeviceDone, Ejected (node 0) ────────> │
//!          │ ── PowerOff | Reset | PeerLost | Failed > │   whoever says it, everybody is told Stop
//!          │ <── Stop ──────────────────────────────── │
//!          │ ── Report (if asked), Dump ─────────────> │
//!   run() returns, the process ends within Stop::grace │
//! ```
//!
//! A node that has said `PowerOff`, `Reset` or `PeerLost` goes on serving its peers until `Stop` arrives:
//! the others may still wait for its pages. Heartbeats pass in both directions below this interface.

pub mod fence;
pub mod join;
pub mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};
use fabric::secure::{KEY, PublicKey};
use firmware::MachineSpec;
use firmware::cpuid::CpuidEntry;
use serde::{Deserialize, Serialize};

use self::fence::Fence;
use crate::config::ShipMode;
use crate::config::devices::PlacedDevice;
use crate::config::limits::{Capacity, Limits};
use crate::config::rdma::RdmaConfig;

/// The machine, as far as its nodes need to know it. The same at every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The machine's name, for messages.
    pub name: String,
    /// Drawn at random for every start of the machine, so that a node of an earlier run cannot mesh with it.
    pub id: [u8; 16],
    /// Nodes with CPUs and memory. A node's position is its index; names are `spec.nodes[i].name`.
    pub spec: MachineSpec,
    /// What each node may hold for the guest, in bytes, by node index; see `NodeConfig::budget`.
    pub budgets: Vec<Option<u64>>,
    /// What each node's devices may do all together, by node index.
    pub capacities: Vec<Capacity>,
    /// The guest kernel (bzImage or ELF), a path on node 0's host. Empty: what the first disk of node 0 would
    /// boot.
    pub kernel: PathBuf,
    /// The initial ramdisk, a path on node 0's host.
    pub initrd: Option<PathBuf>,
    /// The guest kernel's command line as its owner gave it, without what the node appends.
    pub cmdline: String,
    /// Disks, network cards and the like, each on its node.
    pub devices: Vec<PlacedDevice>,
    /// Coherence shards, `1..=64`: lanes `1..=shards` of the fabric.
    pub shards: u16,
    /// How long a node keeps a page that it just won before it gives it up.
    pub hold: Duration,
    /// After a timer interrupt its CPU is left alone for so many times as long as it took; 0: not at all.
    pub timer_rest: u32,
    /// Whether instructions may be carried out where their operand is.
    pub ship: ShipMode,
    /// How long a peer may say nothing before it counts as lost.
    pub silence: Duration,
    /// Which RDMA ports carry the fabric's frames; `None` if TCP does.
    pub rdma: Option<RdmaConfig>,
    /// Whether the fabric's frames travel in the clear, unprotected once the peers have proven who they are.
    pub plaintext_fabric: bool,
}

/// A node's assignment: the coordinator's answer when it accepts the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// This node's index in `machine.spec.nodes`.
    pub node: u16,
    /// The machine.
    pub machine: Machine,
    /// Where this node's fabric listens, by rail; port 0 lets the kernel choose.
    pub fabric_listen: Vec<SocketAddr>,
}

/// A node's contribution to the decisions that need all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// Where its peers reach its fabric, by rail.
    pub fabric: Vec<SocketAddr>,
    /// The public key by which its peers know it during this run.
    pub fabric_key: [u8; KEY],
    /// What KVM can offer there: `kvm::HostCpu::cpuid`.
    pub cpuid: Vec<CpuidEntry>,
    /// IA32_ARCH_CAPABILITIES there; 0 if it has none.
    pub arch_capabilities: u64,
    /// The host's TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Whether a guest TSC can have another frequency there.
    pub tsc_control: bool,
}

/// Everybody has joined: mesh, prepare, then say [`ToCoordinator::Ready`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// What each node contributed, by node index.
    pub nodes: Vec<Joined>,
}

impl Start {
    /// The nodes' fabric addresses by node index and rail.
    pub fn addresses(&self) -> Vec<Vec<SocketAddr>> {
        self.nodes.iter().map(|node| node.fabric.clone()).collect()
    }

    /// The nodes' public keys by node index.
    pub fn fabric_keys(&self) -> Vec<PublicKey> {
        self.nodes.iter().map(|node| PublicKey(node.fabric_key)).collect()
    }
}

/// The machine ends.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// Whether the node is to send a [`ToCoordinator::Report`] before it ends.
    pub report: bool,
    /// Whether the machine starts again afterwards.
    pub restart: bool,
    /// How long the node has before its process is ended for it.
    pub grace: Duration,
}

impl Stop {
    /// What `node::run` returns after this.
    pub fn exit(&self) -> Exit {
        if self.restart { Exit::Restart } else { Exit::End }
    }
}

/// Why a node ended in good order.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The machine is over.
    End,
    /// The machine starts again: a node that `gestalt run` did not start itself joins again.
    Restart,
}

/// A node's counters at the end of a run; `gestalt run --report` adds them up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Totals by name, such as `remote_read_faults`, `remote_write_faults`, `invalidations`, `bytes_moved`.
    pub counters: Vec<(String, u64)>,
    /// Latency of remote faults: (upper edge of the bucket in nanoseconds, how many), ascending.
    pub fault_latency: Vec<(u64, u64)>,
}

/// A slot of some node's bus.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotId {
    /// The bus, which is the node's number.
    pub bus: u8,
    /// The slot.
    pub slot: u8,
}

/// The news of a slot for the guest. Its number is what the AML notifies the slot's object of (ACPI 6.5,
/// 5.6.6).
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A device has come: "device check".
    Come = 1,
    /// The device should go: "eject request".
    Leave = 3,
}

/// The memory that a guest has given up.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GivenUp {
    /// Bytes that are in the balloon, as the guest says.
    pub inflated: u64,
    /// Bytes that it has reported as free since it started, again each time that they were in use in between.
    pub reported: u64,
}

/// A setting of a device that can be changed while it is used.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Setting {
    /// A disk or a network card is held to these limits.
    Limits {
        /// Its own.
        limits: Limits,
        /// Its share of what its node's devices may do.
        share: u32,
    },
    /// A balloon takes so many bytes from the guest.
    Size(u64),
}

/// An order to a node's devices while the machine runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceOrder {
    /// Open this device, which is to be on this node, and put it into its slot.
    Add(PlacedDevice),
    /// The guest has let go of the device in this slot: take it out and close it.
    Remove {
        /// The slot of the node's bus.
        slot: u8,
    },
    /// Change the device in this slot.
    Set {
        /// The slot of the node's bus.
        slot: u8,
        /// What is changed.
        setting: Setting,
    },
    /// Say what the guest has given up through the balloon in this slot.
    Measure {
        /// The slot of the node's bus.
        slot: u8,
    },
    /// Tell the guest what has become of a slot of any bus (node 0).
    Announce {
        /// The slot.
        slot: SlotId,
        /// What has become of it.
        change: Change,
    },
}

/// The result of an order: a measurement, if one was asked for; or why the node cannot obey, a sentence.
pub type DeviceResult = Result<Option<GivenUp>, String>;

/// A message from a node to the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// Sent by [`Control`] itself, at this time by [`fence::now`] of the node; nobody else needs it.
    Heartbeat(u64),
    /// The fabric listener is open and KVM has been asked.
    Joined(Joined),
    /// Meshed, memory mapped, kernel loaded: vCPUs may start.
    Ready,
    /// Bytes that the guest wrote to its console (node 0).
    Console(Vec<u8>),
    /// The guest switched the machine off (node 0).
    PowerOff,
    /// The guest asked for a reboot (node 0).
    Reset,
    /// The fabric lost a peer. Not a failure of the node that says so.
    PeerLost {
        /// The lost node's index.
        node: u16,
        /// How it was noticed, as a clause: `its connection was reset`.
        why: String,
    },
    /// This node cannot go on: triple fault, KVM internal error, impossible message.
    Failed {
        /// One sentence for the operator.
        why: String,
        /// Registers, trace and the like: text of at most a few MiB.
        dump: Option<String>,
    },
    /// The answer to [`Stop::report`].
    Report(NodeReport),
    /// The answer to [`FromCoordinator::Device`].
    DeviceDone {
        /// The order's number.
        id: u32,
        /// `Err`: why not, a sentence.
        result: DeviceResult,
    },
    /// The guest has let go of the device in this slot (node 0).
    Ejected(SlotId),
    /// Text worth keeping with a failure that another node reported: the trace, the vCPUs' registers.
    Dump(String),
}

/// A message from the coordinator to a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromCoordinator {
    /// Consumed by [`Control`] itself; never returned by it. The answer to [`ToCoordinator::Heartbeat`], with
    /// its time; or 0, when there has been nothing to say.
    Heartbeat(u64),
    /// All nodes have joined.
    Start(Start),
    /// All nodes are ready: run the vCPUs.
    Go,
    /// Bytes typed at the terminal (node 0).
    ConsoleInput(Vec<u8>),
    /// Change a device.
    Device {
        /// For the answer.
        id: u32,
        /// How.
        order: DeviceOrder,
    },
    /// End.
    Stop(Stop),
}

/// The coordinator cannot be heard any more, or says something impossible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The connection ended. The process ends by itself shortly after, whatever the caller does.
    #[error("the coordinator was lost: {0}")]
    Lost(String),
    /// Nothing came in time.
    #[error(
        "the coordinator did not say {what} within {seconds} s: a node of the machine is missing or slow"
    )]
    TooLate {
        /// What was waited for.
        what: &'static str,
        /// How long, in seconds.
        seconds: u64,
    },
    /// Stop came first.
    #[error("the machine was stopped before {0}")]
    Stopped(&'static str),
    /// Something else came first.
    #[error("the coordinator said something else than {0}")]
    Unexpected(&'static str),
}

/// An item for the thread that writes to the coordinator.
#[derive(Debug)]
pub enum Outgoing {
    /// A message, in order.
    Message(ToCoordinator),
    /// The same, of those that a guest can have sent as often as it likes.
    FromGuest(ToCoordinator, Room),
    /// Answered once everything before it has been written.
    Flush(Sender<()>),
}

/// The room that a message of the guest's has among those that wait for the connection; given back when it is
/// dropped.
#[derive(Debug)]
pub struct Room(Receiver<()>);

impl Drop for Room {
    fn drop(&mut self) {
        // It was taken before.
        let _ = self.0.try_recv();
    }
}

/// Messages of the guest's that may wait for the connection: so many whose senders wait for room, and so many
/// of others.
pub const GUEST_MESSAGES: usize = 64;

/// The node's end of its connection to the coordinator. Clones are the same connection.
#[derive(Clone, Debug)]
pub struct Control {
    outgoing: Sender<Outgoing>,
    /// For messages of the guest's whose senders wait for room.
    patient: (Sender<()>, Receiver<()>),
    /// For those whose senders cannot wait; that there are many of the others takes them no room.
    urgent: (Sender<()>, Receiver<()>),
    incoming: Receiver<FromCoordinator>,
    lost: Arc<Mutex<Option<String>>>,
    fence: Arc<Fence>,
}

/// The other side of a [`Control`]: held by the threads that own the socket, or by a test.
#[derive(Debug)]
pub struct ControlEnd {
    /// What the node sends.
    pub from_node: Receiver<Outgoing>,
    /// What the node receives. Dropping it tells the node that the coordinator is lost.
    pub to_node: Sender<FromCoordinator>,
    /// Why the coordinator is lost; set before `to_node` is dropped.
    pub lost: Arc<Mutex<Option<String>>>,
}

impl Control {
    /// A control handle and what it is connected to. Its fence is open until told otherwise.
    pub fn pair() -> (Control, ControlEnd) {
        Control::fenced(Arc::new(Fence::open()))
    }

    /// The same with another fence.
    pub fn fenced(fence: Arc<Fence>) -> (Control, ControlEnd) {
        let (outgoing, from_node) = channel::unbounded();
        let (to_node, incoming) = channel::unbounded();
        let lost = Arc::new(Mutex::new(None));
        let end = ControlEnd { from_node, to_node, lost: lost.clone() };
        let (patient, urgent) = (channel::bounded(GUEST_MESSAGES), channel::bounded(GUEST_MESSAGES));
        (Control { outgoing, patient, urgent, incoming, lost, fence }, end)
    }

    /// What is asked before anything is written that others may use after this node.
    pub fn fence(&self) -> &Arc<Fence> {
        &self.fence
    }

    /// Queues a message that the guest causes; `false` if too many such wait already, and then it is left out.
    ///
    /// # Errors
    /// [`ControlError::Lost`] once the coordinator is gone.
    pub fn try_send_from_guest(&self, message: ToCoordinator) -> Result<bool, ControlError> {
        if self.urgent.0.try_send(()).is_err() {
            return Ok(false);
        }
        self.send_in(&self.urgent.1, message).map(|()| true)
    }

    /// Queues a message that the guest causes, and waits as long as too many wait already.
    ///
    /// # Errors
    /// [`ControlError::Lost`] once the coordinator is gone.
    pub fn send_from_guest(&self, message: ToCoordinator) -> Result<(), ControlError> {
        // This value has the other end as well.
        let _ = self.patient.0.send(());
        self.send_in(&self.patient.1, message)
    }

    fn send_in(&self, room: &Receiver<()>, message: ToCoordinator) -> Result<(), ControlError> {
        let room = Room(room.clone());
        self.outgoing.send(Outgoing::FromGuest(message, room)).map_err(|_| self.lost())
    }

    /// Queues a message for the coordinator. Never blocks.
    ///
    /// # Errors
    /// [`ControlError::Lost`] once the coordinator is gone.
    pub fn send(&self, message: ToCoordinator) -> Result<(), ControlError> {
        self.outgoing.send(Outgoing::Message(message)).map_err(|_| self.lost())
    }

    /// The next message, `None` if there is none within `timeout`.
    ///
    /// # Errors
    /// [`ControlError::Lost`] once the coordinator is gone and all it said has been returned.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Option<FromCoordinator>, ControlError> {
        match self.incoming.recv_timeout(timeout) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.lost()),
        }
    }

    /// What the coordinator says, to select on together with other channels. It closes when the coordinator
    /// is gone; [`Control::recv_timeout`] then says why.
    pub fn incoming(&self) -> &Receiver<FromCoordinator> {
        &self.incoming
    }

    /// Waits for [`FromCoordinator::Start`].
    ///
    /// # Errors
    /// Loss, `Stop`, anything else, or nothing within `timeout`.
    pub fn wait_start(&self, timeout: Duration) -> Result<Start, ControlError> {
        match self.expect("Start", timeout)? {
            FromCoordinator::Start(start) => Ok(start),
            _ => Err(ControlError::Unexpected("Start")),
        }
    }

    /// Waits for [`FromCoordinator::Go`]. What is typed before that is lost on purpose: no guest reads it.
    ///
    /// # Errors
    /// Loss, `Stop`, anything else, or nothing within `timeout`.
    pub fn wait_go(&self, timeout: Duration) -> Result<(), ControlError> {
        match self.expect("Go", timeout)? {
            FromCoordinator::Go => Ok(()),
            _ => Err(ControlError::Unexpected("Go")),
        }
    }

    /// Waits until everything sent so far has been written to the connection; `false` if it was not in time.
    pub fn flush(&self, timeout: Duration) -> bool {
        let (done, wait) = channel::bounded(1);
        self.outgoing.send(Outgoing::Flush(done)).is_ok() && wait.recv_timeout(timeout).is_ok()
    }

    fn expect(&self, what: &'static str, timeout: Duration) -> Result<FromCoordinator, ControlError> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.recv_timeout(deadline.saturating_duration_since(Instant::now()))? {
                Some(FromCoordinator::ConsoleInput(_) | FromCoordinator::Heartbeat(_)) => {}
                Some(FromCoordinator::Stop(_)) => return Err(ControlError::Stopped(what)),
                Some(message) => return Ok(message),
                None => return Err(ControlError::TooLate { what, seconds: timeout.as_secs() }),
            }
        }
    }

    fn lost(&self) -> ControlError {
        let why = base::lock(&self.lost).clone();
        ControlError::Lost(why.unwrap_or_else(|| "its connection was closed".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_before_go_ends_the_wait() {
        let (control, end) = Control::pair();
        end.to_node.send(FromCoordinator::ConsoleInput(b"x".to_vec())).unwrap();
        let stop = Stop { report: false, restart: false, grace: Duration::from_secs(1) };
        end.to_node.send(FromCoordinator::Stop(stop)).unwrap();
        assert_eq!(control.wait_go(Duration::from_secs(5)), Err(ControlError::Stopped("Go")));
    }

    #[test]
    fn what_a_guest_has_sent_waits_in_bounded_number_and_is_refused_beyond() {
        let (control, end) = Control::pair();
        let eject = |slot| control.try_send_from_guest(ToCoordinator::Ejected(SlotId { bus: 0, slot }));
        let taken = (0..200).filter(|slot| eject(*slot) == Ok(true)).count();
        assert_eq!(taken, GUEST_MESSAGES);
        control.send(ToCoordinator::Ready).unwrap();
        assert_eq!(end.from_node.len(), GUEST_MESSAGES + 1, "the node's own messages always have room");
        drop(end.from_node.recv().unwrap());
        assert_eq!((eject(7), eject(8)), (Ok(true), Ok(false)));
        // Who may wait goes on when the coordinator is gone, too.
        let console = control.clone();
        (0..GUEST_MESSAGES).for_each(|_| console.send_from_guest(ToCoordinator::Console(vec![1])).unwrap());
        let waiting = std::thread::spawn(move || console.send_from_guest(ToCoordinator::Console(vec![1])));
        drop(end);
        assert!(matches!(waiting.join().unwrap(), Ok(()) | Err(ControlError::Lost(_))));
    }

    #[test]
    fn a_guest_that_floods_its_console_takes_no_room_from_its_ejects() {
        let (control, _end) = Control::pair();
        (0..GUEST_MESSAGES).for_each(|_| control.send_from_guest(ToCoordinator::Console(vec![1])).unwrap());
        let ejected = ToCoordinator::Ejected(SlotId { bus: 0, slot: 3 });
        assert_eq!(control.try_send_from_guest(ejected), Ok(true));
    }

    #[test]
    fn a_lost_coordinator_is_reported_with_its_reason_after_what_it_said() {
        let (control, end) = Control::pair();
        end.to_node.send(FromCoordinator::Go).unwrap();
        *end.lost.lock().unwrap() = Some("it was silent for 3 s".into());
        drop(end);
        assert_eq!(control.recv_timeout(Duration::ZERO), Ok(Some(FromCoordinator::Go)));
        let lost = ControlError::Lost("it was silent for 3 s".into());
        assert_eq!(control.recv_timeout(Duration::ZERO), Err(lost.clone()));
        assert_eq!(control.send(ToCoordinator::Ready), Err(lost));
    }
}
