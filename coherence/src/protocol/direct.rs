//! Direct access: a device reads or overwrites a whole page that is not here, without bringing it here. A
//! read takes the page from nobody; an overwriting takes it from all but the home.
//!
//! ```text
//!  device's node                  home                               owner, sharers
//!  load ───── Load ─────────────> current here: Loaded + bytes
//!                                 an owner ────── LoadAt ──────────> Loaded + bytes, to the device's node
//!
//!  store ──── Store + bytes ────> nobody else has it: Overwrite, Stored
//!                                 sharers: Unmap, Land, Invalidate > Ack
//!                                 an owner: Land, Reclaim ─────────> Clear, Data (zeroes: no bytes)
//!                                 all have answered: Written, Stored
//! ```
//! A load is an access at the moment at which the bytes are copied, where they are current; CPUs may be
//! writing the page then, as with any device. A store is a write by the home, which wins the page for it as
//! for any write, and lands the bytes in its own frame, where nobody looks before. It is done when no other
//! copy is left: who then sees the answer, and whom it tells, sees the new content.
//!
//! Both are for quiet pages. Where something is under way on a page, the answer is that it was not done, and
//! the device touches the page as a CPU would.

use fabric::NodeId;

use super::under_way::{Direct, Replacement};
use super::{Effect, Entry, Kind, Mistake, Outcome, Protocol, Rights};
use crate::page::Page;

impl Protocol {
    /// A device here wants to read a whole page; whether it was asked for. If so, [`Effect::Loaded`] follows;
    /// else the page is here, or on its way.
    pub fn load(&mut self, page: Page, out: &mut Vec<Effect>) -> bool {
        let home_has_it = self.is_home(page) && matches!(self.entry(page), Entry::Shared(_));
        let asked =
            self.rights(page) == Rights::None && !home_has_it && self.begin_direct(page, Direct::Load);
        if asked {
            self.send(self.homes.home(page), page, Kind::Load, out);
            self.finish_own(out);
        }
        asked
    }

    /// A device here wants to overwrite a whole page with the bytes that belong to this input; whether that
    /// was asked for. If so, [`Effect::Stored`] follows; else the page is here to write, or on its way.
    pub fn store(&mut self, page: Page, out: &mut Vec<Effect>) -> bool {
        let asked = self.rights(page) != Rights::Exclusive && self.begin_direct(page, Direct::Store);
        if asked {
            self.send(self.homes.home(page), page, Kind::Store, out);
            self.finish_own(out);
        }
        asked
    }

    /// How many pages devices here wait for.
    pub fn direct(&self) -> usize {
        self.direct.len()
    }

    fn begin_direct(&mut self, page: Page, access: Direct) -> bool {
        // One at a time, so that an answer is for the question.
        let quiet = !self.is_transient(page) && self.direct.get(page).is_none();
        if quiet {
            self.direct.insert(page, access);
        }
        quiet
    }

    /// A device's page was read, or was not because something is under way on it.
    pub(super) fn loaded(&mut self, page: Page, found: bool, out: &mut Vec<Effect>) -> Outcome {
        match self.direct.remove(page) {
            Some(Direct::Load) => out.push(Effect::Loaded(page, found)),
            _ => return Err("it answered a load that nobody waits for".into()),
        }
        Ok(())
    }

    /// A device's page was overwritten, or was not.
    pub(super) fn stored(&mut self, page: Page, done: bool, out: &mut Vec<Effect>) -> Outcome {
        match self.direct.remove(page) {
            Some(Direct::Store) => out.push(Effect::Stored(page, done)),
            _ => return Err("it answered a store that nobody waits for".into()),
        }
        Ok(())
    }

    /// Somebody's device reads a page of this home.
    pub(super) fn home_load(&mut self, page: Page, by: NodeId, out: &mut Vec<Effect>) {
        match self.entry(page) {
            _ if self.makes(Mistake::LoadFromTheHome) => self.answer_load(page, by, by != self.me, out),
            _ if self.is_transient(page) => self.answer_load(page, by, false, out),
            Entry::Shared(_) => self.answer_load(page, by, by != self.me, out),
            Entry::Exclusive(owner) if owner == self.me => self.answer_load(page, by, by != self.me, out),
            // It has given the page up, or has it on its way.
            Entry::Exclusive(owner) if owner == by => self.answer_load(page, by, false, out),
            Entry::Exclusive(owner) => self.send(owner, page, Kind::LoadAt { requester: by }, out),
        }
    }

    /// The home says that a device of another node reads our page.
    pub(super) fn owner_load(&mut self, page: Page, by: NodeId, out: &mut Vec<Effect>) -> Outcome {
        if by == self.me {
            return Err("it sent the load of a page to the node that asked for it".into());
        }
        self.answer_load(page, by, self.rights(page) == Rights::Exclusive, out);
        Ok(())
    }

    fn answer_load(&mut self, page: Page, to: NodeId, body: bool, out: &mut Vec<Effect>) {
        self.send(to, page, Kind::Loaded { body }, out);
    }

    /// Somebody's device overwrites a page of this home, with the bytes of this input.
    pub(super) fn home_store(&mut self, page: Page, by: NodeId, out: &mut Vec<Effect>) -> Outcome {
        if self.is_here_alone(page) {
            // What was never touched keeps its place among what is the home's alone.
            out.extend([Effect::Overwrite(page), Effect::Written(page)]);
            self.answer_store(page, by, true, out);
            return Ok(());
        }
        if !self.is_free_to_win(page) {
            self.answer_store(page, by, false, out);
            return Ok(());
        }
        self.unmap_to_replace(page, out);
        out.push(Effect::Land(page));
        self.win_to_replace(page, Replacement::Bytes(by), out)?;
        if self.makes(Mistake::AnswerStoreAtOnce) {
            out.push(Effect::Written(page));
            self.answer_store(page, by, true, out);
        }
        Ok(())
    }

    /// The home has won a page in order to overwrite it; whether nothing is left to do. If it is `wanted`
    /// here it goes on as any page that was won.
    pub(super) fn home_won_to_store(
        &mut self,
        page: Page,
        by: NodeId,
        wanted: bool,
        out: &mut Vec<Effect>,
    ) -> bool {
        if !self.makes(Mistake::AnswerStoreAtOnce) {
            out.push(Effect::Written(page));
            self.answer_store(page, by, true, out);
        }
        if !wanted {
            self.set_local(page, Rights::Exclusive, false);
        }
        !wanted
    }

    fn answer_store(&mut self, page: Page, to: NodeId, done: bool, out: &mut Vec<Effect>) {
        if !self.makes(Mistake::ForgetStored) {
            self.send(to, page, Kind::Stored { done }, out);
        }
    }
}
