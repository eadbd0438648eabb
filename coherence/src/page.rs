//! Guest pages by number: where their home is, and which shard works on them.

use std::ops::Range;

use fabric::NodeId;

/// Bytes in a page: the grain of coherence.
pub const PAGE_SIZE: usize = 4096;

/// Pages in a block: runs, windows and shards' regions have their borders at multiples of it, as huge pages
/// have.
pub const BLOCK: u64 = 512;

/// A page of guest RAM: its index among the RAM pages, holes of the physical address space left out.
#[derive(Copy, Clone, Default, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Page(pub u64);

impl Page {
    /// The page's offset in the guest memory's file and in both views, in bytes.
    pub fn offset(self) -> usize {
        self.0 as usize * PAGE_SIZE
    }
}

/// Which node is the home of which page: each node has one contiguous range of RAM pages, in node order.
#[derive(Clone, Debug, Eq, PartialEq, Hash)]
pub struct Homes {
    /// First page after each node's range.
    ends: Vec<u64>,
}

impl Homes {
    /// From the number of pages of each node.
    pub fn new(pages: impl IntoIterator<Item = u64>) -> Homes {
        let mut end = 0;
        Homes {
            ends: pages
                .into_iter()
                .map(|n| {
                    end += n;
                    end
                })
                .collect(),
        }
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.ends.len()
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The home of a page; the page is below [`Homes::pages`].
    pub fn home(&self, page: Page) -> NodeId {
        NodeId(self.ends.partition_point(|&end| end <= page.0) as u16)
    }

    /// The pages whose home is `node`.
    pub fn range(&self, node: NodeId) -> Range<u64> {
        let i = node.index();
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        start..self.ends[i]
    }
}

/// Which shard works on which page: RAM is cut into equal regions, dealt to the shards in turn.
///
/// A region is at least 2 MiB, so that huge pages stay in one shard, and there are at most 1024 regions, so
/// that a userfaultfd per shard does not cut the mapping into more pieces than the kernel allows.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Shards {
    count: u16,
    region_shift: u32,
}

impl Shards {
    /// `count` shards over `pages` pages.
    pub fn new(count: u16, pages: u64) -> Shards {
        let region = (pages.div_ceil(1024)).next_power_of_two().max(BLOCK);
        Shards { count: count.max(1), region_shift: region.trailing_zeros() }
    }

    /// How many shards there are.
    pub fn count(self) -> u16 {
        self.count
    }

    /// The shard of a page.
    pub fn shard(self, page: Page) -> u16 {
        ((page.0 >> self.region_shift) % u64::from(self.count)) as u16
    }

    /// The parts of `pages` that belong to `shard`.
    pub fn ranges(self, shard: u16, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let regions = (pages.start >> self.region_shift)..(pages.end.div_ceil(1 << self.region_shift));
        regions.filter(move |r| (r % u64::from(self.count)) as u16 == shard).map(move |r| {
            (r << self.region_shift).max(pages.start)..((r + 1) << self.region_shift).min(pages.end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_the_home_whose_range_holds_it() {
        let homes = Homes::new([3, 1, 5]);
        assert_eq!(homes.pages(), 9);
        for n in 0..3 {
            for p in homes.range(NodeId(n)) {
                assert_eq!(homes.home(Page(p)), NodeId(n));
            }
        }
    }

    #[test]
    fn the_shards_ranges_partition_any_range() {
        let shards = Shards::new(3, 10_000);
        let mut seen = vec![0; 10_000];
        for s in 0..3 {
            for r in shards.ranges(s, 100..9_000) {
                for p in r {
                    assert_eq!(shards.shard(Page(p)), s);
                    seen[p as usize] += 1;
                }
            }
        }
        assert!(seen[..100].iter().chain(&seen[9_000..]).all(|&n| n == 0));
        assert!(seen[100..9_000].iter().all(|&n| n == 1));
    }
}
