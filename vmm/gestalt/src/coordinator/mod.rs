//! `gestalt run`: the process that brings the nodes of a machine together and notices when one goes.
//!
//! ```text
//! listener ── handshakes ──┐
//! link threads ── Said ────┤            ┌──> links (Assigned, Start, Go, Stop, typed bytes)
//! process waiters ─ Ended ─┼─> events ──┤    Session::handle decides
//! signals, escape key ─────┤            ├──> console output, messages
//! typed bytes, the clock ──┘            └──> processes (spawn, kill)
//! ```
//!
//! - [`wire`]: bytes on the connection; [`machine::control`] has both sides' words. [`link`] and [`listener`]
//!   are our side.
//! - [`hotplug`]: devices that come, go and change while the machine runs; pure, too.
//! - [`session`]: all decisions, pure; [`event`]: what goes in and out. [`cause`]: which sign of a failure is
//!   its cause.
//! - [`spawn`]: processes of local nodes. [`report`]: counters at the end. [`dumps`]: what nodes leave
//!   behind.
//! - [`Coordinator`]: the loop in the middle of the picture.
//!
//! The loop answers the nodes' heartbeats, and no thread that reads or writes does that for it: an answer lets
//! a node write to its disks for another while ([`machine::control::fence`]), and says that whoever would end
//! the machine for a lost node has heard this one and lost none. So nothing in the loop may wait for an
//! operator, a terminal or a disk. Log lines, the guest's output and dumps are written by threads of their own
//! ([`crate::output`], [`dumps`]); where these stand still, lines are left out and counted.

pub mod cause;
pub mod dumps;
pub mod event;
pub mod hotplug;
pub mod link;
pub mod listener;
pub mod report;
pub mod session;
pub mod spawn;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, Sender};

use crate::log_limit::OPERATOR;
use crate::operator;
use crate::operator::server::Asked;
use dumps::Dumps;
use event::{Action, Event, Interrupt, LinkId, Outcome};
use hotplug::AskerId;
use link::Link;
use listener::Acceptor;
use machine::config::{CheckedMachine, MachineConfig};
use machine::control::wire::{self, Answer, Assigned, Hello};
use machine::control::{FromCoordinator, Machine};
use machine::keys::{CoordinatorKeys, MachineKey};
use session::Session;
use spawn::{NodeProcess, Spawner};

/// How often the session learns that time passes.
pub const TICK: Duration = Duration::from_millis(100);
/// How many pieces of typed text may wait for node 0 before the terminal is no longer read.
const MAX_TYPED: usize = 16;

/// How long the nodes' dumps may take to be written once the machine is over.
const LAST_DUMPS: Duration = Duration::from_secs(5);

/// Why a machine could not even begin.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// The address is taken.
    #[error(
        "{0} is in use by another process: end that one, or choose another address with --listen or listen = in \
         the machine file"
    )]
    InUse(SocketAddr),
    /// The address is not one of this host, or not allowed.
    #[error("cannot listen on {address} ({why}): choose an address of this host with --listen or listen =")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        why: io::Error,
    },
    /// The keys cannot be made.
    #[error("the machine's keys cannot be made: {0}")]
    Keys(#[from] fabric::secure::SecureError),
    /// The system lacks something else.
    #[error("the coordinator could not start: {0}")]
    Io(#[from] io::Error),
}

/// The operator's side of the coordinator: terminal, wishes and requests.
pub struct Console {
    /// Bytes typed; a bounded channel, so that a pipe is read no faster than the guest takes it. A closed
    /// channel is the end of input, not of the machine.
    pub input: Receiver<Vec<u8>>,
    /// Wishes to end the machine.
    pub interrupts: Receiver<Interrupt>,
    /// What operators ask of the running machine.
    pub requests: Receiver<Asked>,
    /// Called with `true` when the guest begins to read what is typed, with `false` when it ceases.
    pub attach: Box<dyn FnMut(bool)>,
    /// Takes what the guest wrote; must not block.
    pub output: Box<dyn FnMut(Vec<u8>)>,
    /// Where nodes' dumps go, one file per node; without it they go to stderr.
    pub dumps: Option<PathBuf>,
}

/// How a machine ended, with its report.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// See [`report::Tally::to_json`].
    pub report: serde_json::Value,
}

/// A machine that is about to start.
pub struct Coordinator {
    config: CheckedMachine,
    key: MachineKey,
    keys: CoordinatorKeys,
    listener: TcpListener,
    spawner: Box<dyn Spawner>,
}

/// A wake-up of the coordinator's loop.
enum Wake {
    Event(Event),
    Hello(TcpStream, Box<wire::ControlChannel>, Hello, SocketAddr),
}

impl Coordinator {
    /// Opens the listener; nothing else happens yet. Who has `key`, or a node's key that
    /// follows from it, can join.
    ///
    /// # Errors
    /// A sentence about the address.
    pub fn bind(
        config: CheckedMachine,
        key: MachineKey,
        spawner: Box<dyn Spawner>,
    ) -> Result<Coordinator, CoordinatorError> {
        let keys = key.coordinator(config.nodes.iter().map(|node| node.spec.name.as_str()))?;
        let address = config.listen();
        let listener = TcpListener::bind(address).map_err(|why| match why.kind() {
            io::ErrorKind::AddrInUse => CoordinatorError::InUse(address),
            _ => CoordinatorError::Listen { address, why },
        })?;
        Ok(Coordinator { config, key, keys, listener, spawner })
    }

    /// Where nodes join.
    ///
    /// # Errors
    /// What the system says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Runs the machine to its end, on the calling thread: its end would take the local nodes with it.
    ///
    /// # Errors
    /// Only if the machine could not begin; all else is an [`Outcome`].
    pub fn run(self, console: Console) -> Result<Ended, CoordinatorError> {
        let bound = self.listener.local_addr()?;
        let (tell, events) = channel::unbounded();
        let knocking = tell.clone();
        let _acceptor = Acceptor::start(self.listener, self.keys, move |stream, session, hello, from| {
            // Nobody listens any more only when the machine is over.
            let _ = knocking.send(Wake::Hello(stream, Box::new(session), hello, from));
        })?;
        let session = Session::new(self.config.clone(), join_hint(bound), Instant::now());
        let driver = Driver {
            dumps: Dumps::new(console.dumps.clone(), self.config.nodes.len())?,
            machine: self.config.machine([0; 16], session.devices()),
            join: MachineConfig::local_join_address(bound),
            config: self.config,
            key: self.key,
            spawner: self.spawner,
            session,
            tell,
            waiting: HashMap::new(),
            links: HashMap::new(),
            processes: Processes::default(),
            next_link: 0,
            askers: HashMap::new(),
            next_asker: 0,
            console,
            over: None,
        };
        driver.run(&events)
    }
}

/// How the operator of another host is told to reach us.
fn join_hint(bound: SocketAddr) -> String {
    if !bound.ip().is_unspecified() {
        return bound.to_string();
    }
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    format!("{}:{}", host.unwrap_or_else(|| "HOST".into()), bound.port())
}

/// The processes of this start; whatever happens to the coordinator, they do not outlive it.
#[derive(Default)]
struct Processes(Vec<Arc<dyn NodeProcess>>);

impl Processes {
    fn kill(&self) {
        for process in &self.0 {
            process.kill();
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Driver {
    config: CheckedMachine,
    key: MachineKey,
    machine: Machine,
    join: SocketAddr,
    spawner: Box<dyn Spawner>,
    session: Session,
    tell: Sender<Wake>,
    /// Introduced, not answered yet.
    waiting: HashMap<LinkId, (TcpStream, Box<wire::ControlChannel>)>,
    links: HashMap<LinkId, Link>,
    processes: Processes,
    next_link: LinkId,
    /// Operators who wait for an answer.
    askers: HashMap<AskerId, Sender<operator::Answer>>,
    next_asker: AskerId,
    console: Console,
    dumps: Dumps,
    over: Option<Outcome>,
}

impl Driver {
    fn run(mut self, events: &Receiver<Wake>) -> Result<Ended, CoordinatorError> {
        let actions = self.session.start(Instant::now());
        self.perform(actions)?;
        let mut next_tick = Instant::now() + TICK;
        while self.over.is_none() {
            let now = Instant::now();
            // A node is silent only if nothing of it waits to be read.
            if now >= next_tick && (events.is_empty() || now >= next_tick + Duration::from_secs(1)) {
                next_tick = now + TICK;
                self.handle(Event::Tick)?;
                continue;
            }
            let typed_to = self.session.input_link().and_then(|link| self.links.get(&link));
            let takes_input = typed_to.is_some_and(|link| link.queued() < MAX_TYPED);
            let input = if takes_input { self.console.input.clone() } else { channel::never() };
            let (interrupts, requests) = (self.console.interrupts.clone(), self.console.requests.clone());
            crossbeam::select! {
                recv(events) -> wake => match wake {
                    Ok(Wake::Event(event)) => self.handle(event)?,
                    Ok(Wake::Hello(stream, session, hello, from)) => self.knock((stream, session), hello, from)?,
                    // Impossible: this struct holds a sender.
                    Err(_) => break,
                },
                recv(interrupts) -> interrupt => match interrupt {
                    Ok(interrupt) => self.handle(Event::Interrupted(interrupt))?,
                    Err(_) => self.console.interrupts = channel::never(),
                },
                recv(requests) -> asked => match asked {
                    Ok(Asked { request, reply }) => {
                        let asker = self.next_asker;
                        self.next_asker += 1;
                        self.askers.insert(asker, reply);
                        self.handle(Event::Asked { asker, request })?;
                    }
                    Err(_) => self.console.requests = channel::never(),
                },
                recv(input) -> typed => match typed {
                    Ok(bytes) => self.typed(bytes),
                    Err(_) => self.console.input = channel::never(),
                },
                default(next_tick.saturating_duration_since(now)) => {}
            }
        }
        let outcome = self.over.take().unwrap_or(Outcome::Failed("the coordinator lost its events".into()));
        if !self.dumps.finish(LAST_DUMPS) {
            tracing::warn!("what the nodes left behind could not be written in {LAST_DUMPS:?}");
        }
        let report = self.session.tally().to_json(&outcome);
        Ok(Ended { outcome, report })
    }

    fn knock(
        &mut self,
        who: (TcpStream, Box<wire::ControlChannel>),
        hello: Hello,
        from: SocketAddr,
    ) -> Result<(), CoordinatorError> {
        let link = self.next_link;
        self.next_link += 1;
        self.waiting.insert(link, who);
        self.handle(Event::Hello { link, hello, from })
    }

    fn typed(&mut self, bytes: Vec<u8>) {
        if let Some(link) = self.session.input_link().and_then(|link| self.links.get(&link)) {
            link.send(FromCoordinator::ConsoleInput(bytes));
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), CoordinatorError> {
        if let Event::Closed { link, .. } = &event {
            self.links.remove(link);
        }
        let actions = self.session.handle(event, Instant::now());
        self.perform(actions)
    }

    fn perform(&mut self, actions: Vec<Action>) -> Result<(), CoordinatorError> {
        for action in actions {
            match action {
                Action::NewRun => {
                    self.machine = self.config.machine(random_id()?, self.session.devices());
                    self.processes = Processes::default();
                    self.links.clear();
                }
                Action::Spawn { node, life } => self.spawn(node, life)?,
                Action::Admit { link, node } => self.admit(link, node),
                Action::Refuse { link, why, later } => {
                    if let Some((stream, mut session)) = self.waiting.remove(&link) {
                        // A few bytes into a fresh socket; whether they arrive is the node's concern.
                        let _ = wire::answer(&stream, &mut session.sender, &Answer::Refused { why, later });
                    }
                }
                Action::Send { link, message } => {
                    if let Some(link) = self.links.get(&link) {
                        link.send(message);
                    }
                }
                Action::Attach(attached) => (self.console.attach)(attached),
                Action::Console(bytes) => (self.console.output)(bytes),
                Action::Say(text) => tracing::info!(target: OPERATOR, "{text}"),
                Action::Warn(text) => tracing::warn!("{text}"),
                Action::Dump { node, text } => {
                    self.dumps.keep(node, &self.config.nodes[node].spec.name, text);
                }
                Action::Answer { asker, answer } => {
                    if let Some(reply) = self.askers.remove(&asker) {
                        // Who does not wait any more needs no answer.
                        let _ = reply.send(answer);
                    }
                }
                Action::Close(link) => drop(self.links.remove(&link)),
                Action::KillAll => self.processes.kill(),
                Action::Over(outcome) => self.over = Some(outcome),
            }
        }
        Ok(())
    }

    fn spawn(&mut self, node: usize, life: u32) -> Result<(), CoordinatorError> {
        let name = &self.config.nodes[node].spec.name;
        let key = self.key.node(name)?;
        match self.spawner.spawn(name, self.join, &key) {
            Ok(process) => {
                tracing::debug!("node {} is process {}", self.config.nodes[node].spec.name, process.id());
                self.processes.0.push(process.clone());
                let tell = self.tell.clone();
                thread::Builder::new().name(format!("wait-{node}")).spawn(move || {
                    let how = process.wait();
                    let _ = tell.send(Wake::Event(Event::Ended { node, life, how }));
                })?;
            }
            Err(error) => {
                // Through the queue, so that events are never handled inside one another.
                let why = error.to_string();
                let _ = self.tell.send(Wake::Event(Event::NotSpawned { node, why }));
            }
        }
        Ok(())
    }

    fn admit(&mut self, link: LinkId, node: usize) {
        let Some((stream, mut session)) = self.waiting.remove(&link) else { return };
        let assigned = Assigned {
            node: node as u16,
            machine: self.machine.clone(),
            fabric_listen: self.config.nodes[node].fabric_listen.clone(),
        };
        let tell = self.tell.clone();
        let tell = move |event| {
            let _ = tell.send(Wake::Event(event));
        };
        let answer = Answer::Assigned(Box::new(assigned));
        let opened = wire::answer(&stream, &mut session.sender, &answer)
            .and_then(|()| Ok(Link::open(link, stream, *session, self.config.silence, tell.clone())?));
        match opened {
            Ok(open) => drop(self.links.insert(link, open)),
            Err(error) => tell(Event::Closed { link, why: error.to_string(), by_node: false }),
        }
    }
}

/// 16 random bytes.
fn random_id() -> Result<[u8; 16], CoordinatorError> {
    let mut id = [0; 16];
    fabric::secure::fill_random(&mut id)?;
    Ok(id)
}
