//! Sockets: connecting without blocking, their options, and the sizes of their buffers.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};

/// Socket buffer asked for in each direction, in bytes: 256 pages in flight before a sender has to keep a
/// backlog. Without CAP_NET_ADMIN the kernel grants at most `net.core.{w,r}mem_max`.
const SOCKET_BUFFER: usize = 1 << 20;

/// A connection on which nothing comes for so many seconds is probed, and from then on every second.
const PROBE_AFTER: u32 = 1;

/// That many probes without an answer would end the connection; it is ended before (`silence`).
const PROBES: u32 = 3;

/// A peer may take nothing for so many silences, as long as it acknowledges: 30 s by default.
const PATIENCE: u32 = 10;

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

/// Sets a connection up for greetings and frames. It ends when the peer takes nothing for [`PATIENCE`] times
/// `silence` (tcp(7), TCP_USER_TIMEOUT); one that acknowledges nothing is found earlier, by `silence::watch`.
pub(super) fn tune(socket: &TcpStream, silence: Duration) -> std::io::Result<()> {
    // Every frame is wanted at once: never wait for an acknowledgement to fill a segment.
    socket.set_nodelay(true)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &PROBE_AFTER)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &1)?;
    setsockopt(socket, sockopt::TcpKeepCount, &PROBES)?;
    // 0 would be no limit.
    let limit = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX).saturating_mul(PATIENCE).max(1);
    setsockopt(socket, sockopt::TcpUserTimeout, &limit)?;
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
