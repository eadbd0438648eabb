//! The link of one lane to one peer: the sending side with its backlog, and its end. The receiving side is in
//! `incoming`.
//!
//! ```text
//!             one rail                                       several rails
//! send ──> socket ── full ──> backlog        send ──> retained ──> socket ── full ──> backlog
//!                                                        └── again after the lane has moved
//! ```

pub(super) mod incoming;

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, sendmsg};

use super::connecting::Connection;
use super::frames::{ACKNOWLEDGES, FrameBuffer, HEADER, header};
use crate::resend::Retained;
use crate::secure::{Sealer, TAG};
use crate::transport::too_far_behind;
use crate::{FabricError, MAX_BACKLOG, NodeId};
use incoming::Incoming;

/// Parts of a frame that go to the kernel as they are; a frame of more parts is gathered first.
const MAX_PARTS: usize = 15;

/// A backlog that grew past this gives its memory back when it has been sent.
const KEPT_CAPACITY: usize = 1 << 20;

/// Frames are sealed and sent together until they are this many bytes: so much stays in the CPU's cache.
const SEALED_AT_ONCE: usize = 128 * 1024;

/// One lane to one peer. Threads send through it; the lane's receiver receives and flushes.
///
/// Ordering: where both locks are needed, `inn` is taken first.
pub(super) struct Link {
    pub(super) peer: NodeId,
    out: Mutex<Outgoing>,
    inn: Mutex<Incoming>,
    /// Whether the backlog holds bytes: lets the receiver look without the lock. Written under the lock.
    behind: AtomicBool,
}

#[derive(Default)]
pub(super) struct Outgoing {
    /// The present connection; `None` while the lane moves to another rail.
    pub(super) socket: Option<Arc<TcpStream>>,
    /// Seals frames, if they are to be sealed. Ordering: frames go to the socket, or to the backlog, in the
    /// order in which they were sealed.
    pub(super) sealer: Option<Sealer>,
    /// Where frames are sealed; kept so that no frame needs an allocation.
    sealed: Vec<u8>,
    /// What the socket did not take, oldest first, as it is to travel; it may begin in the middle of a frame.
    pub(super) backlog: VecDeque<u8>,
    /// What may have to be sent again; `None` with one rail.
    pub(super) retained: Option<Retained>,
    /// Why the peer is lost, once it is. Then the backlog is empty and the socket is shut down.
    pub(super) lost: Option<String>,
}

impl Outgoing {
    /// Appends the frame in `parts`, of `len` bytes together, to what is sealed, as it is to travel. The copy
    /// is the one that sealing in place needs; in the clear it costs about what the kernel takes to gather
    /// three parts a frame. `Err` is why the peer must be given up.
    fn seal(&mut self, header: [u8; HEADER], len: usize, parts: &[&[u8]]) -> Result<(), String> {
        self.sealed.reserve(HEADER + len + TAG);
        self.sealed.extend_from_slice(&header);
        let begin = self.sealed.len();
        parts.iter().for_each(|part| self.sealed.extend_from_slice(part));
        if let Some(sealer) = &mut self.sealer {
            let tag = sealer.seal(&header, &mut self.sealed[begin..]).map_err(|error| error.to_string())?;
            self.sealed.extend_from_slice(&tag);
        }
        Ok(())
    }

    /// Forgets the connection: what the peer did not get of it is retained, or the peer is lost.
    pub(super) fn drop_connection(&mut self) {
        if let Some(socket) = self.socket.take()
            && let Err(error) = socket.shutdown(Shutdown::Both)
            && error.kind() != ErrorKind::NotConnected
        {
            tracing::debug!(%error, "shutdown of a lost connection");
        }
        self.backlog = VecDeque::new();
        self.sealed.clear();
    }
}

impl Link {
    /// A lane over its first connection. Frames travel in the clear if `plaintext`, and are retained if it
    /// has `several_rails`.
    pub(super) fn new(peer: NodeId, connection: Connection, plaintext: bool, several_rails: bool) -> Link {
        let socket = Arc::new(connection.socket);
        let (sealer, opener) = connection.met.streams(plaintext);
        let out = Outgoing {
            socket: Some(socket.clone()),
            sealer,
            retained: several_rails.then(Retained::default),
            ..Outgoing::default()
        };
        let inn = Incoming::new(socket, FrameBuffer::new(opener, several_rails));
        Link { peer, out: Mutex::new(out), inn: Mutex::new(inn), behind: AtomicBool::new(false) }
    }

    /// Sends a frame of `len` bytes in `parts`, or what the socket takes of it, and keeps the rest.
    ///
    /// Ordering: the lock is held over the system call, so frames reach the socket in lock order, and once
    /// there is a backlog nothing passes it.
    pub(super) fn send(&self, epoll: &Epoll, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        let out = &mut *self.usable()?;
        if let Some(retained) = &mut out.retained {
            retained.push(len, parts);
            return self.pump(out, epoll);
        }
        if out.sealer.is_some() {
            out.seal(header(len), len, parts).map_err(|why| self.lose(out, why))?;
            return self.send_sealed(out, epoll);
        }
        let header = header(len);
        let sent = if out.backlog.is_empty() { self.try_frame(out, &header, len, parts) } else { Ok(0) };
        match sent {
            Ok(sent) if sent == HEADER + len => Ok(()),
            Ok(sent) => self.keep(out, epoll, sent, HEADER + len, &header, parts),
            Err(error) => Err(self.lose(out, broken(error))),
        }
    }

    /// Sends frames with as few system calls as [`SEALED_AT_ONCE`] allows, as [`Link::send`] would one after
    /// the other; how many bytes they made.
    pub(super) fn send_all(&self, epoll: &Epoll, frames: &[[&[u8]; 2]]) -> Result<usize, FabricError> {
        let out = &mut *self.usable()?;
        let (mut total, tag) = (0, if out.sealer.is_some() { TAG } else { 0 });
        for frame in frames {
            let len = frame[0].len() + frame[1].len();
            total += HEADER + len + tag;
            if let Some(retained) = &mut out.retained {
                retained.push(len, frame);
                continue;
            }
            out.seal(header(len), len, frame).map_err(|why| self.lose(out, why))?;
            if out.sealed.len() >= SEALED_AT_ONCE {
                self.send_sealed(out, epoll)?;
            }
        }
        if out.retained.is_some() {
            self.pump(out, epoll)?
        } else {
            self.send_sealed(out, epoll)?
        }
        Ok(total)
    }

    /// Gives the connection retained frames while it takes them.
    pub(super) fn pump(&self, out: &mut Outgoing, epoll: &Epoll) -> Result<(), FabricError> {
        if out.retained.as_ref().is_some_and(|retained| retained.len() > MAX_BACKLOG) {
            return Err(self.lose(out, too_far_behind()));
        }
        while out.socket.is_some() && out.backlog.is_empty() {
            // Out of its place while frames of it are sealed into its neighbour.
            let Some(mut retained) = out.retained.take() else { break };
            let mut sealed = Ok(());
            while out.sealed.len() < SEALED_AT_ONCE
                && sealed.is_ok()
                && let Some([front, back]) = retained.unsent()
            {
                let len = front.len() + back.len();
                sealed = out.seal(header(len), len, &[front, back]);
                retained.sent();
            }
            out.retained = Some(retained);
            sealed.map_err(|why| self.lose(out, why))?;
            if out.sealed.is_empty() {
                break;
            }
            self.send_sealed(out, epoll)?;
        }
        Ok(())
    }

    /// Tells the peer how many frames have been received. What cannot be sent now is not worth waiting for.
    pub(super) fn acknowledge(&self, epoll: &Epoll, received: u64) {
        let out = &mut *self.lock();
        if out.lost.is_some() || out.socket.is_none() {
            return;
        }
        let count = received.to_le_bytes();
        let header = (ACKNOWLEDGES | count.len() as u32).to_le_bytes();
        if let Err(why) = out.seal(header, count.len(), &[&count]) {
            self.lose(out, why);
            return;
        }
        // A failure shows at the next receive.
        let _ = self.send_sealed(out, epoll);
    }

    /// Sends what has been sealed, or what the socket takes of it, and keeps the rest.
    fn send_sealed(&self, out: &mut Outgoing, epoll: &Epoll) -> Result<(), FabricError> {
        let mut sealed = std::mem::take(&mut out.sealed);
        let sent = if out.backlog.is_empty() { try_send(out, &[IoSlice::new(&sealed)]) } else { Ok(0) };
        let kept = match sent {
            Ok(sent) if sent == sealed.len() => Ok(()),
            Ok(sent) => self.keep(out, epoll, sent, sealed.len(), &sealed, &[]),
            Err(error) => self.failed(out, error),
        };
        sealed.clear();
        out.sealed = sealed;
        kept
    }

    /// The connection failed: the lane moves if it can, and else the peer is lost. The receiver sees the end
    /// of the connection and does what is to be done.
    fn failed(&self, out: &mut Outgoing, error: Errno) -> Result<(), FabricError> {
        if out.retained.is_none() {
            return Err(self.lose(out, broken(error)));
        }
        out.drop_connection();
        self.behind.store(false, Relaxed);
        Ok(())
    }

    fn try_frame(&self, out: &Outgoing, header: &[u8], len: usize, parts: &[&[u8]]) -> Result<usize, Errno> {
        let mut slices = [IoSlice::new(header); MAX_PARTS + 1];
        if parts.len() > MAX_PARTS {
            let mut whole = Vec::with_capacity(len);
            parts.iter().for_each(|part| whole.extend_from_slice(part));
            return try_send(out, &[slices[0], IoSlice::new(&whole)]);
        }
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        try_send(out, &slices[..=parts.len()])
    }

    /// Appends a frame without its first `sent` bytes to the backlog.
    fn keep(
        &self,
        out: &mut Outgoing,
        epoll: &Epoll,
        sent: usize,
        total: usize,
        header: &[u8],
        parts: &[&[u8]],
    ) -> Result<(), FabricError> {
        if out.backlog.len() + total - sent > MAX_BACKLOG {
            return Err(self.lose(out, too_far_behind()));
        }
        let first = out.backlog.is_empty();
        let mut skip = sent;
        for part in std::iter::once(&header).chain(parts) {
            let skipped = skip.min(part.len());
            skip -= skipped;
            out.backlog.extend(&part[skipped..]);
        }
        if first {
            self.behind.store(true, Relaxed);
            // The receiver may be asleep: its descriptor must wake it when the socket has room again.
            self.watch(out, epoll, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT)?;
        }
        Ok(())
    }

    fn watch(&self, out: &mut Outgoing, epoll: &Epoll, flags: EpollFlags) -> Result<(), FabricError> {
        let Some(socket) = &out.socket else { return Ok(()) };
        let watched = epoll.modify(socket, &mut EpollEvent::new(flags, self.peer.0.into()));
        watched.map_err(|error| self.lose(out, format!("its connection cannot be watched: {}", error.desc())))
    }

    /// Whether there is a backlog to [`Link::flush`].
    pub(super) fn is_behind(&self) -> bool {
        self.behind.load(Relaxed)
    }

    /// Sends of the backlog what the socket takes. A failure shows at the next [`Link::receive`].
    pub(super) fn flush(&self, epoll: &Epoll) {
        let out = &mut *self.lock();
        if out.backlog.is_empty() {
            return;
        }
        let (front, back) = out.backlog.as_slices();
        match try_send(out, &[IoSlice::new(front), IoSlice::new(back)]) {
            Ok(sent) => drop(out.backlog.drain(..sent)),
            Err(error) => {
                let _ = self.failed(out, error);
                return;
            }
        }
        if out.backlog.is_empty() {
            if out.backlog.capacity() > KEPT_CAPACITY {
                out.backlog = VecDeque::new();
            }
            self.behind.store(false, Relaxed);
            if self.watch(out, epoll, EpollFlags::EPOLLIN).is_ok() {
                // Its failure, too, shows at the next receive.
                let _ = self.pump(out, epoll);
            }
        }
    }

    /// The present connection.
    pub(super) fn socket(&self) -> Option<Arc<TcpStream>> {
        self.lock().socket.clone()
    }

    /// `socket` is dead because of `why`, if it is still the present connection: the lane moves if it can, and
    /// else the peer is lost. The receiver sees the end of the connection and does what is to be done.
    pub(super) fn give_up_connection(&self, socket: &Arc<TcpStream>, why: String) {
        let out = &mut *self.lock();
        if !out.socket.as_ref().is_some_and(|present| Arc::ptr_eq(present, socket)) {
            return;
        }
        if out.retained.is_none() {
            self.lose(out, why);
        } else {
            tracing::debug!(peer = self.peer.0, "a rail is given up: {why}");
            out.drop_connection();
            self.not_behind();
        }
    }

    /// Ends the lane because of `why`, unless it was lost before for another reason; returns the error
    /// with the first reason.
    pub(super) fn end(&self, why: String) -> FabricError {
        let out = &mut *self.lock();
        match out.lost.clone() {
            Some(first) => self.loss(first),
            None => self.lose(out, why),
        }
    }

    /// Marks the peer as lost and shuts the socket down, which makes the receiver's descriptor readable: so
    /// a loss that a sender finds reaches the receiver as well.
    pub(super) fn lose(&self, out: &mut Outgoing, why: String) -> FabricError {
        out.drop_connection();
        out.retained = None;
        self.behind.store(false, Relaxed);
        out.lost = Some(why.clone());
        self.loss(why)
    }

    pub(super) fn loss(&self, why: String) -> FabricError {
        FabricError::PeerLost { peer: self.peer, why }
    }

    /// The sending side, unless the peer is lost.
    fn usable(&self) -> Result<MutexGuard<'_, Outgoing>, FabricError> {
        let out = self.lock();
        match &out.lost {
            Some(why) => Err(self.loss(why.clone())),
            None => Ok(out),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Outgoing> {
        // No code under the lock can panic half-way through a change.
        base::lock(&self.out)
    }

    pub(super) fn lock_incoming(&self) -> MutexGuard<'_, Incoming> {
        // A sink may panic under the lock; the frame that it got is counted by then.
        base::lock(&self.inn)
    }

    /// The sending side has no backlog any more, as its connection is gone.
    pub(super) fn not_behind(&self) {
        self.behind.store(false, Relaxed);
    }
}

/// What the socket takes of `slices` now; 0 when it is full.
fn try_send(out: &Outgoing, slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
    let Some(socket) = &out.socket else { return Err(Errno::EPIPE) };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<()>(socket.as_raw_fd(), slices, &[], flags, None) {
        Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(0),
        other => other,
    }
}

/// The reason of a loss for an error of the socket.
pub(super) fn broken(error: Errno) -> String {
    match error {
        Errno::ECONNRESET => "it reset the connection".to_owned(),
        Errno::EPIPE => "it closed the connection".to_owned(),
        Errno::ETIMEDOUT | Errno::EHOSTUNREACH | Errno::ENETUNREACH => {
            format!("its host does not answer ({})", error.desc())
        }
        other => format!("its connection failed ({})", other.desc()),
    }
}
