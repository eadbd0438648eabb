//! The coordinator's decisions, without sockets, processes, threads or a clock of its own.
//!
//! ```text
//!            every node Joined        every node Ready
//! Joining ───────────────────> Preparing ─────────────> Running
//!    │  send Start                │  send Go               │
//!    ├────────────────────────────┴────────────────────────┤
//!    │ a node is lost or fails              PowerOff, Reset, a signal
//!    ▼                                                     │
//! Settling ── 0.3 s: consequences and causes come in ──┐   │
//!                                                      ▼   ▼
//!                               Stopping: all told Stop, within its grace
//!                                                      │ all gone, or killed, and none may write any more
//!                                                      ▼
//!                                         Over, or Joining again after Reset
//! ```
//!
//! A node that was cut off hears no Stop, and goes on writing to its disks until its lease is over
//! ([`fence`]). The machine has not ended before: a new one may have the same disks. Who is told so and
//! interrupts all the same ends that wait, and is warned.
//!
//! [`Session::handle`] takes what happened and the time; it returns what to do. When one node goes, others
//! notice and say so within moments, and the order in which that reaches us is chance: Settling waits for
//! the evidence and [`super::cause`] picks what came first in the chain of causes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::cause::{Cause, Evidence};
use super::event::{Action, Event, Interrupt, LinkId, Outcome, ProcessEnd};
use super::hotplug::{Hotplug, Step};
use super::report::Tally;
use machine::config::devices::PlacedDevice;
use machine::config::{CheckedMachine, NodeHost};
use machine::control::fence;
use machine::control::wire::Hello;
use machine::control::{FromCoordinator, Joined, Start, Stop, ToCoordinator};

/// How long evidence is collected before the machine is stopped for a failure.
pub const SETTLE: Duration = Duration::from_millis(300);
/// What nodes get to end after a failure or a signal.
pub const GRACE_FAILED: Duration = Duration::from_secs(1);
/// What nodes get to report and end after the guest switched itself off.
pub const GRACE_CLEAN: Duration = Duration::from_secs(3);
/// How long mapping memory, meshing and loading the kernel may take.
pub const PREPARE: Duration = Duration::from_secs(110);
/// How long killed processes may take to disappear.
pub const KILL: Duration = Duration::from_secs(1);

/// By how much the clocks of nodes may differ from this one's over a lease.
const CLOCKS: Duration = Duration::from_millis(50);

#[derive(Debug)]
enum Phase {
    Joining {
        until: Instant,
    },
    Preparing {
        until: Instant,
    },
    Running,
    Settling {
        until: Instant,
        evidence: Vec<Evidence>,
    },
    Stopping {
        until: Instant,
        ending: Ending,
    },
    /// `hurried`: there was an interrupt since.
    Killing {
        until: Instant,
        ending: Ending,
        hurried: bool,
    },
    Over,
}

#[derive(Clone, Debug)]
enum Ending {
    Over(Outcome),
    Restart,
}

#[derive(Debug, Default)]
struct Node {
    link: Option<LinkId>,
    from: Option<SocketAddr>,
    process: bool,
    heard: Option<Instant>,
    joined: Option<Joined>,
    ready: bool,
    silent: bool,
    reported: bool,
    /// Until when it may write to its disks, if it may; see [`machine::control::fence`].
    writes: Option<Instant>,
}

impl Node {
    fn writes(&self, now: Instant) -> bool {
        self.writes.is_some_and(|until| now < until)
    }
}

/// The coordinator's state.
#[derive(Debug)]
pub struct Session {
    config: CheckedMachine,
    join: String,
    nodes: Vec<Node>,
    phase: Phase,
    life: u32,
    last_tick: Instant,
    tally: Tally,
    hotplug: Hotplug,
}

impl Session {
    /// A session whose operator reads that nodes join at `join`.
    pub fn new(config: CheckedMachine, join: String, now: Instant) -> Session {
        let (tally, hotplug) = (Tally::new(&config), Hotplug::new(&config));
        Session {
            config,
            join,
            nodes: Vec::new(),
            phase: Phase::Over,
            life: 0,
            last_tick: now,
            tally,
            hotplug,
        }
    }

    /// Begins.
    pub fn start(&mut self, now: Instant) -> Vec<Action> {
        self.life += 1;
        self.nodes = self.config.nodes.iter().map(|_| Node::default()).collect();
        self.phase = Phase::Joining { until: now + self.config.join_timeout() };
        let mut actions = vec![Action::NewRun];
        for (index, node) in self.config.nodes.iter().enumerate() {
            match node.host {
                NodeHost::Local => {
                    self.nodes[index].process = true;
                    actions.push(Action::Spawn { node: index, life: self.life });
                }
                NodeHost::Remote if self.life == 1 => actions.push(Action::Say(format!(
                    "waiting for node {}: on its host run `{}`",
                    node.spec.name,
                    self.join_command(index)
                ))),
                // It comes back by itself.
                NodeHost::Remote => {}
            }
        }
        actions
    }

    /// Whether typed bytes may be sent on, and where to.
    pub fn input_link(&self) -> Option<LinkId> {
        match self.phase {
            Phase::Running => self.nodes[0].link,
            _ => None,
        }
    }

    /// What the nodes have reported.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The devices that the machine starts with, and starts again with.
    pub fn devices(&self) -> Vec<PlacedDevice> {
        self.hotplug.devices()
    }

    /// Takes one event and says what follows from it.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Hello { link, hello, from } => self.hello(link, &hello, from, now, &mut actions),
            Event::Said { link, message } => {
                if let Some(node) = self.node_of(link) {
                    self.nodes[node].heard = Some(now);
                    self.nodes[node].silent = false;
                    self.said(node, message, now, &mut actions);
                }
            }
            Event::Closed { link, why, by_node } => {
                if let Some(node) = self.node_of(link) {
                    self.nodes[node].link = None;
                    if by_node {
                        self.nodes[node].writes = None;
                    }
                    self.suspect(node, Cause::Closed(why), now);
                }
            }
            Event::Ended { node, life, how } => {
                if life == self.life {
                    self.nodes[node].process = false;
                    self.nodes[node].writes = None;
                    self.process_ended(node, how, now, &mut actions);
                }
            }
            Event::NotSpawned { node, why } => {
                self.nodes[node].process = false;
                self.suspect(node, Cause::NotSpawned(why), now);
            }
            Event::Interrupted(who) => self.interrupted(who, now, &mut actions),
            Event::Asked { asker, request } => {
                let running = matches!(self.phase, Phase::Running);
                let steps = self.hotplug.ask(asker, request, running, now);
                self.steps(steps, &mut actions);
            }
            Event::Tick => {
                self.tick(now);
                let steps = self.hotplug.tick(now);
                self.steps(steps, &mut actions);
            }
        }
        self.advance(now, &mut actions);
        actions
    }

    fn hello(&mut self, link: LinkId, hello: &Hello, from: SocketAddr, now: Instant, out: &mut Vec<Action>) {
        let refuse = |why: String, later| Action::Refuse { link, why, later };
        let Some(node) = self.config.node_named(&hello.name) else {
            let names: Vec<_> = self.config.nodes.iter().map(|node| node.spec.name.as_str()).collect();
            out.push(Action::Warn(format!(
                "{from} wanted to join as {:?}, which is no node here",
                hello.name
            )));
            out.push(refuse(
                format!(
                    "this machine has no node named {:?}: its nodes are {}",
                    hello.name,
                    names.join(", ")
                ),
                false,
            ));
            return;
        };
        let name = &self.config.nodes[node].spec.name;
        if let Some(taken) = self.nodes[node].from.filter(|_| self.nodes[node].link.is_some()) {
            let ending = matches!(
                self.phase,
                Phase::Stopping { ending: Ending::Restart, .. }
                    | Phase::Killing { ending: Ending::Restart, .. }
            );
            if !ending {
                out.push(Action::Warn(format!("{from} wanted to join as {name}, which {taken} has done")));
            }
            out.push(refuse(
                format!(
                    "node {name} has joined already, from {taken}: give every node process a name of its own"
                ),
                ending,
            ));
            return;
        }
        match &self.phase {
            Phase::Joining { .. } => {
                let state = &mut self.nodes[node];
                state.link = Some(link);
                state.from = Some(from);
                state.heard = Some(now);
                self.tally.host(node, hello);
                out.push(Action::Admit { link, node });
                if self.config.nodes[node].host == NodeHost::Remote {
                    out.push(Action::Say(format!("node {name} joined from {} ({})", hello.host, from.ip())));
                }
            }
            Phase::Stopping { ending: Ending::Restart, .. }
            | Phase::Killing { ending: Ending::Restart, .. } => {
                out.push(refuse("the machine is about to start again".into(), true));
            }
            _ => out.push(refuse(
                format!("the machine runs or ends, and node {name} cannot join it any more: start it again"),
                false,
            )),
        }
    }

    fn said(&mut self, node: usize, message: ToCoordinator, now: Instant, out: &mut Vec<Action>) {
        match (message, &mut self.phase) {
            // A node that is told that it was heard may write to its disks for a while: not once something
            // has failed.
            (
                ToCoordinator::Heartbeat(said),
                Phase::Joining { .. } | Phase::Preparing { .. } | Phase::Running,
            ) => {
                self.nodes[node].writes = Some(now + self.lease());
                let link = self.nodes[node].link;
                let message = FromCoordinator::Heartbeat(said);
                out.extend(link.map(|link| Action::Send { link, message }));
            }
            (ToCoordinator::Heartbeat(_), _) => {}
            (ToCoordinator::Report(report), _) => {
                if !std::mem::replace(&mut self.nodes[node].reported, true) {
                    self.tally.add(node, report);
                }
            }
            (ToCoordinator::Dump(text), _) => out.push(Action::Dump { node, text }),
            (ToCoordinator::Console(bytes), _) if node == 0 => out.push(Action::Console(bytes)),
            (ToCoordinator::Failed { why, dump }, phase) => {
                if let Some(text) = dump {
                    out.push(Action::Dump { node, text });
                }
                if !matches!(phase, Phase::Stopping { .. } | Phase::Killing { .. } | Phase::Over) {
                    self.suspect(node, Cause::Failed(why), now);
                }
            }
            (ToCoordinator::PeerLost { node: lost, why }, _)
                if usize::from(lost) < self.nodes.len() && usize::from(lost) != node =>
            {
                let witness = self.config.nodes[node].spec.name.clone();
                self.suspect(usize::from(lost), Cause::SeenBy { witness, why }, now);
            }
            (ToCoordinator::Joined(joined), Phase::Joining { .. }) if self.nodes[node].joined.is_none() => {
                self.joined(node, joined, now);
            }
            (ToCoordinator::Ready, Phase::Preparing { .. }) => self.nodes[node].ready = true,
            (ToCoordinator::DeviceDone { id, result }, Phase::Running) => {
                match self.hotplug.done(node, id, result) {
                    Some(steps) => self.steps(steps, out),
                    None => {
                        let why = "it answered an order about a device that it was not given".to_string();
                        self.suspect(node, Cause::Failed(why), now);
                    }
                }
            }
            (ToCoordinator::Ejected(slot), Phase::Running) if node == 0 => {
                let steps = self.hotplug.ejected(slot);
                self.steps(steps, out);
            }
            (ToCoordinator::PowerOff, Phase::Running) if node == 0 => {
                self.stop(Ending::Over(Outcome::PoweredOff), now, out);
            }
            (ToCoordinator::Reset, Phase::Running) if node == 0 => {
                out.push(Action::Say("the guest asked for a reboot: the machine starts again".into()));
                self.stop(Ending::Restart, now, out);
            }
            // What was on its way when the machine was stopped.
            (_, Phase::Settling { .. } | Phase::Stopping { .. } | Phase::Killing { .. } | Phase::Over) => {}
            (message, _) => {
                let name = format!("{message:?}");
                let name = name.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
                let why = format!("it said {name}, which makes no sense at that moment");
                self.suspect(node, Cause::Failed(why), now);
            }
        }
    }

    /// Does what the devices want done.
    fn steps(&self, steps: Vec<Step>, out: &mut Vec<Action>) {
        out.extend(steps.into_iter().filter_map(|step| match step {
            Step::Answer(asker, answer) => Some(Action::Answer { asker, answer }),
            Step::Say(text) => Some(Action::Say(text)),
            // A node that is lost ends the machine.
            Step::Tell { node, id, order } => {
                let link = self.nodes.get(node).and_then(|node| node.link)?;
                Some(Action::Send { link, message: FromCoordinator::Device { id, order } })
            }
        }));
    }

    fn joined(&mut self, node: usize, mut joined: Joined, now: Instant) {
        if let Some(from) = self.nodes[node].from {
            // It listens everywhere; its peers reach it where we do.
            let everywhere = joined.fabric.iter_mut().filter(|address| address.ip().is_unspecified());
            everywhere.for_each(|address| address.set_ip(from.ip()));
        }
        let (here, all) = (joined.fabric.len(), self.config.rails());
        if here != all {
            let why =
                format!("it has {here} rails and the machine has {all}: give it as many --fabric-listen");
            return self.suspect(node, Cause::Failed(why), now);
        }
        if joined.fabric.iter().any(|address| address.port() == 0) {
            let why = "its fabric listens on port 0, where no peer can reach it".to_string();
            return self.suspect(node, Cause::Failed(why), now);
        }
        self.nodes[node].joined = Some(joined);
    }

    fn process_ended(&mut self, node: usize, how: ProcessEnd, now: Instant, out: &mut Vec<Action>) {
        if let Phase::Stopping { ending, .. } = &self.phase {
            let in_order = how == ProcessEnd::Code(0);
            if !in_order && !matches!(ending, Ending::Over(Outcome::Failed(_))) {
                let name = &self.config.nodes[node].spec.name;
                out.push(Action::Warn(format!("node {name} did not end in good order: its process {how}")));
            }
            return;
        }
        self.suspect(node, Cause::Ended(how), now);
    }

    /// Something is wrong with a node, unless the machine is ending anyway.
    fn suspect(&mut self, node: usize, cause: Cause, now: Instant) {
        let found = Evidence { node, cause };
        match &mut self.phase {
            Phase::Joining { .. } | Phase::Preparing { .. } | Phase::Running => {
                self.phase = Phase::Settling { until: now + SETTLE, evidence: vec![found] };
            }
            Phase::Settling { evidence, .. } => evidence.push(found),
            Phase::Stopping { .. } | Phase::Killing { .. } | Phase::Over => {}
        }
    }

    fn interrupted(&mut self, who: Interrupt, now: Instant, out: &mut Vec<Action>) {
        match &mut self.phase {
            // The second time means: now.
            Phase::Stopping { until, ending } => {
                *until = now;
                if let Ending::Restart = ending {
                    *ending = Ending::Over(Outcome::Interrupted(who));
                }
            }
            Phase::Settling { until, .. } => *until = now,
            Phase::Killing { hurried: true, ending, .. } => {
                let ending = ending.clone();
                if let Some((names, seconds)) = self.writers(now, |_| true) {
                    out.push(Action::Warn(format!(
                        "{names} may still write to disks for {seconds:.1} s: wait so long before these disks are \
                         given to another machine"
                    )));
                }
                self.end(ending, now, out);
            }
            Phase::Killing { hurried, ending, .. } => {
                *hurried = true;
                if let Ending::Restart = ending {
                    *ending = Ending::Over(Outcome::Interrupted(who));
                }
                if let Some((names, seconds)) = self.writers(now, |_| true) {
                    out.push(Action::Say(format!(
                        "{names} may still write to disks for {seconds:.1} s: another interrupt ends this at once \
                         all the same"
                    )));
                }
            }
            Phase::Over => {}
            Phase::Joining { .. } | Phase::Preparing { .. } | Phase::Running => {
                self.stop(Ending::Over(Outcome::Interrupted(who)), now, out);
            }
        }
    }

    fn stop(&mut self, ending: Ending, now: Instant, out: &mut Vec<Action>) {
        if self.tally.running() {
            out.push(Action::Attach(false));
        }
        let failed = matches!(ending, Ending::Over(Outcome::Failed(_)));
        let clean = matches!(ending, Ending::Restart | Ending::Over(Outcome::PoweredOff));
        let grace = if clean { GRACE_CLEAN } else { GRACE_FAILED };
        let restart = matches!(ending, Ending::Restart);
        let stop = Stop { report: !failed, restart, grace };
        for link in self.nodes.iter().filter_map(|node| node.link) {
            out.push(Action::Send { link, message: FromCoordinator::Stop(stop) });
        }
        self.phase = Phase::Stopping { until: now + grace, ending };
    }

    fn tick(&mut self, now: Instant) {
        // If this process itself did not run for a while, the nodes' silence proves nothing.
        let slept = now.saturating_duration_since(self.last_tick).saturating_sub(4 * super::TICK);
        self.last_tick = now;
        let mut silent = Vec::new();
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if let Some(heard) = &mut node.heard {
                *heard += slept;
                let silence = now.saturating_duration_since(*heard);
                if node.link.is_some() && silence > self.config.silence {
                    silent.push((index, silence));
                    // Once is enough.
                    node.heard = None;
                    node.silent = true;
                }
            }
        }
        for (node, silence) in silent {
            self.suspect(node, Cause::Silent(silence), now);
        }
    }

    /// Moves on where nothing more has to be waited for.
    fn advance(&mut self, now: Instant, out: &mut Vec<Action>) {
        let left = |node: &&Node| node.link.is_some() || node.process;
        let gone = !self.nodes.iter().any(|node| left(&node));
        // Another machine may have their disks after this one.
        let quiet = !self.nodes.iter().any(|node| node.writes(now));
        // A silent node will not end because it is told to.
        let hopeless = self.nodes.iter().filter(left).all(|node| node.silent);
        match &mut self.phase {
            Phase::Joining { until } => {
                if self.nodes.iter().all(|node| node.joined.is_some()) {
                    let nodes: Vec<_> = self.nodes.iter().filter_map(|node| node.joined.clone()).collect();
                    self.phase = Phase::Preparing { until: now + PREPARE };
                    self.send_all(&FromCoordinator::Start(Start { nodes }), out);
                } else if now >= *until {
                    let why = self.missing_sentence();
                    self.stop(Ending::Over(Outcome::Failed(why)), now, out);
                }
            }
            Phase::Preparing { until } => {
                if self.nodes.iter().all(|node| node.ready) {
                    self.phase = Phase::Running;
                    self.tally.started(now);
                    out.push(Action::Attach(true));
                    self.send_all(&FromCoordinator::Go, out);
                } else if now >= *until {
                    let names = self.names(|node| !node.ready);
                    let why = format!("{names} did not get ready within {} s", PREPARE.as_secs());
                    self.stop(Ending::Over(Outcome::Failed(why)), now, out);
                }
            }
            Phase::Settling { until, evidence } if now >= *until => {
                let why = super::cause::first(evidence, &self.config);
                self.stop(Ending::Over(Outcome::Failed(why)), now, out);
            }
            Phase::Stopping { ending, .. } if gone && quiet => {
                let ending = ending.clone();
                self.end(ending, now, out);
            }
            Phase::Stopping { until, ending } if hopeless || now >= *until => {
                let ending = ending.clone();
                let names = self.names(|node| node.link.is_some() || node.process);
                if !gone && !matches!(ending, Ending::Over(Outcome::Failed(_))) {
                    out.push(Action::Warn(format!("{names} did not end in time")));
                }
                // The processes of the others are killed.
                if let Some((names, seconds)) = self.writers(now, |node| !node.process) {
                    out.push(Action::Say(format!(
                        "{names} may not know that the machine has ended: waiting {seconds:.1} s more, then \
                         nothing is written to its disks"
                    )));
                }
                out.extend(self.nodes.iter_mut().filter_map(|node| node.link.take()).map(Action::Close));
                out.push(Action::KillAll);
                self.phase = Phase::Killing { until: now + KILL, ending, hurried: false };
            }
            Phase::Killing { until, ending, .. } if quiet && (gone || now >= *until) => {
                let ending = ending.clone();
                self.end(ending, now, out);
            }
            _ => {}
        }
    }

    fn end(&mut self, ending: Ending, now: Instant, out: &mut Vec<Action>) {
        self.tally.stopped(now);
        match ending {
            Ending::Restart => {
                let steps = self.hotplug.restart();
                self.steps(steps, out);
                out.extend(self.start(now));
            }
            Ending::Over(outcome) => {
                self.phase = Phase::Over;
                out.push(Action::Over(outcome));
            }
        }
    }

    /// How long a node may write after its heartbeat has been answered, as counted here.
    fn lease(&self) -> Duration {
        fence::lease(self.config.silence) + CLOCKS
    }

    fn send_all(&self, message: &FromCoordinator, out: &mut Vec<Action>) {
        for link in self.nodes.iter().filter_map(|node| node.link) {
            out.push(Action::Send { link, message: message.clone() });
        }
    }

    fn node_of(&self, link: LinkId) -> Option<usize> {
        self.nodes.iter().position(|node| node.link == Some(link))
    }

    fn join_command(&self, node: usize) -> String {
        format!("gestalt node --join {} --name {} --key FILE", self.join, self.config.nodes[node].spec.name)
    }

    fn names(&self, which: impl Fn(&Node) -> bool) -> String {
        let chosen = self.nodes.iter().zip(&self.config.nodes).filter(|(node, _)| which(node));
        let names: Vec<_> = chosen.map(|(_, config)| config.spec.name.as_str()).collect();
        format!("{} {}", if names.len() == 1 { "node" } else { "nodes" }, names.join(", "))
    }

    /// The names of those among `which` that may write to their disks, if there are any, and for how many
    /// seconds more: tenths, rounded up.
    fn writers(&self, now: Instant, which: impl Fn(&Node) -> bool) -> Option<(String, f64)> {
        let writes = |node: &Node| node.writes(now) && which(node);
        let until = self.nodes.iter().filter(|node| writes(node)).filter_map(|node| node.writes).max()?;
        let tenths = until.saturating_duration_since(now).as_nanos().div_ceil(100_000_000);
        Some((self.names(writes), tenths as f64 / 10.0))
    }

    fn missing_sentence(&self) -> String {
        let seconds = self.config.join_timeout().as_secs();
        if let Some(absent) = self.nodes.iter().position(|node| node.link.is_none()) {
            let who = self.names(|node| node.link.is_none());
            return format!(
                "{who} did not join within {seconds} s: run `{}` on its host, and see whether a firewall is in \
                 the way",
                self.join_command(absent)
            );
        }
        let who = self.names(|node| node.joined.is_none());
        format!("{who} joined but did not say what its host offers within {seconds} s: see its messages")
    }
}

#[cfg(test)]
mod tests;
