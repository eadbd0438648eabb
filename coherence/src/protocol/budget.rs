//! The budget for copies of other nodes' pages: how many frames there are, which faults wait for one, and
//! which copy is given back to make room.
//!
//! A copy needs a frame from the moment at which it is asked for until its home has acknowledged that it is
//! given back. A fault that finds no frame is *parked*, first come first served, and asks when a copy has
//! gone. Held pages do not go, but no hold lasts; the home always has a frame for what comes back; so there
//! is always a next frame. Pages at home are not counted: their frames are always there.
//!
//! # Which copy goes
//! A clock: a hand goes round the copies in the order of their pages. The kernel does not tell which are
//! used, so the hand *probes*: it has a page unmapped ([`Effect::Probe`]), its frame kept. If the page is
//! used, the fault that follows maps it again, without a message. A page that is still unmapped when the hand
//! comes back has not been used for one round, and goes.

use std::collections::VecDeque;

use super::under_way::Want;
use super::{Effect, Mistake, Protocol, Rights, Transient};
use crate::page::Page;

/// Pages that the hand looks at for one eviction before it takes one that may be in use.
const LOOK: usize = 16;

/// Which copy goes.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Eviction {
    /// One that was not used lately.
    Clock,
    /// Any, by this seed: what the clock is compared with.
    Random(u64),
}

/// Frames for copies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    frames: usize,
    /// So many are kept free, so that a fault need not wait for a copy to go.
    reserve: usize,
    eviction: Eviction,
    /// Where the clock's hand goes on.
    hand: Page,
    /// Faults that wait for a frame.
    parked: VecDeque<(Page, Want)>,
}

impl Budget {
    pub(super) const NONE: Budget = Budget {
        frames: usize::MAX,
        reserve: 0,
        eviction: Eviction::Clock,
        hand: Page(0),
        parked: VecDeque::new(),
    };
}

impl Protocol {
    /// Lets this node have copies of so many pages at most, at least one; an eighth of them, 64 at most, is
    /// kept free for what comes next. Without a call there is no limit.
    pub fn set_budget(&mut self, frames: usize, eviction: Eviction) {
        let frames = frames.max(1);
        self.budget.frames = frames;
        self.budget.reserve = (frames / 8).min(64);
        self.budget.eviction = eviction;
    }

    /// Frames that copies take now: of pages here, on their way here, and on their way home.
    pub fn frames(&self) -> usize {
        let (frames, _) = self.frames_under_way();
        self.copies.here() + frames
    }

    /// Faults that wait for a frame.
    pub fn parked(&self) -> impl Iterator<Item = Page> {
        self.budget.parked.iter().map(|(page, _)| *page)
    }

    /// Frames of pages that are not here (yet, or any more), and how many of them will be free soon.
    fn frames_under_way(&self) -> (usize, usize) {
        let (mut frames, mut leaving) = (0, 0);
        for (page, transient) in self.transient.iter().filter(|(page, _)| !self.is_home(*page)) {
            match transient {
                Transient::Evict { .. } => leaving += 1,
                Transient::Miss(miss) => {
                    frames += usize::from(self.rights(page) == Rights::None) + usize::from(miss.run);
                }
            }
        }
        (frames + leaving, leaving)
    }

    /// Frames that are free.
    pub(super) fn room(&self) -> usize {
        match self.budget.frames {
            usize::MAX => usize::MAX,
            frames => frames.saturating_sub(self.frames()),
        }
    }

    /// Frames that are kept free for faults: what is only asked for ahead of its need leaves them.
    pub(super) fn spare(&self) -> usize {
        self.budget.reserve + self.budget.parked.len()
    }

    /// Whether the fault has to wait for a frame; notes it then. One that is `admitted` has waited.
    pub(super) fn parks(&mut self, page: Page, want: Want, admitted: bool) -> bool {
        if self.is_home(page) || self.rights(page) != Rights::None || self.makes(Mistake::IgnoreBudget) {
            return false;
        }
        if self.room() > 0 && (admitted || self.budget.parked.is_empty()) {
            return false;
        }
        self.budget.parked.push_back((page, want));
        true
    }

    /// Whether the page waits for a frame already; notes what it is wanted for.
    pub(super) fn is_parked(&mut self, page: Page, want: Want) -> bool {
        let Some((_, noted)) = self.budget.parked.iter_mut().find(|(parked, _)| *parked == page) else {
            return false;
        };
        *noted = want.and(*noted);
        true
    }

    /// Lets those who wait have the frames that are free, and sees to it that some are.
    pub(super) fn balance(&mut self, out: &mut Vec<Effect>) {
        if self.budget.frames == usize::MAX {
            return;
        }
        while self.room() > 0
            && let Some((page, want)) = self.budget.parked.pop_front()
        {
            if !self.makes(Mistake::ForgetParked) {
                self.admitted_fault(page, want, out);
            }
        }
        let (under_way, leaving) = self.frames_under_way();
        let needed = self.copies.here() + under_way - leaving + self.budget.parked.len();
        let most = self.budget.frames - self.budget.reserve;
        for _ in most..needed {
            if !self.evict_one(out) {
                break;
            }
        }
    }

    /// Evicts a copy; false if none can go now.
    fn evict_one(&mut self, out: &mut Vec<Effect>) -> bool {
        for looked in 1..=LOOK.max(self.copies.here()) {
            let Some(page) = self.next_copy() else { return false };
            if self.held(page) || self.is_transient(page) {
                continue;
            }
            let used = self.budget.eviction == Eviction::Clock && !self.is_idle(page);
            if used && looked < LOOK {
                self.set_idle(page, true);
                out.push(Effect::Probe(page));
                continue;
            }
            return self.cache_evict(page, out);
        }
        false
    }

    /// Moves the hand to the next copy.
    fn next_copy(&mut self) -> Option<Page> {
        if let Eviction::Random(state) = &mut self.budget.eviction {
            // A linear congruence (Knuth, MMIX); its high bits are random enough for this.
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            self.budget.hand = Page(((u128::from(*state) * u128::from(self.homes.pages())) >> 64) as u64);
        }
        let found = self.copies.at_or_after(self.budget.hand).or_else(|| self.copies.at_or_after(Page(0)));
        self.budget.hand = Page(found?.0 + 1);
        found
    }
}
