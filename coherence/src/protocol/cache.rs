//! The cache's part of the protocol: faults of this node, answers to them, and other nodes' demands for its
//! copies.

use fabric::NodeId;

use super::under_way::{Replacement, Want};
use super::{
    Busy, Demand, Effect, Grant, Kind, Local, MAX_RUN, Miss, Mistake, Outcome, Protocol, Rights, Transient,
};
use crate::page::Page;

impl Protocol {
    pub(super) fn cache_fault(&mut self, page: Page, want: Want, out: &mut Vec<Effect>) {
        if !self.is_parked(page, want) {
            self.fault_now(page, want, false, out);
        }
    }

    /// A fault that waited for a frame has one.
    pub(super) fn admitted_fault(&mut self, page: Page, want: Want, out: &mut Vec<Effect>) {
        self.fault_now(page, want, true, out);
    }

    fn fault_now(&mut self, page: Page, want: Want, admitted: bool, out: &mut Vec<Effect>) {
        if self.transient.get(page).is_none() && self.wait_for_run(page, want.rights) {
            return;
        }
        let rights = self.rights(page);
        let stays = want.may_ship && self.knows_to_ship(page);
        match self.transient.get_mut(page) {
            Some(Transient::Miss(miss)) => {
                miss.then_write |= want.rights > miss.want;
                miss.prefetch = false;
                miss.must_move |= miss.may_ship && !want.may_ship;
            }
            Some(Transient::Evict { refault }) => *refault = want.and(*refault),
            // A late or spurious event: the right answer is the mapping that should be there.
            None if rights >= want.rights => {
                self.set_idle(page, false);
                out.push(Effect::Map(page, rights));
            }
            None if stays => out.push(Effect::Ship(page)),
            None => {
                self.yield_deferred(page, out);
                if !self.parks(page, want, admitted) {
                    self.start_miss(page, want, false, out);
                }
            }
        }
    }

    pub(super) fn cache_prefetch(&mut self, page: Page, want: Rights, out: &mut Vec<Effect>) -> bool {
        let under_way = self.transient.get(page).is_some() || self.covering_miss(page).is_some();
        let crowded = !self.is_home(page) && self.room() <= self.spare();
        if under_way || crowded || self.rights(page) != Rights::None || self.knows_to_ship(page) {
            return false;
        }
        let want = Want { rights: want, may_ship: self.ships() };
        self.start_miss(page, want, true, out);
        true
    }

    /// Asks the home for the page.
    fn start_miss(&mut self, page: Page, want: Want, prefetch: bool, out: &mut Vec<Effect>) {
        let Want { rights: want, may_ship } = want;
        let home = self.homes.home(page);
        let run = if self.rights(page) == Rights::None && home != self.me && !prefetch {
            let room = self.room().saturating_sub(1);
            self.run_to_ask(page, home).min(room.min(usize::from(MAX_RUN)) as u8)
        } else {
            0
        };
        let miss = Miss {
            want,
            granted: false,
            acks: 0,
            then_write: false,
            may_ship,
            must_move: false,
            keeps_frame: false,
            pulls: false,
            prefetch,
            replaces: None,
            deferred: None,
            run,
            run_faults: 0,
            run_writes: 0,
        };
        self.transient.insert(page, Transient::Miss(miss));
        self.ask(page, want, run, may_ship, out);
    }

    fn ask(&mut self, page: Page, want: Rights, run: u8, may_ship: bool, out: &mut Vec<Effect>) {
        let kind = match want {
            Rights::Exclusive => Kind::GetExclusive { run, may_ship },
            _ => Kind::GetShared { run, may_ship },
        };
        self.send(self.homes.home(page), page, kind, out);
    }

    /// This home asks for a page that another node writes, to push it.
    pub(super) fn pull(&mut self, page: Page, out: &mut Vec<Effect>) {
        self.start_miss(page, Want::page(Rights::Shared), true, out);
        if let Some(Transient::Miss(miss)) = self.transient.get_mut(page) {
            miss.pulls = true;
        }
    }

    /// The home says that the page stays where it is: who waits for it may send what it wants to do, unless
    /// somebody waits who cannot.
    pub(super) fn cache_ship(&mut self, page: Page, out: &mut Vec<Effect>) -> Outcome {
        let here = self.rights(page);
        let forgets = self.makes(Mistake::ForgetToMove);
        let Some(Transient::Miss(miss)) = self.transient.get_mut(page) else {
            return Err("it would have operations sent for a page that nobody asked for".into());
        };
        let asked = miss.may_ship && !miss.granted && miss.acks == 0 && miss.deferred.is_none();
        if !asked || here != Rights::None {
            return Err("it would have operations sent where the page was asked for".into());
        }
        if std::mem::take(&mut miss.must_move) && !forgets {
            miss.may_ship = false;
            let (want, run) = (miss.want, miss.run);
            self.ask(page, want, run, false, out);
            return Ok(());
        }
        let (prefetch, faults, writes) = (miss.prefetch, miss.run_faults, miss.run_writes);
        let keeps_frame = miss.keeps_frame;
        self.transient.remove(page);
        if keeps_frame {
            out.push(Effect::Free(page));
        }
        self.learn_to_ship(page);
        if !prefetch {
            out.push(Effect::Ship(page));
        }
        self.fault_in_run(page, faults, writes, out);
        Ok(())
    }

    pub(super) fn cache_data(
        &mut self,
        page: Page,
        from: NodeId,
        grant: Grant,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Grant { rights, acks, body, run } = grant;
        let here = self.rights(page);
        let current_at_home = from == self.me;
        let from_home = from == self.homes.home(page);
        let Some(Transient::Miss(miss)) = self.transient.get_mut(page) else {
            return Err("it sent the page though nobody asked for it".into());
        };
        let run_fits = run == 0 || (run <= miss.run && from_home && rights == Rights::Exclusive && acks == 0);
        if miss.granted || rights < miss.want || !run_fits {
            return Err("it granted what was not asked for".into());
        }
        if body == (here == Rights::Shared || current_at_home) {
            return Err(
                "it sent the page's bytes where a current copy is, or left them out where none is".into()
            );
        }
        if miss.acks + i32::from(acks) < 0 {
            return Err("it granted a page with fewer sharers than have answered".into());
        }
        miss.granted = true;
        miss.keeps_frame = false;
        miss.want = rights;
        miss.then_write &= rights == Rights::Shared;
        miss.acks += i32::from(acks);
        if body && miss.replaces.is_none() {
            self.land(page, out)?;
        }
        // As home, the owner's bytes are also what a reader's forward was waiting for.
        if self.busy.get(page).and_then(Busy::writeback).is_some_and(|(_, requester)| requester == self.me) {
            self.home_writeback_done(page, from, out)?;
        }
        if run > 0 {
            self.take_run(page, run, out);
        }
        self.complete_if_answered(page, out);
        Ok(())
    }

    pub(super) fn cache_ack(&mut self, page: Page, out: &mut Vec<Effect>) -> Outcome {
        // Acks may come before the grant that says how many there are.
        let awaited = |miss: &Miss| miss.want == Rights::Exclusive && (!miss.granted || miss.acks > 0);
        let Some(Transient::Miss(miss)) = self.transient.get_mut(page) else {
            return Err("it acknowledged an invalidation that nobody waits for".into());
        };
        if !awaited(miss) {
            return Err("it acknowledged an invalidation that nobody waits for".into());
        }
        miss.acks -= 1;
        self.complete_if_answered(page, out);
        Ok(())
    }

    pub(super) fn complete_if_answered(&mut self, page: Page, out: &mut Vec<Effect>) {
        let Some(Transient::Miss(miss)) = self.transient.get(page) else { return };
        if !miss.granted || (miss.acks != 0 && !self.makes(Mistake::WriteBeforeAcks)) {
            return;
        }
        let (want, then_write, deferred) = (miss.want, miss.then_write, miss.deferred);
        let (run_faults, run_writes, prefetch) = (miss.run_faults, miss.run_writes, miss.prefetch);
        let (replaces, may_ship, pulls) = (miss.replaces, miss.may_ship && !miss.must_move, miss.pulls);
        self.transient.remove(page);
        let wanted = !prefetch || deferred.is_some();
        let done = match replaces {
            None => false,
            Some(Replacement::Zeroes(by)) => self.home_won_to_discard(page, by, wanted, out),
            Some(Replacement::Bytes(by)) => self.home_won_to_store(page, by, wanted, out),
        };
        if done {
            return;
        }
        match self.rights(page) {
            Rights::Shared if !self.is_idle(page) => out.push(Effect::Unprotect(page)),
            _ if prefetch => {}
            _ => out.push(Effect::Map(page, want)),
        }
        self.forget_to_ship(page);
        let held = !pulls || wanted;
        self.set_local(page, want, held);
        self.set_idle(page, prefetch);
        if held {
            out.push(Effect::Hold(page));
        }
        if let Some(demand) = deferred {
            self.deferred.insert(page, demand);
        }
        if then_write {
            self.yield_deferred(page, out);
            self.start_miss(page, Want { rights: Rights::Exclusive, may_ship }, false, out);
        }
        self.fault_in_run(page, run_faults, run_writes, out);
    }

    /// What the answer of a miss did not bring of its run is asked for now.
    fn fault_in_run(&mut self, page: Page, run_faults: u64, run_writes: u64, out: &mut Vec<Effect>) {
        if self.makes(Mistake::ForgetRestOfRun) {
            return;
        }
        for i in (1..=u64::from(MAX_RUN)).filter(|i| run_faults >> (i - 1) & 1 == 1) {
            let write = run_writes >> (i - 1) & 1 == 1;
            // Which of them could do without the page is not known any more.
            let want = Want::page(if write { Rights::Exclusive } else { Rights::Shared });
            self.cache_fault(Page(page.0 + i), want, out);
        }
    }

    /// Another node wants something of our copy, or of the one on its way to us.
    pub(super) fn cache_demand(&mut self, page: Page, demand: Demand, out: &mut Vec<Effect>) -> Outcome {
        let rights = self.rights(page);
        let invalidate = matches!(demand, Demand::Invalidate { .. });
        let (Demand::Invalidate { requester }
        | Demand::ForwardShared { requester }
        | Demand::ForwardExclusive { requester }
        | Demand::Reclaim { requester }) = demand;
        if requester == self.me {
            return Err("it demanded a copy for the node that has it".into());
        }
        let too_early = invalidate && self.makes(Mistake::AnswerForComingCopy);
        match self.transient.get_mut(page) {
            Some(Transient::Miss(miss)) => {
                let for_coming_copy = (miss.want == Rights::Exclusive) != invalidate;
                if for_coming_copy && too_early {
                    self.answer(page, demand, false, out);
                    return Ok(());
                }
                if for_coming_copy && miss.deferred.is_none() {
                    miss.deferred = Some(demand);
                    return Ok(());
                }
                if for_coming_copy || rights != Rights::Shared {
                    return Err("it demanded a copy that is not here".into());
                }
                self.serve(page, demand, out);
            }
            // The mapping is gone already and the frame is kept until PutAck.
            Some(Transient::Evict { .. }) => self.answer(page, demand, false, out),
            None => {
                let fits = if invalidate { Rights::Shared } else { Rights::Exclusive };
                if rights != fits || self.deferred.get(page).is_some() {
                    return Err("it demanded a copy that is not here".into());
                }
                if self.held(page) {
                    self.deferred.insert(page, demand);
                    out.push(Effect::Deferred(page));
                } else {
                    self.serve(page, demand, out);
                }
            }
        }
        Ok(())
    }

    /// Gives up what `demand` asks for, then answers: the order is what makes the answer true.
    fn serve(&mut self, page: Page, demand: Demand, out: &mut Vec<Effect>) {
        if let Demand::ForwardShared { .. } = demand {
            if !self.makes(Mistake::KeepWriting) {
                out.push(Effect::Protect(page));
            }
            let idle = self.is_idle(page);
            self.set_local(page, Rights::Shared, false);
            self.set_idle(page, idle);
        } else if self.makes(Mistake::AckBeforeUnmap) {
            self.answer(page, demand, true, out);
            out.push(Effect::Unmap(page, self.rights(page)));
            self.set_local(page, Rights::None, false);
            return;
        } else {
            out.push(Effect::Unmap(page, self.rights(page)));
            self.set_local(page, Rights::None, false);
        }
        self.answer(page, demand, true, out);
    }

    /// Answers a demand from the frame; `free` if the frame is then of no use.
    fn answer(&mut self, page: Page, demand: Demand, free: bool, out: &mut Vec<Effect>) {
        let home = self.homes.home(page);
        let data = |rights| Kind::Data { rights, acks: 0, body: true, run: 0 };
        match demand {
            Demand::Invalidate { .. } if self.makes(Mistake::DropAck) => {}
            Demand::Invalidate { .. } if self.makes(Mistake::AckTheHome) => {
                self.send(home, page, Kind::Ack, out);
            }
            Demand::Invalidate { requester } => self.send(requester, page, Kind::Ack, out),
            Demand::ForwardExclusive { requester } => {
                self.send(requester, page, data(Rights::Exclusive), out);
            }
            Demand::Reclaim { requester } => {
                out.push(Effect::Clear(page));
                self.send(requester, page, data(Rights::Exclusive), out);
            }
            Demand::ForwardShared { requester } => {
                self.send(requester, page, data(Rights::Shared), out);
                if requester != home && !self.makes(Mistake::LoseWriteback) {
                    self.send(home, page, Kind::Writeback { body: home != self.me }, out);
                }
            }
        }
        let keeps = matches!(demand, Demand::ForwardShared { .. }) && !self.makes(Mistake::FreeSharedFrame);
        if !free || keeps || home == self.me {
            return;
        }
        match self.transient.get_mut(page) {
            None => out.push(Effect::Free(page)),
            // Its bytes will land in the frame at once: keep it.
            Some(Transient::Miss(miss)) => miss.keeps_frame = true,
            Some(Transient::Evict { .. }) => {}
        }
    }

    /// Serves a demand that waits for the page's release, now: this node wants more of the page anyhow.
    fn yield_deferred(&mut self, page: Page, out: &mut Vec<Effect>) {
        if let Some(demand) = self.deferred.remove(page) {
            self.serve(page, demand, out);
        }
    }

    pub(super) fn cache_release(&mut self, page: Page, out: &mut Vec<Effect>) {
        self.set_bits(page, self.bits(page) & !Local::HELD);
        if self.makes(Mistake::ForgetDeferred) {
            self.deferred.remove(page);
        }
        self.yield_deferred(page, out);
        self.home_push_own(page, out);
    }

    pub(super) fn cache_evict(&mut self, page: Page, out: &mut Vec<Effect>) -> bool {
        let (home, rights) = (self.homes.home(page), self.rights(page));
        if home == self.me || rights == Rights::None || self.held(page) || self.is_transient(page) {
            return false;
        }
        out.push(Effect::Unmap(page, rights));
        self.set_local(page, Rights::None, false);
        if !self.makes(Mistake::ForgetBeforePutAck) {
            self.transient.insert(page, Transient::Evict { refault: Want::NOTHING });
        }
        let kind = if rights == Rights::Exclusive { Kind::PutExclusive } else { Kind::PutShared };
        self.send(home, page, kind, out);
        true
    }

    pub(super) fn cache_put_ack(&mut self, page: Page, out: &mut Vec<Effect>) -> Outcome {
        let Some(&Transient::Evict { refault }) = self.transient.get(page) else {
            return Err("it acknowledged an eviction that nobody asked for".into());
        };
        self.transient.remove(page);
        if !self.makes(Mistake::KeepFrame) {
            out.push(Effect::Free(page));
        }
        if refault.rights != Rights::None && !self.makes(Mistake::ForgetRefault) {
            self.cache_fault(page, refault, out);
        }
        Ok(())
    }
}
