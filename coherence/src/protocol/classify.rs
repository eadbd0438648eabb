//! The rules by which a home delegates and pushes its pages: from what it sees of them, which is who asks for
//! them when, and the operations that come. Pure; the time comes with each question.
//!
//! ```text
//!               `changes` changes of hands, each within `quick`:
//!               one node writes and several read ──────────────────> pushed
//!               else ──────────────────────────────────────────────> delegated
//!  moving ──────────────────────────────────────────────────────────────┘
//!   ▲  ▲                                                            │   │
//!   │  └─ `cold`, or most of those who come do not fit the class ───┘   │ one node makes nine tenths
//!   │                                                                   │ of `window` operations
//!   └─ kept longer than `quick` ── on trial with that node <────────────┘
//!                                        │ taken away within `quick`: delegated again, `window` doubled
//! ```
//! What a home cannot see is what the owner itself does with the page: it costs no message. So that one node
//! alone sends operations may mean that it alone uses the page, or that it shares it with the owner. The page
//! goes to that node *on trial*, which shows. Since the window doubles with each trial that fails, these cost
//! a part of the operations that goes to zero, and nothing swings to and fro.
//!
//! Nor can a home see whether what it pushes is read. So one write in [`SURVEY`] is not pushed: who then asks
//! is a reader still.

use fabric::NodeId;

use super::Class;
use super::state::PageMap;
use crate::page::Page;

/// When a page is delegated or pushed, and when no more. Times are microseconds.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    /// A page that changes hands again within this is hot.
    pub quick: u64,
    /// So many such changes delegate it.
    pub changes: u8,
    /// Operations of which one node makes nine tenths before it has the page on trial, at first.
    pub window: u16,
    /// A page that nobody operates on, or writes, for so long is moving again.
    pub cold: u64,
    /// Pages of one shard that are delegated or pushed at a time.
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

/// How much more than a demand that fits its class one weighs that does not.
const MISFIT: u16 = 8;

/// The weight at which a class ends.
const UNFIT: u16 = 64;

/// Readers who make it worth while to push.
const READERS: usize = 2;

/// Of so many writes one is not pushed, to see who asks.
const SURVEY: u32 = 32;

/// Surveys in a row after which hardly anybody asked, before a page is pushed no more.
const MOST_UNREAD: u8 = 2;

/// Times that a page did not fit its class, after which it is not pushed again.
const MOST_PUSHED: u8 = 3;

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
    /// Who wrote it last, and how often in a row, each time after several had read it.
    writer: NodeId,
    writes: u16,
    /// Who has it, or is to have it, on trial.
    trial: Option<NodeId>,
}

/// A page that is not moving.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Special {
    past: Past,
    /// When it was last operated on, or written.
    last: u64,
    /// Demands that did not fit, against those that did.
    misfits: u16,
    how: How,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
enum How {
    Delegated {
        /// Who may be the one that makes most of the operations.
        by: NodeId,
        /// Operations since it may be, and those of others.
        operations: u16,
        strays: u16,
    },
    Pushed {
        writer: NodeId,
        writes: u32,
        /// Surveys in a row after which hardly anybody asked.
        unread: u8,
    },
}

/// A demand for a page that other nodes have.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct Demanded {
    pub(super) by: NodeId,
    /// Whether who asks can do without the page.
    pub(super) may_ship: bool,
    pub(super) write: bool,
    /// How many others can read the page, none of whom can write it.
    pub(super) readers: usize,
}

/// What a home has seen of its pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Classifier {
    rules: Rules,
    candidates: Vec<Option<Candidate>>,
    special: PageMap<Special>,
}

impl Classifier {
    pub(super) fn new(rules: Rules) -> Classifier {
        Classifier { rules, candidates: vec![None; SLOTS], special: PageMap::default() }
    }

    /// The page's class.
    pub(super) fn class(&self, page: Page) -> Class {
        match self.special.get(page).map(|known| known.how) {
            None => Class::Moving,
            Some(How::Delegated { .. }) => Class::Delegated,
            Some(How::Pushed { .. }) => Class::Pushed,
        }
    }

    /// How many pages are not moving.
    pub(super) fn special(&self) -> usize {
        self.special.len()
    }

    /// Bytes that this takes.
    pub(super) fn bytes(&self) -> usize {
        self.candidates.len() * size_of::<Option<Candidate>>()
            + self.special.len() * size_of::<(Page, Special)>()
    }

    /// Whether the write that was just asked for is one that is not pushed.
    pub(super) fn surveys(&self, page: Page) -> bool {
        let how = self.special.get(page).map(|known| known.how);
        matches!(how, Some(How::Pushed { writes, .. }) if writes % SURVEY == 0)
    }

    /// Somebody asks for a page that other nodes have.
    pub(super) fn wanted(&mut self, page: Page, demanded: Demanded, now: u64) {
        let Some(known) = self.special.get_mut(page) else {
            // What moves in any case is not worth watching.
            if demanded.may_ship
                && let Some((past, how)) = self.heat_up(page, demanded, now)
            {
                self.candidates[slot(page)] = None;
                self.begin(page, past, how, now);
            }
            return;
        };
        let is_cold = now.saturating_sub(known.last) > self.rules.cold;
        let fits = match &mut known.how {
            How::Delegated { .. } => (!demanded.may_ship).then_some(false),
            How::Pushed { writer, writes, unread } if demanded.write => {
                known.last = now;
                if *writer == NOBODY {
                    *writer = demanded.by;
                }
                // After a survey, those who asked are all who read.
                if *writes > 0 && *writes % SURVEY == 0 {
                    *unread = if demanded.readers < READERS { *unread + 1 } else { 0 };
                }
                *writes = writes.wrapping_add(1);
                if *unread == MOST_UNREAD {
                    known.misfits = UNFIT;
                }
                Some(*unread < MOST_UNREAD && *writer == demanded.by)
            }
            How::Pushed { .. } => None,
        };
        known.misfits = match fits {
            Some(true) => known.misfits.saturating_sub(1),
            Some(false) => known.misfits + MISFIT,
            None => known.misfits,
        };
        if known.misfits > UNFIT || is_cold {
            let strikes = (known.past.strikes + u8::from(!is_cold)).min(MOST_STRIKES);
            let past = Past { strikes, ..known.past };
            self.end(page, past, None, now);
        }
    }

    /// A moving page changes hands; what is to be done with it if that is once too often.
    fn heat_up(&mut self, page: Page, demanded: Demanded, now: u64) -> Option<(Past, How)> {
        let Demanded { by, write, readers, .. } = demanded;
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
                let (writer, trial) = (NOBODY, None);
                *slot = Some(Candidate { page, past, since: now, heat: 0, writer, writes: 0, trial });
                return None;
            }
        };
        let residency = now.saturating_sub(known.since);
        known.since = now;
        if write {
            let again = known.writer == by && readers >= READERS;
            known.writer = by;
            known.writes = if again { known.writes.saturating_add(1) } else { 0 };
        }
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
        let pushed = known.writes >= 2 && known.past.strikes < MOST_PUSHED;
        let how = match pushed {
            true => How::Pushed { writer: known.writer, writes: 0, unread: 0 },
            false => How::Delegated { by: NOBODY, operations: 0, strays: 0 },
        };
        enough.then_some((known.past, how))
    }

    fn begin(&mut self, page: Page, past: Past, how: How, now: u64) {
        if self.special.len() >= self.rules.most {
            let coldest = self.special.iter().min_by_key(|(_, known)| known.last);
            let Some((coldest, known)) = coldest.map(|(page, known)| (page, *known)) else { return };
            if now.saturating_sub(known.last) <= self.rules.cold {
                return;
            }
            self.end(coldest, known.past, None, now);
        }
        self.special.insert(page, Special { past, last: now, misfits: 0, how });
    }

    /// Gives a page a class, whatever is known of it.
    pub(super) fn tell(&mut self, page: Page, class: Class, now: u64) {
        self.special.remove(page);
        let past = Past { window: self.rules.window, strikes: 0 };
        match class {
            Class::Moving => {}
            Class::Delegated => {
                self.begin(page, past, How::Delegated { by: NOBODY, operations: 0, strays: 0 }, now);
            }
            Class::Pushed => {
                self.begin(page, past, How::Pushed { writer: NOBODY, writes: 0, unread: 0 }, now)
            }
        }
    }

    /// The page is moving again.
    fn end(&mut self, page: Page, past: Past, trial: Option<NodeId>, now: u64) {
        self.special.remove(page);
        let (writer, writes) = (NOBODY, 0);
        self.candidates[slot(page)] =
            Some(Candidate { page, past, since: now, heat: 0, writer, writes, trial });
    }

    /// Somebody operates on the page; afterwards it may not be delegated any more.
    pub(super) fn operated(&mut self, page: Page, node: NodeId, now: u64) {
        let Some(known) = self.special.get_mut(page) else { return };
        let How::Delegated { by, operations, strays } = &mut known.how else { return };
        if now.saturating_sub(known.last) > self.rules.cold {
            let past = known.past;
            return self.end(page, past, None, now);
        }
        known.last = now;
        known.misfits = known.misfits.saturating_sub(1);
        *operations += 1;
        *strays += u16::from(*by != node);
        if u32::from(*strays) * 10 > u32::from(*operations) {
            (*by, *operations, *strays) = (node, 1, 0);
        }
        if *operations >= known.past.window && *by == node {
            let window = known.past.window.saturating_mul(2).min(LONGEST);
            let past = Past { window, ..known.past };
            self.end(page, past, Some(node), now);
        }
    }
}

/// No node.
const NOBODY: NodeId = NodeId(u16::MAX);

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

    fn is_delegated(classifier: &Classifier, page: Page) -> bool {
        classifier.class(page) == Class::Delegated
    }

    /// Of a page that another node has to write.
    fn write(by: NodeId) -> Demanded {
        Demanded { by, may_ship: true, write: true, readers: 0 }
    }

    /// A page that two nodes have taken from each other until it was delegated.
    fn hot() -> (Classifier, u64) {
        let mut classifier = Classifier::new(Rules::default());
        let mut now = 0;
        for turn in 0..=6 {
            assert!(!is_delegated(&classifier, PAGE), "after {turn} turns");
            now += 1_000;
            classifier.wanted(PAGE, write(if turn % 2 == 0 { A } else { B }), now);
        }
        assert!(is_delegated(&classifier, PAGE));
        (classifier, now)
    }

    #[test]
    fn a_page_that_changes_hands_quickly_is_delegated_and_one_that_is_kept_is_not() {
        hot();
        let mut classifier = Classifier::new(Rules::default());
        for turn in 0..1000 {
            classifier.wanted(PAGE, write(if turn % 2 == 0 { A } else { B }), turn * 9_000);
        }
        assert!(!is_delegated(&classifier, PAGE));
    }

    #[test]
    fn a_page_that_must_move_is_not_delegated_and_one_that_mostly_must_is_not_for_long() {
        let mut classifier = Classifier::new(Rules::default());
        let must_move = |by| Demanded { may_ship: false, ..write(by) };
        (0..1000).for_each(|now| classifier.wanted(PAGE, must_move(A), now));
        assert!(!is_delegated(&classifier, PAGE));
        let (mut classifier, now) = hot();
        for _ in 0..10 {
            classifier.operated(PAGE, A, now);
            classifier.wanted(PAGE, must_move(B), now);
        }
        assert!(!is_delegated(&classifier, PAGE));
        // It takes twice as much from now on.
        let turns = (0..100).take_while(|turn| {
            classifier.wanted(PAGE, write(if turn % 2 == 0 { A } else { B }), now + turn);
            !is_delegated(&classifier, PAGE)
        });
        assert_eq!(turns.count(), 11);
    }

    /// Operations of one node until it has the page on trial.
    fn until_trial(classifier: &mut Classifier, by: NodeId, now: u64) -> u64 {
        let count = (1..100_000).take_while(|_| {
            classifier.operated(PAGE, by, now);
            is_delegated(classifier, PAGE)
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
            classifier.wanted(PAGE, write(A), now);
            assert!(!is_delegated(&classifier, PAGE));
            classifier.wanted(PAGE, write(B), now + 100);
            assert!(is_delegated(&classifier, PAGE));
        }
        assert!(operations > 9 * 1000, "a trial in a thousand operations and less");
        until_trial(&mut classifier, A, now);
        classifier.wanted(PAGE, write(A), now);
        classifier.wanted(PAGE, write(B), now + 50_000);
        assert!(!is_delegated(&classifier, PAGE), "it alone used the page");
    }

    #[test]
    fn a_page_that_several_nodes_operate_on_stays_delegated() {
        let (mut classifier, now) = hot();
        for turn in 0..100_000 {
            classifier.operated(PAGE, if turn % 7 == 0 { C } else { A }, now);
            assert!(is_delegated(&classifier, PAGE));
        }
    }

    #[test]
    fn a_page_that_has_gone_cold_moves_again_and_makes_room_for_another() {
        let (mut classifier, now) = hot();
        classifier.operated(PAGE, A, now + 2_000_001);
        assert!(!is_delegated(&classifier, PAGE));

        let mut classifier = Classifier::new(Rules { most: 2, ..Rules::default() });
        for page in [1, 2, 3].map(Page) {
            classifier.tell(page, Class::Delegated, 0);
        }
        assert_eq!((classifier.special(), is_delegated(&classifier, Page(3))), (2, false));
        classifier.operated(Page(1), A, 1_000_000);
        classifier.tell(Page(3), Class::Delegated, 2_500_000);
        assert!(is_delegated(&classifier, Page(1)) && is_delegated(&classifier, Page(3)));
    }

    /// One round of a page that A writes and `readers` read.
    fn round(classifier: &mut Classifier, readers: usize, now: u64) {
        classifier.wanted(PAGE, Demanded { readers, ..write(A) }, now);
        let read = Demanded { write: false, ..write(B) };
        if classifier.class(PAGE) != Class::Pushed || classifier.surveys(PAGE) {
            classifier.wanted(PAGE, read, now + 100);
        }
    }

    #[test]
    fn a_page_that_one_node_writes_and_several_read_is_pushed_until_nobody_reads_it() {
        let mut classifier = Classifier::new(Rules::default());
        let rounds = (0..100).take_while(|now| {
            round(&mut classifier, 2, now * 1_000);
            classifier.class(PAGE) == Class::Moving
        });
        assert_eq!(rounds.count(), 3);
        for now in 0..10_000 {
            round(&mut classifier, 2, now * 1_000);
            assert_eq!(classifier.class(PAGE), Class::Pushed);
        }
        let writes = (0..10_000).take_while(|now| {
            // Only who asked after a survey has the page when it is written again.
            let readers = if classifier.surveys(PAGE) { 0 } else { 2 };
            round(&mut classifier, readers, now * 1_000);
            classifier.class(PAGE) == Class::Pushed
        });
        let writes = writes.count();
        assert!((30..1000).contains(&writes), "{writes} writes");
    }

    #[test]
    fn a_pushed_page_that_several_write_is_pushed_no_more() {
        let mut classifier = Classifier::new(Rules::default());
        classifier.tell(PAGE, Class::Pushed, 0);
        let writes = (1..100).take_while(|turn| {
            classifier.wanted(PAGE, Demanded { readers: 2, ..write(NodeId(turn % 3)) }, 0);
            classifier.class(PAGE) == Class::Pushed
        });
        assert_eq!(writes.count(), 13);
    }

    #[test]
    fn what_is_remembered_stays_within_its_bounds() {
        let mut classifier = Classifier::new(Rules::default());
        for page in (0..5_000).map(Page) {
            for turn in 0..10 {
                classifier.wanted(page, write(if turn % 2 == 0 { A } else { B }), turn);
            }
        }
        assert_eq!(classifier.special(), 256);
        assert!(classifier.bytes() < 64 << 10, "{} bytes", classifier.bytes());
    }
}
