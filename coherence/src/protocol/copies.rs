//! The table of a node's copies: pages whose home is another node. Pages that are not here take no room in
//! it, and the others so little that the tables of a whole cluster take a fraction of a percent of its
//! memory.

use std::collections::BTreeMap;

use crate::page::Page;

/// Pages in a word.
const BLOCK: u64 = 16;

/// The two lowest of a page's four bits, its rights, for all pages of a word.
const RIGHTS: u64 = 0x3333_3333_3333_3333;

/// Four bits a page, of which the two lowest are its rights; 16 pages a word, and no word that is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Copies {
    words: BTreeMap<u64, u64>,
    here: usize,
}

impl Copies {
    /// The page's bits; 0 if nothing of it is here.
    pub fn get(&self, page: Page) -> u8 {
        let word = self.words.get(&(page.0 / BLOCK)).copied().unwrap_or(0);
        (word >> (page.0 % BLOCK * 4) & 15) as u8
    }

    /// Sets the page's bits.
    pub fn set(&mut self, page: Page, bits: u8) {
        let (key, shift) = (page.0 / BLOCK, page.0 % BLOCK * 4);
        let before = self.words.get(&key).copied().unwrap_or(0);
        let after = before & !(15 << shift) | u64::from(bits & 15) << shift;
        self.here -= usize::from(before >> shift & 3 != 0);
        self.here += usize::from(bits & 3 != 0);
        match after {
            0 => self.words.remove(&key),
            _ => self.words.insert(key, after),
        };
    }

    /// How many pages are here, with any rights.
    pub fn here(&self) -> usize {
        self.here
    }

    /// The first page from `page` on that is here.
    pub fn at_or_after(&self, page: Page) -> Option<Page> {
        let (first, skip) = (page.0 / BLOCK, page.0 % BLOCK * 4);
        self.words.range(first..).find_map(|(&key, &word)| {
            let rights = if key == first { word & RIGHTS >> skip << skip } else { word & RIGHTS };
            (rights != 0).then(|| Page(key * BLOCK + u64::from(rights.trailing_zeros() / 4)))
        })
    }

    /// Bytes that this takes at most: the nodes of a B-tree are at least half full, but for one.
    pub fn bytes(&self) -> usize {
        tree_bytes(self.words.len(), size_of::<(u64, u64)>())
    }
}

/// Bytes of a [`BTreeMap`] with so many entries of that size, at most.
pub fn tree_bytes(entries: usize, entry: usize) -> usize {
    // Leaves of at most 11 entries have 16 bytes of their own; inner nodes, one for six leaves at least, also
    // have 12 pointers.
    let leaves = entries.div_ceil(6);
    let node = 11 * entry + 16;
    leaves * node + leaves.div_ceil(6) * (node + 12 * size_of::<usize>())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn copies_are_what_a_plain_map_says(
            sets in proptest::collection::vec((0u64..100, 0u8..16), 0..200), from in 0u64..120
        ) {
            let (mut copies, mut plain) = (Copies::default(), BTreeMap::new());
            for (page, bits) in sets {
                copies.set(Page(page), bits);
                plain.insert(page, bits);
            }
            for page in 0..100 {
                prop_assert_eq!(copies.get(Page(page)), plain.get(&page).copied().unwrap_or(0));
            }
            let here = |(_, bits): &(&u64, &u8)| **bits & 3 != 0;
            prop_assert_eq!(copies.here(), plain.iter().filter(here).count());
            let next = plain.range(from..).find(here).map(|(page, _)| Page(*page));
            prop_assert_eq!(copies.at_or_after(Page(from)), next);
            // What is not here costs nothing.
            plain.keys().for_each(|&page| copies.set(Page(page), 0));
            prop_assert_eq!(copies.bytes(), 0);
            prop_assert_eq!(copies, Copies::default());
        }
    }
}
