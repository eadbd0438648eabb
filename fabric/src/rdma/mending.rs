//! The lost peers of a lane, which are connected again: carries out what `mend` says.

use std::collections::VecDeque;
use std::sync::Arc;

use super::lane::Lane;
use super::mend::{Mend, Step, Unsound};
use super::mender::{Done, Which};
use super::notes::Note;
use super::place::Half;
use super::verbs::queue::Qp;
use crate::{LaneId, NodeId, Transport};

/// A lane's part of it; it belongs to the lane's receiver.
pub(super) struct Mending {
    lane: Arc<Lane>,
    session: Arc<dyn Transport>,
    id: LaneId,
    /// By node.
    peers: Vec<Peer>,
    returned: VecDeque<NodeId>,
}

struct Peer {
    mend: Mend,
    /// It stays lost when it is lost.
    over: bool,
    /// Counts its connections.
    number: u64,
    /// A queue pair that was made. Completions of the one before it may be left.
    fresh: Option<Half>,
    /// The same, and there are none.
    half: Option<Half>,
}

/// What has changed.
pub(super) struct News {
    /// Messages of these peers may come, from their first one on.
    pub(super) installed: Vec<NodeId>,
    /// Look again when the receive queue was found empty once more.
    pub(super) again: bool,
}

impl Mending {
    pub(super) fn new(lane: Arc<Lane>, session: Arc<dyn Transport>, id: LaneId, nodes: usize) -> Mending {
        let over = lane.mender.is_none();
        let peer = || Peer { mend: Mend::new(), over, number: 0, fresh: None, half: None };
        Mending { lane, session, id, peers: (0..nodes).map(|_| peer()).collect(), returned: VecDeque::new() }
    }

    /// A loss was reported.
    pub(super) fn lost(&mut self, peer: NodeId) {
        if !self.peers[peer.index()].over {
            let steps = self.peers[peer.index()].mend.lost();
            self.act(peer, steps, None);
        }
    }

    /// A peer that is lost, or is about to be, stays lost.
    pub(super) fn end(&mut self, peer: NodeId) {
        let peer = &mut self.peers[peer.index()];
        (peer.over, peer.fresh, peer.half) = (true, None, None);
    }

    /// Takes a note of a peer.
    pub(super) fn note(&mut self, peer: NodeId, note: &Note) -> Result<(), Unsound> {
        let state = &mut self.peers[peer.index()];
        if state.over && !state.mend.is_installed() {
            return Ok(());
        }
        let steps = state.mend.note(note)?;
        self.act(peer, steps, None);
        Ok(())
    }

    /// Looks at what was done meanwhile. To be called when the receive queue has just been found empty.
    pub(super) fn look(&mut self) -> News {
        // The queue pair before this one was gone when the queue was found empty, and so nothing in it is of that.
        for peer in (0..self.peers.len() as u16).map(NodeId) {
            let state = &mut self.peers[peer.index()];
            if let Some(half) = state.fresh.take() {
                state.half = Some(half);
                let steps = state.mend.made();
                self.act(peer, steps, None);
            }
        }
        let mut news = News { installed: Vec::new(), again: false };
        for done in self.lane.take_done() {
            let (Done::Made(which, _) | Done::Connected(which, _)) = &done;
            let (peer, which) = (which.peer, *which);
            let state = &mut self.peers[peer.index()];
            // What was given up meanwhile.
            if state.over || which.number != state.number {
                continue;
            }
            match done {
                Done::Made(_, half) => {
                    state.fresh = Some(half);
                    news.again = true;
                }
                Done::Connected(_, Ok(qp)) => {
                    let steps = state.mend.connected(true);
                    self.act(peer, steps, Some(qp));
                    news.installed.push(peer);
                }
                Done::Connected(_, Err(why)) => {
                    tracing::debug!("RDMA to {peer} cannot be had again: {why}");
                    let steps = state.mend.connected(false);
                    self.act(peer, steps, None);
                }
            }
        }
        news
    }

    /// The next peer that messages may be sent to again.
    pub(super) fn returned(&mut self) -> Option<NodeId> {
        self.returned.pop_front()
    }

    /// Does what `mend` says; `qp` is what it installs.
    fn act(&mut self, peer: NodeId, steps: Vec<Step>, mut qp: Option<Qp>) {
        let Some(mender) = &self.lane.mender else { return };
        let state = &mut self.peers[peer.index()];
        let say = |note: Note| {
            // Without the session the peer is lost for good, which its receiver says.
            let _ = self.session.send(peer, self.id, &[&note.encode()]);
        };
        for step in steps {
            match step {
                Step::Make => {
                    state.number += 1;
                    (state.fresh, state.half) = (None, None);
                    let old = self.lane.lock().retire(peer);
                    mender.make(&self.lane, Which { peer, number: state.number }, old);
                }
                Step::Hello => {
                    if let Some(half) = &state.half {
                        say(Note::Hello(mender.hello(half)));
                    }
                }
                Step::Connect(hello) => {
                    if let Some(half) = state.half.take() {
                        mender.connect(&self.lane, Which { peer, number: state.number }, half, hello);
                    }
                }
                Step::Install => {
                    if let Some(qp) = qp.take() {
                        self.lane.lock().install(peer, qp);
                    }
                    say(Note::Ready);
                }
                Step::Returned => self.returned.push_back(peer),
                Step::Goodbye => say(Note::Goodbye(0)),
            }
        }
    }
}
