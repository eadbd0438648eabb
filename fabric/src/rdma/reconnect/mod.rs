//! Reconnecting to lost peers, where there are several rails.
//!
//! ```text
//! receiver ── lost, notes ──> LaneReconnect ── make, connect ──> ReconnectThread
//!                                  ^                                  │
//!                                  └───────────── Outcomes <──────────┘
//! ```
//!
//! - `protocol`: what both sides do and say, and when; pure.
//! - `lane`: a lane's lost peers; carries out what `protocol` decides. It belongs to the lane's receiver.
//! - `thread`: makes and connects queue pairs, which takes milliseconds, and a second where the network is
//!   cut.
//! - this file: what the thread is told to work on, and where it puts what came of that.

pub(super) mod lane;
pub(super) mod protocol;
pub(super) mod thread;

use std::sync::{Arc, Mutex};

use super::unconnected::UnconnectedQp;
use super::verbs::queue::{Qp, Remains};
use crate::NodeId;
use crate::bell::Bell;

/// A connection's identity: the peer, and its ordinal among the connections to it.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct ConnectionId {
    peer: NodeId,
    ordinal: u64,
}

/// The outcome of one piece of the thread's work.
enum Outcome {
    /// A queue pair was made; this is left of the one before it.
    Made(ConnectionId, UnconnectedQp, Remains),
    /// It was connected, or why not (the end of a sentence about the peer) and what is left of it.
    Connected(ConnectionId, Result<Qp, (String, Remains)>),
}

/// What came of the thread's work for one lane, in order.
pub(super) struct Outcomes {
    outcomes: Mutex<Vec<Outcome>>,
    /// The lane's.
    bell: Arc<Bell>,
}

impl Outcomes {
    pub(super) fn new(bell: Arc<Bell>) -> Outcomes {
        Outcomes { outcomes: Mutex::default(), bell }
    }

    fn push(&self, outcome: Outcome) {
        base::lock(&self.outcomes).push(outcome);
        self.bell.ring();
    }

    /// What has come since the last time.
    fn take(&self) -> Vec<Outcome> {
        std::mem::take(&mut base::lock(&self.outcomes))
    }
}
