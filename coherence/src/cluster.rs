//! A whole cluster of protocols as one value: what the property tests, the model checker and the simulator
//! drive, and what they check.
//!
//! There is no time and no data here. A frame is *current* or it is not: a write makes every other copy of
//! the page, in frames and in flight, stale; a read must find a current one. That keeps the state finite, so
//! that the model checker can exhaust it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use fabric::NodeId;

use crate::node_set::NodeSet;
use crate::page::{Homes, Page};
use crate::protocol::{Effect, Entry, Message, Protocol, Rights, RunPolicy, Violation};

/// One node's copy of a page.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Copy {
    /// What the guest view may do with it, as mapped.
    pub mapped: Rights,
    /// Whether the frame holds the last write.
    pub current: bool,
}

/// A message under way, and whether its bytes are the last write.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct Flight {
    /// What is said.
    pub message: Message,
    /// Whether its body, if it has one, holds the last write.
    pub current: bool,
}

/// One thing that can happen.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// A CPU of the node touches the page.
    Access {
        /// Where.
        node: usize,
        /// What.
        page: Page,
        /// How.
        write: bool,
    },
    /// The node asks for a page that it may need.
    Prefetch {
        /// Where.
        node: usize,
        /// What.
        page: Page,
        /// How.
        write: bool,
    },
    /// The oldest message from one node to another arrives.
    Deliver {
        /// Sender.
        from: NodeId,
        /// Receiver.
        to: NodeId,
    },
    /// A page has been held long enough.
    Release {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
    /// The node makes room.
    Evict {
        /// Where.
        node: usize,
        /// What.
        page: Page,
    },
}

/// What must never be.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Broken {
    /// Two nodes may access a page that one may write.
    #[error("page {0:?} has {1} writers among {2} readers")]
    TwoWriters(Page, usize, usize),
    /// A read found an old page.
    #[error("node {0} read an old copy of page {1:?}")]
    StaleRead(usize, Page),
    /// Bytes landed under a mapping.
    #[error("bytes landed in page {1:?} of node {0} while it was mapped")]
    LandedUnderMapping(usize, Page),
    /// A frame was freed that is needed.
    #[error("the frame of page {1:?} of node {0} was freed")]
    Freed(usize, Page),
    /// A sound node was called unsound.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// Nothing is under way and an access still waits.
    #[error("node {0}'s access to page {1:?} was never answered")]
    Unanswered(usize, Page),
    /// Nothing is under way and a node thinks that something is.
    #[error("node {0} still waits: {1}")]
    NotQuiet(usize, String),
    /// Nothing is under way and the directory disagrees with the nodes.
    #[error("the directory says {1:?} of page {0:?}, which the nodes do not")]
    Directory(Page, Entry),
}

/// Nodes, what they have mapped, and what is between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cluster {
    nodes: Vec<Protocol>,
    homes: Arc<Homes>,
    lanes: BTreeMap<(NodeId, NodeId), VecDeque<Flight>>,
    copies: Vec<Vec<Copy>>,
    held: Vec<(usize, Page)>,
    waiting: Vec<(usize, Page, bool)>,
    /// Pages that nobody has touched since power-on.
    untouched: Vec<bool>,
    messages: Option<u64>,
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
            true => Copy { mapped: Rights::Exclusive, current: true },
            false => Copy { mapped: Rights::None, current: false },
        };
        Cluster {
            nodes: (0..nodes)
                .map(|n| Protocol::new(NodeId(n as u16), homes.clone(), pages.min(64), runs))
                .collect(),
            lanes: BTreeMap::new(),
            copies: (0..nodes).map(|n| (0..pages).map(|p| copy(n, p)).collect()).collect(),
            held: Vec::new(),
            waiting: Vec::new(),
            untouched: vec![true; pages as usize],
            messages: None,
            homes,
        }
    }

    /// Counts messages from here on (which makes otherwise equal states differ).
    pub fn count_messages(&mut self) {
        self.messages = Some(0);
    }

    /// Messages since [`Cluster::count_messages`].
    pub fn messages(&self) -> u64 {
        self.messages.unwrap_or(0)
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.homes.pages()
    }

    /// What is under way: deliveries and releases that can happen now.
    pub fn pending(&self) -> impl Iterator<Item = Step> {
        let lanes = self.lanes.keys().map(|&(from, to)| Step::Deliver { from, to });
        lanes.chain(self.held.iter().map(|&(node, page)| Step::Release { node, page }))
    }

    /// Whether an access of this node to this page waits already.
    pub fn is_waiting(&self, node: usize, page: Page, write: bool) -> bool {
        self.waiting.contains(&(node, page, write))
    }

    /// Does one step and checks what must hold at every instant. A step that cannot be done does nothing.
    ///
    /// # Errors
    /// What broke; the cluster is of no use then.
    pub fn step(&mut self, step: Step) -> Result<(), Broken> {
        let mut out = Vec::new();
        match step {
            Step::Access { node, page, write } => {
                let need = if write { Rights::Exclusive } else { Rights::Shared };
                if self.copies[node][page.0 as usize].mapped >= need {
                    return self.touch(node, page, write);
                }
                self.waiting.push((node, page, write));
                self.nodes[node].fault(page, write, &mut out);
                self.apply(node, out, false)
            }
            Step::Prefetch { node, page, write } => {
                self.nodes[node].prefetch(page, write, &mut out);
                self.apply(node, out, false)
            }
            Step::Deliver { from, to } => {
                let Some(lane) = self.lanes.get_mut(&(from, to)) else { return Ok(()) };
                let Some(flight) = lane.pop_front() else { return Ok(()) };
                if lane.is_empty() {
                    self.lanes.remove(&(from, to));
                }
                let zeroes = self.surrender(to.index(), flight.message);
                self.nodes[to.index()].message(from, flight.message, zeroes, &mut out)?;
                self.apply(to.index(), out, flight.current)
            }
            Step::Release { node, page } => {
                let Some(i) = self.held.iter().position(|&held| held == (node, page)) else { return Ok(()) };
                self.held.remove(i);
                self.nodes[node].release(page, &mut out);
                self.apply(node, out, false)
            }
            Step::Evict { node, page } => {
                self.nodes[node].evict(page, &mut out);
                self.apply(node, out, false)
            }
        }
    }

    /// What the engine does before a Get: unmaps untouched pages, and tells how many they are.
    fn surrender(&mut self, home: usize, message: Message) -> u8 {
        let first = message.page.0 as usize;
        let most = usize::from(self.nodes[home].untouched(&message));
        let zeroes = self.untouched[first..first + most].iter().take_while(|&&untouched| untouched).count();
        self.copies[home][first..first + zeroes].iter_mut().for_each(|copy| copy.mapped = Rights::None);
        zeroes as u8
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

    /// If nothing is under way: every access was answered, and the directory is what the nodes have.
    ///
    /// # Errors
    /// What broke.
    pub fn check_rest(&self) -> Result<(), Broken> {
        if self.pending().next().is_some() {
            return Ok(());
        }
        if let Some(&(node, page, _)) = self.waiting.first() {
            return Err(Broken::Unanswered(node, page));
        }
        for (n, node) in self.nodes.iter().enumerate() {
            if !node.is_quiet() {
                return Err(Broken::NotQuiet(n, node.describe().join("; ")));
            }
        }
        for page in (0..self.pages()).map(Page) {
            let home = self.homes.home(page).index();
            let having = |rights| -> NodeSet {
                let has = |n: &usize| self.nodes[*n].rights(page) == rights;
                (0..self.nodes.len()).filter(has).map(|n| NodeId(n as u16)).collect()
            };
            let entry = self.nodes[home].entry(page);
            let agrees = match entry {
                Entry::Exclusive(owner) => {
                    having(Rights::Exclusive) == [owner].into_iter().collect()
                        && having(Rights::Shared).is_empty()
                }
                Entry::Shared(set) => having(Rights::Shared) == set && having(Rights::Exclusive).is_empty(),
            };
            let mapped_as_known = self.copies.iter().enumerate().all(|(n, copies)| {
                let mapped = copies[page.0 as usize].mapped;
                // What came home or was prefetched is mapped without asking anybody.
                mapped == self.nodes[n].rights(page) || mapped == Rights::None
            });
            if !agrees || !mapped_as_known {
                return Err(Broken::Directory(page, entry));
            }
        }
        Ok(())
    }

    fn apply(&mut self, node: usize, effects: Vec<Effect>, body: bool) -> Result<(), Broken> {
        for effect in effects {
            match effect {
                Effect::Send { to, message } => {
                    let current =
                        message.kind.has_body() && self.copies[node][message.page.0 as usize].current;
                    let lane = self.lanes.entry((NodeId(node as u16), to)).or_default();
                    lane.push_back(Flight { message, current });
                    self.messages = self.messages.map(|n| n + 1);
                }
                Effect::Land(page) => {
                    let copy = &mut self.copies[node][page.0 as usize];
                    if copy.mapped != Rights::None {
                        return Err(Broken::LandedUnderMapping(node, page));
                    }
                    copy.current = body;
                }
                Effect::Map(page, rights) => self.copies[node][page.0 as usize].mapped = rights,
                Effect::MapZeroes(first, count) => {
                    for page in (first.0..first.0 + u64::from(count)).map(Page) {
                        let copy = &mut self.copies[node][page.0 as usize];
                        *copy = Copy { mapped: Rights::Exclusive, current: self.untouched[page.0 as usize] };
                        self.check_single_writer(page)?;
                        self.serve_waiting(node, page)?;
                    }
                }
                Effect::Unprotect(page) => self.copies[node][page.0 as usize].mapped = Rights::Exclusive,
                Effect::Protect(page) => self.copies[node][page.0 as usize].mapped = Rights::Shared,
                Effect::Unmap(page, _) => self.copies[node][page.0 as usize].mapped = Rights::None,
                Effect::Free(page) => {
                    let copy = &mut self.copies[node][page.0 as usize];
                    if copy.mapped != Rights::None || self.homes.home(page).index() == node {
                        return Err(Broken::Freed(node, page));
                    }
                    copy.current = false;
                }
                Effect::Hold(page) => {
                    if !self.held.contains(&(node, page)) {
                        self.held.push((node, page));
                        self.held.sort_unstable();
                    }
                }
                Effect::Deferred(_) => {}
            }
            if let Effect::Map(page, _) | Effect::Unprotect(page) | Effect::Protect(page) = effect {
                self.check_single_writer(page)?;
                self.serve_waiting(node, page)?;
            }
        }
        Ok(())
    }

    fn check_single_writer(&self, page: Page) -> Result<(), Broken> {
        let mapped = || self.copies.iter().map(|copies| copies[page.0 as usize].mapped);
        let writers = mapped().filter(|&m| m == Rights::Exclusive).count();
        let readers = mapped().filter(|&m| m != Rights::None).count();
        match writers {
            0 => Ok(()),
            1 if readers == 1 => Ok(()),
            _ => Err(Broken::TwoWriters(page, writers, readers)),
        }
    }

    fn serve_waiting(&mut self, node: usize, page: Page) -> Result<(), Broken> {
        let mapped = self.copies[node][page.0 as usize].mapped;
        for write in [false, true] {
            let need = if write { Rights::Exclusive } else { Rights::Shared };
            let before = self.waiting.len();
            self.waiting.retain(|&w| mapped < need || w != (node, page, write));
            if self.waiting.len() < before {
                self.touch(node, page, write)?;
            }
        }
        Ok(())
    }

    /// The access itself, with its rights.
    fn touch(&mut self, node: usize, page: Page, write: bool) -> Result<(), Broken> {
        if !self.copies[node][page.0 as usize].current {
            return Err(Broken::StaleRead(node, page));
        }
        self.untouched[page.0 as usize] = false;
        if write {
            for (n, copies) in self.copies.iter_mut().enumerate() {
                copies[page.0 as usize].current = n == node;
            }
            for flight in self.lanes.values_mut().flatten() {
                flight.current &= flight.message.page != page;
            }
        }
        Ok(())
    }
}
