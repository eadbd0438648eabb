//! The commands that the bench gives a node, and its answers: JSON, a line each, over a process's standard
//! streams.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::handover::code::Program;
use crate::handover::guest::Job;

/// How threads wait.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Polling {
    /// They look again and again.
    Busy,
    /// They sleep in the kernel.
    Blocking,
}

impl Polling {
    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Polling::Busy => "busy",
            Polling::Blocking => "blocking",
        }
    }
}

/// Whose time is measured.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The coherence engine's.
    Ours,
    /// The least that the same bytes can cost.
    Floor,
}

/// What a fault needs; the bare nodes must be told, engines know.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Op {
    /// A page that the home has.
    Read = 0,
    /// The same, to write it.
    Write = 1,
    /// Write access to a page that is here to read, and at all other nodes.
    Upgrade = 2,
    /// A page that node 2 has modified, to read it.
    ReadDirty = 3,
    /// The same, to write it.
    WriteDirty = 4,
}

impl Op {
    /// Whether the fault is a write.
    pub fn writes(self) -> bool {
        matches!(self, Op::Write | Op::Upgrade | Op::WriteDirty)
    }

    /// By its number.
    pub fn from_code(code: u8) -> Op {
        [Op::Read, Op::Write, Op::Upgrade, Op::ReadDirty]
            .get(usize::from(code))
            .copied()
            .unwrap_or(Op::WriteDirty)
    }
}

/// How a node is to be set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Which node it is.
    pub node: u16,
    /// Engine or bare.
    pub side: Side,
    /// How its threads wait.
    pub polling: Polling,
    /// Pages whose home each node is.
    pub pages: Vec<u64>,
    /// How long a page that was won is kept, in microseconds.
    pub hold_us: u64,
    /// Whether instructions of its guest go to pages that stay elsewhere.
    pub ship: bool,
    /// Pages of other nodes that it may have; any number if none is given.
    pub copies: Option<u64>,
    /// Where each node listens, by rail; empty in process.
    pub addresses: Vec<Vec<SocketAddr>>,
    /// Whether frames travel in the clear.
    pub plaintext: bool,
    /// CPUs for the node's threads.
    pub cpus: Vec<usize>,
}

/// Pages to be touched.
#[derive(Copy, Clone, Debug, Serialize, Deserialize)]
pub struct Pages {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What a node is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// Listen on so many rails, and say where.
    Listen(Side, usize),
    /// Connect to the others and start.
    Start(Setup),
    /// Write a word to each page, not timed.
    Fill(Pages),
    /// Read a word of each page, not timed.
    Look(Pages),
    /// Touch the pages in a mixed order, by so many threads, each fault timed.
    Touch(Op, Pages, usize),
    /// Read the pages in order.
    Stream(Pages),
    /// Take turns with another node in changing one word: 0 begins.
    PingPong {
        /// Where the word is.
        page: u64,
        /// How often this node has its turn.
        rounds: u64,
        /// 0 or 1.
        turn: u64,
    },
    /// Send 64 bytes to node 1 and back, so often.
    RoundTrips(u64),
    /// Write a micro guest's page tables and code into the guest's memory.
    Code(Program),
    /// Run the code on this node's vCPU.
    Run(Job),
    /// The last events of the node's trace.
    Trace,
    /// The node's counters.
    Counters,
    /// End.
    Quit,
}

/// What a node answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// Where it listens, by rail.
    Addresses(Vec<SocketAddr>),
    /// It was done.
    Done,
    /// How long it took.
    Times(Times),
    /// Operations that the vCPU did.
    Count(u64),
    /// The trace's text.
    Trace(String),
    /// Counters by name.
    Counters(Vec<(String, u64)>),
    /// It was not done, and why.
    Failed(String),
}

/// Times of a row.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Times {
    /// Median of single operations, in microseconds.
    pub median_us: f64,
    /// Their 99th percentile.
    pub p99_us: f64,
    /// The whole time by the number of operations.
    pub each_us: f64,
    /// Page, and time stamp counter before and after, of each operation of a single thread.
    pub stamps: Vec<(u64, u64, u64)>,
}
