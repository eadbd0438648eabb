//! The invariants: those of every step, and those of a cluster in which nothing is under way.

use fabric::NodeId;

use super::Cluster;
use crate::node_set::NodeSet;
use crate::page::Page;
use crate::protocol::{Entry, Kind, Message, Rights, Violation};

/// What must never be.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Broken {
    /// Two nodes may access a page that one may write.
    #[error("page {0:?} has {1} writers among {2} readers")]
    TwoWriters(Page, usize, usize),
    /// A read found an old page.
    #[error("node {0} read an old copy of page {1:?}")]
    StaleRead(usize, Page),
    /// A copy that is said to be the last write has another byte for CPUs to operate on.
    #[error("the copy of page {1:?} of node {0} has lost an operation")]
    LostOperation(usize, Page),
    /// An operation was carried out that nobody waits for, or once more.
    #[error("the operation of CPU {1} of node {0} on page {2:?} was carried out when it must not be")]
    NotAsked(usize, u32, Page),
    /// A CPU was told of its operation what is not true.
    #[error("CPU {1} of node {0} was told what is not true of its operation on page {2:?}")]
    WrongAnswer(usize, u32, Page),
    /// Bytes landed under a mapping.
    #[error("bytes landed in page {1:?} of node {0} while it was mapped")]
    LandedUnderMapping(usize, Page),
    /// A node answered for a page that its CPUs can still use.
    #[error("node {0} sent {2:?} of page {1:?} while its CPUs could still use it")]
    AnsweredTooEarly(usize, Page, Kind),
    /// A frame was freed that is needed.
    #[error("the frame of page {1:?} of node {0} was freed")]
    Freed(usize, Page),
    /// A node has more copies than it has memory for.
    #[error("node {0} took a frame for page {1:?} beyond its budget")]
    OverBudget(usize, Page),
    /// Nothing is under way and a frame is kept for nothing.
    #[error("node {0} keeps a frame for page {1:?}, which it does not have")]
    Leaked(usize, Page),
    /// A correct node was called faulty.
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

impl Broken {
    /// The page that it is about, if it is about one.
    pub fn page(&self) -> Option<Page> {
        match self {
            Broken::TwoWriters(page, ..) | Broken::Directory(page, _) => Some(*page),
            Broken::StaleRead(_, page)
            | Broken::LostOperation(_, page)
            | Broken::NotAsked(_, _, page)
            | Broken::WrongAnswer(_, _, page)
            | Broken::LandedUnderMapping(_, page)
            | Broken::AnsweredTooEarly(_, page, _)
            | Broken::Freed(_, page)
            | Broken::OverBudget(_, page)
            | Broken::Leaked(_, page)
            | Broken::Unanswered(_, page) => Some(*page),
            Broken::Violation(violation) => Some(violation.page),
            Broken::NotQuiet(..) => None,
        }
    }
}

impl Cluster {
    /// What a node says of its copy must be true when it says it, or a CPU there could still see or change
    /// what others think it cannot.
    pub(super) fn check_given_up(&self, node: usize, Message { page, kind }: Message) -> Result<(), Broken> {
        let left = match kind {
            Kind::Ack | Kind::PutShared | Kind::PutExclusive => Rights::None,
            Kind::Data { rights: Rights::Exclusive, acks: 0, body: true, .. } => Rights::None,
            Kind::Data { body: true, .. } | Kind::Writeback { .. } => Rights::Shared,
            _ => return Ok(()),
        };
        match self.mapped(node, page) > left {
            true => Err(Broken::AnsweredTooEarly(node, page, kind)),
            false => Ok(()),
        }
    }

    /// What a node accesses must be the last write.
    pub(super) fn check_current(&self, node: usize, page: Page) -> Result<(), Broken> {
        let copy = self.copies[self.at(node, page)];
        match copy.current {
            false => Err(Broken::StaleRead(node, page)),
            true if copy.value != self.values[page.0 as usize] => Err(Broken::LostOperation(node, page)),
            true => Ok(()),
        }
    }

    pub(super) fn check_single_writer(&self, page: Page) -> Result<(), Broken> {
        let (mut writers, mut readers) = (0, 0);
        for copy in self.of_page(page) {
            writers += usize::from(copy.mapped == Rights::Exclusive);
            readers += usize::from(copy.mapped != Rights::None);
        }
        match writers {
            0 => Ok(()),
            1 if readers == 1 => Ok(()),
            _ => Err(Broken::TwoWriters(page, writers, readers)),
        }
    }

    /// If nothing is under way: every access was answered, and the directory is what the nodes have.
    ///
    /// # Errors
    /// What broke.
    pub fn check_rest(&self) -> Result<(), Broken> {
        if self.pending().next().is_some() {
            return Ok(());
        }
        for (node, waiting) in self.waiting.iter().enumerate() {
            if let Some(&(page, _)) = waiting.first() {
                return Err(Broken::Unanswered(node, page));
            }
        }
        for (node, cpus) in self.cpus.iter().enumerate() {
            if let Some(cpu) = cpus.first() {
                return Err(Broken::Unanswered(node, cpu.page));
            }
        }
        for (n, node) in self.nodes.iter().enumerate() {
            if !node.is_quiet() {
                return Err(Broken::NotQuiet(n, node.describe().join("; ")));
            }
        }
        let mut copies = vec![0; self.nodes.len()];
        (0..self.pages()).map(Page).try_for_each(|page| self.check_directory(page, &mut copies))?;
        // Rights without a frame, which the above does not look for.
        match (0..self.nodes.len()).find(|&n| self.nodes[n].frames() != copies[n]) {
            Some(n) => Err(Broken::NotQuiet(n, "it believes to have copies that it has no frames of".into())),
            None => Ok(()),
        }
    }

    fn check_directory(&self, page: Page, copies: &mut [usize]) -> Result<(), Broken> {
        let home = self.homes.home(page).index();
        let (mut readers, mut writers) = (NodeSet::default(), NodeSet::default());
        let mut mapped_as_known = true;
        for (n, copy) in self.of_page(page).iter().enumerate().filter(|(_, copy)| copy.frame) {
            let rights = self.nodes[n].rights(page);
            match rights {
                Rights::None => {}
                Rights::Shared => readers.insert(NodeId(n as u16)),
                Rights::Exclusive => writers.insert(NodeId(n as u16)),
            }
            if n != home {
                copies[n] += 1;
                if rights == Rights::None {
                    return Err(Broken::Leaked(n, page));
                }
            }
            // What came home or was prefetched is mapped without asking anybody.
            mapped_as_known &= copy.mapped == rights || copy.mapped == Rights::None;
        }
        let entry = self.nodes[home].entry(page);
        let agrees = match entry {
            Entry::Exclusive(owner) => writers == [owner].into_iter().collect() && readers.is_empty(),
            Entry::Shared(set) => readers == set && writers.is_empty(),
        };
        match agrees && mapped_as_known {
            true => Ok(()),
            false => Err(Broken::Directory(page, entry)),
        }
    }
}
