//! The rules by which a home delegates its pages: from what it sees of them, which is who asks for them when, and the
//! operations that come. Pure; the time comes with each question.
//!
//! ```text
//!               `changes` changes of hands, each within `quick`
//!  moving ───────────────────────────────────────────────────────> delegated
//!   ▲  ▲                                                            │   │
//!   │  └─ `cold`, or most of those who come need the page itself ───┘   │ one node makes nine tenths
//!   │                                                                   │ of `window` operations
//!   └─ kept longer than `quick` ── on trial with that node <────────────┘
//!                                        │ taken away within `quick`: delegated again, `window` doubled
//! ```
//! What a home cannot see is what the owner itself does with the page: it costs no message. So that one node alone
//! sends operations may mean that it alone uses the page, or that it shares it with the owner. The page goes to that
//! node *on trial*, which shows. Since the window doubles with each trial that fails, these cost a part of the
//! operations that goes to zero, and nothing swings to and fro.

use fabric::NodeId;

use super::state::PageMap;
use crate::page::Page;

/// When a page is delegated, and when no more. Times are microseconds.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    /// A page that changes hands again within this is hot.
    pub quick: u64,
    /// So many such changes delegate it.
    pub changes: u8,
    /// Operations of which one node makes nine tenths before it has the page on trial, at first.
    pub window: u16,
    /// A delegated page that nobody operates on for so long is moving again.
    pub cold: u64,
    /// Pages of one shard that are delegated at a time.
    pub most: usize,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { quick: 8_000, changes: 6, window: 64, cold: 2_000_000, most: 256 }
    }
}

/// Moving pages that are watched: a page takes the place of another that the same slot watched.
const SLOTS: usize = 256;

/// The longest window.
const LONGEST: u16 = 1 << 15;

/// How much more than an operation a demand for the page itself weighs against delegation.
const MISFIT: u16 = 8;

/// The weight at which delegation ends.
const UNFIT: u16 = 64;

/// The most doublings of the changes that it takes to delegate a page that did not fit.
const MOST_STRIKES: u8 = 8;

/// What is remembered of a page when its class changes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Past {
    window: u16,
    /// How often the page was delegated and did not fit.
    strikes: u8,
}

/// A moving page that is watched.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Candidate {
    page: Page,
    past: Past,
    /// When it last changed hands.
    since: u64,
    /// Quick changes of hands.
    heat: u16,
    /// Who has it, or is to have it, on trial.
    trial: Option<NodeId>,
}

/// A delegated page.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Delegated {
    past: Past,
    /// When it was last operated on.
    last: u64,
    /// Who may be the one that makes most of the operations.
    by: NodeId,
    /// Operations since it may be, and those of others.
    operations: u16,
    strays: u16,
    misfits: u16,
}

/// What a home has seen of its pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Classifier {
    rules: Rules,
    candidates: Vec<Option<Candidate>>,
    delegated: PageMap<Delegated>,
}

impl Classifier {
    pub(super) fn new(rules: Rules) -> Classifier {
        Classifier { rules, candidates: vec![None; SLOTS], delegated: PageMap::default() }
    }

    /// Whether the page is delegated.
    pub(super) fn is_delegated(&self, page: Page) -> bool {
        self.delegated.get(page).is_some()
    }

    /// How many pages are delegated.
    pub(super) fn delegated(&self) -> usize {
        self.delegated.len()
    }

    /// Bytes that this takes.
    pub(super) fn bytes(&self) -> usize {
        self.candidates.len() * size_of::<Option<Candidate>>()
            + self.delegated.len() * size_of::<(Page, Delegated)>()
    }

    /// Somebody asks for a page that another node has; whether who asks can do without.
    pub(super) fn wanted(&mut self, page: Page, by: NodeId, may_ship: bool, now: u64) {
        if let Some(known) = self.delegated.get_mut(page) {
            if !may_ship {
                known.misfits += MISFIT;
                if known.misfits > UNFIT {
                    let strikes = (known.past.strikes + 1).min(MOST_STRIKES);
                    let past = Past { strikes, ..known.past };
                    self.end(page, past, None, now);
                }
            } else if now.saturating_sub(known.last) > self.rules.cold {
                let past = known.past;
                self.end(page, past, None, now);
            }
            return;
        }
        // What moves in any case is not worth watching.
        if may_ship && let Some(past) = self.heat_up(page, by, now) {
            self.candidates[slot(page)] = None;
            self.delegate(page, past, now);
        }
    }

    /// A moving page changes hands; what is known of it if that is once too often.
    fn heat_up(&mut self, page: Page, by: NodeId, now: u64) -> Option<Past> {
        let Rules { quick, changes, window, .. } = self.rules;
        let slot = &mut self.candidates[slot(page)];
        let known = match slot {
            Some(known) if known.page == page => known,
            // A page that is hotter defends its slot for a while.
            Some(other) if other.heat > 0 && now.saturating_sub(other.since) <= quick => {
                other.heat -= 1;
                return None;
            }
            _ => {
                let past = Past { window, strikes: 0 };
                *slot = Some(Candidate { page, past, since: now, heat: 0, trial: None });
                return None;
            }
        };
        let residency = now.saturating_sub(known.since);
        known.since = now;
        if known.trial == Some(by) {
            return None;
        }
        if residency > quick {
            known.heat /= 2;
            if known.trial.take().is_some() {
                known.past = Past { window: (known.past.window / 2).max(window), strikes: 0 };
            }
            return None;
        }
        known.heat = known.heat.saturating_add(1);
        let enough =
            known.trial.take().is_some() || u32::from(known.heat) >= u32::from(changes) << known.past.strikes;
        enough.then_some(known.past)
    }

    fn delegate(&mut self, page: Page, past: Past, now: u64) {
        if self.delegated.len() >= self.rules.most {
            let coldest = self.delegated.iter().min_by_key(|(_, known)| known.last);
            let Some((coldest, known)) = coldest.map(|(page, known)| (page, *known)) else { return };
            if now.saturating_sub(known.last) <= self.rules.cold {
                return;
            }
            self.end(coldest, known.past, None, now);
        }
        let by = NodeId(u16::MAX);
        let known = Delegated { past, last: now, by, operations: 0, strays: 0, misfits: 0 };
        self.delegated.insert(page, known);
    }

    /// Delegates a page, whatever is known of it.
    pub(super) fn tell(&mut self, page: Page, delegated: bool, now: u64) {
        match delegated {
            true => self.delegate(page, Past { window: self.rules.window, strikes: 0 }, now),
            false => drop(self.delegated.remove(page)),
        }
    }

    /// The page is moving again.
    fn end(&mut self, page: Page, past: Past, trial: Option<NodeId>, now: u64) {
        self.delegated.remove(page);
        self.candidates[slot(page)] = Some(Candidate { page, past, since: now, heat: 0, trial });
    }

    /// Somebody operates on the page; afterwards it may not be delegated any more.
    pub(super) fn operated(&mut self, page: Page, by: NodeId, now: u64) {
        let Some(known) = self.delegated.get_mut(page) else { return };
        if now.saturating_sub(known.last) > self.rules.cold {
            let past = known.past;
            return self.end(page, past, None, now);
        }
        known.last = now;
        known.misfits = known.misfits.saturating_sub(1);
        known.operations += 1;
        known.strays += u16::from(known.by != by);
        if u32::from(known.strays) * 10 > u32::from(known.operations) {
            (known.by, known.operations, known.strays) = (by, 1, 0);
        }
        if known.operations >= known.past.window && known.by == by {
            let window = known.past.window.saturating_mul(2).min(LONGEST);
            let past = Past { window, ..known.past };
            self.end(page, past, Some(by), now);
        }
    }
}

/// The slot that may watch a page.
fn slot(page: Page) -> usize {
    // Fibonacci hashing (Knuth, volume 3, section 6.4).
    (page.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Page = Page(7);
    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);

    /// A page that two nodes have taken from each other until it was delegated.
    fn hot() -> (Classifier, u64) {
        let mut classifier = Classifier::new(Rules::default());
        let mut now = 0;
        for turn in 0..=6 {
            assert!(!classifier.is_delegated(PAGE), "after {turn} turns");
            now += 1_000;
            classifier.wanted(PAGE, if turn % 2 == 0 { A } else { B }, true, now);
        }
        assert!(classifier.is_delegated(PAGE));
        (classifier, now)
    }

    #[test]
    fn a_page_that_changes_hands_quickly_is_delegated_and_one_that_is_kept_is_not() {
        hot();
        let mut classifier = Classifier::new(Rules::default());
        for turn in 0..1000 {
            classifier.wanted(PAGE, if turn % 2 == 0 { A } else { B }, true, turn * 9_000);
        }
        assert!(!classifier.is_delegated(PAGE));
    }

    #[test]
    fn a_page_that_must_move_is_not_delegated_and_one_that_mostly_must_is_not_for_long() {
        let mut classifier = Classifier::new(Rules::default());
        (0..1000).for_each(|now| classifier.wanted(PAGE, A, false, now));
        assert!(!classifier.is_delegated(PAGE));
        let (mut classifier, now) = hot();
        for _ in 0..10 {
            classifier.operated(PAGE, A, now);
            classifier.wanted(PAGE, B, false, now);
        }
        assert!(!classifier.is_delegated(PAGE));
        // It takes twice as much from now on.
        let turns = (0..100).take_while(|turn| {
            classifier.wanted(PAGE, if turn % 2 == 0 { A } else { B }, true, now + turn);
            !classifier.is_delegated(PAGE)
        });
        assert_eq!(turns.count(), 11);
    }

    /// Operations of one node until it has the page on trial.
    fn until_trial(classifier: &mut Classifier, by: NodeId, now: u64) -> u64 {
        let count = (1..100_000).take_while(|_| {
            classifier.operated(PAGE, by, now);
            classifier.is_delegated(PAGE)
        });
        count.count() as u64 + 1
    }

    #[test]
    fn trials_that_fail_become_rare_and_one_that_succeeds_lets_the_page_move() {
        let (mut classifier, now) = hot();
        let mut operations = 0;
        for trial in 0..9 {
            let window = until_trial(&mut classifier, A, now);
            assert_eq!(window, 64 << trial);
            operations += window;
            // It gets the page, and the owner, who used it too, wants it back at once.
            classifier.wanted(PAGE, A, true, now);
            assert!(!classifier.is_delegated(PAGE));
            classifier.wanted(PAGE, B, true, now + 100);
            assert!(classifier.is_delegated(PAGE));
        }
        assert!(operations > 9 * 1000, "a trial in a thousand operations and less");
        until_trial(&mut classifier, A, now);
        classifier.wanted(PAGE, A, true, now);
        classifier.wanted(PAGE, B, true, now + 50_000);
        assert!(!classifier.is_delegated(PAGE), "it alone used the page");
    }

    #[test]
    fn a_page_that_several_nodes_operate_on_stays_delegated() {
        let (mut classifier, now) = hot();
        for turn in 0..100_000 {
            classifier.operated(PAGE, if turn % 7 == 0 { C } else { A }, now);
            assert!(classifier.is_delegated(PAGE));
        }
    }

    #[test]
    fn a_page_that_has_gone_cold_moves_again_and_makes_room_for_another() {
        let (mut classifier, now) = hot();
        classifier.operated(PAGE, A, now + 2_000_001);
        assert!(!classifier.is_delegated(PAGE));

        let mut classifier = Classifier::new(Rules { most: 2, ..Rules::default() });
        for page in [1, 2, 3].map(Page) {
            classifier.tell(page, true, 0);
        }
        assert_eq!((classifier.delegated(), classifier.is_delegated(Page(3))), (2, false));
        classifier.operated(Page(1), A, 1_000_000);
        classifier.tell(Page(3), true, 2_500_000);
        assert!(classifier.is_delegated(Page(1)) && classifier.is_delegated(Page(3)));
    }

    #[test]
    fn what_is_remembered_stays_within_its_bounds() {
        let mut classifier = Classifier::new(Rules::default());
        for page in (0..5_000).map(Page) {
            for turn in 0..10 {
                classifier.wanted(page, if turn % 2 == 0 { A } else { B }, true, turn);
            }
        }
        assert_eq!(classifier.delegated(), 256);
        assert!(classifier.bytes() < 64 << 10, "{} bytes", classifier.bytes());
    }
}
