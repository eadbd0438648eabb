//! The coherence protocol: a pure state machine, one for each shard of each node.
//!
//! Inputs are [`Protocol::fault`], [`Protocol::message`], [`Protocol::evict`], [`Protocol::discard`],
//! [`Protocol::load`], [`Protocol::store`], [`Protocol::operate`] and [`Protocol::release`]; every input
//! appends [`Effect`]s, which the caller carries out **in their order**. There is no I/O, no clock and no
//! randomness here. The engine, the model checker, the property tests and the simulator all drive this code.
//!
//! Each node plays two parts: *cache* ([`cache`]) for the pages that its guest view maps, and *home*
//! ([`home`]) for the pages whose directory it keeps. When both parts of one node talk to each other the
//! messages take the same way, through a local queue that is emptied before an input ends.
//!
//! # What the lanes must give
//! Messages from one node to another arrive in the order sent (per shard). Between different pairs of
//! nodes there is no order. Nothing is lost: a node that cannot be reached ends the machine.
//!
//! # The directory is exact
//! A node never drops a copy silently: it puts it ([`Kind::PutShared`], [`Kind::PutExclusive`]) and forgets
//! the page only when the home has acknowledged. So an Invalidate, Forward or Reclaim that finds a miss under
//! way can be told apart:
//!
//! | waiting for | Invalidate arrives | Forward or Reclaim arrives |
//! |---|---|---|
//! | Shared | it is for the copy on its way to us: answered after it came | cannot be |
//! | Exclusive | it is for the copy we still have: answered at once | for the page on its way: answered after it came |
//! | PutAck | answered at once | answered at once, from the frame |
//!
//! # States of a page in the cache
//! ```text
//!            fault r: GetShared             fault w: GetExclusive
//!  Invalid ────────────────────> (miss) <──────────────────────── Shared
//!     ▲                            │ Data (+ acks)                   ▲
//!     │ Invalidate / Forward:      ▼                                 │
//!     ├──── unmap, answer ── Shared | Exclusive ── ForwardShared ────┘
//!     │                            │ evict          protect, answer
//!     └──── PutAck ──────────── (evicting)
//! ```
//! # Runs
//! A miss may ask for untouched pages that follow ([`runs`]). They have no miss of their own: faults on them
//! wait for the answer, and ask for themselves if it does not bring their page. Only the home grants a run,
//! in its own answer, so that whatever it says of these pages later comes after the grant.
//!
//! # Discarding
//! Who knows that nobody needs the content of some pages (the balloon, of what the guest has freed) may have
//! their home give their frames up ([`discard`]): afterwards they are as at power-on, zero and untouched.
//!
//! # Devices
//! What a device reads or overwrites whole need not move: [`direct`] reads a page where it is, and writes it
//! at its home.
//!
//! # Classes
//! Most pages *move* to who uses them. A page that several nodes use a little at a time costs less where it
//! stays: its home may *delegate* it to whoever owns it, and what other nodes' vCPUs would do with it is sent
//! there ([`ship`]). One that a node writes and several read may be *pushed*: readers get the new content
//! unasked ([`push`]). Classes are the home's ([`classes`]), by the rules of [`classify`], and begin and end
//! while requests are under way.
//!
//! ```text
//!   fault_may_ship of a page that is not here
//!       │ Get, may ship               ┌─ moving, pushed, or its turn: Data, as ever
//!       ├──────────────────────> home ┤
//!       │                             └─ delegated, with an owner: Ship
//!       ▼ known to be delegated               │
//!   Effect::Ship <────────────────────────────┘
//!       │ the vCPU is called out
//!       ├─ its instruction cannot be shipped: fault ──> the page moves, the class stays
//!       ▼
//!   operate ──> (outstanding) ──┬─ Effect::Operated, with the old bytes: done, once
//!                               └─ Effect::Operated, without: refused; fault again
//! ```
//! | the page, when an operation comes to its home | then |
//! |---|---|
//! | delegated, the home has it to write | done there |
//! | delegated, another node owns it | passed on; done there if it has the page to write, else refused |
//! | not delegated, shared, owned by who asks, its turn, or something under way on it | refused |
//!
//! | the reader's side of a page, when a push comes | then |
//! |---|---|
//! | nothing, and a frame is free | taken: mapped read-only |
//! | waiting for Shared | taken, as the answer; the home drops the question that has passed it |
//! | waiting for Exclusive | taken: the page is here as if it had been before the question |
//! | nothing and no frame, or waiting for PutAck | declined |
//!
//! # Memory
//! Copies may be limited in number ([`budget`]): faults then wait for a frame, and copies go home.
//!
//! A page that was just won is *held*: Invalidate and Forward wait until the caller [`release`]s it, so
//! that the instruction that needed it can retire.
//!
//! [`release`]: Protocol::release

mod budget;
mod cache;
mod classes;
mod classify;
mod copies;
mod direct;
mod discard;
mod home;
mod message;
mod mistake;
mod operation;
mod push;
mod runs;
mod ship;
mod state;
#[cfg(test)]
mod tests;
mod turns;
mod under_way;
mod wire;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use fabric::NodeId;

use self::budget::Budget;
pub use self::budget::Eviction;
use self::classes::Classes;
pub use self::classes::{Class, Shipping};
pub use self::classify::Rules;
use self::copies::Copies;
pub use self::message::{Bits, Kind, MAX_RUN, Message};
#[cfg(test)]
pub(crate) use self::mistake::Mistake;
#[cfg(not(test))]
use self::mistake::Mistake;
pub use self::operation::{Action, Operation, Width};
pub use self::runs::RunPolicy;
use self::runs::Streams;
pub use self::state::Entry;
pub(crate) use self::state::PageMap;
use self::state::{Directory, Table};
use self::under_way::{Busy, Demand, Direct, Local, Miss, Outstanding, Request, Transient, Want};
pub use self::wire::{Body, Head};
use crate::node_set::NodeSet;
use crate::page::{Homes, Page};

/// What a node may do with a page through its guest view.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Rights {
    /// Nothing: Invalid.
    #[default]
    None = 0,
    /// Read.
    Shared = 1,
    /// Read and write.
    Exclusive = 2,
}

/// What the caller must do, in order.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Send a message; its body, if any, is the page's frame as it is now. With [`Kind::Loaded`] the frame
    /// may be written meanwhile; with [`Kind::Store`] it is the bytes of the input instead.
    Send {
        /// To whom; never this node.
        to: NodeId,
        /// What.
        message: Message,
    },
    /// Copy the body of the message being handled into the page's frame.
    Land(Page),
    /// Map the frame in the guest view with these rights and wake who waits for it.
    Map(Page, Rights),
    /// Map that many pages of zeroes, from this one on, writable, and wake who waits for them.
    MapZeroes(Page, u8),
    /// Lift the write protection from the mapped page and wake who waits for it.
    Unprotect(Page),
    /// Write-protect the page in the guest view.
    Protect(Page),
    /// Unmap the page, which had these rights, from the guest view; its frame stays. Nobody can access it
    /// when this is done.
    Unmap(Page, Rights),
    /// Unmap the page from the guest view to see whether it is used: its copy stays, and the next touch is a
    /// fault.
    Probe(Page),
    /// The frame's content is of no use any more; give its memory back (never at the home).
    Free(Page),
    /// Fill the frame with zeroes; the page is not mapped. As a write by this node, which alone has the page.
    Clear(Page),
    /// At the home, which alone has them: that many pages, from this one on, are zero from now on and their
    /// frames given up, mapped or not; the kernel fills them when they are touched.
    Punch(Page, u16),
    /// [`Protocol::discard`] is done with that many pages, from this one on.
    Discarded(Page, u16),
    /// At the home, which alone has the page: copy the bytes of the input into its frame, mapped or not.
    Overwrite(Page),
    /// At the home: what a device stored is the page's content from now on.
    Written(Page),
    /// [`Protocol::load`] of this page is done; if `true`, what was read is the body of the message being
    /// handled.
    Loaded(Page, bool),
    /// [`Protocol::store`] of this page is done, if `true`, or the page must be written by other means.
    Stored(Page, bool),
    /// The page does not come: each vCPU that waits for it is to be called out of its wait, and then either
    /// [`Protocol::operate`]s or faults again.
    Ship(Page),
    /// Carry the operation out on the page's frame, mapped or not, as one instruction that is atomic with
    /// those of this node's vCPUs, and send the old bytes as [`Kind::Operated`]. This node alone has the
    /// page.
    Operate {
        /// Whose CPU waits; never this node.
        to: NodeId,
        /// Where.
        page: Page,
        /// To send back.
        token: u32,
        /// What to do.
        operation: Operation,
    },
    /// [`Protocol::operate`] of this page and token was done once, and these were the bytes before; or it was
    /// not done and will not be, and the vCPU is to fault again.
    Operated {
        /// Where.
        page: Page,
        /// Of the input.
        token: u32,
        /// The bytes before.
        old: Option<Bits>,
    },
    /// A page was won: call [`Protocol::release`] after it could be used.
    Hold(Page),
    /// A demand waits for the release of a held page. For the trace and the counters.
    Deferred(Page),
}

/// A message that no correct peer sends: its session must end.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{from} broke the coherence protocol on page {page:#x}: {what}", page = page.0)]
pub struct Violation {
    /// Who sent it.
    pub from: NodeId,
    /// On which page.
    pub page: Page,
    /// What is wrong with it.
    pub what: &'static str,
}

/// What a Data message says.
struct Grant {
    rights: Rights,
    acks: u16,
    body: bool,
    run: u8,
}

/// What is wrong with a message; `from` if it is not its sender's fault but that of one whose request waited.
struct Wrong {
    from: Option<NodeId>,
    what: &'static str,
}

impl From<&'static str> for Wrong {
    fn from(what: &'static str) -> Wrong {
        Wrong { from: None, what }
    }
}

type Outcome = Result<(), Wrong>;

/// The protocol of one shard at one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Protocol {
    me: NodeId,
    homes: Arc<Homes>,
    /// Pages of which this node is the home.
    own: Range<u64>,
    /// The cache's side of these.
    local: Table<Local>,
    /// The cache's side of all others.
    copies: Copies,
    budget: Budget,
    transient: PageMap<Transient>,
    deferred: PageMap<Demand>,
    directory: Directory,
    busy: PageMap<Busy>,
    streams: Streams,
    /// Pages whose homes this node has asked to discard them, and which have not answered yet.
    discarding: u64,
    /// What devices of this node wait for.
    direct: PageMap<Direct>,
    /// What vCPUs of this node wait for, in order.
    operations: Vec<Outstanding>,
    /// Pages of which this node has been told that they are delegated.
    shipped: PageMap<()>,
    classes: Classes,
    /// Of pushed pages of this home: who could read them before they were written last.
    readers: PageMap<NodeSet>,
    /// A page to ask for when this input ends.
    to_pull: Option<Page>,
    /// Messages from one part of this node to the other.
    loopback: VecDeque<Message>,
    /// What is wrong with a message that had to wait.
    violation: Option<Violation>,
    /// What tests make it do wrongly.
    #[cfg(test)]
    mistake: Option<Mistake>,
}

impl Protocol {
    /// The protocol at node `me`, everything at home. Tables grow by `chunk_pages` pages; runs of untouched
    /// pages stay within an aligned block of 512, so that they never leave their shard.
    pub fn new(me: NodeId, homes: Arc<Homes>, chunk_pages: u64, runs: RunPolicy) -> Protocol {
        Protocol {
            me,
            own: homes.range(me),
            homes,
            local: Table::new(chunk_pages),
            copies: Copies::default(),
            budget: Budget::NONE,
            transient: PageMap::default(),
            deferred: PageMap::default(),
            directory: Directory::new(me, chunk_pages),
            busy: PageMap::default(),
            streams: Streams::new(runs),
            discarding: 0,
            direct: PageMap::default(),
            operations: Vec::new(),
            shipped: PageMap::default(),
            classes: Classes::default(),
            readers: PageMap::default(),
            to_pull: None,
            loopback: VecDeque::new(),
            violation: None,
            #[cfg(test)]
            mistake: None,
        }
    }

    /// A vCPU (or the node itself, through the guest view) was stopped at a page.
    ///
    /// Several faults may report one page; a fault that comes after its page was mapped is answered by
    /// mapping it again. The page comes, whatever its class: see [`Protocol::fault_may_ship`].
    pub fn fault(&mut self, page: Page, write: bool, out: &mut Vec<Effect>) {
        self.cache_fault(page, Want::page(if write { Rights::Exclusive } else { Rights::Shared }), out);
        self.finish_own(out);
    }

    /// Asks for a page that is likely to be needed, if it is not here and nothing is under way on it; whether
    /// it was asked for. It is held when it comes, but only a fault maps it. A copy that is here to read is
    /// left alone.
    pub fn prefetch(&mut self, page: Page, write: bool, out: &mut Vec<Effect>) -> bool {
        let want = if write { Rights::Exclusive } else { Rights::Shared };
        let asked = self.cache_prefetch(page, want, out);
        self.finish_own(out);
        asked
    }

    /// A peer's message came.
    ///
    /// `zeroes` is a promise of the caller, for a Get: that many pages, from the message's page on, are
    /// unmapped from this node's guest view and all zero. [`Protocol::untouched`] tells for how many it is
    /// worth finding out; 0 is always right.
    ///
    /// # Errors
    /// [`Violation`] when it, or one that had to wait until now, makes no sense; the state and `out` are then
    /// not to be used any more.
    pub fn message(
        &mut self,
        from: NodeId,
        message: Message,
        zeroes: u8,
        out: &mut Vec<Effect>,
    ) -> Result<(), Violation> {
        if let Some(earlier) = self.violation {
            return Err(earlier);
        }
        self.dispatch(from, message, zeroes, out)?;
        self.finish(out)
    }

    /// For a Get from a peer: how many pages, from the message's page on, never left this home and could go
    /// with the answer if they turn out to be untouched. 0 if the message is something else.
    pub fn untouched(&self, message: &Message) -> u8 {
        let (Kind::GetShared { run, may_ship } | Kind::GetExclusive { run, may_ship }) = message.kind else {
            return 0;
        };
        if may_ship && self.is_delegated(message.page) {
            return 0;
        }
        self.untouched_run(message.page, run + 1)
    }

    /// Holds a page that is here once more, as if it had just been won: it was asked for ahead of its need,
    /// and is needed now. [`Protocol::release`] must follow.
    pub fn hold(&mut self, page: Page) {
        if self.rights(page) != Rights::None {
            self.set_bits(page, self.bits(page) | Local::HELD);
        }
    }

    /// The time for which a won page is held is over.
    pub fn release(&mut self, page: Page, out: &mut Vec<Effect>) {
        self.cache_release(page, out);
        self.finish_own(out);
    }

    /// Gives a copy back to its home, to make room. Does nothing, and says so by `false`, if the page is at
    /// home, not here, held, or already under way.
    pub fn evict(&mut self, page: Page, out: &mut Vec<Effect>) -> bool {
        let evicted = self.cache_evict(page, out);
        self.finish_own(out);
        evicted
    }

    /// What this node's guest view may do with a page now.
    pub fn rights(&self, page: Page) -> Rights {
        let bits = self.bits(page);
        match bits & 3 {
            _ if self.is_home(page) && bits & Local::KNOWN == 0 => Rights::Exclusive,
            0 => Rights::None,
            1 => Rights::Shared,
            _ => Rights::Exclusive,
        }
    }

    /// Whether the page is held.
    pub fn held(&self, page: Page) -> bool {
        self.bits(page) & Local::HELD != 0
    }

    /// The home's knowledge of a page; only at its home.
    pub fn entry(&self, page: Page) -> Entry {
        self.directory.get(page)
    }

    /// What was found wrong with a peer's message when its turn came, by another input than a message; the
    /// next [`Protocol::message`] says so as well.
    pub fn violation(&self) -> Option<Violation> {
        self.violation
    }

    /// Whether nothing is under way here.
    pub fn is_quiet(&self) -> bool {
        self.transient.is_empty()
            && self.busy.is_empty()
            && self.deferred.is_empty()
            && self.discarding == 0
            && self.direct.is_empty()
            && self.operations.is_empty()
            && self.parked().next().is_none()
    }

    /// Whether something is under way on the page here.
    pub fn is_transient(&self, page: Page) -> bool {
        self.transient.get(page).is_some() || self.busy.get(page).is_some()
    }

    /// Whether nobody needs what the frame of a page of another home holds here.
    pub fn is_garbage(&self, page: Page) -> bool {
        self.rights(page) == Rights::None && !self.is_transient(page)
    }

    /// Whether the page is on its way back to its home.
    pub fn is_leaving(&self, page: Page) -> bool {
        matches!(self.transient.get(page), Some(Transient::Evict { .. }))
    }

    /// Whether the page is being asked for here, by a fault or ahead of one.
    pub fn is_missing(&self, page: Page) -> bool {
        match self.transient.get(page) {
            Some(Transient::Miss(_)) => true,
            Some(Transient::Evict { refault }) => refault.rights != Rights::None,
            None => self.covering_miss(page).is_some() || self.parked().any(|parked| parked == page),
        }
    }

    /// How many demands wait for held pages here.
    pub fn deferred(&self) -> usize {
        self.deferred.len()
    }

    /// Bytes of state: directory, rights, and classes.
    pub fn metadata_bytes(&self) -> usize {
        self.local.bytes() + self.copies.bytes() + self.directory.bytes() + self.classes_bytes()
    }

    /// One line for every page on which something is under way, for the failure dump.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (page, t) in self.transient.iter() {
            lines.push(format!("page {:#x}: {:?}, rights {:?}", page.0, t, self.rights(page)));
        }
        for (page, d) in self.deferred.iter() {
            lines.push(format!("page {:#x}: held, deferred {:?}", page.0, d));
        }
        lines.extend(self.parked().map(|page| format!("page {:#x}: waits for a frame", page.0)));
        if self.discarding > 0 {
            lines.push(format!("{} pages are being discarded by their homes", self.discarding));
        }
        for (page, direct) in self.direct.iter() {
            lines.push(format!("page {:#x}: a device waits for its {direct:?}", page.0));
        }
        for Outstanding { page, token, .. } in &self.operations {
            lines.push(format!("page {:#x}: operation {token} of a vCPU is under way", page.0));
        }
        for (page, b) in self.busy.iter() {
            lines.push(format!("page {:#x}: home busy, {:?}, {:?}", page.0, self.entry(page), b));
        }
        lines
    }

    fn set_local(&mut self, page: Page, rights: Rights, held: bool) {
        let held = if held { Local::HELD } else { 0 };
        let known = if self.is_home(page) { Local::KNOWN } else { 0 };
        self.set_bits(page, rights as u8 | held | known);
    }

    /// Whether this node is the page's home.
    fn is_home(&self, page: Page) -> bool {
        self.own.contains(&page.0)
    }

    fn bits(&self, page: Page) -> u8 {
        if self.is_home(page) { self.local.get(page).0 } else { self.copies.get(page) }
    }

    fn set_bits(&mut self, page: Page, bits: u8) {
        if self.is_home(page) {
            self.local.set(page, Local(bits));
        } else {
            self.copies.set(page, bits);
        }
    }

    /// Whether the page, of another home, is here and not mapped.
    fn is_idle(&self, page: Page) -> bool {
        !self.is_home(page) && self.bits(page) & Local::IDLE != 0
    }

    fn set_idle(&mut self, page: Page, idle: bool) {
        if !self.is_home(page) {
            let bits = self.bits(page) & !Local::IDLE;
            self.set_bits(page, if idle { bits | Local::IDLE } else { bits });
        }
    }

    fn send(&mut self, to: NodeId, page: Page, kind: Kind, out: &mut Vec<Effect>) {
        let message = Message { page, kind };
        if to == self.me {
            self.loopback.push_back(message);
        } else {
            out.push(Effect::Send { to, message });
        }
    }

    /// Takes the bytes that came with a message. Nothing lands under a mapping, whatever peers send: who owns
    /// a page that is still here cannot have its bytes.
    fn land(&self, page: Page, out: &mut Vec<Effect>) -> Outcome {
        if self.rights(page) != Rights::None {
            return Err("it sent bytes of a page that it has not got yet".into());
        }
        out.push(Effect::Land(page));
        Ok(())
    }

    /// Ends an input that is no message. What this node says to itself is never malformed, but it may be the
    /// turn of a peer's request that is.
    fn finish_own(&mut self, out: &mut Vec<Effect>) {
        if let Err(violation) = self.finish(out) {
            self.violation = Some(violation);
        }
    }

    /// Ends an input: messages to this node itself, and the budget.
    fn finish(&mut self, out: &mut Vec<Effect>) -> Result<(), Violation> {
        loop {
            while let Some(message) = self.loopback.pop_front() {
                self.dispatch(self.me, message, 0, out)?;
            }
            if self.to_pull.is_none() {
                break;
            }
            self.pull_if_free(out);
        }
        // Pages at home need no frame, so this sends nothing to this node itself.
        self.balance(out);
        Ok(())
    }

    fn dispatch(
        &mut self,
        from: NodeId,
        message: Message,
        zeroes: u8,
        out: &mut Vec<Effect>,
    ) -> Result<(), Violation> {
        let page = message.page;
        let at_home = self.homes.home(page) == self.me;
        let from_home = self.homes.home(page) == from;
        let result = match message.kind {
            Kind::GetShared { run, .. } | Kind::GetExclusive { run, .. }
                if at_home && zeroes > 0 && self.untouched_run(page, run + 1) > 0 =>
            {
                self.home_give_run(page, from, zeroes.min(self.untouched_run(page, run + 1)), out)
            }
            Kind::GetShared { may_ship, .. } if at_home => {
                self.home_get(page, from, Want { rights: Rights::Shared, may_ship }, out)
            }
            Kind::GetExclusive { may_ship, .. } if at_home => {
                self.home_get(page, from, Want { rights: Rights::Exclusive, may_ship }, out)
            }
            Kind::Writeback { body } if at_home => self.home_writeback(page, from, body, out),
            Kind::PutShared if at_home => self.home_put(page, from, None, out),
            Kind::PutExclusive if at_home => self.home_put(page, from, Some(()), out),
            Kind::Data { rights, acks, body, run } => {
                self.cache_data(page, from, Grant { rights, acks, body, run }, out)
            }
            Kind::Ack => self.cache_ack(page, out),
            Kind::Invalidate { requester } if from_home => {
                self.cache_demand(page, Demand::Invalidate { requester }, out)
            }
            Kind::ForwardShared { requester } if from_home => {
                self.cache_demand(page, Demand::ForwardShared { requester }, out)
            }
            Kind::ForwardExclusive { requester } if from_home => {
                self.cache_demand(page, Demand::ForwardExclusive { requester }, out)
            }
            Kind::PutAck if from_home => self.cache_put_ack(page, out),
            Kind::Discard { run } if at_home => self.home_discard(page, from, run, out),
            Kind::Reclaim if from_home => self.cache_demand(page, Demand::Reclaim { requester: from }, out),
            Kind::Discarded { run } if from_home => self.discarded(page, run, out),
            Kind::Load if at_home => {
                self.home_load(page, from, out);
                Ok(())
            }
            Kind::LoadAt { requester } if from_home => self.owner_load(page, requester, out),
            Kind::Loaded { body } => self.loaded(page, body, out),
            Kind::Store if at_home => self.home_store(page, from, out),
            Kind::Stored { done } if from_home => self.stored(page, done, out),
            Kind::Ship if from_home => self.cache_ship(page, out),
            Kind::Operate { token, operation } if at_home => {
                self.home_operate(page, from, token, operation, out);
                Ok(())
            }
            Kind::OperateAt { requester, token, operation } if from_home => {
                self.owner_operate(page, requester, token, operation, out)
            }
            Kind::Operated { token, old } => self.operated(page, token, old, out),
            Kind::Push if from_home => self.cache_push(page, out),
            Kind::Pushed { taken } if at_home => self.home_pushed(page, from, taken, out),
            _ => Err("the page's home is another node".into()),
        };
        result.map_err(|wrong| Violation { from: wrong.from.unwrap_or(from), page, what: wrong.what })
    }
}
