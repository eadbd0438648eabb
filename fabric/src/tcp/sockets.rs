//! Sockets: connecting without blocking, their options, and the sizes of their buffers.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

/// Socket buffer asked for in each direction, in bytes: 256 pages in flight before a sender has to keep a
/// backlog. Without CAP_NET_ADMIN the kernel grants at most `net.core.{w,r}mem_max`.
const SOCKET_BUFFER: usize = 1 << 20;

/// A silent connection is probed after this many seconds, then every second.
const PROBE_AFTER: u32 = 2;

/// That many probes without an answer end the connection.
const PROBES: u32 = 3;

/// What a peer does not acknowledge for so many milliseconds, it does not get over this rail.
const RAIL_SILENCE: u32 = 1000;

/// Begins to connect to `address`; the socket becomes writable when it is connected or has failed.
pub(super) fn begin_connect(address: SocketAddr) -> nix::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = nix::sys::socket::socket(family, SockType::Stream, flags, None)?;
    set_buffers(&socket);
    match nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error),
    }
}

/// Sets a connection up for greetings and frames. Where there are `several` rails a dead one must show sooner than
/// the users above take the peer for lost.
pub(super) fn tune(socket: &TcpStream, several: bool) -> std::io::Result<()> {
    // Every frame is wanted at once: never wait for an acknowledgement to fill a segment.
    socket.set_nodelay(true)?;
    // A host that died sends no FIN. Data in flight is covered by the heartbeats of the users above; an
    // idle connection is covered here.
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, if several { &1 } else { &PROBE_AFTER })?;
    if several {
        setsockopt(socket, sockopt::TcpUserTimeout, &RAIL_SILENCE)?;
    }
    setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
    setsockopt(socket, sockopt::TcpKeepCount, &PROBES)?;
    Ok(())
}

/// Asks for large socket buffers. Smaller ones only cost speed, so what cannot be had is left.
pub(super) fn set_buffers(socket: &impl AsFd) {
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &SOCKET_BUFFER);
    }
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &SOCKET_BUFFER);
    }
}
