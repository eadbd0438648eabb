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
                // Only a node that has closed the connection has shut its fence. One whose connection was cut
                // off on its way may not know.
                let by_node = matches!(error, WireError::Closed);
                tell(Event::Closed { link, why: error.to_string(), by_node });
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
            tell(Event::Closed { link, why: error.to_string(), by_node: false });
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use machine::control::wire::Hello;
    use machine::keys::MachineKey;
    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A node's end of a connection, and the coordinator's after the handshake.
    fn connected() -> (TcpStream, TcpStream, ControlChannel) {
        let key = MachineKey::from_bytes([0x42; 32]);
        let (node_key, keys) = (key.node("n0").unwrap(), key.coordinator(["n0"].into_iter()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let node = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (coordinator, _) = listener.accept().unwrap();
        let introduction = thread::spawn({
            let node = node.try_clone().unwrap();
            let hello = Hello { name: "n0".into(), host: "h".into(), kernel: "6.12".into(), emulated: false };
            move || wire::introduce(&node, &node_key, &hello).map(drop)
        });
        let (_, mut session) = wire::receive_hello(&coordinator, &keys).unwrap();
        let no = wire::Answer::Refused { why: "a test".into(), later: false };
        wire::answer(&coordinator, &mut session.sender, &no).unwrap();
        introduction.join().unwrap().unwrap();
        (node, coordinator, session)
    }

    /// What the coordinator's reader says of a connection to whose other end `end` happens.
    fn told_of(end: impl FnOnce(TcpStream)) -> (String, bool) {
        let (node, stream, session) = connected();
        let (tell, told) = channel::unbounded();
        end(node);
        read(3, stream, session.receiver, move |event| tell.send(event).unwrap());
        match told.recv_timeout(PATIENCE).unwrap() {
            Event::Closed { link: 3, why, by_node } => (why, by_node),
            other => panic!("{other:?}"),
        }
    }

    fn reset(node: TcpStream) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&node, sockopt::Linger, &linger).unwrap();
    }

    #[test]
    fn only_an_end_of_the_connection_in_good_order_is_the_nodes_own() {
        assert_eq!(told_of(drop), ("it closed the connection".into(), true));
        assert_eq!(told_of(reset), ("its connection was cut off".into(), false));
        for half in [&[2, 0][..], &[2, 0, 0, 0], &[2, 0, 0, 0, 1]] {
            let told = told_of(|mut node| node.write_all(half).unwrap());
            assert_eq!(told, ("its connection was cut off".into(), false), "{half:?}");
        }
    }

    #[test]
    fn what_the_writer_meets_is_never_the_nodes_own_end() {
        let (node, stream, session) = connected();
        let (tell, told) = channel::unbounded();
        let (queue, said) = channel::unbounded();
        // Without a reader only the writer can notice; what it meets is the reset.
        reset(node);
        queue.send(FromCoordinator::Go).unwrap();
        write(3, stream, session.sender, said, move |event| tell.send(event).unwrap());
        let event = told.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(event, Event::Closed { link: 3, by_node: false, .. }), "{event:?}");
    }
}
