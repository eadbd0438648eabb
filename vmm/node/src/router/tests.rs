//! Interrupts by their way to CPUs here and on other nodes, counted in messages.

use std::sync::Mutex;
use std::time::Duration;

use fabric::{Receiver, sim};

use super::*;

/// Node 1 of three, with CPUs 2, 70 and 1 on the nodes (APIC ids `node << 8 | local`), and the peers' ends.
struct Machine {
    router: Router,
    peers: Vec<(NodeId, Box<dyn Receiver>, sim::SimTransport)>,
    failures: Arc<Mutex<Vec<LinkFailure>>>,
}

impl Machine {
    fn of_node(own: u16) -> Machine {
        let mut cpus = Vec::new();
        for (node, count) in [(0u16, 2u32), (1, 70), (2, 1)] {
            for local in 0..count {
                let apic_id = u32::from(node) << 8 | local;
                cpus.push(CpuPlace { vcpu: cpus.len() as u32, node, apic_id, local });
            }
        }
        let mut transports = sim::cluster(3, 1).unwrap();
        let transport = transports.remove(own.into());
        let failures = Arc::new(Mutex::new(Vec::new()));
        let sink = failures.clone();
        let on_failure = Box::new(move |failure| sink.lock().unwrap().push(failure));
        let peers = Arc::new(Peers::new(NodeId(own), 3, Duration::from_secs(3), on_failure));
        let table = Arc::new(Table::new(cpus.iter().filter(|cpu| cpu.node == own).count()));
        let router = Router::new(&cpus, table, Arc::new(transport), peers);
        let peers = transports
            .into_iter()
            .map(|transport| (transport.node(), transport.take_receiver(CONTROL_LANE).unwrap(), transport))
            .collect();
        Machine { router, peers, failures }
    }

    /// What the peers received since the last call.
    fn sent(&mut self) -> Vec<(u16, NodeMsg)> {
        let mut sent = Vec::new();
        for (node, receiver, _) in &mut self.peers {
            let mut sink = |_, frame: &[u8]| sent.push((node.0, NodeMsg::decode(frame).unwrap()));
            while receiver.poll(&mut sink).unwrap() > 0 {}
        }
        sent
    }

    /// The local CPUs that have vector `vector` in their mailboxes.
    fn posted(&self, vector: u8) -> Vec<usize> {
        let slots = self.router.table().slots().iter().enumerate();
        slots
            .filter_map(|(index, slot)| {
                let mut found = false;
                slot.mailbox.take_vectors(|posted, _| found |= posted == vector);
                found.then_some(index)
            })
            .collect()
    }
}

const FIXED: Mode = Mode::Fixed { vector: 0x55, level: false };
const SIGNAL: Signal = Signal::Vector { vector: 0x55, level: false };

#[test]
fn a_cpu_here_is_posted_and_one_elsewhere_gets_one_message() {
    let mut machine = Machine::of_node(1);
    machine.router.deliver(&Destination::Physical(0x103), &FIXED, Some(0x100));
    assert_eq!((machine.posted(0x55), machine.sent()), (vec![3], vec![]));
    machine.router.deliver(&Destination::Physical(1), &FIXED, Some(0x100));
    let message = NodeMsg::Interrupt { signal: SIGNAL, first: 0, set: 2 };
    assert_eq!((machine.posted(0x55), machine.sent()), (vec![], vec![(0, message)]));
    machine.router.deliver(&Destination::Physical(0x777), &FIXED, Some(0x100));
    assert_eq!((machine.posted(0x55), machine.sent()), (vec![], vec![]));
}

#[test]
fn a_broadcast_is_one_message_for_each_node_and_64_cpus() {
    let mut machine = Machine::of_node(0);
    machine.router.deliver(&Destination::AllButSelf, &Mode::Nmi, Some(0));
    let nmi = |first, set| NodeMsg::Interrupt { signal: Signal::Nmi, first, set };
    assert_eq!(machine.sent(), [(1, nmi(0, u64::MAX)), (1, nmi(64, 0x3f)), (2, nmi(0, 1))]);
    assert!(!machine.router.table().slots()[0].mailbox.take_nmi());
    assert!(machine.router.table().slots()[1].mailbox.take_nmi());
}

#[test]
fn a_logical_destination_reaches_the_cpus_of_its_cluster_in_one_message() {
    let mut machine = Machine::of_node(0);
    // APIC ids 0x100..0x110 are cluster 0x10; bits 1, 4 and 15.
    machine.router.deliver(&Destination::Logical(0x0010_8012), &FIXED, None);
    let message = NodeMsg::Interrupt { signal: SIGNAL, first: 0, set: 0x8012 };
    assert_eq!(machine.sent(), [(1, message)]);
    let lowest = Mode::LowestPriority { vector: 0x55, level: false };
    machine.router.deliver(&Destination::Logical(0x0010_8012), &lowest, None);
    let sent = machine.sent();
    assert!(matches!(sent[..], [(1, NodeMsg::Interrupt { set, .. })] if set.count_ones() == 1), "{sent:?}");
}

#[test]
fn the_end_of_a_level_triggered_vector_goes_to_node_0() {
    let mut machine = Machine::of_node(2);
    machine.router.eoi(0x61);
    assert_eq!(machine.sent(), [(0, NodeMsg::Eoi { vector: 0x61 })]);
}

#[test]
fn nothing_is_sent_to_a_peer_that_left_and_a_lost_one_is_reported_once() {
    let mut machine = Machine::of_node(1);
    machine.router.peers().left(NodeId(2));
    machine.router.send(NodeId(2), &NodeMsg::Heartbeat);
    assert_eq!(machine.sent(), []);
    assert!(!machine.router.is_ended());
    machine.peers.clear();
    for _ in 0..3 {
        machine.router.send(NodeId(0), &NodeMsg::Heartbeat);
    }
    let failures = machine.failures.lock().unwrap();
    assert!(matches!(failures[..], [LinkFailure::PeerLost { peer: NodeId(0), .. }]), "{failures:?}");
    assert!(machine.router.is_ended());
}
