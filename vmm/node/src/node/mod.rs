//! The life of one node, from its assignment to the machine's end.
//!
//! ```text
//! run ─ Joined ─> Start ─ mesh ─ memory ─ engine ─ devices ─ clock ─ vCPUs ─> Ready ─> Go ─ watch ─> Stop ─> report
//! ```
//!
//! | file | concept |
//! |---|---|
//! | this one | the order of things |
//! | [`parts`] | the node's parts, built one after the other |
//! | [`platform`] | node 0's devices |
//! | [`boot_disk`] | the kernel, named or out of a disk |
//! | [`pci_devices`] | this node's disks and network cards |
//! | [`shipping`] | instructions that are carried out where their operand is |
//! | [`orders`] | devices that come, go or change while the machine runs |
//! | [`console`] | COM1 and the coordinator's terminal |
//! | [`panics`] | a panic in any thread |
//! | [`counters`] | the report |

pub mod boot_disk;
pub mod console;
pub mod counters;
pub mod orders;
pub mod panics;
pub mod parts;
pub mod pci_devices;
pub mod platform;
pub mod shipping;

use std::sync::Arc;
use std::time::Duration;

use coherence::engine::EngineError;
use crossbeam::channel::{Receiver, Sender, never, unbounded};
use fabric::FabricError;
use nix::sys::signal::{SigSet, Signal};

use self::console::Input;
use self::parts::{Host, Node};
use crate::router::LinkFailure;
use crate::vcpu::VcpuFailure;
use devices::platform::power::PowerEvent;
use machine::control::{Assignment, Control, Exit, FromCoordinator, Stop, ToCoordinator};

/// How long a node waits for the others to join. The coordinator gives up earlier, and says who is missing.
const START: Duration = Duration::from_secs(3600);
/// How long all nodes may take from Start to Go.
const GO: Duration = Duration::from_secs(120);
/// How long the last words to the coordinator may take.
const FLUSH: Duration = Duration::from_millis(500);
/// How long vCPUs may take to leave the guest at the end, or to show their registers.
const VCPUS: Duration = Duration::from_millis(300);

/// An event in the life of a running node.
#[derive(Debug)]
pub enum Event {
    /// The guest switched the machine off or asked for a reboot.
    Power(PowerEvent),
    /// A peer is gone.
    PeerLost {
        /// Who.
        node: u16,
        /// How it was noticed, as a clause.
        why: String,
    },
    /// This node cannot go on.
    Failed {
        /// A sentence.
        why: String,
        /// Registers of the vCPU that is to blame, if one is.
        dump: String,
    },
}

impl From<LinkFailure> for Event {
    fn from(failure: LinkFailure) -> Event {
        match failure {
            LinkFailure::PeerLost { peer, why } => Event::PeerLost { node: peer.0, why },
            LinkFailure::Fabric(_) => Event::Failed { why: failure.to_string(), dump: String::new() },
        }
    }
}

impl From<EngineError> for Event {
    fn from(error: EngineError) -> Event {
        match error {
            EngineError::Fabric(FabricError::PeerLost { peer, why }) => Event::PeerLost { node: peer.0, why },
            error => Event::Failed { why: error.to_string(), dump: String::new() },
        }
    }
}

impl From<VcpuFailure> for Event {
    fn from(failure: VcpuFailure) -> Event {
        Event::Failed { why: failure.to_string(), dump: failure.dump }
    }
}

/// Runs a node until the machine ends. On return the process must end: vCPUs may wait for pages that nobody
/// brings any more.
///
/// # Errors
/// A sentence for the operator, when the node cannot start or the coordinator is lost.
pub fn run(assignment: Assignment, control: Control) -> anyhow::Result<Exit> {
    let (events, happened) = unbounded();
    panics::end_node(&control, &events, panics::GRACE);
    let mut node = start(&assignment, &control, &events)?;
    let stop = watch(&mut node, &control, &happened);
    // Its threads may be stuck in page faults, which only the end of the process ends.
    std::mem::forget(node);
    Ok(stop?.exit())
}

/// Keeps SIGUSR2 for the thread that prints the node's state. Threads inherit this: call it before starting
/// any.
pub fn block_dump_signal() {
    // Fails only for a signal that does not exist.
    let _ = SigSet::from(Signal::SIGUSR2).thread_block();
}

/// Everything up to Go.
fn start(assignment: &Assignment, control: &Control, events: &Sender<Event>) -> anyhow::Result<Node> {
    let host = Host::open(assignment)?;
    control.send(ToCoordinator::Joined(host.joined()))?;
    let start = control.wait_start(START)?;
    let node = Node::build(host, assignment, &start, control, events)?;
    let state = node.state();
    std::thread::Builder::new().name("dump".into()).spawn(move || {
        while SigSet::from(Signal::SIGUSR2).wait().is_ok() {
            eprintln!("{}", state());
        }
    })?;
    control.send(ToCoordinator::Ready)?;
    control.wait_go(GO)?;
    node.vcpus.resume();
    Ok(node)
}

/// From Go to Stop.
fn watch(node: &mut Node, control: &Control, happened: &Receiver<Event>) -> anyhow::Result<Stop> {
    let mut events = happened.clone();
    loop {
        crossbeam::channel::select! {
            recv(events) -> event => match event {
                Ok(event) => {
                    let last = !matches!(event, Event::PeerLost { .. });
                    tell(node, control, event)?;
                    if last {
                        // What follows from the first cause is of no interest.
                        events = never();
                    }
                }
                Err(_) => events = never(),
            },
            recv(control.incoming()) -> message => match message {
                Ok(FromCoordinator::ConsoleInput(bytes)) => {
                    // At other nodes nobody listens.
                    let _ = node.input.send(Input::Typed(bytes));
                }
                Ok(FromCoordinator::Device { id, order }) => {
                    // The thread lives as long as the node.
                    let _ = node.orders.send((id, order));
                }
                Ok(FromCoordinator::Stop(stop)) => {
                    finish(node, control, stop);
                    return Ok(stop);
                }
                Ok(_) => {}
                Err(_) => {
                    // Says why the coordinator is lost.
                    control.recv_timeout(Duration::ZERO)?;
                }
            },
        }
    }
}

fn tell(node: &Node, control: &Control, event: Event) -> anyhow::Result<()> {
    let message = match event {
        Event::Power(PowerEvent::PowerOff) => ToCoordinator::PowerOff,
        Event::Power(PowerEvent::Reset) => ToCoordinator::Reset,
        Event::PeerLost { node: lost, why } => {
            control.send(ToCoordinator::PeerLost { node: lost, why })?;
            ToCoordinator::Dump(node.state()())
        }
        Event::Failed { why, dump } => {
            let dump = format!("{dump}\n{}", node.state()());
            ToCoordinator::Failed { why, dump: Some(dump) }
        }
    };
    Ok(control.send(message)?)
}

fn finish(node: &mut Node, control: &Control, stop: Stop) {
    node.router.leave();
    node.router.end();
    if stop.report {
        // Stuck vCPUs only make their counters a little old.
        let _ = node.vcpus.stop(VCPUS);
        // A coordinator that is gone needs no report.
        let _ = control.send(ToCoordinator::Report(node.report()));
    }
    control.flush(FLUSH);
}

/// Text that shows what the node is doing: what a failure's dump holds, and what SIGUSR2 prints.
pub type StateText = Arc<dyn Fn() -> String + Send + Sync>;
