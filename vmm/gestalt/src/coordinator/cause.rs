//! The cause of a failure, among several signs of it.
//!
//! A node that dies takes its control connection with it, and its peers notice through the fabric. All
//! this arrives in any order. What is certain outranks what is hearsay, and the earlier outranks the later.

use std::fmt;
use std::time::Duration;

use super::event::ProcessEnd;
use machine::config::MachineConfig;

/// A sign that something is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its process could not be started.
    NotSpawned(String),
    /// Its process ended.
    Ended(ProcessEnd),
    /// It says that it cannot go on.
    Failed(String),
    /// Its control connection ended; a clause.
    Closed(String),
    /// It said nothing for so long.
    Silent(Duration),
    /// Another node lost it.
    SeenBy {
        /// The other node's name.
        witness: String,
        /// How it noticed, a clause.
        why: String,
    },
}

/// A sign and the node it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The node.
    pub node: usize,
    /// The sign.
    pub cause: Cause,
}

impl Cause {
    /// Lower explains more. No other node's trouble makes a process end by a signal; but it may well make one
    /// fail, or exit, and a lost process explains every closed connection.
    fn rank(&self) -> u8 {
        match self {
            Cause::NotSpawned(_) => 0,
            Cause::Ended(ProcessEnd::Signal(_)) => 1,
            Cause::Failed(_) => 2,
            Cause::Ended(ProcessEnd::Code(_)) => 3,
            Cause::Closed(_) => 4,
            Cause::Silent(_) => 5,
            Cause::SeenBy { .. } => 6,
        }
    }
}

/// One sentence that names the node which is the first cause. `evidence` is in order of arrival, not empty.
pub fn first(evidence: &[Evidence], config: &MachineConfig) -> String {
    let Some(mut chosen) = evidence.iter().min_by_key(|found| found.cause.rank()) else {
        return "the machine failed for a reason that nobody gave".into();
    };
    // What a node said about itself before it died tells more than how it died.
    let own_words = |found: &&Evidence| found.node == chosen.node && matches!(found.cause, Cause::Failed(_));
    if let Some(said) = evidence.iter().find(own_words) {
        chosen = said;
    }
    let name = config.nodes.get(chosen.node).map_or("?", |node| node.spec.name.as_str());
    match &chosen.cause {
        Cause::NotSpawned(why) => format!("node {name} could not be started: {why}"),
        Cause::Ended(how) => format!("node {name} was lost: its process {how}"),
        Cause::Failed(why) => format!("node {name} failed: {why}"),
        Cause::Closed(why) => format!("node {name} was lost: {why}"),
        Cause::Silent(silence) => {
            format!("node {name} was lost: it was silent for {:.1} s", silence.as_secs_f64())
        }
        Cause::SeenBy { witness, why } => format!("node {name} was lost: node {witness} says {why}"),
    }
}

impl fmt::Display for ProcessEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProcessEnd::Signal(signal) => write!(f, "ended with signal {signal}"),
            ProcessEnd::Code(code) => write!(f, "ended with exit code {code}"),
        }
    }
}
