//! What senders and the receiver of a lane share.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::mender::{Done, Mender};
use super::sender::Sender;
use super::verbs::completion::{Channel, Cq};
use super::verbs::memory::{Pd, Slots};
use super::watch::Watch;
use super::window::Window;
use crate::bell::Bell;
use crate::transport::Counters;
use crate::{FabricError, NodeId};

/// How long all lanes of a node together wait, when they close, until their last messages have arrived.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);
const LAST_WORDS_PAUSE: Duration = Duration::from_micros(50);

/// The number of receive queues at their channel; send queues have [`SENDS`].
pub(super) const RECEIVES: usize = 0;
/// See [`RECEIVES`].
pub(super) const SENDS: usize = 1;

/// One lane over RDMA.
///
/// Ordering: fields are dropped from the top. The queue pairs (in `sender` and `done`) go before the memory that they
/// were given.
pub(super) struct Lane {
    pub(super) sender: Mutex<Sender>,
    /// What the mender did, in order.
    pub(super) done: Mutex<Vec<Done>>,
    /// Connects lost peers again, if this lane is on a rail of several.
    pub(super) mender: Option<Mender>,
    pub(super) receive_slots: Slots,
    pub(super) pd: Arc<Pd>,
    pub(super) receive_cq: Arc<Cq>,
    pub(super) send_cq: Arc<Cq>,
    pub(super) channel: Arc<Channel>,
    /// This node.
    pub(super) node: NodeId,
    pub(super) window: Window,
    pub(super) bell: Arc<Bell>,
    pub(super) counters: Counters,
    pub(super) watch: Arc<Watch>,
    /// What is left of [`LAST_WORDS`], for all lanes.
    pub(super) last_words: Arc<Mutex<Duration>>,
}

impl Lane {
    pub(super) fn lock(&self) -> MutexGuard<'_, Sender> {
        // A panic under the lock is an assertion that failed; what is behind it is as sound as it was.
        base::lock(&self.sender)
    }

    /// The place of a peer among all peers.
    pub(super) fn place_of(&self, peer: NodeId) -> usize {
        place_of(self.node, peer)
    }

    /// The peer whose messages come into a receive slot.
    pub(super) fn peer_of(&self, slot: usize) -> NodeId {
        let place = self.window.place_of(slot);
        NodeId(if place < self.node.index() { place } else { place + 1 } as u16)
    }

    /// Takes what the mender did.
    pub(super) fn done(&self, done: Done) {
        base::lock(&self.done).push(done);
        self.bell.ring();
    }

    /// What the mender did since the last time.
    pub(super) fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut *base::lock(&self.done))
    }

    /// Sends a frame of `len` bytes, checked by the caller.
    pub(super) fn send(&self, to: NodeId, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.lock().send(to, len, parts)?;
        self.counters.sent(1, len as u64);
        Ok(())
    }

    /// Sends frames, checked by the caller.
    pub(super) fn send_all(&self, to: NodeId, frames: &[[&[u8]; 2]]) -> Result<(), FabricError> {
        self.lock().send_all(to, frames)?;
        let bytes = frames.iter().flatten().map(|part| part.len() as u64).sum();
        self.counters.sent(frames.len() as u64, bytes);
        Ok(())
    }
}

/// The place of a peer among all peers of `node`, from 0.
pub(super) fn place_of(node: NodeId, peer: NodeId) -> usize {
    peer.index() - usize::from(peer > node)
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut sender = self.lock();
        sender.farewell();
        let mut left = base::lock(&self.last_words);
        let begin = Instant::now();
        while !sender.is_drained() && begin.elapsed() < *left {
            std::thread::sleep(LAST_WORDS_PAUSE);
        }
        *left = left.saturating_sub(begin.elapsed());
        sender.say_goodbye();
    }
}
