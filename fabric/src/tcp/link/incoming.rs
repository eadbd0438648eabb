//! The receiving side of a link, and the moves of both sides to another rail.
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

use super::super::connecting::Connection;
use super::super::frames::{FrameBuffer, HEADER};
use super::{Link, broken};
use crate::FabricError;
use crate::resend::{NeverSent, Unacknowledged};

/// The receiving side.
pub(in super::super) struct Incoming {
    /// The present connection; `None` while the lane moves to another rail.
    socket: Option<Arc<TcpStream>>,
    buffer: FrameBuffer,
    /// Frames received on the lane since its beginning.
    received: u64,
    unacknowledged: Unacknowledged,
}

impl Incoming {
    pub(in super::super) fn new(socket: Arc<TcpStream>, buffer: FrameBuffer) -> Incoming {
        Incoming { socket: Some(socket), buffer, received: 0, unacknowledged: Unacknowledged::default() }
    }
}

/// The result of one attempt to receive.
pub(in super::super) enum Received {
    /// This many frames, and their bytes with headers.
    Frames(u64, u64),
    /// The connection is over, and the lane must move. Said once.
    Broken,
    /// The end: the peer is lost.
    End(FabricError),
}

impl Link {
    /// Starts to watch the connection.
    pub(in super::super) fn register(&self, epoll: &Epoll) -> Result<(), Errno> {
        match &self.lock_incoming().socket {
            Some(socket) => epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, self.peer.0.into())),
            None => Ok(()),
        }
    }

    /// Receives what has arrived and gives whole frames to `sink`.
    pub(in super::super) fn receive(&self, epoll: &Epoll, sink: &mut dyn FnMut(&[u8])) -> Received {
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
            let taken = self.lock().retained.as_mut().map_or(Ok(()), |retained| retained.acknowledge(count));
            if let Err(never_sent) = taken {
                return Err(self.end(never_sent.to_string()));
            }
        }
        if inn.unacknowledged.add(frames, bytes) {
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
    pub(in super::super) fn forget(&self, epoll: &Epoll) {
        self.lock_incoming().disconnect(epoll);
    }

    /// Whether the lane has no connection, and the peer is not lost for that.
    pub(in super::super) fn is_down(&self) -> bool {
        self.lock_incoming().socket.is_none() && self.lock().lost.is_none()
    }

    /// Receives and sends nothing more over the present connection; how many frames have been received by
    /// now.
    ///
    /// # Errors
    /// The peer is lost, or the lane cannot move.
    pub(in super::super) fn suspend(&self, epoll: &Epoll) -> Result<u64, String> {
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

    /// Goes on over a new connection with a peer that has told how much it has; [`Link::suspend`] came
    /// before.
    pub(in super::super) fn resume(
        &self,
        epoll: &Epoll,
        Connection { socket, met, .. }: Connection,
        plaintext: bool,
    ) -> Result<(), FabricError> {
        let inn = &mut *self.lock_incoming();
        let out = &mut *self.lock();
        if let Some(why) = &out.lost {
            return Err(self.loss(why.clone()));
        }
        let rewound = out.retained.as_mut().map(|retained| retained.rewind(met.received));
        if rewound != Some(Ok(())) {
            return Err(self.lose(out, NeverSent.to_string()));
        }
        let socket = Arc::new(socket);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, self.peer.0.into());
        if let Err(error) = epoll.add(&socket, event) {
            return Err(self.lose(out, format!("its connection cannot be watched: {}", error.desc())));
        }
        let (sealer, opener) = met.streams(plaintext);
        inn.buffer.restart(opener);
        inn.unacknowledged = Unacknowledged::default();
        inn.socket = Some(socket.clone());
        out.sealer = sealer;
        out.socket = Some(socket);
        self.pump(out, epoll)
    }
}

impl Incoming {
    fn disconnect(&mut self, epoll: &Epoll) {
        if let Some(socket) = self.socket.take()
            && let Err(error) = epoll.delete(&socket)
        {
            tracing::debug!(%error, "a lost connection was not watched");
        }
    }
}
