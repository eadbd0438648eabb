//! Steps of a cluster, and what they bring about.

use fabric::NodeId;

use crate::page::Page;
use crate::protocol::{Class, Kind};

/// One thing that can happen.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A CPU of the node touches the page.
    Access {
        /// Where.
        node: usize,
        /// What.
        page: Page,
        /// How.
        write: bool,
    },
    /// The node asks for a page that it may need.
    Prefetch {
        /// Where.
        node: usize,
        /// What.
        page: Page,
        /// How.
        write: bool,
    },
    /// The oldest message from one node to another arrives.
    Deliver {
        /// Sender.
        from: NodeId,
        /// Receiver.
        to: NodeId,
    },
    /// A page has been held long enough.
    Release {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
    /// A CPU of the node begins to operate on the page, there or by shipping.
    Operate {
        /// Where.
        node: usize,
        /// Which of the node's CPUs.
        cpu: u32,
        /// On what.
        page: Page,
        /// Whether it adds one, or only reads.
        write: bool,
    },
    /// A CPU that was called out of its wait ships its operation.
    Ship {
        /// Where.
        node: usize,
        /// Which of the node's CPUs.
        cpu: u32,
    },
    /// A CPU that was called out of its wait has an instruction that cannot be shipped.
    Move {
        /// Where.
        node: usize,
        /// Which of the node's CPUs.
        cpu: u32,
    },
    /// The home changes the page's class.
    Class {
        /// What.
        page: Page,
        /// To what.
        class: Class,
    },
    /// The node makes room.
    Evict {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
    /// The node learns that nobody needs what is in the page.
    Discard {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
    /// A device of the node reads the page where it is.
    Load {
        /// Where the device is.
        node: usize,
        /// What.
        page: Page,
    },
    /// A device of the node overwrites the page at its home.
    Store {
        /// Where the device is.
        node: usize,
        /// What.
        page: Page,
    },
}

/// What a step brought about, for who counts and who plans what comes next.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// A message went out.
    Sent {
        /// Sender.
        from: NodeId,
        /// Receiver.
        to: NodeId,
        /// What is said.
        kind: Kind,
    },
    /// A page was won: [`Step::Release`] must follow.
    Held {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
    /// An access was done, by a CPU that had waited for it or not.
    Done {
        /// Where.
        node: usize,
        /// What.
        page: Page,
        /// How.
        write: bool,
    },
    /// A CPU's operation was done.
    Operated {
        /// Where.
        node: usize,
        /// Which of the node's CPUs.
        cpu: u32,
        /// On what.
        page: Page,
        /// What the byte was before.
        old: u8,
        /// Whether it was carried out elsewhere.
        shipped: bool,
    },
    /// A CPU was called out of its wait: [`Step::Ship`] or [`Step::Move`] must follow.
    Called {
        /// Where.
        node: usize,
        /// Which of the node's CPUs.
        cpu: u32,
    },
    /// A CPU's operation was refused, and it has faulted again.
    Refused {
        /// Where.
        node: usize,
        /// Which of the node's CPUs.
        cpu: u32,
    },
    /// A node unmapped a page to see whether it is used.
    Probed {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
    /// A page was discarded for a node.
    Discarded {
        /// Which.
        node: usize,
        /// What.
        page: Page,
    },
    /// A device's access to a page that was not here is done, or must be done as a CPU would.
    Direct {
        /// Where the device is.
        node: usize,
        /// What.
        page: Page,
        /// Whether it was done.
        done: bool,
    },
    /// A demand waits for the release of a held page.
    Deferred {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
}
