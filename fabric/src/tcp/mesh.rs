//! Builds the mesh: one thread, nonblocking sockets, one deadline for everything.
//!
//! ```text
//! inbound:  accepted ── handshake ──> slot
//! outbound: pause ──> connecting ──> hello sent ── handshake ──> slot
//!             ^────── any failure: noted for the peer, tried again ──┘
//! ```

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::handshake::{Called, Caller, Credentials, Met, Step};
use super::hello::Rejection;
use super::listener::{begin_connect, tune};
use crate::{FabricError, LaneId, NodeId};

/// How long a connection may take to say who it is, and to prove it.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections that have not proven who they are, beyond those that are expected; the oldest has to go first.
const STRANGERS: usize = 64;

/// Pause before a failed connection is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// What is wrong with a peer that has received frames of a lane that is new here.
const NOT_NEW: &str = "it has received frames on this lane before: it is not at the beginning of this run";

/// One connection, ready for frames.
pub(super) struct Session {
    pub(super) socket: TcpStream,
    pub(super) met: Met,
}

/// A mesh that is being built.
pub(super) struct Mesh {
    listener: TcpListener,
    own: Credentials,
    deadline: Instant,
    timeout: Duration,
    /// Finished connections, by lane and node.
    sessions: Vec<Vec<Option<Session>>>,
    /// How many are missing in `sessions`.
    missing: usize,
    inbound: Vec<Inbound>,
    outbound: Vec<Outbound>,
    /// What went wrong last with each node, for the operator.
    trouble: Vec<Option<String>>,
}

/// An accepted connection whose handshake is not finished.
struct Inbound {
    socket: TcpStream,
    address: SocketAddr,
    state: Called,
    until: Instant,
}

/// A connection that this node has to make.
struct Outbound {
    peer: NodeId,
    lane: LaneId,
    address: SocketAddr,
    pause: Duration,
    state: State,
}

enum State {
    Pausing(Instant),
    Connecting(TcpStream),
    /// Hello was sent. There is no deadline but the mesh's: the peer may not have come to its mesh yet,
    /// while its listening socket takes the connection already.
    Greeted(TcpStream, Caller),
}

impl Mesh {
    pub(super) fn new(
        listener: TcpListener,
        own: Credentials,
        addresses: Vec<SocketAddr>,
        timeout: Duration,
    ) -> Mesh {
        let now = Instant::now();
        let lanes = usize::from(own.identity.lanes);
        let lower = addresses.iter().zip(0..own.identity.node.0);
        let outbound = lower
            .flat_map(|(address, peer)| (0..own.identity.lanes).map(move |lane| (*address, peer, lane)))
            .map(|(address, peer, lane)| Outbound {
                peer: NodeId(peer),
                lane,
                address,
                pause: FIRST_PAUSE,
                state: State::Pausing(now),
            })
            .collect();
        Mesh {
            listener,
            deadline: now + timeout,
            timeout,
            sessions: (0..lanes).map(|_| addresses.iter().map(|_| None).collect()).collect(),
            missing: lanes * (addresses.len() - 1),
            inbound: Vec::new(),
            outbound,
            trouble: addresses.iter().map(|_| None).collect(),
            own,
        }
    }

    /// Runs until every connection is there: `[lane][node]`.
    pub(super) fn run(mut self) -> Result<Vec<Vec<Option<Session>>>, FabricError> {
        while self.missing > 0 {
            let now = Instant::now();
            if now >= self.deadline {
                return Err(self.timed_out());
            }
            self.begin_due(now)?;
            self.wait(now)?;
            self.accept()?;
            self.work_inbound();
            self.work_outbound();
        }
        Ok(self.sessions)
    }

    /// Begins the connections whose pause is over.
    fn begin_due(&mut self, now: Instant) -> Result<(), FabricError> {
        for outbound in &mut self.outbound {
            if !matches!(outbound.state, State::Pausing(until) if until <= now) {
                continue;
            }
            match begin_connect(outbound.address) {
                Ok(socket) => outbound.state = State::Connecting(socket),
                Err(error @ (Errno::EMFILE | Errno::ENFILE)) => return Err(too_many_files(error)),
                Err(error) => {
                    self.trouble[outbound.peer.index()] = Some(format!("cannot connect: {}", error.desc()));
                    outbound.retry(now);
                }
            }
        }
        Ok(())
    }

    /// Sleeps until a socket is ready or the nearest time has come.
    fn wait(&self, now: Instant) -> Result<(), FabricError> {
        let mut until = self.deadline;
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        for inbound in &self.inbound {
            until = until.min(inbound.until);
            fds.push(PollFd::new(inbound.socket.as_fd(), PollFlags::POLLIN));
        }
        for outbound in &self.outbound {
            match &outbound.state {
                State::Pausing(at) => until = until.min(*at),
                State::Connecting(socket) => fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLOUT)),
                State::Greeted(socket, _) => fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
            }
        }
        // One millisecond more than the difference rounded down: never a busy loop before the time.
        let pause = until.saturating_duration_since(now) + Duration::from_millis(1);
        match nix::poll::poll(&mut fds, PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(FabricError::Io { what: "waiting for peers to connect", source: error.into() }),
        }
    }

    /// Accepts what has come.
    fn accept(&mut self) -> Result<(), FabricError> {
        loop {
            match self.listener.accept() {
                Ok((socket, address)) => {
                    if let Err(error) = socket.set_nonblocking(true).and_then(|()| tune(&socket)) {
                        tracing::warn!(%address, %error, "connection closed: it cannot be set up");
                        continue;
                    }
                    if self.inbound.len() >= self.missing + STRANGERS {
                        let oldest = self.inbound.remove(0);
                        tracing::warn!(address = %oldest.address, "connection closed: too many say nothing");
                    }
                    let until = Instant::now() + HELLO_TIME;
                    self.inbound.push(Inbound { socket, address, state: Called::new(), until });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    // Without a descriptor the connection stays in the queue: make room, or give up.
                    Some(errno @ (Errno::EMFILE | Errno::ENFILE)) => {
                        if self.inbound.is_empty() {
                            return Err(too_many_files(errno));
                        }
                        let oldest = self.inbound.remove(0);
                        tracing::warn!(address = %oldest.address, "connection closed: out of descriptors");
                    }
                    Some(Errno::ENOMEM | Errno::ENOBUFS | Errno::EBADF | Errno::EINVAL) | None => {
                        return Err(FabricError::Io { what: "accepting a peer's connection", source: error });
                    }
                    // The rest are errors of the connection that was to be accepted (accept(2)).
                    Some(_) => tracing::debug!(%error, "a connection ended before it was accepted"),
                },
            }
        }
    }

    /// Takes every inbound connection a step further.
    fn work_inbound(&mut self) {
        for mut inbound in std::mem::take(&mut self.inbound) {
            let sessions = &self.sessions;
            let received = |peer: NodeId, lane: LaneId| match &sessions[usize::from(lane)][peer.index()] {
                None => Ok(0),
                Some(_) => Err(format!("{peer} is connected on lane {lane} already")),
            };
            let why = match inbound.state.step(&inbound.socket, &self.own, received) {
                Ok(None) if Instant::now() < inbound.until => {
                    self.inbound.push(inbound);
                    continue;
                }
                Ok(None) => "it did not say in time who it is".into(),
                Ok(Some(met)) if met.received == 0 => {
                    self.connected(met, inbound.socket);
                    continue;
                }
                Ok(Some(_)) => NOT_NEW.into(),
                Err(Rejection::Stranger(why)) => why,
                Err(Rejection::Claim { from, why }) => {
                    // Unproven, so it is kept for the operator and otherwise not believed.
                    if let Some(trouble) = self.trouble.get_mut(from.index()) {
                        *trouble = Some(why.clone());
                    }
                    why
                }
            };
            tracing::warn!(address = %inbound.address, "connection closed: {why}");
        }
    }

    /// Takes every outbound connection a step further.
    fn work_outbound(&mut self) {
        for mut outbound in std::mem::take(&mut self.outbound) {
            match outbound.step(&self.own) {
                Ok(Some((met, socket))) => self.connected(met, socket),
                Ok(None) => self.outbound.push(outbound),
                Err(Rejection::Stranger(why) | Rejection::Claim { why, .. }) => {
                    tracing::debug!(peer = outbound.peer.0, address = %outbound.address, "not connected: {why}");
                    self.trouble[outbound.peer.index()] = Some(why);
                    outbound.retry(Instant::now());
                    self.outbound.push(outbound);
                }
            }
        }
    }

    fn connected(&mut self, met: Met, socket: TcpStream) {
        let (lane, peer) = (usize::from(met.lane), met.peer.index());
        self.sessions[lane][peer] = Some(Session { socket, met });
        self.missing -= 1;
    }

    fn timed_out(&self) -> FabricError {
        let missing: Vec<String> = (0..self.own.identity.nodes)
            .map(NodeId)
            .filter(|peer| *peer != self.own.identity.node)
            .filter_map(|peer| {
                let absent = self.sessions.iter().filter(|lane| lane[peer.index()].is_none()).count();
                let seen = match &self.trouble[peer.index()] {
                    Some(why) => why.clone(),
                    None if peer > self.own.identity.node && absent == self.sessions.len() => {
                        "it has not connected to this node".to_owned()
                    }
                    None => format!("{absent} of {} lanes are missing", self.sessions.len()),
                };
                (absent > 0).then(|| format!("{peer} ({seen})"))
            })
            .collect();
        FabricError::Setup(format!(
            "after {:.1} s {} still misses {}; see that those nodes run and that their addresses can be \
             reached from here",
            self.timeout.as_secs_f64(),
            self.own.identity.node,
            missing.join(", ")
        ))
    }
}

impl Outbound {
    /// What can be done now without waiting; the connection when it is finished.
    fn step(&mut self, own: &Credentials) -> Result<Option<(Met, TcpStream)>, Rejection> {
        let stranger = Rejection::Stranger;
        match std::mem::replace(&mut self.state, State::Pausing(Instant::now())) {
            State::Pausing(until) => self.state = State::Pausing(until),
            State::Connecting(socket) => {
                if !is_writable(socket.as_fd()) {
                    self.state = State::Connecting(socket);
                    return Ok(None);
                }
                if let Some(error) = socket.take_error().unwrap_or_else(Some) {
                    return Err(stranger(format!("cannot connect to {}: {error}", self.address)));
                }
                tune(&socket).map_err(|error| stranger(format!("its connection failed ({error})")))?;
                let caller = Caller::new(&socket, own, self.peer, self.lane)?;
                self.state = State::Greeted(socket, caller);
            }
            State::Greeted(socket, caller) => {
                match caller.step(&socket, own, (self.peer, self.lane), || 0)? {
                    Step::Waits(caller) => self.state = State::Greeted(socket, caller),
                    Step::Met(met) if met.received != 0 => return Err(stranger(NOT_NEW.into())),
                    Step::Met(met) => return Ok(Some((*met, socket))),
                }
            }
        }
        Ok(None)
    }

    fn retry(&mut self, now: Instant) {
        self.state = State::Pausing(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

fn is_writable(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    matches!(nix::poll::poll(&mut fds, PollTimeout::ZERO), Ok(1))
}

fn too_many_files(error: Errno) -> FabricError {
    FabricError::Setup(format!(
        "this process may not open more files ({}): raise its limit with `ulimit -n`",
        error.desc()
    ))
}
