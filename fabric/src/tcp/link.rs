//! One connection: the sending side with its backlog, and how it ends.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv, sendmsg};

use super::frames::{HEADER, header};
use crate::secure::{Sealer, TAG};
use crate::{FabricError, MAX_BACKLOG, NodeId};

/// Parts of a frame that go to the kernel as they are; a frame of more parts is gathered first.
const MAX_PARTS: usize = 15;

/// A backlog that grew past this gives its memory back when it has been sent.
const KEPT_CAPACITY: usize = 1 << 20;

/// Frames are sealed and sent together until they are this many bytes: so much stays in the CPU's cache.
const SEALED_AT_ONCE: usize = 128 * 1024;

/// One connection to one peer. Threads send through it; the lane's receiver receives and flushes.
pub(super) struct Link {
    peer: NodeId,
    socket: TcpStream,
    out: Mutex<Outgoing>,
    /// Whether the backlog holds bytes: lets the receiver look without the lock. Written under the lock.
    behind: AtomicBool,
}

#[derive(Default)]
struct Outgoing {
    /// Seals frames, if they are to be sealed. Ordering: frames go to the socket, or to the backlog, in the order in
    /// which they were sealed.
    sealer: Option<Sealer>,
    /// Where frames are sealed; kept so that no frame needs an allocation.
    sealed: Vec<u8>,
    /// What the socket did not take, oldest first, as it is to travel; it may begin in the middle of a frame.
    backlog: VecDeque<u8>,
    /// Why the peer is lost, once it is. Then the backlog is empty and the socket is shut down.
    lost: Option<String>,
}

impl Outgoing {
    /// Appends the frame in `parts`, of `len` bytes together, to what is sealed. The copy is the one that sealing in
    /// place needs. `Err` is why the peer must be given up.
    fn seal(&mut self, len: usize, parts: &[&[u8]]) -> Result<(), String> {
        let Some(sealer) = &mut self.sealer else { return Ok(()) };
        let header = header(len);
        self.sealed.reserve(HEADER + len + TAG);
        self.sealed.extend_from_slice(&header);
        let begin = self.sealed.len();
        parts.iter().for_each(|part| self.sealed.extend_from_slice(part));
        let tag = sealer.seal(&header, &mut self.sealed[begin..]).map_err(|error| error.to_string())?;
        self.sealed.extend_from_slice(&tag);
        Ok(())
    }
}

/// What one receive call found.
pub(super) enum Received {
    /// This many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The end: the peer is lost.
    End(FabricError),
}

impl Link {
    /// Frames travel in the clear without a `sealer`.
    pub(super) fn new(peer: NodeId, socket: TcpStream, sealer: Option<Sealer>) -> Link {
        let out = Mutex::new(Outgoing { sealer, ..Outgoing::default() });
        Link { peer, socket, out, behind: AtomicBool::new(false) }
    }

    pub(super) fn peer(&self) -> NodeId {
        self.peer
    }

    /// Sends a frame of `len` bytes in `parts`, or what the socket takes of it, and keeps the rest.
    ///
    /// Ordering: the lock is held over the system call, so frames reach the socket in lock order, and once
    /// there is a backlog nothing passes it.
    pub(super) fn send(&self, epoll: &Epoll, len: usize, parts: &[&[u8]]) -> Result<(), FabricError> {
        let mut out = self.lock();
        if let Some(why) = &out.lost {
            return Err(self.loss(why.clone()));
        }
        if out.sealer.is_some() {
            out.seal(len, parts).map_err(|why| self.lose(&mut out, why))?;
            return self.send_sealed(&mut out, epoll);
        }
        let header = header(len);
        let sent = if out.backlog.is_empty() { self.try_frame(&header, len, parts) } else { Ok(0) };
        match sent {
            Ok(sent) if sent == HEADER + len => Ok(()),
            Ok(sent) => self.keep(&mut out, epoll, sent, HEADER + len, &header, parts),
            Err(error) => Err(self.lose(&mut out, broken(error))),
        }
    }

    /// Sends frames with one system call, as [`Link::send`] would one after the other; how many bytes they made.
    pub(super) fn send_all(&self, epoll: &Epoll, frames: &[[&[u8]; 2]]) -> Result<usize, FabricError> {
        let mut out = self.lock();
        if let Some(why) = &out.lost {
            return Err(self.loss(why.clone()));
        }
        if out.sealer.is_none() {
            return self.send_all_plain(&mut out, epoll, frames);
        }
        let mut total = 0;
        for frame in frames {
            let len = frame[0].len() + frame[1].len();
            out.seal(len, frame).map_err(|why| self.lose(&mut out, why))?;
            total += HEADER + len + TAG;
            if out.sealed.len() >= SEALED_AT_ONCE {
                self.send_sealed(&mut out, epoll)?;
            }
        }
        self.send_sealed(&mut out, epoll)?;
        Ok(total)
    }

    fn send_all_plain(
        &self,
        out: &mut Outgoing,
        epoll: &Epoll,
        frames: &[[&[u8]; 2]],
    ) -> Result<usize, FabricError> {
        let headers: Vec<[u8; HEADER]> =
            frames.iter().map(|[first, second]| header(first.len() + second.len())).collect();
        let frames = headers.iter().zip(frames);
        let parts: Vec<&[u8]> =
            frames.flat_map(|(header, [first, second])| [header, *first, *second]).collect();
        let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let total = parts.iter().map(|part| part.len()).sum();
        let sent = if out.backlog.is_empty() { self.try_send(&slices) } else { Ok(0) };
        match sent {
            Ok(sent) if sent == total => {}
            Ok(sent) => self.keep(out, epoll, sent, total, &[], &parts)?,
            Err(error) => return Err(self.lose(out, broken(error))),
        }
        Ok(total)
    }

    /// Sends what has been sealed, or what the socket takes of it, and keeps the rest.
    fn send_sealed(&self, out: &mut Outgoing, epoll: &Epoll) -> Result<(), FabricError> {
        let mut sealed = std::mem::take(&mut out.sealed);
        let sent = if out.backlog.is_empty() { self.try_send(&[IoSlice::new(&sealed)]) } else { Ok(0) };
        let kept = match sent {
            Ok(sent) if sent == sealed.len() => Ok(()),
            Ok(sent) => self.keep(out, epoll, sent, sealed.len(), &sealed, &[]),
            Err(error) => Err(self.lose(out, broken(error))),
        };
        sealed.clear();
        out.sealed = sealed;
        kept
    }

    fn try_frame(&self, header: &[u8], len: usize, parts: &[&[u8]]) -> Result<usize, Errno> {
        let mut slices = [IoSlice::new(header); MAX_PARTS + 1];
        if parts.len() > MAX_PARTS {
            let mut whole = Vec::with_capacity(len);
            parts.iter().for_each(|part| whole.extend_from_slice(part));
            return self.try_send(&[slices[0], IoSlice::new(&whole)]);
        }
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        self.try_send(&slices[..=parts.len()])
    }

    /// What the socket takes of `slices` now; 0 when it is full.
    fn try_send(&self, slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(self.socket.as_raw_fd(), slices, &[], flags, None) {
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(0),
            other => other,
        }
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
            let why = format!("it is more than {} MiB behind with what was sent to it", MAX_BACKLOG >> 20);
            return Err(self.lose(out, why));
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
            self.watch(epoll, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT).map_err(|error| {
                self.lose(out, format!("its connection cannot be watched: {}", error.desc()))
            })?;
        }
        Ok(())
    }

    fn watch(&self, epoll: &Epoll, flags: EpollFlags) -> Result<(), Errno> {
        epoll.modify(&self.socket, &mut EpollEvent::new(flags, self.peer.0.into()))
    }

    /// Whether there is a backlog to [`Link::flush`].
    pub(super) fn is_behind(&self) -> bool {
        self.behind.load(Relaxed)
    }

    /// Sends of the backlog what the socket takes. A failure shows at the next [`Link::receive`].
    pub(super) fn flush(&self, epoll: &Epoll) {
        let mut out = self.lock();
        if out.backlog.is_empty() {
            return;
        }
        let (front, back) = out.backlog.as_slices();
        match self.try_send(&[IoSlice::new(front), IoSlice::new(back)]) {
            Ok(sent) => drop(out.backlog.drain(..sent)),
            Err(error) => {
                self.lose(&mut out, broken(error));
                return;
            }
        }
        if out.backlog.is_empty() {
            if out.backlog.capacity() > KEPT_CAPACITY {
                out.backlog = VecDeque::new();
            }
            self.behind.store(false, Relaxed);
            if let Err(error) = self.watch(epoll, EpollFlags::EPOLLIN) {
                self.lose(&mut out, format!("its connection cannot be watched: {}", error.desc()));
            }
        }
    }

    /// Receives into `space`, which is not empty, what has arrived.
    pub(super) fn receive(&self, space: &mut [u8]) -> Received {
        match recv(self.socket.as_raw_fd(), space, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => Received::End(self.end("it closed the connection".to_owned())),
            Ok(n) => Received::Bytes(n),
            Err(Errno::EAGAIN | Errno::EINTR) => Received::Nothing,
            Err(error) => Received::End(self.end(broken(error))),
        }
    }

    /// Ends the connection because of `why`, unless it was lost before for another reason; returns the error
    /// with the first reason.
    pub(super) fn end(&self, why: String) -> FabricError {
        let mut out = self.lock();
        match out.lost.clone() {
            Some(first) => self.loss(first),
            None => self.lose(&mut out, why),
        }
    }

    /// Marks the peer as lost and shuts the socket down, which makes the receiver's descriptor readable: so
    /// a loss that a sender finds reaches the receiver as well.
    fn lose(&self, out: &mut Outgoing, why: String) -> FabricError {
        out.backlog = VecDeque::new();
        self.behind.store(false, Relaxed);
        out.lost = Some(why.clone());
        if let Err(error) = self.socket.shutdown(Shutdown::Both)
            && error.kind() != ErrorKind::NotConnected
        {
            tracing::debug!(peer = self.peer.0, %error, "shutdown of a lost connection");
        }
        self.loss(why)
    }

    fn loss(&self, why: String) -> FabricError {
        FabricError::PeerLost { peer: self.peer, why }
    }

    fn lock(&self) -> MutexGuard<'_, Outgoing> {
        // No code under the lock can panic half-way through a change, so a poisoned lock is a sound one.
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The reason of a loss for an error of the socket.
fn broken(error: Errno) -> String {
    match error {
        Errno::ECONNRESET => "it reset the connection".to_owned(),
        Errno::EPIPE => "it closed the connection".to_owned(),
        Errno::ETIMEDOUT | Errno::EHOSTUNREACH | Errno::ENETUNREACH => {
            format!("its host does not answer ({})", error.desc())
        }
        other => format!("its connection failed ({})", other.desc()),
    }
}
