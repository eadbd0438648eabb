//! One lane from one peer: the receiving side, and what happens to both sides when the lane moves to another rail.
//!
//! ```text
//!          end of the connection, or its failure                a connection over any rail
//! up ─────────────────────────────────────────────────> down ──────────────────────────────────> up
//!  └── Link::suspend: the peer is there on another rail ──^      Link::resume: both know what the other has
//! ```
//!
//! With one rail the end of the connection is the loss of the peer.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv};

use super::frames::{FrameBuffer, HEADER};
use super::handshake::Met;
use super::link::{Link, broken};
use crate::FabricError;

/// A lane of several rails acknowledges at least every so many frames, and every so many bytes.
const ACKNOWLEDGE_FRAMES: u64 = 64;
const ACKNOWLEDGE_BYTES: u64 = 128 * 1024;

/// The receiving side.
pub(super) struct Incoming {
    /// The present connection; `None` while the lane moves to another rail.
    socket: Option<Arc<TcpStream>>,
    buffer: FrameBuffer,
    /// Frames received on the lane since its beginning.
    received: u64,
    /// How many of them, and how many bytes, are not acknowledged yet.
    unacknowledged: (u64, u64),
}

impl Incoming {
    pub(super) fn new(socket: Arc<TcpStream>, buffer: FrameBuffer) -> Incoming {
        Incoming { socket: Some(socket), buffer, received: 0, unacknowledged: (0, 0) }
    }
}

/// What one look for news found.
pub(super) enum Received {
    /// This many frames, and their bytes with headers.
    Frames(u64, u64),
    /// The connection is over, and the lane must move. Said once.
    Broken,
    /// The end: the peer is lost.
    End(FabricError),
}

impl Link {
    /// Starts to watch the connection.
    pub(super) fn register(&self, epoll: &Epoll) -> Result<(), Errno> {
        match &self.lock_incoming().socket {
            Some(socket) => epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, self.peer.0.into())),
            None => Ok(()),
        }
    }

    /// Receives what has arrived and gives whole frames to `sink`.
    pub(super) fn receive(&self, epoll: &Epoll, sink: &mut dyn FnMut(&[u8])) -> Received {
        let inn = &mut *self.lock_incoming();
        let Some(socket) = &inn.socket else {
            return match self.lock().lost.clone() {
                Some(why) => Received::End(self.loss(why)),
                None => Received::Frames(0, 0),
            };
        };
        match recv(socket.as_raw_fd(), inn.buffer.space(), MsgFlags::MSG_DONTWAIT) {
            Ok(0) => self.over(inn, epoll, "it closed the connection".to_owned()),
            Ok(n) => {
                inn.buffer.filled(n);
                self.deliver(inn, epoll, sink)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Received::Frames(0, 0),
            Err(error) => self.over(inn, epoll, broken(error)),
        }
    }

    fn deliver(&self, inn: &mut Incoming, epoll: &Epoll, sink: &mut dyn FnMut(&[u8])) -> Received {
        let (mut frames, mut bytes) = (0, 0);
        let Incoming { buffer, received, .. } = inn;
        let delivered = buffer.deliver(|frame| {
            frames += 1;
            bytes += (HEADER + frame.len()) as u64;
            *received += 1;
            sink(frame);
        });
        if let Err(bad) = delivered {
            return Received::End(self.end(bad.to_string()));
        }
        if buffer.acknowledges()
            && let Err(error) = self.account(inn, epoll, frames, bytes)
        {
            return Received::End(error);
        }
        Received::Frames(frames, bytes)
    }

    /// Takes the peer's acknowledgements, and acknowledges in turn when it is time.
    fn account(&self, inn: &mut Incoming, epoll: &Epoll, frames: u64, bytes: u64) -> Result<(), FabricError> {
        if let Some(count) = inn.buffer.take_acknowledged() {
            // The lock must be free again for the end.
            let sound =
                self.lock().retained.as_mut().is_none_or(|retained| retained.acknowledge(count).is_ok());
            if !sound {
                return Err(self.end(NEVER_SENT.to_owned()));
            }
        }
        let (more, much) = &mut inn.unacknowledged;
        (*more, *much) = (*more + frames, *much + bytes);
        if *more >= ACKNOWLEDGE_FRAMES || *much >= ACKNOWLEDGE_BYTES {
            inn.unacknowledged = (0, 0);
            self.acknowledge(epoll, inn.received);
        }
        Ok(())
    }

    /// The connection is over: the lane goes down if it can move, and else the peer is lost.
    fn over(&self, inn: &mut Incoming, epoll: &Epoll, why: String) -> Received {
        let partial = inn.buffer.has_partial_frame();
        let out = &mut *self.lock();
        if let Some(first) = out.lost.clone() {
            return Received::End(self.loss(first));
        }
        if out.retained.is_some() {
            inn.disconnect(epoll);
            out.drop_connection();
            self.not_behind();
            tracing::debug!(peer = self.peer.0, "a rail is gone: {why}");
            return Received::Broken;
        }
        let why = if partial { format!("{why} in the middle of a frame") } else { why };
        Received::End(self.lose(out, why))
    }

    /// The peer is lost, and nothing is to be watched any more.
    pub(super) fn forget(&self, epoll: &Epoll) {
        self.lock_incoming().disconnect(epoll);
    }

    /// Whether the lane has no connection, and the peer is not lost for that.
    pub(super) fn is_down(&self) -> bool {
        self.lock_incoming().socket.is_none() && self.lock().lost.is_none()
    }

    /// Receives and sends nothing more over the present connection; how many frames have been received by now.
    ///
    /// # Errors
    /// The peer is lost, or the lane cannot move.
    pub(super) fn suspend(&self, epoll: &Epoll) -> Result<u64, String> {
        let inn = &mut *self.lock_incoming();
        let out = &mut *self.lock();
        if let Some(why) = &out.lost {
            return Err(format!("it was lost before: {why}"));
        }
        inn.disconnect(epoll);
        out.drop_connection();
        self.not_behind();
        Ok(inn.received)
    }

    /// Goes on over a new connection with a peer that has told how much it has; [`Link::suspend`] came before.
    pub(super) fn resume(
        &self,
        epoll: &Epoll,
        socket: TcpStream,
        met: Met,
        plaintext: bool,
    ) -> Result<(), FabricError> {
        let inn = &mut *self.lock_incoming();
        let out = &mut *self.lock();
        if let Some(why) = &out.lost {
            return Err(self.loss(why.clone()));
        }
        let rewound = out.retained.as_mut().map(|retained| retained.rewind(met.received));
        if rewound != Some(Ok(())) {
            return Err(self.lose(out, NEVER_SENT.to_owned()));
        }
        let socket = Arc::new(socket);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.peer.0.into());
        if let Err(error) = epoll.add(&socket, event) {
            return Err(self.lose(out, format!("its connection cannot be watched: {}", error.desc())));
        }
        let (sealer, opener) = met.streams(plaintext);
        inn.buffer.restart(opener);
        inn.unacknowledged = (0, 0);
        inn.socket = Some(socket.clone());
        out.sealer = sealer;
        out.socket = Some(socket);
        self.pump(out, epoll)
    }
}

const NEVER_SENT: &str = "it says that it has frames which were never sent to it";

impl Incoming {
    fn disconnect(&mut self, epoll: &Epoll) {
        if let Some(socket) = self.socket.take()
            && let Err(error) = epoll.delete(&socket)
        {
            tracing::debug!(%error, "a lost connection was not watched");
        }
    }
}
