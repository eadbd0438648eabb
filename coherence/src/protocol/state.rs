//! The containers of what the protocol knows of pages: tables that grow where pages are used, and small
//! ordered maps for the few pages on which something is under way.

use std::collections::BTreeMap;
use std::hash::Hash;

use fabric::NodeId;

use super::copies::tree_bytes;
use crate::node_set::{MAX_NODES, NodeSet};
use crate::page::Page;

/// One value a page, in chunks that exist only where a value was ever set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table<T> {
    chunk_pages: u64,
    chunks: BTreeMap<u64, Box<[T]>>,
}

impl<T: Copy + Default> Table<T> {
    /// A table whose chunks hold `chunk_pages` pages.
    pub fn new(chunk_pages: u64) -> Table<T> {
        Table { chunk_pages, chunks: BTreeMap::new() }
    }

    /// The page's value; the default where none was set.
    pub fn get(&self, page: Page) -> T {
        match self.chunks.get(&(page.0 / self.chunk_pages)) {
            Some(chunk) => chunk[(page.0 % self.chunk_pages) as usize],
            None => T::default(),
        }
    }

    /// How many pages from `first` on have a value that is the `same`, `most` at most.
    pub fn run_of(&self, first: Page, most: u64, same: impl Fn(T) -> bool) -> u64 {
        (0..most).take_while(|i| same(self.get(Page(first.0 + i)))).count() as u64
    }

    /// Sets the page's value.
    pub fn set(&mut self, page: Page, value: T) {
        let len = self.chunk_pages as usize;
        let chunk = self
            .chunks
            .entry(page.0 / self.chunk_pages)
            .or_insert_with(|| vec![T::default(); len].into_boxed_slice());
        chunk[(page.0 % self.chunk_pages) as usize] = value;
    }

    /// Bytes that the chunks take.
    pub fn bytes(&self) -> usize {
        self.chunks.len() * self.chunk_pages as usize * size_of::<T>()
    }
}

/// A map over the few pages on which something is under way: a sorted vector that keeps its space, so that
/// a fault allocates nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PageMap<V>(Vec<(Page, V)>);

impl<V> Default for PageMap<V> {
    fn default() -> Self {
        PageMap(Vec::new())
    }
}

impl<V> PageMap<V> {
    fn find(&self, page: Page) -> Result<usize, usize> {
        self.0.binary_search_by_key(&page, |(p, _)| *p)
    }

    /// The page's value.
    pub fn get(&self, page: Page) -> Option<&V> {
        self.find(page).ok().map(|i| &self.0[i].1)
    }

    /// The page's value, to change.
    pub fn get_mut(&mut self, page: Page) -> Option<&mut V> {
        self.find(page).ok().map(|i| &mut self.0[i].1)
    }

    /// The last entry at or before a page.
    pub fn at_or_before(&self, page: Page) -> Option<(Page, &V)> {
        let i = self.find(page).map_or_else(|i| i, |i| i + 1);
        self.0[..i].last().map(|(p, v)| (*p, v))
    }

    /// The first entry after a page.
    pub fn after(&self, page: Page) -> Option<Page> {
        let i = self.find(page).map_or_else(|i| i, |i| i + 1);
        self.0.get(i).map(|(p, _)| *p)
    }

    /// Sets the page's value; the one it had.
    pub fn insert(&mut self, page: Page, value: V) -> Option<V> {
        match self.find(page) {
            Ok(i) => Some(std::mem::replace(&mut self.0[i].1, value)),
            Err(i) => {
                self.0.insert(i, (page, value));
                None
            }
        }
    }

    /// Takes the page's value out.
    pub fn remove(&mut self, page: Page) -> Option<V> {
        self.find(page).ok().map(|i| self.0.remove(i).1)
    }

    /// Takes all values out.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// All pages, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Page, &V)> {
        self.0.iter().map(|(p, v)| (*p, v))
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What the home knows of a page's copies.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// One node may write; its copy is the current one. At power-on that is the home.
    Exclusive(NodeId),
    /// These nodes may read, the home's frame is current. The home is in the set if its guest view maps it.
    Shared(NodeSet),
}

/// The home's side of all pages: an [`Entry`] each, packed in eight bytes.
///
/// `0` is a page that is at its home only. Else the two lowest bits say what the rest is: `1` the owner's
/// id, `2` a bit for each sharer below 62, `3` up to six sharers by id, and
/// whether the home is one too, or, with a count of seven, more than that, kept aside.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Directory {
    home: NodeId,
    packed: Table<u64>,
    large: BTreeMap<Page, [u64; 8]>,
}

impl Directory {
    /// The directory of the pages whose home is `home`.
    pub fn new(home: NodeId, chunk_pages: u64) -> Directory {
        Directory { home, packed: Table::new(chunk_pages), large: BTreeMap::new() }
    }

    /// What is known of a page.
    pub fn get(&self, page: Page) -> Entry {
        let word = self.packed.get(page);
        match word & 3 {
            0 => Entry::Exclusive(self.home),
            1 => Entry::Exclusive(NodeId((word >> 2) as u16)),
            2 => Entry::Shared(NodeSet::from(word >> 2)),
            _ if word >> 2 & COUNT == ASIDE => Entry::Shared(NodeSet::from_words(self.large[&page])),
            _ => Entry::Shared(ids(word).chain((word & HOME_TOO != 0).then_some(self.home)).collect()),
        }
    }

    /// How many pages from `first` on never left the home, `most` at most.
    pub fn untouched_run(&self, first: Page, most: u64) -> u64 {
        self.packed.run_of(first, most, |word| word == 0)
    }

    /// Notes what is now known of a page.
    pub fn set(&mut self, page: Page, entry: Entry) {
        if self.packed.get(page) & 31 == ASIDE << 2 | 3 {
            self.large.remove(&page);
        }
        let word = match entry {
            Entry::Exclusive(owner) if owner == self.home => 0,
            Entry::Exclusive(owner) => u64::from(owner.0) << 2 | 1,
            Entry::Shared(set) => match set.small().filter(|word| word >> 62 == 0) {
                Some(word) => word << 2 | 2,
                None if set.len() - usize::from(set.contains(self.home)) <= MOST_IDS => self.list(set),
                None => {
                    self.large.insert(page, set.words());
                    ASIDE << 2 | 3
                }
            },
        };
        self.packed.set(page, word);
    }

    fn list(&self, mut set: NodeSet) -> u64 {
        let home = if set.remove(self.home) { HOME_TOO } else { 0 };
        let ids = set.iter().enumerate();
        ids.fold(3 | (set.len() as u64) << 2 | home, |word, (i, id)| {
            word | u64::from(id.0) << (FIRST_ID + ID_BITS * i)
        })
    }

    /// Bytes that the directory takes.
    pub fn bytes(&self) -> usize {
        self.packed.bytes() + tree_bytes(self.large.len(), size_of::<(Page, [u64; 8])>())
    }
}

/// Bits of a sharer's id in an entry; enough for [`crate::node_set::MAX_NODES`].
const ID_BITS: usize = 9;

/// Sharers whose ids fit in an entry.
const MOST_IDS: usize = 6;

/// The bits that count them.
const COUNT: u64 = 7;

/// The count that says that there are more.
const ASIDE: u64 = 7;

/// Set if the home has a copy as well.
const HOME_TOO: u64 = 1 << 5;

/// Where the ids begin.
const FIRST_ID: usize = 6;

const _: () =
    assert!(FIRST_ID + ID_BITS * MOST_IDS <= 64 && MAX_NODES <= 1 << ID_BITS && MOST_IDS < ASIDE as usize);

/// The sharers of an entry that lists them.
fn ids(word: u64) -> impl Iterator<Item = NodeId> {
    let id = move |i| word >> (FIRST_ID as u64 + ID_BITS as u64 * i) & ((1 << ID_BITS) - 1);
    (0..word >> 2 & COUNT).map(move |i| NodeId(id(i) as u16))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entries_read_back_and_leave_their_neighbours_alone(
            sets in proptest::collection::vec(
                (0u64..4, proptest::collection::vec(0u16..MAX_NODES as u16, 0..12), any::<bool>()), 1..40)
        ) {
            let mut dir = Directory::new(NodeId(1), 4);
            let mut plain = [Entry::Exclusive(NodeId(1)); 4];
            for (page, ids, low) in sets {
                let entry = match ids[..] {
                    [owner] => Entry::Exclusive(NodeId(owner)),
                    _ => Entry::Shared(ids.iter().map(|id| NodeId(if low { id % 62 } else { *id })).collect()),
                };
                dir.set(Page(page), entry);
                plain[page as usize] = entry;
                for (page, entry) in (0..).zip(plain) {
                    prop_assert_eq!(dir.get(Page(page)), entry);
                }
            }
            let aside = |entry: &&Entry| matches!(entry, Entry::Shared(set) if set.iter().filter(|id| id.0 != 1).count() > MOST_IDS
                && set.iter().any(|id| id.0 >= 62));
            prop_assert_eq!(dir.large.len(), plain.iter().filter(aside).count());
        }
    }

    proptest! {
        #[test]
        fn the_small_map_is_what_a_tree_says(ops in proptest::collection::vec((0u64..20, any::<bool>()), 0..80)) {
            let (mut map, mut tree) = (PageMap::default(), BTreeMap::new());
            for (i, (page, insert)) in ops.into_iter().enumerate() {
                let page = Page(page);
                if insert {
                    prop_assert_eq!(map.insert(page, i), tree.insert(page, i));
                } else {
                    prop_assert_eq!(map.remove(page), tree.remove(&page));
                }
                prop_assert_eq!(map.iter().collect::<Vec<_>>(), tree.iter().map(|(p, v)| (*p, v)).collect::<Vec<_>>());
                prop_assert_eq!(map.at_or_before(page), tree.range(..=page).next_back().map(|(p, v)| (*p, v)));
                prop_assert_eq!(map.after(page), tree.range(page..).find(|(p, _)| **p > page).map(|(p, _)| *p));
            }
        }

        #[test]
        fn a_table_is_what_a_tree_says(
            sets in proptest::collection::vec((0u64..200, 0u8..3), 0..80), chunk in 1u64..40, from in 0u64..220
        ) {
            let (mut table, mut tree) = (Table::new(chunk), BTreeMap::new());
            for (page, value) in sets {
                table.set(Page(page), value);
                tree.insert(page, value);
            }
            let value = |page| tree.get(&page).copied().unwrap_or(0);
            prop_assert!((0..220).all(|page| table.get(Page(page)) == value(page)));
            let run = (from..from + 30).take_while(|&page| value(page) == 0).count() as u64;
            prop_assert_eq!(table.run_of(Page(from), 30, |value| value == 0), run);
        }
    }

    #[test]
    fn an_entry_reads_back_whatever_its_sharers() {
        let mut dir = Directory::new(NodeId(3), 512);
        assert_eq!(dir.get(Page(7)), Entry::Exclusive(NodeId(3)));
        for entry in [
            Entry::Exclusive(NodeId(0)),
            Entry::Shared([0, 61].map(NodeId).into_iter().collect()),
            Entry::Shared([0, 62].map(NodeId).into_iter().collect()),
            Entry::Shared([5, 511].map(NodeId).into_iter().collect()),
            Entry::Exclusive(NodeId(511)),
            Entry::Shared(NodeSet::default()),
            Entry::Exclusive(NodeId(3)),
        ] {
            dir.set(Page(7), entry);
            assert_eq!(dir.get(Page(7)), entry);
        }
        assert!(dir.large.is_empty());
    }

    #[test]
    fn the_small_map_keeps_pages_apart() {
        let mut map = PageMap::default();
        assert_eq!(map.insert(Page(5), 'a'), None);
        assert_eq!(map.insert(Page(2), 'b'), None);
        assert_eq!(map.insert(Page(5), 'c'), Some('a'));
        assert_eq!(map.iter().map(|(p, _)| p.0).collect::<Vec<_>>(), [2, 5]);
        assert_eq!(map.remove(Page(2)), Some('b'));
        assert_eq!((map.get(Page(2)), map.get(Page(5))), (None, Some(&'c')));
    }
}
