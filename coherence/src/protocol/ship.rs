//! Delegated pages: a CPU's node sends the operation on a few bytes to the node that has the page, and the
//! page stays there.
//!
//! ```text
//!  a CPU's node                   home                               owner
//!  fault ────── Get, may ship ──> the page is delegated: Ship
//!  Effect::Ship: the CPU is called out of its wait, its instruction looked at
//!  operate ──── Operate ────────> the home has it: Effect::Operate, Operated
//!                                 an owner ────── OperateAt ───────> Effect::Operate, Operated to the CPU's node
//!  Effect::Operated: the CPU goes on
//! ```
//! A fault says whether it may be shipped ([`Protocol::fault_may_ship`]); any other moves the page as ever
//! ([`Protocol::fault`]), also out of its class, and also if it comes while one that may be shipped is under
//! way. A node remembers which pages are delegated, so that the next fault need not ask.
//!
//! The owner carries an operation out while it alone has the page, on its frame, with one real instruction
//! that is atomic with those of its own CPUs; these notice nothing. It happens once, between the question and
//! the answer. If anything is in the way, because the page is moving, going home, shared, being discarded, or
//! not delegated any more, the answer is that it was not done and will not be: nothing ever waits for
//! something that is under way. The CPU may then fault again as before; after some refusals it should want
//! the page. It is also refused when it is its node's turn to own the page ([`super::turns`]): then its next
//! fault brings the page.
//!
//! # What the caller does
//! - [`Effect::Ship`]: no page will come, so nobody's wait for it is timed any more. Each vCPU that waits for
//!   the page is called out; threads that cannot be called out never fault by [`Protocol::fault_may_ship`].
//! - [`Effect::Operate`]: the frame changes, as when it is written by a vCPU, so what was sent of the page
//!   before must have left. The answer takes its place in the order of effects. The old bytes of a store are
//!   not looked at.
//! - [`Effect::Operated`] with `None`: the vCPU faults again, and after three refusals or so by
//!   [`Protocol::fault`].
//! - What is only likely to be needed ([`Protocol::prefetch`]) may not come, without an effect, if it is
//!   delegated.
//! - [`Protocol::set_time`] before each batch of inputs, for [`Shipping::Auto`](super::Shipping).
//!
//! # Why this is total store order
//! The CPU stands at its instruction, its store buffer empty, until the answer; the operation takes its place
//! among all accesses where the one current copy is. It is as if the page had come, had been used once, and
//! had gone back.
//!
//! # Why exactly once
//! Lanes neither lose nor double messages (a rail that breaks is the fabric's to mend, or the machine ends).
//! Each question is passed on at most once and answered by whoever did not pass it on. Nothing is ever asked
//! again: a CPU whose operation was refused begins again.

use fabric::NodeId;

use super::message::Bits;
use super::operation::Operation;
use super::under_way::{Outstanding, Want};
use super::{Effect, Entry, Kind, Mistake, Outcome, Protocol, Rights};
use crate::page::Page;

/// Pages that a node remembers as delegated at most; it asks again for others.
const KNOWN: usize = 1024;

impl Protocol {
    /// As [`Protocol::fault`], of a vCPU that can be called out of its wait: if the page is delegated
    /// [`Effect::Ship`] follows, and the page does not come.
    pub fn fault_may_ship(&mut self, page: Page, write: bool, out: &mut Vec<Effect>) {
        let rights = if write { Rights::Exclusive } else { Rights::Shared };
        self.cache_fault(page, Want { rights, may_ship: self.ships() }, out);
        self.finish_own(out);
    }

    /// A vCPU that was called out of its wait does this with the page; whether it was sent. If so,
    /// [`Effect::Operated`] with the same token follows. Else the page has come meanwhile, as far as the
    /// operation can tell: the vCPU touches it again.
    ///
    /// `token` tells the operations that this node has under way on the page apart, one for each vCPU.
    pub fn operate(&mut self, page: Page, token: u32, operation: Operation, out: &mut Vec<Effect>) -> bool {
        let at = match self.find_operation(page, token) {
            Ok(_) => return false,
            Err(_) if self.rights(page) != Rights::None => return false,
            Err(at) => at,
        };
        let bytes = operation.width().bytes() as u8;
        self.operations.insert(at, Outstanding { page, token, bytes });
        self.send(self.homes.home(page), page, Kind::Operate { token, operation }, out);
        if self.makes(Mistake::DoNotWait) {
            out.push(Effect::Operated { page, token, old: Some(0.into()) });
        }
        self.finish_own(out);
        true
    }

    /// How many operations of this node are under way.
    pub fn operations(&self) -> usize {
        self.operations.len()
    }

    fn find_operation(&self, page: Page, token: u32) -> Result<usize, usize> {
        self.operations.binary_search_by_key(&(page, token), |known| (known.page, known.token))
    }

    /// Whether a fault that may be shipped need not ask.
    pub(super) fn knows_to_ship(&self, page: Page) -> bool {
        self.shipped.get(page).is_some() && self.rights(page) == Rights::None
    }

    pub(super) fn learn_to_ship(&mut self, page: Page) {
        if self.shipped.len() >= KNOWN {
            self.shipped.clear();
        }
        self.shipped.insert(page, ());
    }

    pub(super) fn forget_to_ship(&mut self, page: Page) {
        self.shipped.remove(page);
    }

    /// A CPU's operation was done, or was not.
    pub(super) fn operated(
        &mut self,
        page: Page,
        token: u32,
        old: Option<Bits>,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Ok(at) = self.find_operation(page, token) else {
            return Err("it answered an operation that nobody waits for".into());
        };
        let bits = 8 * u32::from(self.operations[at].bytes);
        if old.is_some_and(|old| u128::from(old).checked_shr(bits).unwrap_or(0) != 0) {
            return Err("it answered an operation with more bytes than that has".into());
        }
        self.operations.remove(at);
        if old.is_none() {
            self.forget_to_ship(page);
        }
        out.push(Effect::Operated { page, token, old });
        Ok(())
    }

    /// Somebody's CPU operates on a page of this home.
    pub(super) fn home_operate(
        &mut self,
        page: Page,
        by: NodeId,
        token: u32,
        operation: Operation,
        out: &mut Vec<Effect>,
    ) {
        let moves = self.note_operation(page, by, operation.action().writes());
        let delegated = self.is_delegated(page) && !moves;
        match self.entry(page) {
            _ if by != self.me && self.makes(Mistake::OperateAtHome) => {
                self.carry_out(page, by, token, operation, out)
            }
            _ if !delegated || self.is_transient(page) => self.refuse(page, by, token, operation, out),
            Entry::Exclusive(owner) if owner == by => self.refuse(page, by, token, operation, out),
            Entry::Exclusive(owner) if owner == self.me => {
                self.operate_if_here(page, by, token, operation, out);
            }
            Entry::Exclusive(owner) => {
                self.send(owner, page, Kind::OperateAt { requester: by, token, operation }, out);
            }
            Entry::Shared(_) if self.makes(Mistake::OperateOnShared) => {
                self.carry_out(page, by, token, operation, out);
            }
            // It moves on its own when somebody writes.
            Entry::Shared(_) => self.refuse(page, by, token, operation, out),
        }
    }

    /// The home says that a CPU of another node operates on our page.
    pub(super) fn owner_operate(
        &mut self,
        page: Page,
        by: NodeId,
        token: u32,
        operation: Operation,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        if by == self.me {
            return Err("it sent an operation to the node that asked for it".into());
        }
        self.operate_if_here(page, by, token, operation, out);
        Ok(())
    }

    fn operate_if_here(
        &mut self,
        page: Page,
        by: NodeId,
        token: u32,
        operation: Operation,
        out: &mut Vec<Effect>,
    ) {
        // Who has the page to write has nothing under way on it.
        if self.rights(page) == Rights::Exclusive || self.makes(Mistake::OperateOnPageThatLeft) {
            self.carry_out(page, by, token, operation, out);
        } else {
            self.refuse(page, by, token, operation, out);
        }
    }

    fn carry_out(&mut self, page: Page, to: NodeId, token: u32, operation: Operation, out: &mut Vec<Effect>) {
        let operate = Effect::Operate { to, page, token, operation };
        out.push(operate);
        if self.makes(Mistake::OperateTwice) {
            out.push(operate);
        }
    }

    fn refuse(&mut self, page: Page, to: NodeId, token: u32, operation: Operation, out: &mut Vec<Effect>) {
        if self.makes(Mistake::OperateAndRefuse) && self.rights(page) == Rights::Exclusive {
            self.carry_out(page, to, token, operation, out);
        }
        if !self.makes(Mistake::ForgetRefusal) {
            self.send(to, page, Kind::Operated { token, old: None }, out);
        }
    }
}
