//! A set of nodes, for the sharers of a page.

use fabric::NodeId;

/// Nodes a machine can have.
pub const MAX_NODES: usize = 512;

/// A set of node ids below [`MAX_NODES`].
#[derive(Copy, Clone, Debug, Default, Eq, PartialEq, Hash)]
pub struct NodeSet([u64; MAX_NODES / 64]);

impl NodeSet {
    /// Adds a node.
    pub fn insert(&mut self, node: NodeId) {
        self.0[node.index() / 64] |= 1 << (node.0 % 64);
    }

    /// Takes a node out; whether it was in.
    pub fn remove(&mut self, node: NodeId) -> bool {
        let was = self.contains(node);
        self.0[node.index() / 64] &= !(1 << (node.0 % 64));
        was
    }

    /// Whether a node is in.
    pub fn contains(&self, node: NodeId) -> bool {
        self.0[node.index() / 64] >> (node.0 % 64) & 1 == 1
    }

    /// How many nodes are in.
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether no node is in.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; MAX_NODES / 64]
    }

    /// The nodes, in order.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + use<> {
        let words = self.0;
        (0..MAX_NODES / 64).flat_map(move |w| {
            let mut rest = words[w];
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros();
                rest &= rest.checked_sub(1)?;
                Some(NodeId((w * 64) as u16 + bit as u16))
            })
        })
    }

    /// The set as words; bit `n % 64` of word `n / 64` is node `n`.
    pub(crate) fn words(&self) -> [u64; MAX_NODES / 64] {
        self.0
    }

    /// The set from its words.
    pub(crate) fn from_words(words: [u64; MAX_NODES / 64]) -> NodeSet {
        NodeSet(words)
    }

    /// The first word, if no node above 63 is in.
    pub(crate) fn small(&self) -> Option<u64> {
        self.0[1..].iter().all(|&w| w == 0).then_some(self.0[0])
    }
}

impl From<u64> for NodeSet {
    /// Bit `n` is node `n`.
    fn from(word: u64) -> NodeSet {
        let mut set = NodeSet::default();
        set.0[0] = word;
        set
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> NodeSet {
        let mut set = NodeSet::default();
        nodes.into_iter().for_each(|n| set.insert(n));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iterates_in_order_over_what_was_inserted() {
        let ids = [0, 1, 63, 64, 200, 511].map(NodeId);
        let mut set: NodeSet = ids.into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), ids);
        assert!(set.remove(NodeId(64)) && !set.remove(NodeId(64)));
        assert_eq!(set.len(), 5);
        assert_eq!(set.small(), None);
    }
}
