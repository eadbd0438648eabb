//! The messages between nodes about a page.

use fabric::NodeId;

use super::Rights;
use super::operation::Operation;
use crate::page::Page;

/// The longest run of untouched pages that goes with a page.
pub const MAX_RUN: u8 = 63;

/// What a message says. `requester` is the node whose miss the message serves.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash)]
pub enum Kind {
    /// Requester to home: I want to read, and would take up to `run` untouched pages that follow.
    GetShared {
        /// `0..=63`.
        run: u8,
        /// Whether [`Kind::Ship`] is an answer too.
        may_ship: bool,
    },
    /// Requester to home: I want to write, and would take up to `run` untouched pages that follow. The home
    /// knows whether the requester holds a copy.
    GetExclusive {
        /// `0..=63`.
        run: u8,
        /// Whether [`Kind::Ship`] is an answer too.
        may_ship: bool,
    },
    /// Home or owner to requester: the page is yours with these rights, once `acks` sharers have answered.
    Data {
        /// What the requester may do.
        rights: Rights,
        /// How many [`Kind::Ack`]s the requester waits for.
        acks: u16,
        /// Whether the page's bytes come along; without, the requester's own copy is current.
        body: bool,
        /// How many pages that follow are the requester's too: exclusive, and all zero.
        run: u8,
    },
    /// Home to sharer: give up your copy and tell the requester.
    Invalidate {
        /// Who wants to write.
        requester: NodeId,
    },
    /// Sharer to requester: my copy is gone.
    Ack,
    /// Home to owner: give the requester a copy, keep one, and write the page back home.
    ForwardShared {
        /// Who wants to read.
        requester: NodeId,
    },
    /// Home to owner: hand the page to the requester.
    ForwardExclusive {
        /// Who wants to write.
        requester: NodeId,
    },
    /// Owner to home, after [`Kind::ForwardShared`]: the bytes as they now are.
    Writeback {
        /// Whether the page's bytes come along (not when owner and home are one node).
        body: bool,
    },
    /// Sharer to home: I drop my copy.
    PutShared,
    /// Owner to home: I give the page back, here are its bytes.
    PutExclusive,
    /// Home to the node that put: noted, you may forget the page.
    PutAck,
    /// Anyone to home: nobody needs the content of this page and of `run` that follow; let it be zero.
    Discard {
        /// `0..512`, all in the page's block.
        run: u16,
    },
    /// Home to owner: hand the page to me; its content is of no use.
    Reclaim,
    /// Home to who sent [`Kind::Discard`]: done with this page and `run` that follow.
    Discarded {
        /// `0..512`.
        run: u16,
    },
    /// Anyone to home: a device reads the page; let me have its bytes, and the page stay as it is.
    Load,
    /// Home to owner: let the requester have the page's bytes.
    LoadAt {
        /// Whose device reads.
        requester: NodeId,
    },
    /// Home or owner to requester: the page's bytes as they are now, for a device.
    Loaded {
        /// Whether they come along; without, something is under way on the page.
        body: bool,
    },
    /// Anyone to home: a device overwrites the page with these bytes.
    Store,
    /// Home to who sent [`Kind::Store`].
    Stored {
        /// Whether it was done; else something is under way on the page.
        done: bool,
    },
    /// Home to requester, instead of the page: it stays where it is, send what you want to do.
    Ship,
    /// Anyone to home: a CPU does this with the page; let it be done where the page is.
    Operate {
        /// Tells the requester's operations on the page apart.
        token: u32,
        /// What is to be done.
        operation: Operation,
    },
    /// Home to owner: do this with your page, and tell the requester.
    OperateAt {
        /// Whose CPU waits.
        requester: NodeId,
        /// The requester's.
        token: u32,
        /// What is to be done.
        operation: Operation,
    },
    /// Home or owner to requester: it was done, once, or it was not done and will not be.
    Operated {
        /// The requester's.
        token: u32,
        /// The bytes before, if it was done.
        old: Option<Bits>,
    },
    /// Home to who could read the page before it was written: read it again, as it is now.
    Push,
    /// Reader to home, after [`Kind::Push`].
    Pushed {
        /// Whether I have it now.
        taken: bool,
    },
}

/// A value of up to 128 bits, as on the wire, and so that it aligns to nothing.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct Bits([u8; 16]);

impl From<u128> for Bits {
    fn from(value: u128) -> Bits {
        Bits(value.to_le_bytes())
    }
}

impl From<Bits> for u128 {
    fn from(bits: Bits) -> u128 {
        u128::from_le_bytes(bits.0)
    }
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", u128::from(*self))
    }
}

impl Kind {
    /// Whether the page's bytes come along.
    pub fn has_body(self) -> bool {
        matches!(
            self,
            Kind::Data { body: true, .. }
                | Kind::Writeback { body: true }
                | Kind::PutExclusive
                | Kind::Loaded { body: true }
                | Kind::Store
                | Kind::Push
        )
    }

    /// One more than the highest [`Kind::code`].
    pub const CODES: usize = 26;

    /// The name of the kind with that [`Kind::code`].
    pub fn name_of(code: u8) -> &'static str {
        const NAMES: [&str; Kind::CODES] = [
            "none",
            "GetShared",
            "GetExclusive",
            "Data",
            "Invalidate",
            "Ack",
            "ForwardShared",
            "ForwardExclusive",
            "Writeback",
            "PutShared",
            "PutExclusive",
            "PutAck",
            "Discard",
            "Reclaim",
            "Discarded",
            "Load",
            "LoadAt",
            "Loaded",
            "Store",
            "Stored",
            "Ship",
            "Operate",
            "OperateAt",
            "Operated",
            "Push",
            "Pushed",
        ];
        NAMES.get(usize::from(code)).copied().unwrap_or("unknown")
    }

    /// The number on the wire and in the trace.
    pub fn code(self) -> u8 {
        match self {
            Kind::GetShared { .. } => 1,
            Kind::GetExclusive { .. } => 2,
            Kind::Data { .. } => 3,
            Kind::Invalidate { .. } => 4,
            Kind::Ack => 5,
            Kind::ForwardShared { .. } => 6,
            Kind::ForwardExclusive { .. } => 7,
            Kind::Writeback { .. } => 8,
            Kind::PutShared => 9,
            Kind::PutExclusive => 10,
            Kind::PutAck => 11,
            Kind::Discard { .. } => 12,
            Kind::Reclaim => 13,
            Kind::Discarded { .. } => 14,
            Kind::Load => 15,
            Kind::LoadAt { .. } => 16,
            Kind::Loaded { .. } => 17,
            Kind::Store => 18,
            Kind::Stored { .. } => 19,
            Kind::Ship => 20,
            Kind::Operate { .. } => 21,
            Kind::OperateAt { .. } => 22,
            Kind::Operated { .. } => 23,
            Kind::Push => 24,
            Kind::Pushed { .. } => 25,
        }
    }
}

/// A message about one page.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash)]
pub struct Message {
    /// The page.
    pub page: Page,
    /// What is said.
    pub kind: Kind,
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::operation::tests::operations;
    use super::*;

    /// Any message to a machine of so many nodes.
    pub fn kinds(nodes: u16) -> impl Strategy<Value = Kind> {
        let node = (0..nodes).prop_map(NodeId);
        prop_oneof![
            (0..=MAX_RUN, any::<bool>()).prop_map(|(run, may_ship)| Kind::GetShared { run, may_ship }),
            (0..=MAX_RUN, any::<bool>()).prop_map(|(run, may_ship)| Kind::GetExclusive { run, may_ship }),
            (any::<bool>(), 0u16..600, any::<bool>(), 0..=MAX_RUN).prop_map(|(x, acks, body, run)| {
                Kind::Data { rights: if x { Rights::Exclusive } else { Rights::Shared }, acks, body, run }
            }),
            node.clone().prop_map(|requester| Kind::Invalidate { requester }),
            Just(Kind::Ack),
            node.clone().prop_map(|requester| Kind::ForwardShared { requester }),
            node.clone().prop_map(|requester| Kind::ForwardExclusive { requester }),
            any::<bool>().prop_map(|body| Kind::Writeback { body }),
            Just(Kind::PutShared),
            Just(Kind::PutExclusive),
            Just(Kind::PutAck),
            (0..100u16).prop_map(|run| Kind::Discard { run }),
            Just(Kind::Reclaim),
            (0..100u16).prop_map(|run| Kind::Discarded { run }),
            Just(Kind::Load),
            node.clone().prop_map(|requester| Kind::LoadAt { requester }),
            any::<bool>().prop_map(|body| Kind::Loaded { body }),
            Just(Kind::Store),
            any::<bool>().prop_map(|done| Kind::Stored { done }),
            Just(Kind::Ship),
            (0u32..3, operations()).prop_map(|(token, operation)| Kind::Operate { token, operation }),
            (node, 0u32..3, operations()).prop_map(|(requester, token, operation)| Kind::OperateAt {
                requester,
                token,
                operation
            }),
            (0u32..3, any::<Option<u128>>())
                .prop_map(|(token, old)| Kind::Operated { token, old: old.map(Bits::from) }),
            Just(Kind::Push),
            any::<bool>().prop_map(|taken| Kind::Pushed { taken }),
        ]
    }
}
