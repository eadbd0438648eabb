//! One node's control connection, seen from the coordinator: a thread that reads, a thread that writes.
//!
//! Neither decides anything. The reader turns frames into [`Event::Said`]; the writer sends what the
//! session wants said, and a heartbeat whenever there is nothing to say. The session watches for silence.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};

use super::event::{Event, LinkId};
use machine::control::wire::{self, ControlChannel, HEARTBEAT, MAX_FRAME, WireError};
use machine::control::{FromCoordinator, ToCoordinator};

/// An open connection. Dropping it closes the socket and ends both threads.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    queue: Sender<FromCoordinator>,
}

impl Link {
    /// Starts the threads of a session over `stream`. `silence` bounds how long a write may block; `tell`
    /// gets the events.
    ///
    /// # Errors
    /// What the system says to the socket options, the second descriptor or the threads.
    pub fn open(
        id: LinkId,
        stream: TcpStream,
        session: ControlChannel,
        silence: Duration,
        tell: impl Fn(Event) + Clone + Send + 'static,
    ) -> io::Result<Link> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(Some(silence))?;
        let (queue, said) = channel::unbounded();
        let (reading, writing) = (stream.try_clone()?, stream.try_clone()?);
        let tell_reader = tell.clone();
        thread::Builder::new()
            .name(format!("link-read-{id}"))
            .spawn(move || read(id, reading, session.receiver, tell_reader))?;
        thread::Builder::new()
            .name(format!("link-write-{id}"))
            .spawn(move || write(id, writing, session.sender, said, tell))?;
        Ok(Link { stream, queue })
    }

    /// Queues a message; a connection that is over drops it.
    pub fn send(&self, message: FromCoordinator) {
        // The writer has ended only after an error, which it has told.
        let _ = self.queue.send(message);
    }

    /// How many messages wait for the socket.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Fails only if the socket is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn read(link: LinkId, mut stream: TcpStream, mut receiver: wire::Receiver, tell: impl Fn(Event)) {
    loop {
        match receiver.read_message::<ToCoordinator>(&mut stream, MAX_FRAME) {
            Ok(message) => tell(Event::Said { link, message }),
            Err(error) => {
                tell(closed(link, &error));
                // Whatever it was, this peer is no longer listened to; it should know.
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

fn write(
    link: LinkId,
    mut stream: TcpStream,
    mut sender: wire::Sender,
    said: Receiver<FromCoordinator>,
    tell: impl Fn(Event),
) {
    loop {
        let message = match said.recv_timeout(HEARTBEAT) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => FromCoordinator::Heartbeat(0),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Err(error) = sender.write_message(&mut stream, &message) {
            // Before the reader sees the end that is made here.
            tell(closed(link, &error));
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

fn closed(link: LinkId, error: &WireError) -> Event {
    Event::Closed { link, why: error.to_string(), by_node: matches!(error, WireError::Closed) }
}
