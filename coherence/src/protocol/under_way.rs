//! Transient states, of a page with something under way: at the node that asked, at the node that is asked
//! for its copy, and at the home.

use std::collections::VecDeque;

use fabric::NodeId;

use super::Rights;
use crate::node_set::NodeSet;
use crate::page::Page;

/// What another node wants of a copy that is here.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Demand {
    Invalidate {
        requester: NodeId,
    },
    ForwardShared {
        requester: NodeId,
    },
    ForwardExclusive {
        requester: NodeId,
    },
    /// The home wants the page and not its content.
    Reclaim {
        requester: NodeId,
    },
}

/// What faults on a page want of it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Want {
    pub(super) rights: Rights,
    /// Whether all of them can do without the page.
    pub(super) may_ship: bool,
}

impl Want {
    pub(super) const NOTHING: Want = Want { rights: Rights::None, may_ship: true };

    /// What a fault wants that cannot do without the page.
    pub(super) fn page(rights: Rights) -> Want {
        Want { rights, may_ship: false }
    }

    /// What both want.
    pub(super) fn and(self, other: Want) -> Want {
        Want { rights: self.rights.max(other.rights), may_ship: self.may_ship && other.may_ship }
    }
}

/// A page that this node asked for and does not have yet, or gave back and may not forget yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Transient {
    Miss(Miss),
    Evict {
        /// What a fault asked for in the meantime.
        refault: Want,
    },
}

/// A request under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Miss {
    pub(super) want: Rights,
    /// Set once the Data message came.
    pub(super) granted: bool,
    /// Acks announced minus acks received; below zero while acks overtake Data.
    pub(super) acks: i32,
    /// A write fault came while waiting for Shared.
    pub(super) then_write: bool,
    /// Whether the home was told that it need not give the page.
    pub(super) may_ship: bool,
    /// It need after all: a fault has come that cannot do without.
    pub(super) must_move: bool,
    /// No fault waits (yet): the page is not mapped when it comes.
    pub(super) prefetch: bool,
    /// The frame of a copy that was given up meanwhile is still here: the page's bytes were to land in it.
    pub(super) keeps_frame: bool,
    /// The home itself asks, to push what it gets: it does not hold it.
    pub(super) pulls: bool,
    /// Not the content is wanted, but that nobody has any: the home gives the page another.
    pub(super) replaces: Option<Replacement>,
    /// What was asked of the page that is on its way.
    pub(super) deferred: Option<Demand>,
    /// How many pages that follow were asked for as well; no request of their own is made for them.
    pub(super) run: u8,
    /// Bit `i - 1`: a fault waits for page `+ i`.
    pub(super) run_faults: u64,
    /// Of these, which were writes.
    pub(super) run_writes: u64,
}

/// The content that the home gives a page, and who asked it to.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Replacement {
    /// None: nobody needs the page.
    Zeroes(NodeId),
    /// A device's, in the home's frame already.
    Bytes(NodeId),
}

/// What a device waits for.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Direct {
    Load,
    Store,
}

/// An operation of a CPU of this node that was sent and not answered yet.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Outstanding {
    pub(super) page: Page,
    pub(super) token: u32,
    /// No bit of the answer lies beyond it.
    pub(super) bytes: u8,
}

/// A request that waits at the home.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Request {
    Get(Want),
    Put,
}

/// The home cannot go on with a page.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Busy {
    pub(super) wait: Wait,
    pub(super) queue: VecDeque<(NodeId, Request)>,
}

/// What the home waits for before it can go on.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wait {
    /// The owner's bytes, for a reader.
    Writeback { owner: NodeId, requester: NodeId },
    /// The answers of those to whom the page was pushed.
    Pushes { left: NodeSet },
}

impl Busy {
    /// Whose bytes are awaited, if any are, and for whom.
    pub(super) fn writeback(&self) -> Option<(NodeId, NodeId)> {
        match self.wait {
            Wait::Writeback { owner, requester } => Some((owner, requester)),
            Wait::Pushes { .. } => None,
        }
    }

    /// Whether the page was pushed to a node that has not answered.
    pub(super) fn pushes_to(&self, node: NodeId) -> bool {
        matches!(self.wait, Wait::Pushes { left } if left.contains(node))
    }
}

/// The cache's side of a page, packed: rights, and whether the page is held.
///
/// Of pages at home and of others, the fourth bit says different things, since only others need a frame.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Local(pub(super) u8);

impl Local {
    pub(super) const HELD: u8 = 4;
    /// At home: set once the page's rights differ from what they were at power-on.
    pub(super) const KNOWN: u8 = 8;
    /// Of others: here but not mapped, to see whether it is used.
    pub(super) const IDLE: u8 = 8;
}
