//! Two nodes over two rails that are made by hand: cut, and connected again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use super::RailsTransport;
use crate::bell::Bell;
use crate::{FabricError, LaneId, NodeId, Receiver, Transport, TransportStats};

/// One lane on one rail.
#[derive(Default)]
struct Cable {
    cut: bool,
    /// What is under way, by receiving node.
    messages: [VecDeque<Vec<u8>>; 2],
    /// By node: the cut was reported.
    reported: [bool; 2],
    /// Messages that a rail took.
    taken: usize,
}

type Cables = Arc<Vec<Mutex<Cable>>>;

/// A rail of node `node`, with a cable for each lane.
struct Rail {
    node: usize,
    cables: Cables,
}

struct RailReceiver {
    rail: Rail,
    lane: usize,
    bell: Bell,
}

impl Transport for Rail {
    fn node(&self) -> NodeId {
        NodeId(self.node as u16)
    }

    fn nodes(&self) -> usize {
        2
    }

    fn lanes(&self) -> usize {
        self.cables.len()
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let mut cable = self.cables[usize::from(lane)].lock().unwrap();
        if cable.cut {
            return Err(FabricError::PeerLost { peer: to, why: "cut".into() });
        }
        cable.taken += 1;
        cable.messages[to.index()].push_back(parts.concat());
        Ok(())
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        let rail = Rail { node: self.node, cables: self.cables.clone() };
        Some(Box::new(RailReceiver { rail, lane: lane.into(), bell: Bell::new().unwrap() }))
    }

    fn stats(&self) -> TransportStats {
        TransportStats::default()
    }
}

impl RailReceiver {
    fn peer(&self) -> NodeId {
        NodeId(1 - self.rail.node as u16)
    }
}

impl Receiver for RailReceiver {
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        let (node, peer) = (self.rail.node, self.peer());
        let message = {
            let mut cable = self.rail.cables[self.lane].lock().unwrap();
            if cable.cut && !cable.reported[node] {
                cable.reported[node] = true;
                return Err(FabricError::PeerLost { peer, why: "cut".into() });
            }
            cable.messages[node].pop_front()
        };
        let count = message.iter().len();
        message.iter().for_each(|message| sink(peer, message));
        Ok(count)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        Ok(true)
    }

    fn returned(&mut self) -> Option<NodeId> {
        let mut cable = self.rail.cables[self.lane].lock().unwrap();
        let again = !cable.cut && std::mem::take(&mut cable.reported[self.rail.node]);
        again.then(|| self.peer())
    }
}

const LANES: usize = 2;

/// Two nodes and their rails.
struct Machine {
    rails: [Cables; 2],
    nodes: [RailsTransport; 2],
    receivers: [Vec<Box<dyn Receiver>>; 2],
    /// By receiving node and lane.
    got: [[Vec<Vec<u8>>; LANES]; 2],
}

impl Machine {
    fn new() -> Machine {
        let cables = || Arc::new((0..LANES).map(|_| Mutex::default()).collect::<Vec<_>>());
        let rails: [Cables; 2] = [cables(), cables()];
        let nodes = [0, 1].map(|node| {
            let rail =
                |cables: &Cables| Box::new(Rail { node, cables: cables.clone() }) as Box<dyn Transport>;
            RailsTransport::new(rails.iter().map(rail).collect()).unwrap()
        });
        let receivers = nodes
            .each_ref()
            .map(|node| (0..LANES as LaneId).map(|lane| node.take_receiver(lane).unwrap()).collect());
        Machine { rails, nodes, receivers, got: Default::default() }
    }

    fn send(&self, from: usize, lane: LaneId, text: &[u8]) {
        self.nodes[from].send(NodeId(1 - from as u16), lane, &[text]).unwrap();
    }

    /// Polls everything until nothing comes any more.
    fn settle(&mut self) -> Result<(), FabricError> {
        // A move takes two messages, and several polls that deliver no frame.
        let mut idle = 0;
        while idle < 8 {
            idle += 1;
            for (node, receivers) in self.receivers.iter_mut().enumerate() {
                for (lane, receiver) in receivers.iter_mut().enumerate() {
                    let got = &mut self.got[node][lane];
                    if receiver.poll(&mut |_, frame| got.push(frame.to_vec()))? > 0 {
                        idle = 0;
                    }
                }
            }
        }
        Ok(())
    }

    fn cut(&self, rail: usize) {
        for cable in &*self.rails[rail] {
            let mut cable = cable.lock().unwrap();
            cable.cut = true;
            cable.messages.iter_mut().for_each(VecDeque::clear);
        }
    }

    fn connect(&self, rail: usize) {
        self.rails[rail].iter().for_each(|cable| cable.lock().unwrap().cut = false);
    }

    /// Messages that went over a rail on a lane.
    fn taken(&self, rail: usize, lane: usize) -> usize {
        self.rails[rail][lane].lock().unwrap().taken
    }
}

#[test]
fn lanes_leave_a_rail_and_return_to_it_however_often() {
    let mut machine = Machine::new();
    for round in 0..20u8 {
        let rail = usize::from(round % 2);
        for node in 0..2 {
            machine.send(node, 0, &[round, 0]);
            machine.send(node, 1, &[round, 0]);
        }
        // What was under way is sent again over the other rail.
        machine.cut(rail);
        machine.settle().unwrap();
        machine.connect(rail);
        machine.settle().unwrap();
        let before = [0, 1].map(|lane| machine.taken(lane, lane));
        for node in 0..2 {
            machine.send(node, 0, &[round, 1]);
            machine.send(node, 1, &[round, 1]);
        }
        assert_eq!(
            [0, 1].map(|lane| machine.taken(lane, lane)),
            before.map(|taken| taken + 2),
            "each on its own"
        );
    }
    machine.settle().unwrap();
    let all: Vec<Vec<u8>> = (0..20).flat_map(|round| [vec![round, 0], vec![round, 1]]).collect();
    for (node, lane) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        assert_eq!(machine.got[node][lane], all, "lane {lane} at node {node}");
    }
}

#[test]
fn a_peer_is_lost_with_its_last_rail_although_others_returned_before() {
    let mut machine = Machine::new();
    machine.cut(0);
    machine.settle().unwrap();
    machine.connect(0);
    machine.settle().unwrap();
    machine.cut(1);
    machine.settle().unwrap();
    machine.send(0, 1, b"over rail 0");
    machine.settle().unwrap();
    assert_eq!(machine.got[1][1], [b"over rail 0"]);
    machine.cut(0);
    let loss = machine.settle().unwrap_err().to_string();
    assert!(loss.starts_with("node ") && loss.contains("was lost: cut"), "{loss}");
}
