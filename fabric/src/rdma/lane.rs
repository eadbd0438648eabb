//! What senders and the receiver of a lane share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sender::Sender;
use super::verbs::completion::{Channel, Cq};
use super::verbs::memory::Slots;
use super::verbs::queue::Srq;
use super::watch::Watch;
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
/// Ordering: fields are dropped from the top. The queue pairs (in `sender`) go before the queue that they receive
/// from, and that before the memory that it was given.
pub(super) struct Lane {
    pub(super) sender: Mutex<Sender>,
    pub(super) srq: Arc<Srq>,
    pub(super) receive_slots: Slots,
    pub(super) receive_cq: Arc<Cq>,
    pub(super) send_cq: Arc<Cq>,
    pub(super) channel: Arc<Channel>,
    /// Queue pair numbers and whose they are, ascending.
    pub(super) peers: Vec<(u32, NodeId)>,
    pub(super) bell: Arc<Bell>,
    pub(super) counters: Counters,
    pub(super) watch: Arc<Watch>,
    /// What is left of [`LAST_WORDS`], for all lanes.
    pub(super) last_words: Arc<Mutex<Duration>>,
}

impl Lane {
    pub(super) fn lock(&self) -> MutexGuard<'_, Sender> {
        // A panic under the lock is an assertion that failed; what is behind it is as sound as it was.
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose queue pair this is.
    pub(super) fn peer_of(&self, qpn: u32) -> Option<NodeId> {
        let at = self.peers.binary_search_by_key(&qpn, |(qpn, _)| *qpn).ok()?;
        Some(self.peers[at].1)
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
        let mut left = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        while !sender.is_drained() && begin.elapsed() < *left {
            std::thread::sleep(LAST_WORDS_PAUSE);
        }
        *left = left.saturating_sub(begin.elapsed());
        sender.say_goodbye();
    }
}
