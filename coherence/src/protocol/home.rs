//! The home's part: the directory, and requests in the order in which they are granted.

use std::collections::VecDeque;

use fabric::NodeId;

use super::under_way::{Wait, Want};
use super::{Busy, Effect, Entry, Kind, Local, Mistake, Outcome, Protocol, Request, Rights, Wrong};
use crate::node_set::NodeSet;
use crate::page::{BLOCK, Page};

impl Protocol {
    /// How many pages, from `page` on, never left this home, `most` at most.
    pub(super) fn untouched_run(&self, page: Page, most: u8) -> u8 {
        let own = self.homes.range(self.me);
        if !own.contains(&page.0) {
            return 0;
        }
        let block_end = (page.0 / BLOCK + 1) * BLOCK;
        let busy_from = self.transient.after(page).map_or(u64::MAX, |p| p.0);
        let end = (page.0 + u64::from(most)).min(own.end).min(block_end).min(busy_from);
        if self.makes(Mistake::RunIntoGivenPages) && self.entry(page) == Entry::Exclusive(self.me) {
            return (end - page.0) as u8;
        }
        let run = self.directory.untouched_run(page, end - page.0);
        // The table of rights has an entry exactly if the page was once given away, or is held.
        let run = self.local.run_of(page, run, |local| local == Local::default());
        if self.is_transient(page) { 0 } else { run as u8 }
    }

    /// Gives the page and those that follow, `count` in all and all of them zero, to the requester to write:
    /// nobody has them, and who reads untouched memory writes it next.
    pub(super) fn home_give_run(
        &mut self,
        page: Page,
        to: NodeId,
        count: u8,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        for page in (page.0..page.0 + u64::from(count)).map(Page) {
            self.directory.set(page, Entry::Exclusive(to));
            self.set_local(page, Rights::None, false);
        }
        let grant = Kind::Data { rights: Rights::Exclusive, acks: 0, body: true, run: count - 1 };
        self.send(to, page, grant, out);
        Ok(())
    }

    pub(super) fn home_get(
        &mut self,
        page: Page,
        from: NodeId,
        want: Want,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let ignores = self.makes(Mistake::GrantWhileBusy);
        let passed = !self.makes(Mistake::AnswerPassedGet);
        let ignores = ignores || self.makes(Mistake::GrantWhilePushing) && self.is_pushing(page);
        if let Some(busy) = self.busy.get_mut(page).filter(|_| !ignores) {
            // It has passed the push, which is its answer.
            if busy.pushes_to(from) && want.rights == Rights::Shared && passed {
                return Ok(());
            }
            // Who is about to read may ask to write already.
            let reads =
                busy.writeback().is_some_and(|(_, reader)| reader == from) && want.rights == Rights::Shared;
            if reads || busy.queue.iter().any(|(node, request)| *node == from && *request != Request::Put) {
                return Err("it asked twice for one page".into());
            }
            busy.queue.push_back((from, Request::Get(want)));
            return Ok(());
        }
        let moves = self.note_get(page, from, want);
        match (self.directory.get(page), want.rights) {
            (Entry::Exclusive(owner), _) if owner == from => {
                return Err("it asked for a page that it owns".into());
            }
            (Entry::Exclusive(_), _) if want.may_ship && self.is_delegated(page) && !moves => {
                self.send(from, page, Kind::Ship, out);
            }
            (Entry::Exclusive(owner), Rights::Exclusive) => {
                self.directory.set(page, Entry::Exclusive(from));
                self.send(owner, page, Kind::ForwardExclusive { requester: from }, out);
                self.home_will_push(page, from, None, out);
            }
            (Entry::Exclusive(owner), _) => {
                let wait = Wait::Writeback { owner, requester: from };
                self.busy.insert(page, Busy { wait, queue: VecDeque::new() });
                self.send(owner, page, Kind::ForwardShared { requester: from }, out);
            }
            (Entry::Shared(mut sharers), Rights::Exclusive) => {
                let has_copy = sharers.remove(from) || self.makes(Mistake::SkipBytesOfUpgrade);
                self.directory.set(page, Entry::Exclusive(from));
                // The grant goes first: its bytes are on their way while the invalidations are.
                let acks = match sharers.len() as u16 {
                    acks if self.makes(Mistake::MiscountSharers) => acks.saturating_sub(1),
                    acks => acks,
                };
                let body = !has_copy && from != self.me;
                self.send(from, page, Kind::Data { rights: Rights::Exclusive, acks, body, run: 0 }, out);
                for sharer in sharers.iter() {
                    self.send(sharer, page, Kind::Invalidate { requester: from }, out);
                }
                self.home_will_push(page, from, Some(sharers), out);
            }
            (Entry::Shared(mut sharers), _) => {
                if sharers.contains(from) {
                    return Err("it asked for a copy that it has".into());
                }
                sharers.insert(from);
                if !self.makes(Mistake::ForgetSharer) {
                    self.directory.set(page, Entry::Shared(sharers));
                }
                let body = from != self.me;
                self.send(from, page, Kind::Data { rights: Rights::Shared, acks: 0, body, run: 0 }, out);
            }
        }
        Ok(())
    }

    pub(super) fn home_writeback(
        &mut self,
        page: Page,
        from: NodeId,
        body: bool,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        match self.busy.get(page).and_then(Busy::writeback) {
            Some((owner, reader)) if owner == from && reader != self.me => {}
            _ => return Err("it wrote a page back that nobody waits for".into()),
        }
        if body != (from != self.me) {
            return Err("it wrote a page back without its bytes".into());
        }
        if body {
            self.land(page, out)?;
        }
        self.home_writeback_done(page, from, out)
    }

    /// The owner's bytes are in the home's frame: readers share it now, and the next request has its turn.
    pub(super) fn home_writeback_done(
        &mut self,
        page: Page,
        owner: NodeId,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some((_, reader)) = self.busy.get(page).and_then(Busy::writeback) else { return Ok(()) };
        let sharers: NodeSet = [owner, reader].into_iter().collect();
        self.directory.set(page, Entry::Shared(sharers));
        self.home_go_on(page, out)
    }

    /// What the home waited for has come: the next request has its turn.
    pub(super) fn home_go_on(&mut self, page: Page, out: &mut Vec<Effect>) -> Outcome {
        let Some(Busy { mut queue, .. }) = self.busy.remove(page) else { return Ok(()) };
        while let Some((from, request)) = queue.pop_front() {
            match request {
                Request::Get(want) => self.home_get(page, from, want, out),
                Request::Put => self.home_put(page, from, None, out),
            }
            .map_err(|wrong| Wrong { from: Some(from), ..wrong })?;
            if let Some(busy) = self.busy.get_mut(page) {
                busy.queue = queue;
                break;
            }
        }
        self.home_push(page, out);
        Ok(())
    }

    /// A copy comes back; with `bytes` from its owner.
    pub(super) fn home_put(
        &mut self,
        page: Page,
        from: NodeId,
        bytes: Option<()>,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        if from == self.me {
            return Err("it put a page back that is at home".into());
        }
        if let Some(busy) = self.busy.get_mut(page) {
            // If it is the owner, its writeback is on its way with the same bytes.
            busy.queue.push_back((from, Request::Put));
            return Ok(());
        }
        match self.directory.get(page) {
            Entry::Exclusive(owner) if owner == from || self.makes(Mistake::IgnoreEvictionRace) => {
                if bytes.is_none() {
                    return Err("it gave a page back without its bytes".into());
                }
                self.land(page, out)?;
                if !self.makes(Mistake::ForgetPut) {
                    self.directory.set(page, Entry::Exclusive(self.me));
                }
                self.set_local(page, Rights::Exclusive, false);
            }
            Entry::Shared(mut sharers) if sharers.contains(from) => {
                sharers.remove(from);
                let home_again = sharers.is_empty() && !self.is_transient(page);
                let entry = if home_again { Entry::Exclusive(self.me) } else { Entry::Shared(sharers) };
                self.directory.set(page, entry);
                if home_again {
                    self.set_local(page, Rights::Exclusive, false);
                }
            }
            // It was invalidated or handed on while the put was on its way.
            _ => {}
        }
        self.send(from, page, Kind::PutAck, out);
        Ok(())
    }
}
