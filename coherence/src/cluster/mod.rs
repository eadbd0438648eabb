//! A cluster: the protocols of all nodes and the messages between them as one value, which the property
//! tests, the model checker and the simulator drive and check.
//!
//! There is no time here, and hardly any data. A frame is *current* or it is not: a write makes every other
//! copy of the page, in frames and in flight, stale; a read must find a current one. That keeps the state
//! finite, so that the model checker can exhaust it. Only what CPUs *operate* on has a value, one byte a
//! page, to which each operation that writes adds one, wherever it is carried out; it wraps at [`VALUES`]
//! ([`operations`]).
//!
//! [`checks`] says what must hold.
//!
//! | who drives it | where | how |
//! |---|---|---|
//! | model checker | `tests/model.rs` | every step that can happen, in every state of small clusters |
//! | seeded faults | `tests/mistakes.rs` | the same with a mistake built in, which must be found |
//! | property tests | `protocol/tests` | random schedules |
//! | simulator | [`crate::simulator`] | hundreds of nodes in virtual time, by seed |

mod checks;
mod operations;
mod step;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use fabric::NodeId;

pub use self::checks::Broken;
use self::operations::Cpu;
pub use self::operations::VALUES;
pub use self::step::{Seen, Step};
use crate::page::{Homes, Page};
use crate::protocol::{Class, Effect, Eviction, Kind, Message, Protocol, Rights, RunPolicy, Shipping};

/// One node's copy of a page.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Copy {
    /// What the guest view may do with it, as mapped.
    pub mapped: Rights,
    /// Whether the frame holds the last write.
    pub current: bool,
    /// Whether there is a frame; always at home.
    pub frame: bool,
    /// The byte that CPUs operate on.
    pub value: u8,
}

/// A message under way, and whether its bytes are the last write.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Flight {
    /// What is said.
    pub message: Message,
    /// Whether its body, if it has one, holds the last write.
    pub current: bool,
    /// The byte in it that CPUs operate on.
    pub value: u8,
}

/// Nodes, what they have mapped, and what is between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cluster {
    nodes: Vec<Protocol>,
    homes: Arc<Homes>,
    /// Messages on their way, by sender and receiver; no empty queues.
    lanes: BTreeMap<(NodeId, NodeId), VecDeque<Flight>>,
    /// Page by page, node by node: what is looked at together lies together.
    copies: Vec<Copy>,
    /// By node, in order.
    held: Vec<Vec<Page>>,
    /// Accesses that wait, by node, in order: equal states compare equal, however they came about.
    waiting: Vec<Vec<(Page, bool)>>,
    /// CPUs that operate, by node, in order.
    cpus: Vec<Vec<Cpu>>,
    /// By page: what the byte is that CPUs operate on.
    values: Vec<u8>,
    /// Pages that nobody has touched since power-on, or since they were discarded.
    untouched: Vec<bool>,
    /// By page: how many of the messages on their way bring its bytes.
    bodies: Vec<u16>,
    /// By node: frames of pages of other homes.
    frames: Vec<usize>,
    /// How many of these a node may have.
    budget: usize,
    /// Microseconds, if anybody says.
    now: u64,
}

impl Cluster {
    /// `pages` pages dealt evenly to `nodes` homes, without runs.
    pub fn new(nodes: usize, pages: u64) -> Cluster {
        let share = |n| pages / nodes as u64 + u64::from((n as u64) < pages % nodes as u64);
        Cluster::with_homes(Homes::new((0..nodes).map(share)), RunPolicy::NONE)
    }

    /// A cluster with these homes, whose misses ask for runs as the policy says.
    pub fn with_homes(homes: Homes, runs: RunPolicy) -> Cluster {
        let (nodes, pages) = (homes.nodes(), homes.pages());
        let homes = Arc::new(homes);
        let copy = |n, p| match homes.home(Page(p)) == NodeId(n as u16) {
            true => Copy { mapped: Rights::Exclusive, current: true, frame: true, value: 0 },
            false => Copy { mapped: Rights::None, current: false, frame: false, value: 0 },
        };
        Cluster {
            nodes: (0..nodes)
                .map(|n| Protocol::new(NodeId(n as u16), homes.clone(), pages.clamp(1, 512), runs))
                .collect(),
            lanes: BTreeMap::new(),
            copies: (0..pages)
                .flat_map(|p| (0..nodes).map(move |n| (n, p)))
                .map(|(n, p)| copy(n, p))
                .collect(),
            held: vec![Vec::new(); nodes],
            waiting: vec![Vec::new(); nodes],
            cpus: vec![Vec::new(); nodes],
            values: vec![0; pages as usize],
            untouched: vec![true; pages as usize],
            bodies: vec![0; pages as usize],
            frames: vec![0; nodes],
            budget: usize::MAX,
            now: 0,
            homes,
        }
    }

    /// The same cluster, whose nodes may each have so many copies.
    pub fn with_budget(mut self, frames: usize, eviction: Eviction) -> Cluster {
        for (n, node) in (0..).zip(&mut self.nodes) {
            node.set_budget(
                frames,
                match eviction {
                    Eviction::Random(seed) => Eviction::Random(seed ^ n),
                    Eviction::Clock => eviction,
                },
            );
        }
        self.budget = frames;
        self
    }

    /// The same cluster, whose nodes ship operations.
    pub fn with_shipping(mut self, shipping: Shipping) -> Cluster {
        self.nodes.iter_mut().for_each(|node| node.set_shipping(shipping));
        self
    }

    /// The same cluster, all of whose nodes make a mistake.
    #[cfg(test)]
    pub(crate) fn with_mistake(mut self, mistake: crate::protocol::Mistake) -> Cluster {
        self.nodes.iter_mut().for_each(|node| node.build_in(mistake));
        self
    }

    /// It is so late from now on, in microseconds.
    pub fn set_time(&mut self, microseconds: u64) {
        self.now = microseconds;
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.homes.pages()
    }

    /// A node's protocol.
    pub fn node(&self, node: usize) -> &Protocol {
        &self.nodes[node]
    }

    /// What a node's guest view may do with a page.
    pub fn mapped(&self, node: usize, page: Page) -> Rights {
        self.copies[self.at(node, page)].mapped
    }

    /// What is under way: deliveries, releases and decisions of CPUs that can happen now.
    pub fn pending(&self) -> impl Iterator<Item = Step> {
        let lanes = self.lanes.keys().map(|&(from, to)| Step::Deliver { from, to });
        let held = self.held.iter().enumerate();
        let held = held.flat_map(|(node, held)| held.iter().map(move |&page| Step::Release { node, page }));
        lanes.chain(held).chain(self.called())
    }

    /// Whether the page is as at power-on: zero, and nobody has touched it.
    pub fn is_untouched(&self, page: Page) -> bool {
        self.untouched[page.0 as usize]
    }

    /// The class of a page at its home.
    pub fn class(&self, page: Page) -> Class {
        self.nodes[self.homes.home(page).index()].class(page)
    }

    /// Whether an access of this node to this page waits already.
    pub fn is_waiting(&self, node: usize, page: Page, write: bool) -> bool {
        self.waiting[node].binary_search(&(page, write)).is_ok()
    }

    /// The message that a delivery brings.
    pub fn arriving(&self, step: Step) -> Option<Message> {
        let Step::Deliver { from, to } = step else { return None };
        self.lanes.get(&(from, to))?.front().map(|flight| flight.message)
    }

    /// Does one step and checks what must hold at every instant. A step that cannot be done does nothing.
    ///
    /// # Errors
    /// What broke; the cluster is of no use then.
    pub fn step(&mut self, step: Step) -> Result<(), Broken> {
        self.step_seen(step, &mut Vec::new())
    }

    /// As [`Cluster::step`]; appends what it brought about.
    ///
    /// # Errors
    /// What broke; the cluster is of no use then.
    pub fn step_seen(&mut self, step: Step, seen: &mut Vec<Seen>) -> Result<(), Broken> {
        let mut out = Vec::new();
        let nothing = (false, 0);
        let actor = self.actor(step);
        self.nodes[actor].set_time(self.now);
        let (node, body) = match step {
            Step::Access { node, page, write } => {
                let need = need(write);
                if self.mapped(node, page) >= need {
                    return self.touch(node, page, write, seen);
                }
                if let Err(i) = self.waiting[node].binary_search(&(page, write)) {
                    self.waiting[node].insert(i, (page, write));
                }
                // A page that came ahead of its need: it is kept for who needs it, as if it had come now.
                if self.mapped(node, page) == Rights::None && self.nodes[node].rights(page) >= need {
                    self.nodes[node].hold(page);
                    self.hold(node, page, seen);
                }
                self.nodes[node].fault(page, write, &mut out);
                (node, nothing)
            }
            Step::Prefetch { node, page, write } => {
                self.nodes[node].prefetch(page, write, &mut out);
                (node, nothing)
            }
            Step::Deliver { from, to } => {
                let Some(lane) = self.lanes.get_mut(&(from, to)) else { return Ok(()) };
                let Some(flight) = lane.pop_front() else { return Ok(()) };
                if lane.is_empty() {
                    self.lanes.remove(&(from, to));
                }
                self.bodies[flight.message.page.0 as usize] -= u16::from(flight.message.kind.has_body());
                let zeroes = self.surrender(to.index(), flight.message);
                self.nodes[to.index()].message(from, flight.message, zeroes, &mut out)?;
                (to.index(), (flight.current, flight.value))
            }
            Step::Release { node, page } => {
                let Ok(i) = self.held[node].binary_search(&page) else { return Ok(()) };
                self.held[node].remove(i);
                self.nodes[node].release(page, &mut out);
                (node, nothing)
            }
            Step::Operate { node, cpu, page, write } => {
                match self.begin_operation(node, cpu, page, write, &mut out, seen)? {
                    true => (node, nothing),
                    false => return Ok(()),
                }
            }
            Step::Ship { node, cpu } => match self.ship(node, cpu, &mut out, seen)? {
                true => (node, nothing),
                false => return Ok(()),
            },
            Step::Move { node, cpu } => match self.move_instead(node, cpu, &mut out) {
                true => (node, nothing),
                false => return Ok(()),
            },
            Step::Class { page, class } => {
                let home = self.homes.home(page).index();
                self.nodes[home].set_class(page, class);
                (home, nothing)
            }
            Step::Evict { node, page } => {
                self.nodes[node].evict(page, &mut out);
                (node, nothing)
            }
            Step::Discard { node, page } => {
                self.nodes[node].discard(page, 0, &mut out);
                (node, nothing)
            }
            Step::Load { node, page } => {
                self.nodes[node].load(page, &mut out);
                (node, nothing)
            }
            Step::Store { node, page } => {
                self.nodes[node].store(page, &mut out);
                (node, nothing)
            }
        };
        if let Some(violation) = self.nodes[node].violation() {
            return Err(violation.into());
        }
        self.apply(node, out, body, seen)
    }

    /// The node whose protocol has to do with a step.
    fn actor(&self, step: Step) -> usize {
        match step {
            Step::Deliver { to, .. } => to.index(),
            Step::Class { page, .. } => self.homes.home(page).index(),
            Step::Access { node, .. }
            | Step::Prefetch { node, .. }
            | Step::Release { node, .. }
            | Step::Operate { node, .. }
            | Step::Ship { node, .. }
            | Step::Move { node, .. }
            | Step::Evict { node, .. }
            | Step::Discard { node, .. }
            | Step::Load { node, .. }
            | Step::Store { node, .. } => node,
        }
    }

    fn at(&self, node: usize, page: Page) -> usize {
        page.0 as usize * self.nodes.len() + node
    }

    fn copy(&mut self, node: usize, page: Page) -> &mut Copy {
        let at = self.at(node, page);
        &mut self.copies[at]
    }

    /// All nodes' copies of a page.
    fn of_page(&self, page: Page) -> &[Copy] {
        &self.copies[self.at(0, page)..][..self.nodes.len()]
    }

    /// What the engine does before a Get: unmaps untouched pages, and tells how many they are.
    fn surrender(&mut self, home: usize, message: Message) -> u8 {
        let first = message.page.0 as usize;
        let most = usize::from(self.nodes[home].untouched(&message));
        let zeroes = self.untouched[first..first + most].iter().take_while(|&&untouched| untouched).count();
        for page in first..first + zeroes {
            self.copy(home, Page(page as u64)).mapped = Rights::None;
        }
        zeroes as u8
    }

    fn hold(&mut self, node: usize, page: Page, seen: &mut Vec<Seen>) {
        if let Err(i) = self.held[node].binary_search(&page) {
            self.held[node].insert(i, page);
            seen.push(Seen::Held { node, page });
        }
    }

    fn apply(
        &mut self,
        node: usize,
        effects: Vec<Effect>,
        body: (bool, u8),
        seen: &mut Vec<Seen>,
    ) -> Result<(), Broken> {
        let from = NodeId(node as u16);
        // Accesses that were woken and cannot go on: the kernel reports them again, later.
        let mut again = Vec::new();
        // CPUs whose operations were refused fault again as well.
        let mut refused = Vec::new();
        for effect in effects {
            match effect {
                Effect::Send { to, message } => {
                    self.check_given_up(node, message)?;
                    let Copy { current: frame_is_current, value, .. } =
                        self.copies[self.at(node, message.page)];
                    let current = match message.kind {
                        // The access is now; nobody looks at the bytes again.
                        Kind::Loaded { body: true } if !frame_is_current => {
                            return Err(Broken::StaleRead(node, message.page));
                        }
                        // They are what the page holds only once the home says so.
                        Kind::Loaded { .. } | Kind::Store => false,
                        kind => kind.has_body() && frame_is_current,
                    };
                    let value = if current { value } else { 0 };
                    self.post(from, to, Flight { message, current, value }, seen);
                }
                Effect::Land(page) => {
                    let copy = self.copy(node, page);
                    if copy.mapped != Rights::None {
                        return Err(Broken::LandedUnderMapping(node, page));
                    }
                    (copy.current, copy.value) = body;
                    self.take_frame(node, page)?;
                }
                Effect::Map(page, rights) => {
                    self.copy(node, page).mapped = rights;
                    self.woken(node, page, seen, &mut again)?;
                }
                Effect::MapZeroes(first, count) => {
                    for page in (first.0..first.0 + u64::from(count)).map(Page) {
                        let current = self.untouched[page.0 as usize];
                        self.take_frame(node, page)?;
                        let mapped = Rights::Exclusive;
                        *self.copy(node, page) = Copy { mapped, current, frame: true, value: 0 };
                        self.woken(node, page, seen, &mut again)?;
                    }
                }
                Effect::Unprotect(page) => {
                    let copy = self.copy(node, page);
                    // Nothing is mapped by lifting a protection.
                    if copy.mapped != Rights::None {
                        copy.mapped = Rights::Exclusive;
                    }
                    self.woken(node, page, seen, &mut again)?;
                }
                Effect::Protect(page) => {
                    let copy = self.copy(node, page);
                    copy.mapped = copy.mapped.min(Rights::Shared);
                }
                Effect::Unmap(page, _) => {
                    self.copy(node, page).mapped = Rights::None;
                }
                Effect::Probe(page) => {
                    self.copy(node, page).mapped = Rights::None;
                    seen.push(Seen::Probed { node, page });
                }
                Effect::Free(page) => {
                    let at_home = self.homes.home(page).index() == node;
                    let copy = self.copy(node, page);
                    if copy.mapped != Rights::None || at_home {
                        return Err(Broken::Freed(node, page));
                    }
                    (copy.current, copy.value) = (false, 0);
                    self.frames[node] -= usize::from(std::mem::take(&mut self.copy(node, page).frame));
                }
                Effect::Clear(page) => {
                    if self.mapped(node, page) != Rights::None {
                        return Err(Broken::LandedUnderMapping(node, page));
                    }
                    self.take_frame(node, page)?;
                    self.copy(node, page).value = 0;
                    self.written(node, page);
                }
                Effect::Punch(first, count) => {
                    for page in (first.0..first.0 + u64::from(count)).map(Page) {
                        if self.homes.home(page).index() != node {
                            return Err(Broken::Freed(node, page));
                        }
                        self.copy(node, page).value = 0;
                        self.written(node, page);
                        self.copy(node, page).mapped = Rights::Exclusive;
                        self.untouched[page.0 as usize] = true;
                        self.check_single_writer(page)?;
                    }
                }
                Effect::Discarded(first, count) => {
                    let pages = (first.0..first.0 + u64::from(count)).map(Page);
                    seen.extend(pages.map(|page| Seen::Discarded { node, page }));
                }
                Effect::Overwrite(page) => {
                    if self.homes.home(page).index() != node {
                        return Err(Broken::Freed(node, page));
                    }
                }
                Effect::Written(page) => {
                    self.copy(node, page).value = 0;
                    self.written(node, page);
                    self.untouched[page.0 as usize] = false;
                    // Nobody can read what was there before.
                    let others = self.of_page(page).iter().enumerate();
                    let readers =
                        others.filter(|(n, copy)| *n != node && copy.mapped != Rights::None).count();
                    if readers > 0 {
                        return Err(Broken::TwoWriters(page, 1, readers));
                    }
                }
                Effect::Loaded(page, done) | Effect::Stored(page, done) => {
                    seen.push(Seen::Direct { node, page, done });
                }
                Effect::Ship(page) => self.call_out(node, page, seen),
                Effect::Operate { to, page, token, operation } => {
                    let old = self.carry_out(node, page, to, token, operation)?;
                    let message = Message { page, kind: Kind::Operated { token, old: Some(old) } };
                    self.post(from, to, Flight { message, current: false, value: 0 }, seen);
                }
                Effect::Operated { page, token, old } => {
                    if self.end_operation(node, page, token, old, seen)? {
                        refused.push(token);
                    }
                }
                Effect::Hold(page) => self.hold(node, page, seen),
                Effect::Deferred(page) => seen.push(Seen::Deferred { node, page }),
            }
        }
        for again in again {
            let mut out = Vec::new();
            match again {
                Again::Access(page, write) => self.nodes[node].fault(page, write, &mut out),
                Again::Operation(cpu) => self.fault_again(node, cpu, &mut out),
            }
            self.apply(node, out, (false, 0), seen)?;
        }
        for cpu in refused {
            let mut out = Vec::new();
            self.fault_again(node, cpu, &mut out);
            self.apply(node, out, (false, 0), seen)?;
        }
        Ok(())
    }

    fn post(&mut self, from: NodeId, to: NodeId, flight: Flight, seen: &mut Vec<Seen>) {
        let Message { page, kind } = flight.message;
        self.bodies[page.0 as usize] += u16::from(kind.has_body());
        self.lanes.entry((from, to)).or_default().push_back(flight);
        seen.push(Seen::Sent { from, to, kind });
    }

    fn take_frame(&mut self, node: usize, page: Page) -> Result<(), Broken> {
        if !std::mem::replace(&mut self.copy(node, page).frame, true) {
            self.frames[node] += 1;
        }
        match self.frames[node] > self.budget {
            true => Err(Broken::OverBudget(node, page)),
            false => Ok(()),
        }
    }

    /// A mapping changed and who waits for the page is woken: each does its access, or faults again.
    fn woken(
        &mut self,
        node: usize,
        page: Page,
        seen: &mut Vec<Seen>,
        again: &mut Vec<Again>,
    ) -> Result<(), Broken> {
        self.check_single_writer(page)?;
        let mapped = self.mapped(node, page);
        for write in [false, true] {
            let Ok(i) = self.waiting[node].binary_search(&(page, write)) else { continue };
            if mapped >= need(write) {
                self.waiting[node].remove(i);
                self.touch(node, page, write, seen)?;
            } else {
                again.push(Again::Access(page, write));
            }
        }
        self.woken_operations(node, page, seen, again)
    }

    /// The access itself, with its rights.
    fn touch(&mut self, node: usize, page: Page, write: bool, seen: &mut Vec<Seen>) -> Result<(), Broken> {
        self.check_current(node, page)?;
        seen.push(Seen::Done { node, page, write });
        self.untouched[page.0 as usize] = false;
        if write {
            self.written(node, page);
        }
        Ok(())
    }

    /// The node's frame has the page's content from now on, and nobody else's has.
    fn written(&mut self, node: usize, page: Page) {
        self.values[page.0 as usize] = self.copies[self.at(node, page)].value;
        for other in 0..self.nodes.len() {
            let copy = self.copy(other, page);
            copy.current = other == node;
            // What is stale is not looked at: equal states compare equal.
            copy.value = if copy.current { copy.value } else { 0 };
        }
        if self.bodies[page.0 as usize] > 0 {
            for flight in self.lanes.values_mut().flatten().filter(|flight| flight.message.page == page) {
                (flight.current, flight.value) = (false, 0);
            }
        }
    }

    /// Delivers and releases until nothing is under way, then checks what must hold at rest.
    ///
    /// # Errors
    /// What broke.
    pub fn settle(&mut self) -> Result<(), Broken> {
        while let Some(step) = { self.pending().next() } {
            self.step(step)?;
        }
        self.check_rest()
    }
}

/// Who was woken and cannot go on.
enum Again {
    Access(Page, bool),
    /// Of the CPU with that number.
    Operation(u32),
}

/// The rights that an access needs.
fn need(write: bool) -> Rights {
    if write { Rights::Exclusive } else { Rights::Shared }
}
