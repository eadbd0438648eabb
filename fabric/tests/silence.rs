//! A lane whose packets get lost, while all others are fine, is noticed in time: with one rail, in one
//! direction or both. A peer that reads nothing for as long is not lost.

mod common;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::{config, listeners, mesh_all};
use fabric::tcp::{MeshConfig, TcpTransport};
use fabric::{FabricError, NodeId, Receiver, Transport};
use nix::libc;

/// The machine file's default.
const SILENCE: Duration = Duration::from_secs(3);
/// What is promised.
const PROMISED: Duration = Duration::from_secs(5);
const DATA: u16 = 1;

/// Sockets are found among all of this process's.
static ALONE: Mutex<()> = Mutex::new(());

/// Bytes that each connected TCP socket of this process has received.
fn received() -> BTreeMap<RawFd, u64> {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let descriptors = descriptors.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    descriptors.filter_map(|fd: RawFd| Some((fd, bytes_received(fd)?))).collect()
}

fn bytes_received(fd: RawFd) -> Option<u64> {
    // struct tcp_info of linux/tcp.h, of which a kernel may know more or less than libc.
    const STATE: usize = std::mem::offset_of!(libc::tcp_info, tcpi_state);
    const ESTABLISHED: u8 = 1;
    const RECEIVED: usize = std::mem::offset_of!(libc::tcp_info, tcpi_bytes_received);
    let mut info = [0u8; 256];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes `len` bytes at most; a descriptor that is no TCP socket is an error.
    let got =
        unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut len) };
    (got == 0 && info[STATE] == ESTABLISHED)
        .then(|| u64::from_ne_bytes(info[RECEIVED..RECEIVED + 8].try_into().unwrap()))
}

/// What comes to this socket is lost before TCP sees it, acknowledgements included.
fn lose_all(fd: RawFd) {
    // BPF_RET | BPF_K: keep 0 bytes of a packet.
    let mut nothing = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
    let filter = libc::sock_fprog { len: 1, filter: &mut nothing };
    let len = std::mem::size_of_val(&filter) as libc::socklen_t;
    // SAFETY: the kernel copies the program, which lives as long as this call.
    let set = unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const filter).cast(), len)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

/// Polls until a frame comes, or the lane says that its peer is lost, or `limit` is over.
fn poll(receiver: &mut dyn Receiver, limit: Duration) -> Result<usize, FabricError> {
    let end = Instant::now() + limit;
    loop {
        match receiver.poll(&mut |_, _| {}) {
            Ok(0) if Instant::now() < end => std::thread::yield_now(),
            result => return result,
        }
    }
}

/// The socket on which `to` receives a lane.
fn socket_of(from: &TcpTransport, to: &mut dyn Receiver, at: NodeId, lane: u16) -> RawFd {
    let before = received();
    from.send(at, lane, &[&[7; 1000]]).unwrap();
    assert_eq!(poll(to, PROMISED).unwrap(), 1);
    let grown = |(fd, bytes): (RawFd, u64)| (bytes >= before.get(&fd)? + 1000).then_some(fd);
    let found: Vec<RawFd> = received().into_iter().filter_map(grown).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

fn a_lane_goes_dead(both_directions: bool) {
    let _alone = base::lock(&ALONE);
    let (listeners, addresses) = listeners(2);
    let made =
        mesh_all(listeners, |node| MeshConfig { silence: SILENCE, ..config(node, &addresses, DATA + 1) });
    let nodes: Vec<TcpTransport> = made.into_iter().map(Result::unwrap).collect();
    let mut lanes: Vec<Vec<Box<dyn Receiver>>> =
        nodes.iter().map(|node| (0..=DATA).map(|lane| node.take_receiver(lane).unwrap()).collect()).collect();
    let data = usize::from(DATA);
    let there = socket_of(&nodes[0], &mut *lanes[1][data], NodeId(1), DATA);
    let here = socket_of(&nodes[1], &mut *lanes[0][data], NodeId(0), DATA);
    lose_all(there);
    if both_directions {
        lose_all(here);
    }
    nodes[0].send(NodeId(1), DATA, &[b"a page is asked for"]).unwrap();
    let begin = Instant::now();
    let lost = poll(&mut *lanes[0][data], PROMISED);
    let took = begin.elapsed();
    assert!(matches!(lost, Err(FabricError::PeerLost { peer: NodeId(1), .. })), "after {took:?}: {lost:?}");
    assert!(took < PROMISED, "{took:?}");
    // All the while the other lane was fine.
    nodes[0].send(NodeId(1), 0, &[b"heartbeat"]).unwrap();
    assert_eq!(poll(&mut *lanes[1][0], PROMISED).unwrap(), 1);
}

#[test]
fn a_lane_whose_packets_get_lost_in_one_direction_is_noticed_in_time() {
    a_lane_goes_dead(false);
}

#[test]
fn a_lane_whose_packets_get_lost_in_both_directions_is_noticed_in_time() {
    a_lane_goes_dead(true);
}

#[test]
fn a_peer_that_reads_nothing_for_longer_and_then_goes_on_has_lost_nothing() {
    let _alone = base::lock(&ALONE);
    let silence = Duration::from_secs(1);
    let (listeners, addresses) = listeners(2);
    let made = mesh_all(listeners, |node| MeshConfig { silence, ..config(node, &addresses, DATA + 1) });
    let nodes: Vec<TcpTransport> = made.into_iter().map(Result::unwrap).collect();
    let mut ends: Vec<_> = nodes.iter().map(|node| node.take_receiver(DATA).unwrap()).collect();
    // More than the sockets of both sides take.
    const FRAMES: u32 = 512;
    let frame = |number: u32| [&number.to_le_bytes()[..], &[0x5a; 30_000]].concat();
    (0..FRAMES).for_each(|number| nodes[0].send(NodeId(1), DATA, &[&frame(number)]).unwrap());
    let begin = Instant::now();
    while begin.elapsed() < 4 * silence {
        // It sends what it could not send yet, as it always does.
        let lost = ends[0].poll(&mut |_, _| {});
        assert!(lost.is_ok(), "after {:?}: {lost:?}", begin.elapsed());
        std::thread::yield_now();
    }
    let mut expected = 0;
    let end = Instant::now() + 2 * PROMISED;
    while expected < FRAMES {
        assert!(Instant::now() < end, "{expected} frames came");
        ends[0].poll(&mut |_, _| {}).unwrap();
        let mut take = |_, bytes: &[u8]| {
            assert!(bytes == frame(expected), "frame {expected}");
            expected += 1;
        };
        ends[1].poll(&mut take).unwrap();
    }
}
