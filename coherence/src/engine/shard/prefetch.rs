//! Prefetches of a shard: the next pages of a reader, and pages that were needed together before.

use super::super::EngineError;
use super::super::ahead::{ReadAhead, Window};
use super::super::chains::Chain;
use super::super::recall::{Companion, Recall};
use super::Core;
use crate::page::{Homes, Page};
use crate::protocol::PageMap;
use crate::stats::ShardStats;

/// What will be needed, by what was.
pub struct Prefetch {
    read_ahead: ReadAhead,
    recall: Recall,
    /// What a miss recalled, before it is asked for.
    recalled: Vec<Companion>,
    /// Pages that were recalled and not touched yet, and with which page.
    untouched: PageMap<Page>,
}

impl Prefetch {
    /// Nothing is known yet.
    pub fn new(homes: Homes) -> Prefetch {
        Prefetch {
            read_ahead: ReadAhead::new(homes),
            recall: Recall::new(),
            recalled: Vec::with_capacity(64),
            untouched: PageMap::default(),
        }
    }

    /// A thread wants to write the page, as part of that chain.
    pub fn wanted(&mut self, page: Page, chain: Chain) {
        self.recall.wanted(page, chain);
    }

    /// The page is touched: whether it was recalled and this is its first use.
    pub fn used(&mut self, page: Page) -> bool {
        let first = self.untouched.remove(page);
        if let Some(first) = first {
            self.recall.touched(first, page);
        }
        first.is_some()
    }

    /// Whether the page was recalled and nobody has touched it yet.
    pub fn is_untouched(&self, page: Page) -> bool {
        self.untouched.get(page).is_some()
    }

    /// The page leaves; if nobody has touched it, it was recalled in vain.
    pub fn left(&mut self, page: Page) {
        if let Some(first) = self.untouched.remove(page) {
            self.recall.strike(first, page);
        }
    }

    /// Nobody needs the page's content any more, which says nothing of what it was recalled for.
    pub fn forget(&mut self, page: Page) {
        self.untouched.remove(page);
    }

    /// A read of the page must ask another node.
    pub fn missed(&mut self, page: Page) {
        self.read_ahead.missed(page);
    }

    /// The page came: what its reader will need next, if that is known.
    pub fn arrived(&mut self, page: Page) -> Option<Window> {
        self.read_ahead.arrived(page)
    }

    /// The page, which was not mapped, is read: what its reader will need next, if that is known.
    pub fn touched(&mut self, page: Page) -> Option<Window> {
        self.read_ahead.touched(page)
    }

    /// A companion of `page` is asked for: whether it is to be mapped as soon as it comes.
    fn asked(&mut self, page: Page, companion: Companion) -> bool {
        if companion.is_sure() {
            self.recall.touched(page, companion.page);
        } else {
            self.untouched.insert(companion.page, page);
        }
        companion.is_sure()
    }
}

impl Core {
    /// Asks for the pages that a reader will need next.
    pub(super) fn fetch(&mut self, window: Option<Window>) -> Result<(), EngineError> {
        let Some(Window { pages, marker }) = window else { return Ok(()) };
        for page in pages.map(Page) {
            if self.protocol.prefetch(page, false, &mut self.effects) {
                ShardStats::count(&self.stats.prefetches);
                if page != marker {
                    // A fault that nobody waits for: the page is mapped when it comes.
                    self.protocol.fault(page, false, &mut self.effects);
                }
            }
        }
        self.apply_together()
    }

    /// Asks for what was needed together with this page before.
    pub(super) fn prefetch_companions(&mut self, page: Page) -> Result<(), EngineError> {
        let mut recalled = std::mem::take(&mut self.prefetch.recalled);
        self.prefetch.recall.companions(page, &mut recalled);
        for companion in recalled.drain(..) {
            if self.protocol.prefetch(companion.page, true, &mut self.effects) {
                ShardStats::count(&self.stats.prefetches);
                if self.prefetch.asked(page, companion) {
                    // A fault that nobody waits for: the page is mapped when it comes.
                    self.protocol.fault(companion.page, true, &mut self.effects);
                }
            }
        }
        self.prefetch.recalled = recalled;
        self.apply_together()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn companions(prefetch: &mut Prefetch, first: u64) -> Vec<Companion> {
        let mut found = Vec::new();
        prefetch.recall.companions(Page(first), &mut found);
        found
    }

    /// Page 2 was needed with page 1 once, and is asked for again.
    fn recalled() -> Prefetch {
        let mut prefetch = Prefetch::new(Homes::new([8, 8]));
        prefetch.recall.touched(Page(1), Page(2));
        let companion = companions(&mut prefetch, 1)[0];
        assert!(!prefetch.asked(Page(1), companion), "one use does not make sure");
        assert!(prefetch.is_untouched(Page(2)));
        prefetch
    }

    #[test]
    fn a_recalled_page_is_used_once_and_sure_after_some_uses() {
        let mut prefetch = recalled();
        assert!(prefetch.used(Page(2)));
        assert!(!prefetch.used(Page(2)) && !prefetch.is_untouched(Page(2)));
        let companion = companions(&mut prefetch, 1)[0];
        prefetch.asked(Page(1), companion);
        prefetch.used(Page(2));
        let companion = companions(&mut prefetch, 1)[0];
        assert!(prefetch.asked(Page(1), companion));
        assert!(!prefetch.is_untouched(Page(2)), "it is mapped when it comes");
    }

    #[test]
    fn a_recalled_page_that_leaves_untouched_is_recalled_no_more() {
        let mut prefetch = recalled();
        prefetch.left(Page(2));
        assert_eq!(companions(&mut prefetch, 1), []);
        assert!(!prefetch.used(Page(2)));
    }

    #[test]
    fn a_recalled_page_whose_content_is_discarded_stays_a_companion() {
        let mut prefetch = recalled();
        prefetch.forget(Page(2));
        assert!(!prefetch.is_untouched(Page(2)));
        assert_eq!(companions(&mut prefetch, 1).len(), 1);
    }
}
