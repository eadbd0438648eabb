//! A fabric inside one process: the tests of everything above the fabric run on it.
//!
//! [`cluster`] makes all nodes at once; each is then used like a node of its own. Frames travel through
//! queues, at once and without loss. A node that is dropped (its [`SimTransport`] and all receivers that
//! were taken from it) is lost to the others, like a node whose process died.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::transport::{Counters, check_frame};
use crate::{
    FabricError, LaneId, MAX_BACKLOG, MAX_FRAME, MAX_NODES, NodeId, Receiver, Transport, TransportStats,
};

/// Makes the transports of a machine of `nodes` nodes (1 to [`MAX_NODES`]) with `lanes` lanes, by node.
///
/// # Errors
/// [`FabricError::Setup`] when a number is out of range, [`FabricError::Io`] when the process has no
/// descriptor left: one is needed per node and lane.
pub fn cluster(nodes: usize, lanes: u16) -> Result<Vec<SimTransport>, FabricError> {
    if nodes == 0 || nodes > MAX_NODES || lanes == 0 {
        return Err(FabricError::Setup(format!(
            "a machine has 1 to {MAX_NODES} nodes and at least one lane, this one {nodes} and {lanes}"
        )));
    }
    let inboxes = (0..nodes)
        .map(|_| (0..lanes).map(|_| Inbox::new(nodes)).collect::<Result<Vec<_>, _>>())
        .collect::<Result<Vec<_>, _>>()?;
    let wires = Arc::new(Wires { inboxes });
    Ok((0..nodes as u16)
        .map(|node| {
            let seat = Seat { node: NodeId(node), wires: wires.clone(), counters: Counters::default() };
            let taken = (0..lanes).map(|_| AtomicBool::new(false)).collect();
            SimTransport { seat: Arc::new(seat), taken }
        })
        .collect())
}

/// All queues of the machine, by node and lane.
struct Wires {
    inboxes: Vec<Vec<Inbox>>,
}

/// What has been sent to one node on one lane.
struct Inbox {
    state: Mutex<InboxState>,
    /// Readable exactly while the queue holds something; both change under the lock.
    ready: EventFd,
}

struct InboxState {
    queue: VecDeque<(NodeId, Arrival)>,
    /// By sender: bytes in the queue.
    behind: Vec<usize>,
    /// By sender: the link is dead, and its loss has been put into the queue.
    lost: Vec<bool>,
}

enum Arrival {
    Frame(Vec<u8>),
    Lost(String),
}

impl Inbox {
    fn new(nodes: usize) -> Result<Inbox, FabricError> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let ready = EventFd::from_flags(flags)
            .map_err(|error| FabricError::Io { what: "creating an eventfd", source: error.into() })?;
        let state = InboxState { queue: VecDeque::new(), behind: vec![0; nodes], lost: vec![false; nodes] };
        Ok(Inbox { state: Mutex::new(state), ready })
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        // A sink that panics does so outside the lock; the state behind a poisoned one is whole.
        base::lock(&self.state)
    }

    fn push(&self, state: &mut InboxState, from: NodeId, arrival: Arrival) -> Result<(), FabricError> {
        if state.queue.is_empty() {
            signalled(self.ready.write(1).map(drop))?;
        }
        if let Arrival::Frame(frame) = &arrival {
            state.behind[from.index()] += frame.len();
        }
        state.queue.push_back((from, arrival));
        Ok(())
    }

    fn pop(&self) -> Result<Option<(NodeId, Arrival)>, FabricError> {
        let mut state = self.lock();
        let Some((from, arrival)) = state.queue.pop_front() else { return Ok(None) };
        if state.queue.is_empty() {
            signalled(self.ready.read().map(drop))?;
        }
        if let Arrival::Frame(frame) = &arrival {
            state.behind[from.index()] -= frame.len();
        }
        Ok(Some((from, arrival)))
    }

    /// Ends the link from `from`, once.
    fn lose(&self, from: NodeId, why: &str) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.lost[from.index()], true)
            && let Err(error) = self.push(&mut state, from, Arrival::Lost(why.to_owned()))
        {
            tracing::error!(%error, "the loss of {from} may go unnoticed");
        }
    }
}

fn signalled(result: nix::Result<()>) -> Result<(), FabricError> {
    match result {
        Ok(()) | Err(Errno::EAGAIN) => Ok(()),
        Err(error) => Err(FabricError::Io { what: "signalling an eventfd", source: error.into() }),
    }
}

/// A node's place in the machine, shared by its transport and its receivers. When the last one goes, the
/// node is lost to the others.
struct Seat {
    node: NodeId,
    wires: Arc<Wires>,
    counters: Counters,
}

impl Drop for Seat {
    fn drop(&mut self) {
        for (peer, lanes) in self.wires.inboxes.iter().enumerate() {
            if peer != self.node.index() {
                lanes.iter().for_each(|inbox| inbox.lose(self.node, "it closed the connection"));
            }
        }
    }
}

/// One node's side of a fabric inside one process. Made by [`cluster`].
pub struct SimTransport {
    seat: Arc<Seat>,
    /// By lane: the receiver was taken.
    taken: Vec<AtomicBool>,
}

impl Transport for SimTransport {
    fn node(&self) -> NodeId {
        self.seat.node
    }

    fn nodes(&self) -> usize {
        self.seat.wires.inboxes.len()
    }

    fn lanes(&self) -> usize {
        self.taken.len()
    }

    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError> {
        let me = self.node();
        let len = check_frame(me, to, lane, self.nodes(), self.lanes(), MAX_FRAME, parts)?;
        let lost = |why: &str| Err(FabricError::PeerLost { peer: to, why: why.to_owned() });
        // A link dies in both directions: the mark for this one is in this node's own inbox.
        if self.seat.wires.inboxes[me.index()][usize::from(lane)].lock().lost[to.index()] {
            return lost("it closed the connection");
        }
        let inbox = &self.seat.wires.inboxes[to.index()][usize::from(lane)];
        let mut state = inbox.lock();
        if state.behind[me.index()] + len > MAX_BACKLOG {
            drop(state);
            let why = format!("it is more than {} MiB behind with what was sent to it", MAX_BACKLOG >> 20);
            inbox.lose(me, "it closed the connection");
            self.seat.wires.inboxes[me.index()][usize::from(lane)].lose(to, &why);
            return lost(&why);
        }
        inbox.push(&mut state, me, Arrival::Frame(parts.concat()))?;
        drop(state);
        self.seat.counters.sent(1, len as u64);
        Ok(())
    }

    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        let taken = self.taken.get(usize::from(lane))?.swap(true, Relaxed);
        (!taken).then(|| Box::new(SimReceiver { seat: self.seat.clone(), lane }) as Box<dyn Receiver>)
    }

    fn stats(&self) -> TransportStats {
        let mut stats = TransportStats::default();
        self.seat.counters.add_to(&mut stats);
        stats
    }
}

/// The receiving side of one lane of a [`SimTransport`].
struct SimReceiver {
    seat: Arc<Seat>,
    lane: LaneId,
}

impl SimReceiver {
    fn inbox(&self) -> &Inbox {
        &self.seat.wires.inboxes[self.seat.node.index()][usize::from(self.lane)]
    }
}

impl Receiver for SimReceiver {
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        // Not more than what is there now: a sink that provokes new frames must not keep this going without
        // end.
        let most = self.inbox().lock().queue.len();
        let mut frames = 0;
        for _ in 0..most {
            match self.inbox().pop()? {
                Some((from, Arrival::Frame(frame))) => {
                    frames += 1;
                    self.seat.counters.received(1, frame.len() as u64);
                    sink(from, &frame);
                }
                Some((peer, Arrival::Lost(why))) => return Err(FabricError::PeerLost { peer, why }),
                None => break,
            }
        }
        Ok(frames)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.inbox().ready.as_fd()
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        Ok(!self.inbox().lock().queue.is_empty())
    }
}
