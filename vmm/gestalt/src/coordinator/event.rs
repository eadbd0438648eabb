//! The events that the session is told, and its answers.

use std::net::SocketAddr;

use super::hotplug::AskerId;
use crate::operator::{Answer, Request};
use machine::control::wire::Hello;
use machine::control::{FromCoordinator, ToCoordinator};

/// One connection, never reused.
pub type LinkId = u64;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A peer of the right version introduced itself.
    Hello {
        /// Its connection.
        link: LinkId,
        /// What it said.
        hello: Hello,
        /// Where it comes from.
        from: SocketAddr,
    },
    /// An admitted node said something.
    Said {
        /// Its connection.
        link: LinkId,
        /// What it said.
        message: ToCoordinator,
    },
    /// An admitted node's connection is over.
    Closed {
        /// The connection.
        link: LinkId,
        /// How, as a clause.
        why: String,
        /// Whether it was the node that closed it, in good order: its fence is shut then.
        by_node: bool,
    },
    /// A node process of ours ended.
    Ended {
        /// Whose.
        node: usize,
        /// From which start of the machine.
        life: u32,
        /// How.
        how: ProcessEnd,
    },
    /// A node process could not be started.
    NotSpawned {
        /// Whose.
        node: usize,
        /// The system's reason.
        why: String,
    },
    /// Somebody wants the machine to end.
    Interrupted(Interrupt),
    /// An operator wants something of the machine's devices.
    Asked {
        /// Who.
        asker: AskerId,
        /// What.
        request: Request,
    },
    /// Time passes; at least every [`super::TICK`].
    Tick,
}

/// How a process ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ProcessEnd {
    /// With an exit code.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

/// Who wants the machine to end.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// This signal.
    Signal(i32),
    /// The escape key at the terminal.
    Escape,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// A start of the machine begins: draw a new machine id.
    NewRun,
    /// Start this local node's process.
    Spawn {
        /// Which.
        node: usize,
        /// For [`Event::Ended`].
        life: u32,
    },
    /// Assign the node to the connection and listen to it.
    Admit {
        /// The connection.
        link: LinkId,
        /// The node.
        node: usize,
    },
    /// Answer no and close.
    Refuse {
        /// The connection.
        link: LinkId,
        /// A sentence.
        why: String,
        /// Whether asking again helps.
        later: bool,
    },
    /// Send a message.
    Send {
        /// The connection.
        link: LinkId,
        /// What.
        message: FromCoordinator,
    },
    /// The guest begins (`true`) or has ceased to read what is typed.
    Attach(bool),
    /// Show what the guest wrote.
    Console(Vec<u8>),
    /// Tell the operator.
    Say(String),
    /// Tell the operator that something is not as it should be.
    Warn(String),
    /// Keep a text for whoever looks into a failure.
    Dump {
        /// The node that it comes from.
        node: usize,
        /// The text.
        text: String,
    },
    /// Answer an operator.
    Answer {
        /// Who asked.
        asker: AskerId,
        /// The answer.
        answer: Answer,
    },
    /// Close this connection.
    Close(LinkId),
    /// Kill every process that is left.
    KillAll,
    /// Nothing is left.
    Over(Outcome),
}

/// How the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PoweredOff,
    /// Somebody asked for it.
    Interrupted(Interrupt),
    /// A sentence that names the node.
    Failed(String),
}
