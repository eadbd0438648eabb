//! Discards: pages that nobody needs any more, such as those that the guest has freed, lose their frames at
//! the home and wherever copies are, and no page is sent for it.
//!
//! ```text
//!  balloon's node                 home                               owner, sharers
//!  discard ──── Discard ────────> nobody else has it: Punch
//!                                 sharers ─────── Invalidate ──────> Ack
//!                                 an owner ────── Reclaim ─────────> Clear, Data (zeroes: no bytes)
//!                                 all have answered: Punch
//!          <─── Discarded ─────── the page is as at power-on
//! ```
//! It is a write of zeroes by the home, which wins the page for it as for any write; only then is its frame
//! given up. So it takes its place among all accesses, and who has the answer knows that nothing written
//! later can be lost. Accesses that come meanwhile find the page before or after it: if one waits at the home
//! when the page is won, the page is cleared and keeps its frame.
//!
//! A page on which something is under way at its home is in use, whatever was said of it: it is left alone.

use fabric::NodeId;

use super::under_way::{Miss, Replacement, Transient, Want};
use super::{Effect, Entry, Kind, Local, Mistake, Outcome, Protocol, Rights};
use crate::page::{BLOCK, Page};

impl Protocol {
    /// Nobody needs what is in this page and in `run` (`0..512`) that follow; all have the same home and lie
    /// in the same block of 512. [`Effect::Discarded`] tells, in any number of parts, that it is done: they
    /// are zero then, unless somebody has used them meanwhile.
    pub fn discard(&mut self, page: Page, run: u16, out: &mut Vec<Effect>) {
        self.discarding += u64::from(run) + 1;
        self.send(self.homes.home(page), page, Kind::Discard { run }, out);
        self.finish_own(out);
    }

    /// Pages that [`Protocol::discard`] is not done with yet.
    pub fn discarding(&self) -> u64 {
        self.discarding
    }

    /// The home is done with some pages.
    pub(super) fn discarded(&mut self, page: Page, run: u16, out: &mut Vec<Effect>) -> Outcome {
        let count = run + 1;
        match self.discarding.checked_sub(u64::from(count)) {
            Some(left) => self.discarding = left,
            None => return Err("it discarded pages that it was not asked to".into()),
        }
        out.push(Effect::Discarded(page, count));
        Ok(())
    }

    /// Somebody says that nobody needs these pages.
    pub(super) fn home_discard(
        &mut self,
        page: Page,
        from: NodeId,
        run: u16,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let end = page.0 + u64::from(run) + 1;
        if end > self.own.end || end > (page.0 / BLOCK + 1) * BLOCK {
            return Err("it discarded pages beyond their home or their block".into());
        }
        let mut next = page.0;
        while next < end {
            let first = next;
            // Those that are here alone go together.
            while next < end && self.is_here_alone(Page(next)) {
                next += 1;
            }
            if next > first {
                self.punch(Page(first), (next - first) as u16, out);
                self.answer_discard(from, Page(first), (next - first - 1) as u16, out);
            } else {
                self.win_to_discard(Page(next), from, out)?;
                next += 1;
            }
        }
        Ok(())
    }

    fn answer_discard(&mut self, to: NodeId, page: Page, run: u16, out: &mut Vec<Effect>) {
        if !self.makes(Mistake::ForgetDiscarded) {
            self.send(to, page, Kind::Discarded { run }, out);
        }
    }

    /// Whether nobody else has the page or is about to. That it is held does not matter: it stays.
    pub(super) fn is_here_alone(&self, page: Page) -> bool {
        self.makes(Mistake::PunchSharedPage)
            || self.entry(page) == Entry::Exclusive(self.me)
                && self.rights(page) == Rights::Exclusive
                && self.is_unused(page)
    }

    /// Whether nothing is under way on a page at its home.
    fn is_unused(&self, page: Page) -> bool {
        !self.is_transient(page) && self.deferred.get(page).is_none()
    }

    /// Pages that are here alone become what they were at power-on.
    fn punch(&mut self, first: Page, count: u16, out: &mut Vec<Effect>) {
        for page in (first.0..first.0 + u64::from(count)).map(Page) {
            // What was never set needs no entry.
            if self.local.get(page) != Local::default() {
                self.local.set(page, Local::default());
            }
        }
        out.push(Effect::Punch(first, count));
    }

    /// Takes the page from all who have it, for the home alone.
    fn win_to_discard(&mut self, page: Page, by: NodeId, out: &mut Vec<Effect>) -> Outcome {
        if !self.is_free_to_win(page) {
            self.answer_discard(by, page, 0, out);
            return Ok(());
        }
        self.unmap_to_replace(page, out);
        self.win_to_replace(page, Replacement::Zeroes(by), out)
    }

    /// Whether others have the page and nothing is under way on it.
    pub(super) fn is_free_to_win(&self, page: Page) -> bool {
        self.is_unused(page)
            && self.rights(page) != Rights::Exclusive
            && self.entry(page) != Entry::Exclusive(self.me)
    }

    /// The home's own copy of a page goes, whose content is to be replaced.
    pub(super) fn unmap_to_replace(&mut self, page: Page, out: &mut Vec<Effect>) {
        let here = self.rights(page);
        if here == Rights::Shared {
            out.push(Effect::Unmap(page, here));
            self.set_local(page, Rights::None, false);
        }
    }

    /// Takes the page from all others who have it, without its content.
    pub(super) fn win_to_replace(
        &mut self,
        page: Page,
        replacement: Replacement,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let miss = Miss {
            want: Rights::Exclusive,
            granted: false,
            acks: 0,
            then_write: false,
            may_ship: false,
            must_move: false,
            keeps_frame: false,
            pulls: false,
            prefetch: true,
            replaces: Some(replacement),
            deferred: None,
            run: 0,
            run_faults: 0,
            run_writes: 0,
        };
        self.transient.insert(page, Transient::Miss(miss));
        match self.entry(page) {
            Entry::Exclusive(owner) => {
                self.directory.set(page, Entry::Exclusive(self.me));
                self.send(owner, page, Kind::Reclaim, out);
                Ok(())
            }
            Entry::Shared(_) => self.home_get(page, self.me, Want::page(Rights::Exclusive), out),
        }
    }

    /// The home has won a page in order to discard it; whether nothing is left to do. If it is `wanted` here
    /// it is cleared only, and goes on as any page that was won.
    pub(super) fn home_won_to_discard(
        &mut self,
        page: Page,
        by: NodeId,
        wanted: bool,
        out: &mut Vec<Effect>,
    ) -> bool {
        let punch = !wanted || self.makes(Mistake::PunchWantedPage);
        if punch {
            self.punch(page, 1, out);
        } else {
            out.push(Effect::Clear(page));
        }
        self.answer_discard(by, page, 0, out);
        punch
    }
}
