//! Prefetching what came after a miss the last time.
//!
//! What a node loses to another it mostly wants back in the same order: page tables from the root down, a lock
//! and then what it guards. So each shard keeps a log of its misses, and a miss on a page that is in the log
//! recalls those that followed it there; they are asked for in parallel instead of one by one.
//!
//! What comes is kept without being mapped: a touch is a cheap local fault, which shows that the page was worth
//! it and puts it in the log again. A page that leaves untouched is struck from the log; one that was of use
//! several times in a row is mapped at once. (The idea is that of
//! temporal streams: Wenisch et al., "Temporal Streaming of Shared Memory", ISCA 2005.)

use crate::page::Page;
use crate::protocol::Rights;

/// Misses remembered.
const LOG: usize = 1024;
/// Places in which a page's last entry is looked up.
const INDEX: usize = 4096;
/// How many misses are recalled at a time.
const DEPTH: usize = 12;

/// One recall in so many is put to the test.
const PROBE: u8 = 8;

/// A miss that was.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The page.
    pub page: Page,
    /// What was wanted of it.
    pub want: Rights,
    /// How many times in a row its recall was of use.
    pub useful: u8,
}

impl Entry {
    /// Whether to map the page as soon as it comes. The last recalls were of use, then; every few times it is
    /// left to a touch to show that they still are.
    pub fn is_sure(&self) -> bool {
        self.useful >= 2 && !self.useful.is_multiple_of(PROBE)
    }
}

/// The log of one shard.
pub struct Recall {
    log: Box<[Option<Entry>]>,
    /// Entries ever written; entry `n` is at `n % LOG`.
    next: usize,
    /// By page number modulo its length: where the page's last entry may be.
    index: Box<[usize]>,
}

impl Recall {
    /// An empty log.
    pub fn new() -> Recall {
        Recall { log: vec![None; LOG].into(), next: 0, index: vec![usize::MAX; INDEX].into() }
    }

    fn last(&self, page: Page) -> Option<usize> {
        let at = self.index[page.0 as usize % INDEX];
        let known = at < self.next && self.next - at <= LOG;
        (known && self.log[at % LOG].is_some_and(|entry| entry.page == page)).then_some(at)
    }

    /// Notes a miss; `followers` gets what followed the page's last one, the page itself left out.
    pub fn miss(&mut self, page: Page, want: Rights, followers: &mut Vec<Entry>) {
        if let Some(at) = self.last(page) {
            let end = (at + 1 + DEPTH).min(self.next);
            followers.extend((at + 1..end).filter_map(|n| self.log[n % LOG]).filter(|e| e.page != page));
        }
        self.note(Entry { page, want, useful: 0 });
    }

    /// The page was recalled and is of use.
    pub fn used(&mut self, page: Page, want: Rights) {
        let useful = self.last(page).and_then(|at| self.log[at % LOG]).map_or(0, |entry| entry.useful);
        self.note(Entry { page, want, useful: useful.wrapping_add(1).max(1) });
    }

    fn note(&mut self, entry: Entry) {
        let page = entry.page;
        self.log[self.next % LOG] = Some(entry);
        self.index[page.0 as usize % INDEX] = self.next;
        self.next += 1;
    }

    /// The page was recalled and nobody touched it.
    pub fn strike(&mut self, page: Page) {
        if let Some(at) = self.last(page) {
            self.log[at % LOG] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn miss(recall: &mut Recall, page: u64) -> Vec<u64> {
        let mut followers = Vec::new();
        recall.miss(Page(page), Rights::Shared, &mut followers);
        followers.into_iter().map(|e| e.page.0).collect()
    }

    #[test]
    fn a_miss_recalls_what_followed_it_the_last_time() {
        let mut recall = Recall::new();
        for page in [1, 2, 3, 9] {
            assert_eq!(miss(&mut recall, page), []);
        }
        assert_eq!(miss(&mut recall, 2), [3, 9]);
        assert_eq!(miss(&mut recall, 2), []);
    }

    #[test]
    fn what_was_struck_is_recalled_no_more_until_it_is_missed_again() {
        let mut recall = Recall::new();
        for page in [1, 2, 3] {
            miss(&mut recall, page);
        }
        recall.strike(Page(2));
        assert_eq!(miss(&mut recall, 1), [3]);
        for page in [2, 3] {
            miss(&mut recall, page);
        }
        assert_eq!(miss(&mut recall, 1), [2, 3]);
    }

    #[test]
    fn a_page_that_was_of_use_again_and_again_is_sure_but_put_to_the_test() {
        let mut recall = Recall::new();
        miss(&mut recall, 2);
        let mut sure = Vec::new();
        for _ in 0..32 {
            recall.used(Page(2), Rights::Shared);
            sure.push(recall.log[recall.last(Page(2)).unwrap() % LOG].unwrap().is_sure());
        }
        assert_eq!(sure[..3], [false, true, true]);
        assert_eq!(sure.iter().filter(|sure| !**sure).count(), 5);
        miss(&mut recall, 2);
        assert!(!recall.log[recall.last(Page(2)).unwrap() % LOG].unwrap().is_sure());
    }

    #[test]
    fn the_log_forgets_what_is_old() {
        let mut recall = Recall::new();
        for page in 0..LOG as u64 + 2 {
            miss(&mut recall, page);
        }
        assert_eq!(miss(&mut recall, 0), []);
        assert_eq!(miss(&mut recall, 5).len(), DEPTH);
    }
}
