//! Requests of other threads to a shard.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use crossbeam::channel::Sender;

use super::lent::{Lent, LentMut};
use super::vcpus::Vcpus;
use crate::page::Page;
use crate::protocol::{Class, Operation, Shipping};

/// What other threads may ask of a shard.
pub enum Request {
    /// What is under way.
    Describe(Sender<Vec<String>>),
    /// A vCPU of this node has gone idle: what is kept for it may go earlier than planned.
    Reconsider,
    /// Nobody needs the content of these pages of this shard, of one home and one block.
    Discard(Range<u64>, Sender<()>),
    /// A device reads or overwrites pages of this shard.
    Direct(Box<Job>),
    /// Faults of these vCPUs may be answered by shipping.
    Ship(Arc<dyn Vcpus>, Shipping),
    /// A vCPU does this with a page.
    Operate { page: Page, token: u32, operation: Operation },
    /// A page of this home is of this class.
    SetClass(Page, Class),
}

/// A device's bytes for a page.
pub enum Bytes {
    /// They are read, from `offset` in the page on.
    Load { offset: usize, to: LentMut },
    /// They are the page's new content.
    Store(Lent),
}

/// A page that a device wants to read or to overwrite.
pub struct Wanted {
    pub page: Page,
    pub bytes: Bytes,
    /// Where it is among the pages that the device asked for.
    pub place: usize,
}

/// What a device wants of one shard. The device waits until it is dropped.
pub struct Job {
    pub pages: Vec<Wanted>,
    /// Which of all pages of the device were read or written.
    pub done: Arc<[AtomicBool]>,
    /// Pages without an answer.
    pub left: usize,
    pub since: Instant,
}

impl Wanted {
    /// What is to be written, if anything.
    pub fn to_store(&self) -> Option<&Lent> {
        match &self.bytes {
            Bytes::Store(lent) => Some(lent),
            Bytes::Load { .. } => None,
        }
    }
}
