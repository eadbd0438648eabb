//! The rules by which a home delegates and pushes its pages, from the requests and operations that it sees:
//! by which node, and when. Pure; the time comes with each question.
//!
//! ```text
//!               `changes` changes of hands, each within `quick`:
//!               one node writes and several read ──────────────────> pushed
//!               else ──────────────────────────────────────────────> delegated, to its users in turn
//!  moving ──────────────────────────────────────────────────────────────┘
//!     ▲                                                                 │
//!     └─ `cold`; most of those who come do not fit the class;           │
//!        who got a delegated page by a turn was alone with it for longer than `quick`
//! ```
//! What a home cannot see is what the owner itself does with the page: it costs no message. So that one node
//! alone sends operations may mean that it alone uses the page, or that it shares it with the owner. Its turn
//! to own the page ([`super::turns`]) shows.
//!
//! Nor can a home see whether what it pushes is read. So one write in [`SURVEY`] is not pushed: who then asks
//! is a reader still.

use fabric::NodeId;

use super::Class;
use super::state::PageMap;
use super::turns::{NOBODY, Turns};
use crate::page::Page;

/// When a page is delegated or pushed, and when no more. Times are microseconds.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rules {
    /// A page that changes hands again within this is hot.
    pub quick: u64,
    /// So many such changes delegate it.
    pub changes: u8,
    /// Operations of others that write, after which another node owns a delegated page, at first; at least 1.
    pub window: u16,
    /// A page that nobody operates on, or writes, for so long is moving again.
    pub cold: u64,
    /// Pages of one shard that are delegated or pushed at a time.
    pub most: usize,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { quick: 8_000, changes: 6, window: 128, cold: 2_000_000, most: 256 }
    }
}

/// Moving pages that are watched: a page takes the place of another that the same slot watched.
const SLOTS: usize = 256;

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

/// A moving page that is watched.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Candidate {
    page: Page,
    /// How often it was delegated or pushed and did not fit.
    strikes: u8,
    /// When it last changed hands.
    since: u64,
    /// Quick changes of hands.
    heat: u16,
    /// Who wrote it last, and how often in a row, each time after several had read it.
    writer: NodeId,
    writes: u16,
}

/// A page that is not moving.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Special {
    strikes: u8,
    /// When it was last operated on, or written.
    last: u64,
    /// Demands that did not fit, against those that did.
    misfits: u16,
    how: How,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
enum How {
    Delegated(Turns),
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
            Some(How::Delegated(_)) => Class::Delegated,
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

    /// Somebody asks for a page that other nodes have; whether it is to get it though the page is delegated.
    pub(super) fn wanted(&mut self, page: Page, demanded: Demanded, now: u64) -> bool {
        let Demanded { by, may_ship, write, readers } = demanded;
        let Rules { quick, window, cold, .. } = self.rules;
        let Some(known) = self.special.get_mut(page) else {
            // What moves in any case is not worth watching.
            if may_ship && let Some((strikes, how)) = self.heat_up(page, demanded, now) {
                self.candidates[slot(page)] = None;
                self.begin(page, strikes, how, now);
            }
            return false;
        };
        let is_cold = now.saturating_sub(known.last) > cold;
        let mut has_turn = false;
        let fits = match &mut known.how {
            How::Delegated(turns) if turns.is_kept(quick, now) => {
                self.end(page, 0, now);
                return false;
            }
            How::Delegated(turns) => {
                has_turn = turns.asks(by, write, window, now);
                // A page that several can read moves when one of them writes.
                if write && !has_turn && (!may_ship || readers > 0) {
                    turns.moved(by, now);
                }
                (!may_ship && !has_turn).then_some(false)
            }
            How::Pushed { writer, writes, unread } if write => {
                known.last = now;
                if *writer == NOBODY {
                    *writer = by;
                }
                // After a survey, those who asked are all who read.
                if *writes > 0 && *writes % SURVEY == 0 {
                    *unread = if readers < READERS { *unread + 1 } else { 0 };
                }
                *writes = writes.wrapping_add(1);
                if *unread == MOST_UNREAD {
                    known.misfits = UNFIT;
                }
                Some(*unread < MOST_UNREAD && *writer == by)
            }
            How::Pushed { .. } => None,
        };
        known.misfits = match fits {
            Some(true) => known.misfits.saturating_sub(1),
            Some(false) => known.misfits + MISFIT,
            None => known.misfits,
        };
        if known.misfits > UNFIT || is_cold {
            let strikes = (known.strikes + u8::from(!is_cold)).min(MOST_STRIKES);
            self.end(page, strikes, now);
        }
        has_turn
    }

    /// A moving page changes hands; what is to be done with it if that is once too often.
    fn heat_up(&mut self, page: Page, demanded: Demanded, now: u64) -> Option<(u8, How)> {
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
                let (writer, writes) = (NOBODY, 0);
                *slot = Some(Candidate { page, strikes: 0, since: now, heat: 0, writer, writes });
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
        if residency > quick {
            known.heat /= 2;
            return None;
        }
        known.heat = known.heat.saturating_add(1);
        let enough = u32::from(known.heat) >= u32::from(changes) << known.strikes;
        let pushed = known.writes >= 2 && known.strikes < MOST_PUSHED;
        let how = match pushed {
            true => How::Pushed { writer: known.writer, writes: 0, unread: 0 },
            false => How::Delegated(Turns::new(window, now)),
        };
        enough.then_some((known.strikes, how))
    }

    fn begin(&mut self, page: Page, strikes: u8, how: How, now: u64) {
        if self.special.len() >= self.rules.most {
            let coldest = self.special.iter().min_by_key(|(_, known)| known.last);
            let Some((coldest, known)) = coldest.map(|(page, known)| (page, *known)) else { return };
            if now.saturating_sub(known.last) <= self.rules.cold {
                return;
            }
            self.end(coldest, known.strikes, now);
        }
        self.special.insert(page, Special { strikes, last: now, misfits: 0, how });
    }

    /// Gives a page a class, whatever is known of it.
    pub(super) fn tell(&mut self, page: Page, class: Class, now: u64) {
        self.special.remove(page);
        let how = match class {
            Class::Moving => return,
            Class::Delegated => How::Delegated(Turns::new(self.rules.window, now)),
            Class::Pushed => How::Pushed { writer: NOBODY, writes: 0, unread: 0 },
        };
        self.begin(page, 0, how, now);
    }

    /// The page is moving again.
    fn end(&mut self, page: Page, strikes: u8, now: u64) {
        self.special.remove(page);
        let (writer, writes) = (NOBODY, 0);
        self.candidates[slot(page)] = Some(Candidate { page, strikes, since: now, heat: 0, writer, writes });
    }

    /// A node operates on the page, which may not be delegated any more afterwards; whether it is to ask for
    /// the page instead.
    pub(super) fn operated(&mut self, page: Page, by: NodeId, writes: bool, now: u64) -> bool {
        let Some(known) = self.special.get_mut(page) else { return false };
        let How::Delegated(turns) = &mut known.how else { return false };
        let is_kept = turns.is_kept(self.rules.quick, now);
        if is_kept || now.saturating_sub(known.last) > self.rules.cold {
            let strikes = if is_kept { 0 } else { known.strikes };
            self.end(page, strikes, now);
            return true;
        }
        known.last = now;
        known.misfits = known.misfits.saturating_sub(1);
        turns.operated(by, writes, self.rules.window, now)
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
        assert!((0..1000).all(|now| !classifier.wanted(PAGE, must_move(A), now)));
        assert!(!is_delegated(&classifier, PAGE));
        let (mut classifier, now) = hot();
        for _ in 0..10 {
            classifier.operated(PAGE, A, true, now);
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

    #[test]
    fn a_delegated_page_goes_to_whose_turn_it_is_and_stays_delegated() {
        let (mut classifier, now) = hot();
        let operations = (1..1_000).find(|_| classifier.operated(PAGE, A, true, now)).unwrap();
        assert_eq!(operations, 128);
        assert!(!classifier.wanted(PAGE, write(B), now), "it is another's turn");
        assert!(classifier.wanted(PAGE, write(A), now));
        assert!(is_delegated(&classifier, PAGE));
        assert!(!classifier.wanted(PAGE, write(A), now), "it had its turn");
        // The owner before used it too.
        assert!(!classifier.wanted(PAGE, write(B), now + 100));
        assert!(!classifier.operated(PAGE, B, true, now + 100));
        assert!(is_delegated(&classifier, PAGE));
    }

    #[test]
    fn a_page_that_one_node_alone_uses_moves_after_its_turn() {
        for operates in [false, true] {
            let (mut classifier, now) = hot();
            while !classifier.operated(PAGE, A, true, now) {}
            assert!(classifier.wanted(PAGE, write(A), now));
            match operates {
                true => assert!(classifier.operated(PAGE, B, true, now + 50_000)),
                false => assert!(!classifier.wanted(PAGE, write(B), now + 50_000)),
            }
            assert!(!is_delegated(&classifier, PAGE));
        }
    }

    #[test]
    fn a_page_that_has_gone_cold_moves_again_and_makes_room_for_another() {
        let (mut classifier, now) = hot();
        classifier.operated(PAGE, A, true, now + 2_000_001);
        assert!(!is_delegated(&classifier, PAGE));

        let mut classifier = Classifier::new(Rules { most: 2, ..Rules::default() });
        for page in [1, 2, 3].map(Page) {
            classifier.tell(page, Class::Delegated, 0);
        }
        assert_eq!((classifier.special(), is_delegated(&classifier, Page(3))), (2, false));
        classifier.operated(Page(1), A, true, 1_000_000);
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
