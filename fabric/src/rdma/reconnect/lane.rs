//! The lost peers of a lane, which are connected again as [`super::protocol`] decides.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::super::notes::Note;
use super::super::sender::Sender;
use super::super::unconnected::UnconnectedQp;
use super::super::verbs::queue::{Qp, Queues, Remains};
use super::super::verbs::receive::{ReceiveQueue, Share};
use super::protocol::{Connection, Step, Violation};
use super::thread::ReconnectThread;
use super::{ConnectionId, Outcome, Outcomes};
use crate::{LaneId, NodeId, Transport};

/// A lane's part of reconnecting; it belongs to the lane's receiver.
pub(crate) struct LaneReconnect {
    /// `None` where there is one rail: a lost peer stays lost.
    thread: Option<ReconnectThread>,
    queues: Queues,
    sender: Arc<Mutex<Sender>>,
    outcomes: Arc<Outcomes>,
    session: Arc<dyn Transport>,
    lane: LaneId,
    /// By node.
    peers: Vec<Peer>,
    returned: VecDeque<NodeId>,
}

struct Peer {
    connection: Connection,
    /// It stays lost when it is lost.
    over: bool,
    /// Counts its connections.
    ordinal: u64,
    /// The queue pair that was made for it.
    made: Option<UnconnectedQp>,
    /// Its receive slots, while no queue pair has them.
    share: Option<Share>,
}

impl LaneReconnect {
    pub(crate) fn new(
        thread: Option<ReconnectThread>,
        queues: Queues,
        sender: Arc<Mutex<Sender>>,
        outcomes: Arc<Outcomes>,
        (session, lane): (Arc<dyn Transport>, LaneId),
    ) -> LaneReconnect {
        let over = thread.is_none();
        let peer = |_| Peer { connection: Connection::new(), over, ordinal: 0, made: None, share: None };
        let peers = (0..session.nodes()).map(peer).collect();
        LaneReconnect { thread, queues, sender, outcomes, session, lane, peers, returned: VecDeque::new() }
    }

    /// A loss was reported.
    pub(crate) fn lost(&mut self, peer: NodeId) {
        if !self.peers[peer.index()].over {
            let steps = self.peers[peer.index()].connection.lost();
            self.act(peer, steps, None);
        }
    }

    /// A peer that is lost, or is about to be, stays lost.
    pub(crate) fn end(&mut self, peer: NodeId) {
        let peer = &mut self.peers[peer.index()];
        (peer.over, peer.made) = (true, None);
    }

    /// Takes a note of a peer.
    pub(crate) fn note(&mut self, peer: NodeId, note: &Note) -> Result<(), Violation> {
        let state = &mut self.peers[peer.index()];
        if state.over && !state.connection.is_installed() {
            return Ok(());
        }
        let steps = state.connection.note(note)?;
        self.act(peer, steps, None);
        Ok(())
    }

    /// Takes what has come of the thread's work. Messages of the peers that it returns may come, from their
    /// first one on. `queue` is the lane's.
    pub(crate) fn advance(&mut self, queue: &mut ReceiveQueue) -> Vec<NodeId> {
        let mut installed = Vec::new();
        for outcome in self.outcomes.take() {
            let (Outcome::Made(id, ..) | Outcome::Connected(id, _)) = &outcome;
            let (peer, state) = (id.peer, &self.peers[id.peer.index()]);
            // Otherwise it was given up meanwhile.
            let is_wanted = !state.over && state.ordinal == id.ordinal;
            match outcome {
                Outcome::Made(_, qp, remains) => {
                    self.reclaim(peer, remains, queue);
                    if is_wanted {
                        self.peers[peer.index()].made = Some(qp);
                        let steps = self.peers[peer.index()].connection.made();
                        self.act(peer, steps, None);
                    }
                }
                Outcome::Connected(_, Ok(qp)) if is_wanted => {
                    let steps = self.peers[peer.index()].connection.connected(true);
                    self.act(peer, steps, Some(qp));
                    installed.push(peer);
                }
                Outcome::Connected(_, Ok(qp)) => self.reclaim(peer, qp.destroy(), queue),
                Outcome::Connected(_, Err((why, remains))) => {
                    self.reclaim(peer, remains, queue);
                    if is_wanted {
                        tracing::debug!("RDMA to {peer} cannot be had again: {why}");
                        let steps = self.peers[peer.index()].connection.connected(false);
                        self.act(peer, steps, None);
                    }
                }
            }
        }
        installed
    }

    /// Takes back what a queue pair had when it was destroyed.
    fn reclaim(&mut self, peer: NodeId, remains: Remains, queue: &mut ReceiveQueue) {
        base::lock(&self.sender).reclaim(remains.slots);
        if let Some(share) = remains.share {
            self.peers[peer.index()].share = Some(queue.renew(share));
        }
    }

    /// The next peer that messages may be sent to again.
    pub(crate) fn returned(&mut self) -> Option<NodeId> {
        self.returned.pop_front()
    }

    /// Carries out the protocol's steps; `qp` is what it installs.
    fn act(&mut self, peer: NodeId, steps: Vec<Step>, mut qp: Option<Qp>) {
        let Some(thread) = &self.thread else { return };
        let state = &mut self.peers[peer.index()];
        let say = |note: Note| {
            // Without the session the peer is lost for good, which its receiver says.
            let _ = self.session.send(peer, self.lane, &[&note.encode()]);
        };
        let mut failed = false;
        for step in steps {
            match step {
                Step::Make => {
                    state.ordinal += 1;
                    state.made = None;
                    let old = base::lock(&self.sender).retire(peer);
                    let id = ConnectionId { peer, ordinal: state.ordinal };
                    thread.make(id, &self.queues, &self.outcomes, old);
                }
                Step::Hello => {
                    if let Some(qp) = &state.made {
                        say(Note::Hello(thread.hello(qp)));
                    }
                }
                Step::Connect(hello) => match (state.made.take(), state.share.take()) {
                    (Some(qp), Some(share)) => {
                        let id = ConnectionId { peer, ordinal: state.ordinal };
                        thread.connect(id, &self.queues, &self.outcomes, (qp, share, hello));
                    }
                    // Its last queue pair could not be destroyed, and has the slots.
                    (_, share) => (state.share, failed) = (share, true),
                },
                Step::Install => {
                    if let Some(qp) = qp.take() {
                        base::lock(&self.sender).install(peer, qp);
                    }
                    say(Note::Ready);
                }
                Step::Returned => self.returned.push_back(peer),
                Step::Goodbye => say(Note::Goodbye(0)),
            }
        }
        if failed {
            let steps = self.peers[peer.index()].connection.connected(false);
            self.act(peer, steps, None);
        }
    }
}
