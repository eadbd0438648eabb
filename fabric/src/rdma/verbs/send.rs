//! The sending side of queue pairs: the slots that messages are put into, and the queue that says which were
//! sent.
//!
//! A [`SendSlot`] cannot be cloned. Whoever has it may write to it; a queue pair that a message is posted on
//! keeps it until a [`Sent`] says that the device has read it, or until the queue pair is destroyed.

use std::io;
use std::sync::Arc;

use super::completion::{Channel, Cq};
use super::ffi::{Sge, Wc, status};
use super::memory::Slots;

/// Completions taken from the device at once.
const BATCH: usize = 32;

/// A slot for one message.
pub struct SendSlot {
    memory: Arc<Slots>,
    index: usize,
    /// Bytes of the message so far.
    len: usize,
}

impl SendSlot {
    /// All slots of `memory`.
    pub fn all(memory: Slots) -> Vec<SendSlot> {
        let memory = Arc::new(memory);
        (0..memory.count()).map(|index| SendSlot { memory: memory.clone(), index, len: 0 }).collect()
    }

    /// Begins a message.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends to the message, which must fit.
    pub fn append(&mut self, bytes: &[u8]) {
        // SAFETY: this is the slot's only owner, and no work request has it: a queue pair has the `SendSlot`
        // by then.
        unsafe { self.memory.write(self.index, self.len, bytes) };
        self.len += bytes.len();
    }

    pub(super) fn sge(&self) -> Sge {
        self.memory.sge(self.index, self.len)
    }
}

/// The queue in which queue pairs say what they have sent.
pub struct SendQueue(Cq);

/// A send that is finished.
pub struct Sent {
    user: u16,
    pair: u64,
    status: u32,
}

impl SendQueue {
    /// A queue for `entries` sends, whose events go to `channel` under the number `tag`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(channel: &Arc<Channel>, entries: usize, tag: usize) -> io::Result<Arc<SendQueue>> {
        Cq::new(channel, entries, tag).map(|cq| Arc::new(SendQueue(cq)))
    }

    pub(super) fn cq(&self) -> &Cq {
        &self.0
    }

    /// Takes sends that are finished, oldest first; whether there may be more. Never blocks.
    ///
    /// # Errors
    /// The queue overran or the device is gone.
    pub fn poll(&self, into: &mut Vec<Sent>) -> io::Result<bool> {
        let mut completions = [Wc::default(); BATCH];
        let count = self.0.poll(&mut completions)?;
        into.extend(completions[..count].iter().map(|wc| {
            let (pair, user) = parts(wc.wr_id);
            Sent { user, pair, status: wc.status }
        }));
        Ok(count == BATCH)
    }

    /// Lets the next send that is finished raise an event; with `errors_only`, the next failed one.
    ///
    /// # Errors
    /// What the device says.
    pub fn notify(&self, errors_only: bool) -> io::Result<()> {
        self.0.notify(errors_only)
    }
}

impl Sent {
    /// The user's number of the queue pair.
    pub fn user(&self) -> u16 {
        self.user
    }

    /// `enum ibv_wc_status`.
    pub fn status(&self) -> u32 {
        self.status
    }

    pub(super) fn is_success(&self) -> bool {
        self.status == status::SUCCESS
    }

    pub(super) fn pair(&self) -> u64 {
        self.pair
    }
}

/// A work request's id: the queue pair's id (48 bits, unique in the process) and its user's number.
pub(super) fn work_id(pair: u64, user: u16) -> u64 {
    pair << 16 | u64::from(user)
}

fn parts(work_id: u64) -> (u64, u16) {
    (work_id >> 16, work_id as u16)
}
