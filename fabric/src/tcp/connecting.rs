//! Connections that begin: inbound and outbound ones, on all rails, up to the end of their handshakes.
//!
//! ```text
//! inbound:  accepted ── handshake ──> Lanes::up
//! outbound: pause ──> connecting ──> hello sent ── handshake ──> Lanes::up
//!             ^────── any failure: Lanes::failed, tried again on the next rail ──┘
//! ```
//!
//! `mesh` works on them until every lane is up, `failover` from then on.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::handshake::{Credentials, Initiator, Met, Responder, Step};
use super::hello::Rejection;
use super::sockets::{begin_connect, tune};
use crate::{FabricError, LaneId, NodeId};

/// How long a connection may take to say who it is, and to prove it.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Connections that have not proven who they are, beyond those that are expected; the oldest has to go first.
const STRANGERS: usize = 64;

/// What a peer does not acknowledge for so long, it does not get over this rail, where there are several.
const RAIL_SILENCE: Duration = Duration::from_millis(1000);

/// Pause before a failed connection is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How long one rail may take to connect where there is another one to try.
const CONNECT_TIME: Duration = Duration::from_millis(600);

/// How long a peer may then take to answer, if it is known to be in its mesh. Its host may be busy.
const ANSWER_TIME: Duration = Duration::from_millis(1500);

/// The lanes that connections are for.
pub(super) trait Lanes {
    /// The peer is there on the lane: how many of its frames have been received. Nothing more is received
    /// over an earlier connection from now on.
    ///
    /// # Errors
    /// It may not have the lane; the end of a sentence.
    fn received(&mut self, peer: NodeId, lane: LaneId) -> Result<u64, String>;

    /// A connection is ready for frames.
    fn up(&mut self, connection: Connection);

    /// A connection to `peer`, or one that claims to be from it, came to nothing.
    fn failed(&mut self, peer: NodeId, lane: Option<LaneId>, why: &str, refused: bool);
}

/// A connection that is ready for frames.
pub(super) struct Connection {
    pub(super) met: Met,
    pub(super) socket: TcpStream,
    pub(super) rail: usize,
}

/// An accepted connection whose handshake is not finished.
struct Inbound {
    socket: TcpStream,
    address: SocketAddr,
    rail: usize,
    state: Responder,
    until: Instant,
}

/// A connection that this node has to make.
struct Outbound {
    peer: NodeId,
    lane: LaneId,
    rail: usize,
    /// Not tried again if it fails.
    once: bool,
    pause: Duration,
    /// The end of this attempt.
    until: Option<Instant>,
    state: DialState,
}

enum DialState {
    Pausing(Instant),
    Connecting(TcpStream),
    Greeted(TcpStream, Initiator),
}

/// All connections that begin.
pub(super) struct Connecting {
    /// By rail.
    listeners: Vec<TcpListener>,
    pub(super) own: Credentials,
    /// By node and rail.
    addresses: Vec<Vec<SocketAddr>>,
    /// How many connections are expected to come.
    pub(super) expected: usize,
    /// Whether a peer that is connected may take its time with the handshake: it may not have come to its
    /// mesh yet, while its listening socket takes the connection already.
    pub(super) patient: bool,
    /// How long a connection may get no acknowledgement.
    pub(super) silence: Duration,
    inbound: Vec<Inbound>,
    outbound: Vec<Outbound>,
}

impl Connecting {
    pub(super) fn new(
        listeners: Vec<TcpListener>,
        own: Credentials,
        addresses: Vec<Vec<SocketAddr>>,
        silence: Duration,
    ) -> Connecting {
        // With several rails a dead one must show before the peer is taken for lost.
        let silence = if listeners.len() > 1 { silence.min(RAIL_SILENCE) } else { silence };
        let (inbound, outbound) = (Vec::new(), Vec::new());
        Connecting { listeners, own, addresses, expected: 0, patient: true, silence, inbound, outbound }
    }

    /// How many rails there are.
    pub(super) fn rails(&self) -> usize {
        self.listeners.len()
    }

    /// Connects to `peer` on `lane`, first over `rail`: until it succeeds over any, or `once`.
    pub(super) fn dial(&mut self, peer: NodeId, lane: LaneId, rail: usize, once: bool) {
        let state = DialState::Pausing(Instant::now());
        let rail = rail % self.rails();
        self.outbound.push(Outbound { peer, lane, rail, once, pause: FIRST_PAUSE, until: None, state });
    }

    /// Whether a connection to `peer` on `lane` is being made.
    pub(super) fn is_dialling(&self, peer: NodeId, lane: LaneId) -> bool {
        self.outbound.iter().any(|outbound| (outbound.peer, outbound.lane) == (peer, lane))
    }

    /// Does not connect to `peer` on `lane` any more.
    pub(super) fn hang_up(&mut self, peer: NodeId, lane: LaneId) {
        self.outbound.retain(|outbound| (outbound.peer, outbound.lane) != (peer, lane));
    }

    /// Sleeps until something can be done, at most until `until`, and does it.
    ///
    /// # Errors
    /// No descriptor is left, or the system fails otherwise.
    pub(super) fn turn(
        &mut self,
        until: Instant,
        also: Option<BorrowedFd<'_>>,
        lanes: &mut dyn Lanes,
    ) -> Result<(), FabricError> {
        let now = Instant::now();
        self.begin_due(now, lanes)?;
        self.wait(now, until, also)?;
        for rail in 0..self.listeners.len() {
            self.accept(rail)?;
        }
        self.work_inbound(lanes);
        self.work_outbound(lanes);
        Ok(())
    }

    /// Begins the connections whose pause is over.
    fn begin_due(&mut self, now: Instant, lanes: &mut dyn Lanes) -> Result<(), FabricError> {
        let several = self.rails() > 1;
        let mut failed = Vec::new();
        for (at, outbound) in self.outbound.iter_mut().enumerate() {
            if !matches!(outbound.state, DialState::Pausing(until) if until <= now) {
                continue;
            }
            match begin_connect(self.addresses[outbound.peer.index()][outbound.rail]) {
                Ok(socket) => {
                    outbound.state = DialState::Connecting(socket);
                    outbound.until = several.then(|| now + CONNECT_TIME);
                }
                Err(error @ (Errno::EMFILE | Errno::ENFILE)) => return Err(too_many_files(error)),
                Err(error) => failed.push((at, format!("cannot connect: {}", error.desc()))),
            }
        }
        for (at, why) in failed.into_iter().rev() {
            let outbound = self.outbound.remove(at);
            self.failed(outbound, &why, false, lanes);
        }
        Ok(())
    }

    /// Sleeps until a socket is ready or the nearest time has come.
    fn wait(&self, now: Instant, until: Instant, also: Option<BorrowedFd<'_>>) -> Result<(), FabricError> {
        let mut until = until;
        let mut fds: Vec<PollFd<'_>> =
            self.listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)).collect();
        fds.extend(also.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        for inbound in &self.inbound {
            until = until.min(inbound.until);
            fds.push(PollFd::new(inbound.socket.as_fd(), PollFlags::POLLIN));
        }
        for outbound in &self.outbound {
            until = outbound.until.map_or(until, |end| until.min(end));
            match &outbound.state {
                DialState::Pausing(at) => until = until.min(*at),
                DialState::Connecting(socket) => fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLOUT)),
                DialState::Greeted(socket, _) => fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
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
    fn accept(&mut self, rail: usize) -> Result<(), FabricError> {
        loop {
            match self.listeners[rail].accept() {
                Ok((socket, address)) => {
                    let silence = self.silence;
                    if let Err(error) = socket.set_nonblocking(true).and_then(|()| tune(&socket, silence)) {
                        tracing::warn!(%address, %error, "connection closed: it cannot be set up");
                        continue;
                    }
                    if self.inbound.len() >= self.expected + STRANGERS {
                        let oldest = self.inbound.remove(0);
                        tracing::warn!(address = %oldest.address, "connection closed: too many say nothing");
                    }
                    let until = Instant::now() + HELLO_TIME;
                    self.inbound.push(Inbound { socket, address, rail, state: Responder::new(), until });
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
    fn work_inbound(&mut self, lanes: &mut dyn Lanes) {
        for mut inbound in std::mem::take(&mut self.inbound) {
            let received = |peer, lane| lanes.received(peer, lane);
            let why = match inbound.state.step(&inbound.socket, &self.own, received) {
                Ok(None) if Instant::now() < inbound.until => {
                    self.inbound.push(inbound);
                    continue;
                }
                Ok(None) => "it did not say in time who it is".into(),
                Ok(Some(met)) => {
                    let Inbound { socket, rail, .. } = inbound;
                    lanes.up(Connection { met, socket, rail });
                    continue;
                }
                Err(Rejection::Stranger(why)) => why,
                Err(Rejection::Claim { from, why }) => {
                    lanes.failed(from, None, &why, false);
                    why
                }
            };
            tracing::warn!(address = %inbound.address, "connection closed: {why}");
        }
    }

    /// Takes every outbound connection a step further.
    fn work_outbound(&mut self, lanes: &mut dyn Lanes) {
        for mut outbound in std::mem::take(&mut self.outbound) {
            let late = outbound.until.is_some_and(|until| Instant::now() >= until);
            let mut refused = false;
            match outbound.step(&self.own, self.patient, self.silence, &mut refused, lanes) {
                Ok(Some((met, socket))) => lanes.up(Connection { met, socket, rail: outbound.rail }),
                Ok(None) if late => self.failed(outbound, "it does not answer", false, lanes),
                Ok(None) => self.outbound.push(outbound),
                Err(Rejection::Stranger(why) | Rejection::Claim { why, .. }) => {
                    self.failed(outbound, &why, refused, lanes);
                }
            }
        }
    }

    /// An attempt came to nothing: on with the next rail.
    fn failed(&mut self, mut outbound: Outbound, why: &str, refused: bool, lanes: &mut dyn Lanes) {
        let address = self.addresses[outbound.peer.index()][outbound.rail];
        tracing::debug!(peer = outbound.peer.0, %address, "not connected: {why}");
        let (peer, lane) = (outbound.peer, outbound.lane);
        if !outbound.once {
            outbound.rail = (outbound.rail + 1) % self.rails();
            outbound.until = None;
            outbound.state = DialState::Pausing(Instant::now() + outbound.pause);
            outbound.pause = (outbound.pause * 2).min(LONGEST_PAUSE);
            self.outbound.push(outbound);
        }
        lanes.failed(peer, Some(lane), &format!("{why} ({address})"), refused);
    }
}

impl Outbound {
    /// What can be done now without waiting; the connection when it is finished.
    fn step(
        &mut self,
        own: &Credentials,
        patient: bool,
        silence: Duration,
        refused: &mut bool,
        lanes: &mut dyn Lanes,
    ) -> Result<Option<(Met, TcpStream)>, Rejection> {
        let stranger = Rejection::Stranger;
        match std::mem::replace(&mut self.state, DialState::Pausing(Instant::now())) {
            DialState::Pausing(until) => self.state = DialState::Pausing(until),
            DialState::Connecting(socket) => {
                if !is_writable(socket.as_fd()) {
                    self.state = DialState::Connecting(socket);
                    return Ok(None);
                }
                if let Some(error) = socket.take_error().unwrap_or_else(Some) {
                    *refused = error.kind() == ErrorKind::ConnectionRefused;
                    return Err(stranger(format!("cannot connect: {error}")));
                }
                tune(&socket, silence)
                    .map_err(|error| stranger(format!("its connection failed ({error})")))?;
                let initiator = Initiator::new(&socket, own, self.peer, self.lane)?;
                self.state = DialState::Greeted(socket, initiator);
                self.until = (!patient).then(|| Instant::now() + ANSWER_TIME);
            }
            DialState::Greeted(socket, initiator) => {
                let received = |peer, lane| lanes.received(peer, lane);
                match initiator.step(&socket, own, (self.peer, self.lane), received)? {
                    Step::Waits(initiator) => self.state = DialState::Greeted(socket, initiator),
                    Step::Met(met) => return Ok(Some((*met, socket))),
                }
            }
        }
        Ok(None)
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
