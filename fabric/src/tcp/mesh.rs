//! Builds the mesh: one thread, nonblocking sockets, one deadline for everything.
//!
//! ```text
//! inbound:  accepted ── 128 bytes ──> checked ──> answered ──> slot
//! outbound: pause ──> connecting ──> hello sent ── 128 bytes ──> checked ──> slot
//!             ^────── any failure: noted for the peer, tried again ──┘
//! ```

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::hello::{GREETING, Greeting, Identity, Kind, Rejection, may_begin};
use super::listener::{begin_connect, tune};
use crate::{FabricError, LaneId, NodeId};

/// How long a connection may take to say hello.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections that have not said hello yet, beyond those that are expected; the oldest has to go first.
const STRANGERS: usize = 64;

/// Pause before a failed connection is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A mesh that is being built.
pub(super) struct Mesh {
    listener: TcpListener,
    identity: Identity,
    deadline: Instant,
    timeout: Duration,
    /// Finished connections, by lane and node.
    sockets: Vec<Vec<Option<TcpStream>>>,
    /// How many are missing in `sockets`.
    missing: usize,
    inbound: Vec<Inbound>,
    outbound: Vec<Outbound>,
    /// What went wrong last with each node, for the operator.
    trouble: Vec<Option<String>>,
}

/// An accepted connection that has not said hello yet.
struct Inbound {
    socket: TcpStream,
    address: SocketAddr,
    greeting: PartialGreeting,
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
    Greeted(TcpStream, PartialGreeting),
}

/// A greeting of which some bytes have arrived.
struct PartialGreeting {
    bytes: [u8; GREETING],
    have: usize,
}

impl PartialGreeting {
    fn new() -> PartialGreeting {
        PartialGreeting { bytes: [0; GREETING], have: 0 }
    }

    /// Reads what has arrived, never beyond the greeting, because frames follow. `Ok(None)`: not all yet.
    fn read(&mut self, mut socket: &TcpStream) -> Result<Option<Greeting>, String> {
        while self.have < GREETING {
            match socket.read(&mut self.bytes[self.have..]) {
                Ok(0) => return Err("it closed the connection before the end of its greeting".into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("its connection failed ({error})")),
            }
        }
        if self.have < GREETING {
            return if may_begin(&self.bytes[..self.have]) {
                Ok(None)
            } else {
                Err("it does not speak the fabric's protocol".into())
            };
        }
        Greeting::decode(&self.bytes).map(Some)
    }
}

/// Sends a greeting on a connection that has sent nothing else, so that it fits.
fn greet(mut socket: &TcpStream, greeting: &Greeting) -> Result<(), String> {
    match socket.write(&greeting.encode()) {
        Ok(GREETING) => Ok(()),
        Ok(_) => Err("its connection takes no greeting".into()),
        Err(error) => Err(format!("its connection failed ({error})")),
    }
}

impl Mesh {
    pub(super) fn new(
        listener: TcpListener,
        identity: Identity,
        addresses: Vec<SocketAddr>,
        timeout: Duration,
    ) -> Mesh {
        let now = Instant::now();
        let lanes = usize::from(identity.lanes);
        let lower = addresses.iter().zip(0..identity.node.0);
        let outbound = lower
            .flat_map(|(address, peer)| (0..identity.lanes).map(move |lane| (*address, peer, lane)))
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
            sockets: (0..lanes).map(|_| addresses.iter().map(|_| None).collect()).collect(),
            missing: lanes * (addresses.len() - 1),
            inbound: Vec::new(),
            outbound,
            trouble: addresses.iter().map(|_| None).collect(),
            identity,
        }
    }

    /// Runs until every connection is there: `[lane][node]`.
    pub(super) fn run(mut self) -> Result<Vec<Vec<Option<TcpStream>>>, FabricError> {
        while self.missing > 0 {
            let now = Instant::now();
            if now >= self.deadline {
                return Err(self.timed_out());
            }
            self.begin_due(now)?;
            self.wait(now)?;
            self.accept()?;
            self.work_inbound()?;
            self.work_outbound()?;
        }
        Ok(self.sockets)
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
                    if let Err(error) = socket.set_nonblocking(true) {
                        tracing::warn!(%address, %error, "connection closed: it cannot be made nonblocking");
                        continue;
                    }
                    if self.inbound.len() >= self.missing + STRANGERS {
                        let oldest = self.inbound.remove(0);
                        tracing::warn!(address = %oldest.address, "connection closed: too many say nothing");
                    }
                    let until = Instant::now() + HELLO_TIME;
                    let greeting = PartialGreeting::new();
                    self.inbound.push(Inbound { socket, address, greeting, until });
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

    /// Reads hellos, and answers those that are whole.
    fn work_inbound(&mut self) -> Result<(), FabricError> {
        for mut inbound in std::mem::take(&mut self.inbound) {
            let outcome = match inbound.greeting.read(&inbound.socket) {
                Ok(None) if Instant::now() < inbound.until => {
                    self.inbound.push(inbound);
                    continue;
                }
                Ok(None) => Err(Rejection::Stranger("it said no hello in time".into())),
                Ok(Some(hello)) => self.admit(&inbound.socket, &hello),
                Err(why) => Err(Rejection::Stranger(why)),
            };
            match outcome {
                Ok((peer, lane)) => self.connected(peer, lane, inbound.socket)?,
                Err(Rejection::Stranger(why)) => {
                    tracing::warn!(address = %inbound.address, "connection closed: {why}");
                }
                Err(Rejection::Version(why)) => return Err(FabricError::Setup(why)),
            }
        }
        Ok(())
    }

    /// Checks a hello and answers it.
    fn admit(&self, socket: &TcpStream, hello: &Greeting) -> Result<(NodeId, LaneId), Rejection> {
        let checked = self.identity.check_hello(hello);
        if let Err(Rejection::Version(why)) = &checked {
            let refusal = self.identity.greeting(Kind::Refuse, hello.from, hello.lane);
            if let Err(error) = greet(socket, &refusal) {
                tracing::warn!("{why}; it was not told so: {error}");
            }
        }
        let (peer, lane) = checked?;
        if self.sockets[usize::from(lane)][peer.index()].is_some() {
            return Err(Rejection::Stranger(format!("{peer} is connected on lane {lane} already")));
        }
        greet(socket, &self.identity.greeting(Kind::Accept, peer, lane)).map_err(Rejection::Stranger)?;
        Ok((peer, lane))
    }

    /// Takes every outbound connection a step further.
    fn work_outbound(&mut self) -> Result<(), FabricError> {
        for mut outbound in std::mem::take(&mut self.outbound) {
            match outbound.step(&self.identity) {
                Ok(Some(socket)) => self.connected(outbound.peer, outbound.lane, socket)?,
                Ok(None) => self.outbound.push(outbound),
                Err(Rejection::Version(why)) => return Err(FabricError::Setup(why)),
                Err(Rejection::Stranger(why)) => {
                    tracing::debug!(peer = outbound.peer.0, address = %outbound.address, "not connected: {why}");
                    self.trouble[outbound.peer.index()] = Some(why);
                    outbound.retry(Instant::now());
                    self.outbound.push(outbound);
                }
            }
        }
        Ok(())
    }

    fn connected(&mut self, peer: NodeId, lane: LaneId, socket: TcpStream) -> Result<(), FabricError> {
        tune(&socket).map_err(|source| FabricError::Io { what: "setting up a peer's connection", source })?;
        self.sockets[usize::from(lane)][peer.index()] = Some(socket);
        self.missing -= 1;
        Ok(())
    }

    fn timed_out(&self) -> FabricError {
        let missing: Vec<String> = (0..self.identity.nodes)
            .map(NodeId)
            .filter(|peer| *peer != self.identity.node)
            .filter_map(|peer| {
                let absent = self.sockets.iter().filter(|lane| lane[peer.index()].is_none()).count();
                let seen = match &self.trouble[peer.index()] {
                    Some(why) => why.clone(),
                    None if peer > self.identity.node && absent == self.sockets.len() => {
                        "it has not connected to this node".to_owned()
                    }
                    None => format!("{absent} of {} lanes are missing", self.sockets.len()),
                };
                (absent > 0).then(|| format!("{peer} ({seen})"))
            })
            .collect();
        FabricError::Setup(format!(
            "after {:.1} s {} still misses {}; see that those nodes run and that their addresses can be \
             reached from here",
            self.timeout.as_secs_f64(),
            self.identity.node,
            missing.join(", ")
        ))
    }
}

impl Outbound {
    /// What can be done now without waiting; a socket when it is finished.
    fn step(&mut self, identity: &Identity) -> Result<Option<TcpStream>, Rejection> {
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
                greet(&socket, &identity.greeting(Kind::Hello, self.peer, self.lane)).map_err(stranger)?;
                self.state = State::Greeted(socket, PartialGreeting::new());
            }
            State::Greeted(socket, mut greeting) => {
                let Some(answer) = greeting.read(&socket).map_err(stranger)? else {
                    self.state = State::Greeted(socket, greeting);
                    return Ok(None);
                };
                identity.check_answer(&answer, self.peer, self.lane)?;
                return Ok(Some(socket));
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
