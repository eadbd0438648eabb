//! Recall: the prefetching of pages that were needed together before.
//!
//! What a node loses to another it mostly wants back together: the page tables of a walk, a lock and what it
//! guards. So each shard notes which pages a chain of faults ([`super::chains`]) wrote after its first: they
//! are the first page's *companions*. When that page is missed again, its companions that are gone as well
//! are asked for in parallel instead of one by one.
//!
//! What comes is kept without being mapped: a touch is a cheap local fault, which shows that it was of use. A
//! page that leaves untouched is a companion no more; one that was of use several times is mapped at once.
//! (An idea of temporal and spatial memory streaming, Wenisch et al. 2005, Somogyi et al. 2006.)

use super::chains::Chain;
use crate::page::Page;

/// First pages remembered; a later one with the same place takes it.
const GROUPS: usize = 512;
/// Companions of a page.
const COMPANIONS: usize = 20;
/// One recall in so many is put to the test.
const PROBE: u8 = 16;

/// A page that was needed together with another.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Companion {
    /// The page.
    pub page: Page,
    /// How often it was of use, up to a limit.
    useful: u8,
}

impl Companion {
    /// Whether to map it as soon as it comes. Every few times it is left to a touch to show its use.
    pub fn is_sure(&self) -> bool {
        self.useful >= 2 && !self.useful.is_multiple_of(PROBE)
    }
}

#[derive(Clone, Default)]
struct Group {
    first: Option<Page>,
    companions: Vec<Companion>,
}

/// What one shard remembers.
pub struct Recall {
    groups: Box<[Group]>,
    /// The first page of each thread's last chain.
    chains: Vec<(Chain, Page)>,
}

impl Recall {
    /// Nothing yet.
    pub fn new() -> Recall {
        Recall { groups: vec![Group::default(); GROUPS].into(), chains: Vec::new() }
    }

    fn group(&mut self, first: Page) -> &mut Group {
        let group = &mut self.groups[first.0 as usize % GROUPS];
        if group.first != Some(first) {
            group.first = Some(first);
            group.companions.clear();
        }
        group
    }

    /// Notes that a thread wants to write the page, as part of that chain.
    pub fn wanted(&mut self, page: Page, chain: Chain) {
        let same_thread = |other: &&mut (Chain, Page)| other.0.same_thread(chain);
        let first = match self.chains.iter_mut().find(same_thread) {
            Some((last, first)) if *last == chain => *first,
            Some(last) => {
                *last = (chain, page);
                page
            }
            None => {
                self.chains.push((chain, page));
                page
            }
        };
        if first != page {
            self.of_use(first, page);
        }
    }

    fn of_use(&mut self, first: Page, page: Page) {
        let companions = &mut self.group(first).companions;
        let full = companions.len() == COMPANIONS;
        match companions.iter_mut().find(|c| c.page == page) {
            Some(companion) => companion.useful = companion.useful % (2 * PROBE) + 1,
            None if !full => companions.push(Companion { page, useful: 0 }),
            None => {
                // The place of one that was of least use.
                if let Some(least) = companions.iter_mut().min_by_key(|c| c.useful) {
                    *least = Companion { page, useful: 0 };
                }
            }
        }
    }

    /// What was needed with the page before.
    pub fn companions(&mut self, first: Page, into: &mut Vec<Companion>) {
        into.extend_from_slice(&self.group(first).companions);
    }

    /// A page that was recalled with `first` was touched, or is mapped without waiting for that.
    pub fn touched(&mut self, first: Page, page: Page) {
        self.of_use(first, page);
    }

    /// A page that was recalled with `first` has left untouched.
    pub fn strike(&mut self, first: Page, page: Page) {
        self.group(first).companions.retain(|c| c.page != page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::chains::Chains;

    fn companions(recall: &mut Recall, first: u64) -> Vec<(u64, bool)> {
        let mut found = Vec::new();
        recall.companions(Page(first), &mut found);
        found.into_iter().map(|c| (c.page.0, c.is_sure())).collect()
    }

    /// Faults of one chain, and then so long nothing that the next is another's.
    fn chain(chains: &Chains, recall: &mut Recall, now: &mut u64, pages: &[u64]) {
        for &page in pages {
            let chain = chains.fault(7, *now);
            recall.wanted(Page(page), chain);
            chains.answered(chain, *now);
        }
        *now += 1_000_000_000;
    }

    #[test]
    fn pages_of_a_chain_are_recalled_by_its_first() {
        let (chains, mut recall) = (Chains::new(std::time::Duration::from_micros(100)), Recall::new());
        let mut now = 1_000_000_000;
        chain(&chains, &mut recall, &mut now, &[1, 2, 3]);
        chain(&chains, &mut recall, &mut now, &[8, 9]);
        assert_eq!(companions(&mut recall, 1), [(2, false), (3, false)]);
        assert_eq!(companions(&mut recall, 8), [(9, false)]);
        assert_eq!(companions(&mut recall, 2), []);
    }

    #[test]
    fn a_companion_becomes_sure_by_use_and_is_put_to_the_test_now_and_then() {
        let mut recall = Recall::new();
        let mut sure = Vec::new();
        for _ in 0..66 {
            recall.touched(Page(1), Page(2));
            sure.push(companions(&mut recall, 1)[0].1);
        }
        assert_eq!(sure[..4], [false, false, true, true]);
        let tested = sure[4..].iter().filter(|sure| !**sure).count();
        assert!((3..=9).contains(&tested), "{tested}");
    }

    #[test]
    fn a_companion_that_was_of_no_use_is_forgotten() {
        let mut recall = Recall::new();
        for page in [2, 3] {
            recall.touched(Page(1), Page(page));
        }
        recall.strike(Page(1), Page(2));
        assert_eq!(companions(&mut recall, 1), [(3, false)]);
    }

    #[test]
    fn there_is_room_for_the_most_useful_companions_only() {
        let mut recall = Recall::new();
        for _ in 0..3 {
            recall.touched(Page(1), Page(2));
        }
        for page in 100..200 {
            recall.touched(Page(1), Page(page));
        }
        let found = companions(&mut recall, 1);
        assert_eq!(found.len(), COMPANIONS);
        assert!(found.contains(&(2, true)));
    }
}
