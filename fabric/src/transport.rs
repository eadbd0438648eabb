//! The contract of every transport: frames to a peer on a lane, in order.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::FabricError;

/// A node's index in its machine, `0..=511`. Node 0 owns the legacy devices and is where the guest starts.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct NodeId(pub u16);

impl NodeId {
    /// The index as a `usize`, for tables indexed by node.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// One ordered stream to each peer. Lane 0 carries control traffic, lanes 1.. one coherence shard each.
pub type LaneId = u16;

/// The most nodes that one machine may have.
pub const MAX_NODES: usize = 512;

/// The longest frame, in bytes. Anything longer is a programming error at the sender and ends the session
/// at the receiver.
pub const MAX_FRAME: usize = 64 * 1024;

/// What a transport that is a rail of another one must carry beyond [`MAX_FRAME`], in bytes.
pub(crate) const ENVELOPE: usize = 1;

/// What a sender keeps for one peer on one lane while the peer does not take it, in bytes. A peer that is
/// further behind is lost.
pub const MAX_BACKLOG: usize = 64 << 20;

/// The end of a sentence about a peer that is further behind than [`MAX_BACKLOG`].
pub(crate) fn too_far_behind() -> String {
    format!("it is more than {} MiB behind with what was sent to it", MAX_BACKLOG >> 20)
}

/// Totals since the transport was opened.
#[derive(Copy, Clone, Debug, Default, Eq, PartialEq)]
pub struct TransportStats {
    /// Frames handed to the wire.
    pub frames_sent: u64,
    /// Bytes handed to the wire, framing included.
    pub bytes_sent: u64,
    /// Frames delivered to a sink.
    pub frames_received: u64,
    /// Bytes taken off the wire, framing included.
    pub bytes_received: u64,
}

/// The sending side of a node's fabric.
pub trait Transport: Send + Sync {
    /// This node.
    fn node(&self) -> NodeId;

    /// How many nodes the machine has, this one included.
    fn nodes(&self) -> usize;

    /// How many lanes there are to each peer.
    fn lanes(&self) -> usize;

    /// Sends one frame, the concatenation of `parts` (at most [`MAX_FRAME`] bytes).
    ///
    /// Never blocks: what the wire does not take at once is kept and sent by the lane's [`Receiver`], so
    /// that receiver must be polled. Frames on the same lane to the same peer stay in order, whichever
    /// threads send them.
    ///
    /// # Errors
    /// [`FabricError::PeerLost`] once the peer is gone or its backlog exceeds [`MAX_BACKLOG`];
    /// [`FabricError::Refused`] for a frame that is empty or too long, or is for this node itself, or for a
    /// peer or lane that does not exist.
    fn send(&self, to: NodeId, lane: LaneId, parts: &[&[u8]]) -> Result<(), FabricError>;

    /// Sends several frames of two parts each, of which one may be empty, to one peer on one lane: what
    /// [`Transport::send`] does with each, in their order, at less cost where the transport can.
    ///
    /// # Errors
    /// As [`Transport::send`]; a part of the frames may have been sent.
    fn send_all(&self, to: NodeId, lane: LaneId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        frames.iter().try_for_each(|frame| self.send(to, lane, frame))
    }

    /// Takes the receiving side of a lane; `None` when the lane does not exist or was taken before.
    fn take_receiver(&self, lane: LaneId) -> Option<Box<dyn Receiver>>;

    /// Totals so far.
    fn stats(&self) -> TransportStats;
}

/// The receiving side of one lane, from all peers.
pub trait Receiver: Send {
    /// Delivers the frames that have arrived to `sink`, and sends what [`Transport::send`] had to keep
    /// back. Returns how many frames were delivered; it may return before all were (call it again until
    /// it says 0). Never blocks.
    ///
    /// # Errors
    /// [`FabricError::PeerLost`] when a peer closed its end or broke the framing. Frames that arrived
    /// whole before that have been delivered. Each lost peer is reported once; the others go on, so call
    /// `poll` again.
    fn poll(&mut self, sink: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError>;

    /// A descriptor that becomes readable (level-triggered, for `poll` or `epoll`) when [`Receiver::poll`]
    /// may have something to do. Meaningful once [`Receiver::arm`] has said `false`.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Call before sleeping on [`Receiver::fd`]; `true` means there is work already and sleeping is wrong.
    fn arm(&mut self) -> Result<bool, FabricError>;

    /// The next peer that was lost and that [`Transport::send`] reaches again. What was under way when it was
    /// lost is not sent again. Always `None` on transports on which a lost peer stays lost: all but those
    /// that are rails of another one.
    fn returned(&mut self) -> Option<NodeId> {
        None
    }
}

/// Receivers by lane, each of which is given out once.
pub(crate) struct Receivers<R>(Mutex<Vec<Option<R>>>);

impl<R: Receiver + 'static> Receivers<R> {
    pub(crate) fn take(&self, lane: LaneId) -> Option<Box<dyn Receiver>> {
        let mut receivers = base::lock(&self.0);
        let receiver = receivers.get_mut(usize::from(lane))?.take()?;
        Some(Box::new(receiver))
    }
}

impl<R> FromIterator<R> for Receivers<R> {
    fn from_iter<I: IntoIterator<Item = R>>(receivers: I) -> Receivers<R> {
        Receivers(Mutex::new(receivers.into_iter().map(Some).collect()))
    }
}

/// Totals that several threads add to. Senders and the receiver have a cache line each.
#[derive(Default)]
pub(crate) struct Counters {
    sent: Direction,
    received: Direction,
}

#[derive(Default)]
#[repr(align(64))]
struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Counters {
    pub(crate) fn sent(&self, frames: u64, bytes: u64) {
        self.sent.frames.fetch_add(frames, Relaxed);
        self.sent.bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn received(&self, frames: u64, bytes: u64) {
        self.received.frames.fetch_add(frames, Relaxed);
        self.received.bytes.fetch_add(bytes, Relaxed);
    }

    /// Adds these totals to `stats`.
    pub(crate) fn add_to(&self, stats: &mut TransportStats) {
        stats.frames_sent += self.sent.frames.load(Relaxed);
        stats.bytes_sent += self.sent.bytes.load(Relaxed);
        stats.frames_received += self.received.frames.load(Relaxed);
        stats.bytes_received += self.received.bytes.load(Relaxed);
    }
}

/// Checks what every transport refuses before it sends: returns the frame's length, which is at most `most`.
pub(crate) fn check_frame(
    from: NodeId,
    to: NodeId,
    lane: LaneId,
    nodes: usize,
    lanes: usize,
    most: usize,
    parts: &[&[u8]],
) -> Result<usize, FabricError> {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    let wrong = if to == from {
        "a node does not send to itself".to_owned()
    } else if to.index() >= nodes {
        format!("the machine has {nodes} nodes")
    } else if usize::from(lane) >= lanes {
        format!("the machine has {lanes} lanes")
    } else if len == 0 || len > most {
        format!("a frame has 1 to {most} bytes, this one {len}")
    } else {
        return Ok(len);
    };
    Err(FabricError::Refused(format!("to {to} on lane {lane}: {wrong}")))
}
