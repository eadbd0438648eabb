//! One lane: the state that its senders and its receiver share.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::async_events::AsyncEvents;
use super::sender::Sender;
use super::verbs::completion::Channel;
use super::verbs::send::SendQueue;
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
pub(super) struct Lane {
    pub(super) sender: Arc<Mutex<Sender>>,
    pub(super) send_queue: Arc<SendQueue>,
    pub(super) channel: Arc<Channel>,
    /// This node.
    pub(super) node: NodeId,
    pub(super) bell: Arc<Bell>,
    pub(super) counters: Counters,
    pub(super) events: Arc<AsyncEvents>,
    /// What is left of [`LAST_WORDS`], for all lanes.
    pub(super) last_words: Arc<Mutex<Duration>>,
}

impl Lane {
    pub(super) fn lock(&self) -> MutexGuard<'_, Sender> {
        // A panic under the lock is an assertion that failed; what is behind it is as it was.
        base::lock(&self.sender)
    }

    /// The peer whose messages come into a share of the receive slots: shares are in the order of the peers.
    pub(super) fn peer_of(&self, share: usize) -> NodeId {
        NodeId(if share < self.node.index() { share } else { share + 1 } as u16)
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
