//! The listener for nodes: it accepts connections and hears their introductions, strangers included.
//!
//! Every connection shakes hands in a thread of its own with a deadline, and their number is limited:
//! a stranger that says nothing, or garbage, costs a thread for seconds and disturbs nobody.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use machine::control::wire::{self, ControlChannel, Hello};
use machine::keys::CoordinatorKeys;

/// The most handshakes at a time; further connections are closed at once.
const MAX_HANDSHAKES: usize = 1024;
/// How often the accepting thread checks whether it should end, in milliseconds.
const LOOK: u16 = 200;

/// Accepts until dropped.
#[derive(Debug)]
pub struct Acceptor {
    stop: Arc<AtomicBool>,
}

impl Acceptor {
    /// Starts to accept; `admitted` gets every peer that proved to be one of the nodes, from threads of its
    /// own.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(
        listener: TcpListener,
        keys: CoordinatorKeys,
        admitted: impl Fn(TcpStream, ControlChannel, Hello, SocketAddr) + Clone + Send + 'static,
    ) -> io::Result<Acceptor> {
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        thread::Builder::new()
            .name("accept".into())
            .spawn(move || accept(&listener, &stopped, &Arc::new(keys), admitted))?;
        Ok(Acceptor { stop })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn accept(
    listener: &TcpListener,
    stop: &AtomicBool,
    keys: &Arc<CoordinatorKeys>,
    admitted: impl Fn(TcpStream, ControlChannel, Hello, SocketAddr) + Clone + Send + 'static,
) {
    let handshakes = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        // An interrupted or failed poll only means that accept says WouldBlock.
        let _ = poll(&mut ready, PollTimeout::from(LOOK));
        let (stream, from) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, mostly: the next look comes soon enough, but not at once.
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!("a connection could not be accepted: {error}");
                    thread::sleep(Duration::from_millis(u64::from(LOOK)));
                }
                continue;
            }
        };
        if handshakes.fetch_add(1, Ordering::Relaxed) >= MAX_HANDSHAKES {
            handshakes.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("{from} was turned away: {MAX_HANDSHAKES} others are introducing themselves");
            continue;
        }
        let (admitted, counter, keys) = (admitted.clone(), handshakes.clone(), keys.clone());
        let handshake = move || {
            match stream
                .set_nonblocking(false)
                .map_err(Into::into)
                .and_then(|()| wire::receive_hello(&stream, &keys))
            {
                Ok((hello, session)) => admitted(stream, session, hello, from),
                Err(error) => tracing::warn!("a connection from {from} was closed: {error}"),
            }
            counter.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().name("handshake".into()).spawn(handshake) {
            handshakes.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("{from} was turned away: {error}");
        }
    }
}
