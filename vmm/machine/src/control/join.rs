//! The node's side of the control connection: joining, heartbeats, and noticing that the coordinator is gone.

use std::cell::Cell;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use base::lock;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use super::wire::{self, Answer, Assigned, ControlChannel, HEARTBEAT, Hello, MAX_FRAME, WireError};
use crate::control::fence::{self, Fence};
use crate::control::{Assignment, Control, ControlEnd, FromCoordinator, Outgoing, Stop, ToCoordinator};
use crate::keys::NodeKey;

/// How long a node that lost its coordinator gets to end by itself.
pub const ORPHAN_GRACE: Duration = Duration::from_secs(1);
/// How long to wait between two attempts to join.
const RETRY: Duration = Duration::from_millis(200);

/// How to join a machine.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// `host:port` of the coordinator.
    pub address: String,
    /// The node's introduction.
    pub hello: Hello,
    /// What proves it, and who the coordinator must be.
    pub key: NodeKey,
    /// Where the fabric listens, by rail, if this host's operator wants to say; goes before the machine file.
    pub fabric_listen: Vec<SocketAddr>,
    /// How long to try, if nobody listens there yet or the machine is between two starts.
    pub patience: Duration,
    /// What happens to a process whose `node::run` does not return although it should.
    pub watchdog: Watchdog,
}

/// The watchdog that ends a node which does not end by itself.
#[derive(Copy, Clone, Debug)]
pub enum Watchdog {
    /// The process is ended, [`ORPHAN_GRACE`] after the coordinator was lost or [`Stop::grace`] after Stop.
    EndProcess {
        /// Called before: waits, not for long, until what was logged has been written.
        flush: fn(),
    },
    /// Nothing: the process has other things to do. For tests.
    None,
}

/// Why a node could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The name cannot be resolved, or is no `host:port`.
    #[error(
        "{address:?} is not an address to join ({why}): give the coordinator's host:port, as it printed it"
    )]
    Address {
        /// As given.
        address: String,
        /// The resolver's reason.
        why: String,
    },
    /// Nobody listens there, for the whole of [`JoinOptions::patience`].
    #[error(
        "no coordinator was reached at {address} within {seconds} s ({why}): start `gestalt run` there, and see \
         whether a firewall is in the way"
    )]
    NoAnswer {
        /// Where.
        address: String,
        /// How long was tried.
        seconds: u64,
        /// The last attempt's error.
        why: String,
    },
    /// Something listens there, but it did not shake hands as it should.
    #[error("joining the machine at {address} failed: {why}")]
    Handshake {
        /// Where.
        address: String,
        /// A clause about the peer.
        why: WireError,
    },
    /// The coordinator said no.
    #[error("the coordinator at {address} refused this node: {why}")]
    Refused {
        /// Where.
        address: String,
        /// Its reason.
        why: String,
    },
    /// A thread or descriptor is missing.
    #[error("the control connection could not be set up: {0}")]
    Io(#[from] io::Error),
}

/// Joins a machine; returns once the coordinator has assigned this node.
///
/// # Errors
/// [`JoinError`], a sentence each.
pub fn join(options: &JoinOptions) -> Result<(Assignment, Control), JoinError> {
    let deadline = Instant::now() + options.patience;
    let address = options.address.clone();
    loop {
        let late = Instant::now() + RETRY >= deadline;
        match connect(&options.address, deadline)? {
            Ok(stream) => match wire::introduce(&stream, &options.key, &options.hello) {
                Ok((Answer::Assigned(assigned), session)) => {
                    return Ok(open(stream, session, *assigned, options)?);
                }
                Ok((Answer::Refused { later: true, .. }, _))
                | Err(WireError::Refused { later: true, .. })
                    if !late => {}
                Ok((Answer::Refused { why, .. }, _)) | Err(WireError::Refused { why, .. }) => {
                    return Err(JoinError::Refused { address, why });
                }
                // A coordinator that is just ending; another may come.
                Err(WireError::Closed | WireError::CutOff) if !late => {}
                Err(why) => return Err(JoinError::Handshake { address, why }),
            },
            Err(_) if !late => {}
            Err(error) => {
                let seconds = options.patience.as_secs();
                return Err(JoinError::NoAnswer { address, seconds, why: error.to_string() });
            }
        }
        thread::sleep(RETRY);
    }
}

fn connect(address: &str, deadline: Instant) -> Result<io::Result<TcpStream>, JoinError> {
    let bad = |why: String| JoinError::Address { address: address.into(), why };
    let found: Vec<_> = address.to_socket_addrs().map_err(|error| bad(error.to_string()))?.collect();
    let mut last = None;
    for candidate in found {
        let left = deadline.saturating_duration_since(Instant::now()).max(RETRY);
        match TcpStream::connect_timeout(&candidate, left) {
            // Dialling a free local port can, rarely, connect a socket to itself.
            Ok(stream) if stream.local_addr().ok() == stream.peer_addr().ok() => {
                last = Some(io::ErrorKind::ConnectionRefused.into());
            }
            Ok(stream) => return Ok(Ok(stream)),
            Err(error) => last = Some(error),
        }
    }
    last.map(Err).ok_or_else(|| bad("it has no address".into()))
}

fn open(
    stream: TcpStream,
    session: ControlChannel,
    assigned: Assigned,
    options: &JoinOptions,
) -> io::Result<(Assignment, Control)> {
    let ControlChannel { sender, receiver } = session;
    let silence = assigned.machine.silence;
    stream.set_read_timeout(Some(silence))?;
    stream.set_write_timeout(Some(silence))?;
    let local = SocketAddr::new(stream.local_addr()?.ip(), 0);
    let wishes =
        [&options.fabric_listen, &assigned.fabric_listen].into_iter().find(|rails| !rails.is_empty());
    let fabric_listen = wishes.cloned().unwrap_or_else(|| vec![local]);
    let fence = Arc::new(Fence::leased(silence));
    let (control, ControlEnd { from_node, to_node, lost }) = Control::fenced(fence.clone());
    let ended = Arc::new(AtomicBool::new(false));
    let (reading, node_left) = (stream.try_clone()?, ended.clone());
    let writers_fence = fence.clone();
    let (watchdog, name) = (options.watchdog, options.hello.name.clone());
    thread::Builder::new().name("control-read".into()).spawn(move || {
        let stopped = Cell::new(false);
        let why = read(reading, receiver, &to_node, silence, &fence, &|stop| {
            // From here on the end of the connection is no loss.
            if !stopped.replace(true) {
                watch(watchdog, &name, stop.grace, "being told to stop");
            }
        });
        // At once: the node may take its time to end.
        fence.end();
        if stopped.get() || node_left.load(Ordering::Acquire) {
            return;
        }
        tracing::error!("node {name} lost the coordinator: {why}");
        *lock(&lost) = Some(why);
        drop(to_node);
        watch(watchdog, &name, ORPHAN_GRACE, "the loss of the coordinator");
    })?;
    thread::Builder::new()
        .name("control-write".into())
        .spawn(move || write(stream, sender, &from_node, &ended, &writers_fence))?;
    Ok((Assignment { node: assigned.node, machine: assigned.machine, fabric_listen }, control))
}

/// Ends the process after `grace`; the caller goes on meanwhile.
fn watch(watchdog: Watchdog, name: &str, grace: Duration, after: &'static str) {
    let Watchdog::EndProcess { flush } = watchdog else { return };
    let name = name.to_string();
    let end = move || {
        thread::sleep(grace);
        tracing::error!("node {name} did not end within {grace:?} of {after}: its process is ended now");
        flush();
        std::process::exit(1);
    };
    // Without a thread there is nothing to wait with.
    if thread::Builder::new().name("watchdog".into()).spawn(end).is_err() {
        std::process::exit(1);
    }
}

/// Reads until the connection is over; says how.
fn read(
    mut stream: TcpStream,
    mut receiver: wire::Receiver,
    to_node: &Sender<FromCoordinator>,
    silence: Duration,
    fence: &Fence,
    stopped: &dyn Fn(Stop),
) -> String {
    loop {
        match receiver.read_message::<FromCoordinator>(&mut stream, MAX_FRAME) {
            Ok(FromCoordinator::Heartbeat(said)) => fence.renew(said),
            Ok(message) => {
                if let FromCoordinator::Stop(stop) = &message {
                    fence.end();
                    stopped(*stop);
                }
                if to_node.send(message).is_err() {
                    return "this node has ended".into();
                }
            }
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                return WireError::Silent(silence).to_string();
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// Writes until the node has dropped its handles or the connection fails. A heartbeat goes at its time,
/// whatever else there is to say: it keeps the fence open.
fn write(
    mut stream: TcpStream,
    mut sender: wire::Sender,
    from_node: &Receiver<Outgoing>,
    ended: &AtomicBool,
    fence: &Fence,
) {
    let mut beat = Instant::now();
    loop {
        let sent = match from_node.recv_deadline(beat) {
            Ok(Outgoing::Message(message)) => sender.write_message(&mut stream, &message),
            Ok(Outgoing::FromGuest(message, room)) => {
                let sent = sender.write_message(&mut stream, &message);
                drop(room);
                sent
            }
            Ok(Outgoing::Flush(done)) => {
                // Whoever waited may have given up.
                let _ = done.send(());
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => {
                ended.store(true, Ordering::Release);
                break;
            }
        };
        let sent = sent.and_then(|()| {
            if Instant::now() < beat {
                return Ok(());
            }
            beat = Instant::now() + HEARTBEAT;
            sender.write_message(&mut stream, &ToCoordinator::Heartbeat(fence::now()))
        });
        // The reader sees the end of the connection and says so.
        if sent.is_err() {
            break;
        }
    }
    // Before the coordinator hears of it: it takes this node's end of the connection for its last write.
    fence.end();
    let _ = stream.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_node_writes_nothing_any_more_before_the_coordinator_hears_that_it_has_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let (fence, ended) = (Arc::new(Fence::leased(Duration::from_secs(40))), AtomicBool::new(false));
        let (control, end) = Control::fenced(fence.clone());
        let coordinator = thread::spawn({
            let fence = fence.clone();
            move || {
                far.read_to_end(&mut Vec::new()).unwrap();
                fence.has_ended()
            }
        });
        drop(control);
        assert!(!fence.has_ended());
        // No reader runs that could shut the fence instead.
        write(near, wire::tests::sessions().0.sender, &end.from_node, &ended, &fence);
        assert!(coordinator.join().unwrap());
    }
}
