//! Pushed pages: one node writes them and many read, and these get the new content without asking.
//!
//! ```text
//!  readers                        home                               writer
//!                                 <──── GetExclusive ─────────────── writes
//!  Ack to the writer <──────────  Invalidate, Data ────────────────> all have answered: it has the page
//!                                 the home asks for it to read ────> held until the write is done
//!                                 <──── Data ─────────────────────── write-protected
//!  Pushed <────────── Push ────── to those who had it before
//!  mapped, read-only
//! ```
//! So a reader sees the old content until it has given it up, which the writer waits for, and the new one
//! after it was written: the order is that of any page, only that nobody asks. The home is busy with the page
//! until all have answered; they do so at once, by taking the page or by declining it, so that none is a
//! sharer without knowing. A reader's own question may pass the push on its way: then the push is the answer,
//! and the question is dropped.

use std::collections::VecDeque;

use fabric::NodeId;

use super::under_way::{Transient, Wait};
use super::{Busy, Class, Effect, Entry, Kind, Mistake, Outcome, Protocol, Rights};
use crate::node_set::NodeSet;
use crate::page::Page;

/// Pages of which a home knows who read them, at most.
const KNOWN: usize = 1024;

impl Protocol {
    /// The home grants a page to a writer. Those who could read it until now, if there were any, are to have
    /// what is written, if the page is pushed.
    pub(super) fn home_will_push(
        &mut self,
        page: Page,
        writer: NodeId,
        had: Option<NodeSet>,
        out: &mut Vec<Effect>,
    ) {
        if self.class(page) != Class::Pushed {
            return;
        }
        if let Some(mut had) = had {
            // The home gets the page in any case.
            had.remove(self.me);
            if !had.is_empty() {
                // Without them the page is only not pushed this once.
                if self.readers.len() >= KNOWN {
                    self.readers.clear();
                }
                self.readers.insert(page, had);
            }
        }
        if self.surveys(page) {
            self.readers.remove(page);
        }
        let readers = self.readers(page);
        if self.makes(Mistake::PushTooEarly) {
            readers.iter().for_each(|node| self.send(node, page, Kind::Push, out));
        }
        // A home that writes itself pushes when it lets go of the page.
        if writer != self.me && !readers.is_empty() {
            self.to_pull = Some(page);
        }
    }

    /// Asks for a page to push, which a writer is about to have, if the home has nothing else under way on
    /// it.
    pub(super) fn pull_if_free(&mut self, out: &mut Vec<Effect>) {
        if let Some(page) = self.to_pull.take()
            && !self.is_transient(page)
            && self.rights(page) == Rights::None
            && self.entry(page) != Entry::Exclusive(self.me)
        {
            self.pull(page, out);
        }
    }

    /// Who had the page before it was written, if it is pushed.
    fn readers(&self, page: Page) -> NodeSet {
        let pushed = self.class(page) == Class::Pushed;
        self.readers.get(page).copied().filter(|_| pushed).unwrap_or_default()
    }

    /// Whether answers to pushes of the page are awaited.
    pub(super) fn is_pushing(&self, page: Page) -> bool {
        self.busy.get(page).is_some_and(|busy| busy.writeback().is_none())
    }

    /// The page can be read by all again: those who had it before get it.
    pub(super) fn home_push(&mut self, page: Page, out: &mut Vec<Effect>) {
        let Entry::Shared(sharers) = self.entry(page) else { return };
        if self.busy.get(page).is_some() {
            return;
        }
        let mut left = self.readers(page);
        for node in sharers.iter().chain([self.me]) {
            left.remove(node);
        }
        if left.is_empty() {
            return;
        }
        self.busy.insert(page, Busy { wait: Wait::Pushes { left }, queue: VecDeque::new() });
        left.iter().for_each(|node| self.send(node, page, Kind::Push, out));
    }

    /// The home lets go of a page. If it is pushed, and the home wrote it, it is read-only here from now on.
    pub(super) fn home_push_own(&mut self, page: Page, out: &mut Vec<Effect>) {
        let mine = self.is_home(page)
            && self.entry(page) == Entry::Exclusive(self.me)
            && self.rights(page) == Rights::Exclusive
            && !self.is_transient(page)
            && !self.readers(page).is_empty();
        if mine {
            out.push(Effect::Protect(page));
            self.set_local(page, Rights::Shared, false);
            self.directory.set(page, Entry::Shared([self.me].into_iter().collect()));
            self.home_push(page, out);
        }
    }

    /// A reader has answered a push.
    pub(super) fn home_pushed(
        &mut self,
        page: Page,
        from: NodeId,
        taken: bool,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(Busy { wait: Wait::Pushes { left }, .. }) = self.busy.get_mut(page) else {
            return Err("it answered a push that was not sent".into());
        };
        if !left.remove(from) {
            return Err("it answered a push that was not sent".into());
        }
        let done = left.is_empty();
        if let Entry::Shared(mut sharers) = self.entry(page)
            && taken
        {
            sharers.insert(from);
            self.directory.set(page, Entry::Shared(sharers));
        }
        if !taken && let Some(readers) = self.readers.get_mut(page) {
            // It would only decline again.
            readers.remove(from);
        }
        if done {
            self.home_go_on(page, out)?;
        }
        Ok(())
    }

    /// The home sends what was written since this node had the page.
    pub(super) fn cache_push(&mut self, page: Page, out: &mut Vec<Effect>) -> Outcome {
        if self.rights(page) != Rights::None {
            return Err("it pushed a page that is here".into());
        }
        let home = self.homes.home(page);
        let parked = self.parked().any(|parked| parked == page);
        let spare = self.room() > self.spare() && !parked && self.covering_miss(page).is_none();
        let takes = self.makes(Mistake::TakePushWhileLeaving) && self.is_leaving(page);
        let taken = match self.transient.get_mut(page) {
            // The question is dropped: this is its answer.
            Some(Transient::Miss(miss)) if miss.deferred.is_some() || miss.granted || miss.acks != 0 => {
                return Err("it pushed a page that it has granted".into());
            }
            Some(Transient::Miss(miss)) if miss.want == Rights::Shared => {
                miss.granted = true;
                miss.keeps_frame = false;
                out.push(Effect::Land(page));
                self.answer_push(home, page, true, out);
                self.complete_if_answered(page, out);
                return Ok(());
            }
            // As if it had been here when the write was asked for.
            Some(Transient::Miss(miss)) => {
                miss.keeps_frame = false;
                out.push(Effect::Land(page));
                self.set_local(page, Rights::Shared, false);
                self.set_idle(page, true);
                true
            }
            Some(Transient::Evict { .. }) if !takes => false,
            None if !spare => false,
            _ => {
                self.forget_to_ship(page);
                out.push(Effect::Land(page));
                self.set_local(page, Rights::Shared, false);
                out.push(Effect::Map(page, Rights::Shared));
                true
            }
        };
        self.answer_push(home, page, taken, out);
        Ok(())
    }

    fn answer_push(&mut self, home: NodeId, page: Page, taken: bool, out: &mut Vec<Effect>) {
        if !self.makes(Mistake::ForgetPushed) {
            self.send(home, page, Kind::Pushed { taken }, out);
        }
    }
}
