//! Turns: the order in which the users of a delegated page own it. Pure; the time comes with each question.
//!
//! Its owner uses a delegated page at the speed of memory, the others at that of the network: who does nothing
//! but count would get a thousandth of what the owner gets. So they take turns:
//!
//! ```text
//!  owned ── others have changed the page by `window` operations ──> the one of them that has made the most
//!    ▲                                                              since it owned the page is refused once
//!    └────────────── asks for the page, and gets it ────────────────────────────────┘
//! ```
//! A turn costs a refusal and a move, which is a small part of a window, whatever a round trip takes. Only
//! operations that write count: who spins on a word by reading it is not helped by owning it.
//!
//! Where some need the page more than others, these lose by turns. It shows afterwards: who lost the page asks
//! more quickly than who got it did. If operations come twice as fast in a tenure as in the one before, and the
//! page goes back, it should not have been given away, and is kept for twice as many operations as the last
//! time. So such turns take a part of the time that goes to zero.

use fabric::NodeId;

/// Nodes whose operations are counted apart.
const COUNTED: usize = 4;

/// The longest window.
const LONGEST: u16 = 1 << 14;

/// Who owned a delegated page for how long, and whose turn is next. Times are microseconds.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Turns {
    /// When the page got its owner.
    since: u64,
    /// Whether it got it by a turn and nobody else has used the page since.
    alone: bool,
    /// Operations of others that wrote, since then.
    operations: u16,
    /// So many end the owner's tenure.
    window: u16,
    /// [`NOBODY`] if it is not known.
    owner: NodeId,
    before: Tenure,
    /// Who owns the page next, when it asks; or [`NOBODY`].
    next: NodeId,
    /// Operations that nodes made since they owned the page last; of more than a window of the shortest kind
    /// nobody knows, so that who waited for long is not before who needs the page all the time.
    made: [(NodeId, u16); COUNTED],
}

/// The time for which another node owned the page before.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Tenure {
    owner: NodeId,
    window: u16,
    operations: u16,
    took: u32,
}

// There is one for each delegated page.
const _: () = assert!(size_of::<Turns>() <= 56);

impl Turns {
    /// Of a page whose owner is not known yet; `window` is at least 1.
    pub(super) fn new(window: u16, now: u64) -> Turns {
        Turns {
            since: now,
            alone: false,
            operations: 0,
            window,
            owner: NOBODY,
            before: Tenure { owner: NOBODY, window, operations: 1, took: 0 },
            next: NOBODY,
            made: [(NOBODY, 0); COUNTED],
        }
    }

    /// Whether the page has been with who got it by a turn for longer than `quick`, and nobody else has used
    /// it.
    pub(super) fn is_kept(&self, quick: u64, now: u64) -> bool {
        self.alone && now.saturating_sub(self.since) > quick
    }

    /// A node operates on the page; `true` if it is to ask for the page instead. `window` is the shortest.
    pub(super) fn operated(&mut self, by: NodeId, writes: bool, window: u16, now: u64) -> bool {
        // Of the owner's, another of its vCPUs may have asked just before the page came.
        if by == self.owner {
            return false;
        }
        // The tenure begins when there is somebody else who is kept waiting.
        if std::mem::take(&mut self.alone) {
            self.since = now;
        }
        if !writes {
            return false;
        }
        if self.next == by {
            return true;
        }
        self.operations = self.operations.saturating_add(1);
        let made = self.count(by, window);
        // One that does not take its turn does not keep others from theirs.
        let due = match self.next {
            NOBODY => self.operations >= self.window,
            _ => self.operations >= self.window.saturating_mul(2),
        };
        if !due || self.made.iter().any(|(_, others)| *others > made) {
            return false;
        }
        self.next = by;
        self.operations = self.window;
        self.forget(by);
        true
    }

    /// A node that could do without asks for the page; whether it is its turn. `window` is the shortest.
    pub(super) fn asks(&mut self, by: NodeId, write: bool, window: u16, now: u64) -> bool {
        if !write || self.next != by {
            return false;
        }
        let Turns { operations, owner, before, .. } = *self;
        let took = now.saturating_sub(self.since).min(u32::MAX.into()) as u32;
        // By the time for each operation.
        let faster = 2 * u64::from(took) * u64::from(before.operations)
            < u64::from(before.took) * u64::from(operations);
        let goes_back = before.owner == by;
        let longer = before.window.saturating_mul(2).min(LONGEST);
        self.before = Tenure { owner, window: self.window, took, operations };
        self.window = if faster && goes_back { longer } else { window };
        self.owner = by;
        (self.since, self.alone, self.operations, self.next) = (now, true, 0, NOBODY);
        true
    }

    /// The page goes to a node that cannot do without it.
    pub(super) fn moved(&mut self, to: NodeId, now: u64) {
        self.forget(to);
        self.owner = to;
        (self.since, self.alone, self.operations, self.next) = (now, false, 0, NOBODY);
    }

    /// Counts an operation; how many the node has made since it owned the page.
    fn count(&mut self, by: NodeId, most: u16) -> u16 {
        let at = self.made.iter().position(|(node, _)| *node == by).unwrap_or_else(|| {
            // A node for which there is no place takes that of the one with the fewest, and their number
            // (Metwally, Agrawal and El Abbadi, 2005, "Space-Saving").
            let fewest = self.made.iter().enumerate().min_by_key(|(_, (_, count))| *count);
            fewest.map_or(0, |(at, _)| at)
        });
        let count = self.made[at].1.saturating_add(1).min(most);
        self.made[at] = (by, count);
        count
    }

    fn forget(&mut self, node: NodeId) {
        for made in self.made.iter_mut().filter(|(other, _)| *other == node) {
            *made = (NOBODY, 0);
        }
    }
}

/// No node.
pub(super) const NOBODY: NodeId = NodeId(u16::MAX);

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u16 = 64;

    /// A page whose users are `nodes`, each of which operates on it every so many microseconds unless it owns
    /// it: for how long each owned it within `until`, and how often it changed owners.
    fn tenures<const N: usize>(every: [u64; N], until: u64) -> ([u64; N], u64) {
        let mut turns = Turns::new(WINDOW, 0);
        let (mut owned, mut owner, mut changes) = ([0; N], 0, 0);
        for now in 1..until {
            owned[owner] += 1;
            for node in (0..N).filter(|&node| now.is_multiple_of(every[node])) {
                let by = NodeId(node as u16);
                if node != owner && turns.operated(by, true, WINDOW, now) {
                    assert!(turns.asks(by, true, WINDOW, now));
                    (owner, changes) = (node, changes + 1);
                }
            }
        }
        (owned, changes)
    }

    #[test]
    fn nodes_that_need_a_page_alike_own_it_for_equal_parts_of_the_time() {
        for (owned, changes) in [
            (tenures([20; 2], 1_000_000).0.to_vec(), tenures([20; 2], 1_000_000).1),
            (tenures([20; 4], 1_000_000).0.to_vec(), tenures([20; 4], 1_000_000).1),
            (tenures([20; 7], 1_000_000).0.to_vec(), tenures([20; 7], 1_000_000).1),
        ] {
            let share = 1_000_000 / owned.len() as u64;
            assert!(owned.iter().all(|&owned| owned.abs_diff(share) < share / 10), "{owned:?}");
            // One for each window of operations.
            let others = owned.len() as u64 - 1;
            let windows = 1_000_000 / 20 * others / u64::from(WINDOW);
            assert!(changes < windows + windows / 10, "{changes} changes");
        }
    }

    #[test]
    fn nodes_more_than_are_counted_apart_all_have_turns() {
        let (owned, _) = tenures([20; 20], 1_000_000);
        assert!(owned.iter().all(|&owned| owned > 10_000), "{owned:?}");
    }

    #[test]
    fn who_needs_the_page_more_keeps_it_nearly_always() {
        // The second operates on it a fiftieth as often.
        let (owned, changes) = tenures([20, 1_000], 100_000_000);
        assert!(owned[1] < 2_000_000, "{owned:?}, {changes} changes");
        assert!(changes < 60, "{changes} changes");
        let (owned, _) = tenures([1_000, 20, 1_000, 1_000], 100_000_000);
        assert!(owned[1] > 97_000_000, "{owned:?}");
    }

    #[test]
    fn who_only_reads_has_no_turn() {
        let mut turns = Turns::new(WINDOW, 0);
        assert!((0..10_000).all(|now| !turns.operated(NodeId(1), false, WINDOW, now)));
        assert!(!turns.asks(NodeId(1), true, WINDOW, 10_000));
    }

    #[test]
    fn one_that_does_not_take_its_turn_keeps_nobody_from_his() {
        let mut turns = Turns::new(WINDOW, 0);
        let first = (1..).find(|&now| turns.operated(NodeId(1), true, WINDOW, now)).unwrap();
        assert_eq!(first, u64::from(WINDOW));
        assert!(turns.operated(NodeId(1), true, WINDOW, first), "it is to ask, not to operate");
        let other = (1..).find(|&now| turns.operated(NodeId(2), true, WINDOW, first + now)).unwrap();
        assert_eq!(other, u64::from(WINDOW));
        assert!(!turns.asks(NodeId(1), true, WINDOW, 200) && turns.asks(NodeId(2), true, WINDOW, 200));
    }

    #[test]
    fn a_page_is_kept_if_nobody_else_uses_it_after_a_turn() {
        let mut turns = Turns::new(1, 0);
        assert!(!turns.is_kept(10, 100), "nobody got it by a turn");
        assert!(turns.operated(NodeId(1), true, 1, 100) && turns.asks(NodeId(1), true, 1, 100));
        assert!(!turns.is_kept(10, 110) && turns.is_kept(10, 111));
        turns.operated(NodeId(2), false, 1, 105);
        assert!(!turns.is_kept(10, 200));
    }
}
