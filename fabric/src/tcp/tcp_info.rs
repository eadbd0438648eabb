//! The kernel's account of a connection: TCP_INFO (tcp(7); `struct tcp_info` of linux/tcp.h).

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;

/// What matters here of a connection's state.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) struct TcpInfo {
    /// Segments have been sent that are not acknowledged.
    pub(super) in_flight: bool,
    /// Bytes that have been acknowledged since the connection began.
    pub(super) acked: u64,
    /// How often in a row the first of them has been sent again.
    pub(super) sent_again: u8,
    /// Probes that have been sent, of an idle connection or of a window of zero, since something came.
    pub(super) probes: u8,
    /// The peer has said that it has room.
    pub(super) has_room: bool,
    /// Since the last segment of the peer's.
    pub(super) heard: Duration,
}

// Offsets of fields, whose order is part of the kernel's interface.
const RETRANSMITS: usize = 2;
const PROBES: usize = 3;
const UNACKED: usize = 24;
const LAST_ACK_RECV: usize = 56;
const BYTES_ACKED: usize = 120;
const SND_WND: usize = 228;
const LEN: usize = 232;

impl TcpInfo {
    /// Asks; `None` if the kernel has no answer, or less than Linux 5.4 says.
    pub(super) fn of(socket: &TcpStream) -> Option<TcpInfo> {
        let mut info = [0u8; LEN];
        let mut len = LEN as libc::socklen_t;
        // SAFETY: the kernel writes `len` bytes at most, which is how long the array is.
        let got = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &mut len,
            )
        };
        (got == 0 && len as usize == LEN).then(|| TcpInfo::from_bytes(&info))
    }

    fn from_bytes(info: &[u8; LEN]) -> TcpInfo {
        let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        let mut acked = [0; 8];
        acked.copy_from_slice(&info[BYTES_ACKED..BYTES_ACKED + 8]);
        TcpInfo {
            in_flight: word(UNACKED) > 0,
            acked: u64::from_ne_bytes(acked),
            sent_again: info[RETRANSMITS],
            probes: info[PROBES],
            has_room: word(SND_WND) > 0,
            heard: Duration::from_millis(word(LAST_ACK_RECV).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_is_sent_is_acknowledged_and_a_peer_that_reads_nothing_has_no_room() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        socket.write_all(&[1; 1000]).unwrap();
        peer.read_exact(&mut [0; 1000]).unwrap();
        let wait = |what: &dyn Fn(&TcpInfo) -> bool| {
            let end = Instant::now() + Duration::from_secs(30);
            loop {
                let info = TcpInfo::of(&socket).unwrap();
                if what(&info) {
                    return info;
                }
                assert!(Instant::now() < end, "{info:?}");
                std::thread::yield_now();
            }
        };
        // The first byte of the count is that of the connection's beginning.
        let info = wait(&|info| !info.in_flight);
        assert!((1000..=1001).contains(&info.acked) && info.has_room && info.probes == 0, "{info:?}");
        socket.set_nonblocking(true).unwrap();
        let mut writer = &socket;
        while writer.write(&[2; 65536]).is_ok() {}
        let info = wait(&|info| !info.has_room);
        assert!(info.acked > 1000);
    }
}
