//! Tests of TCP alone: building the mesh among strangers, and peers that break the framing.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, Raw, Tap, config, connect, hello, listeners, mesh_all, plain_hello, readable};
use fabric::tcp::{Listener, MeshConfig, TcpTransport};
use fabric::{FabricError, MAX_FRAME, NodeId, Transport};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket, sockopt,
};

/// Sends `bytes` and expects nothing but the end of the connection.
fn expect_closed(mut socket: TcpStream, bytes: &[u8]) {
    socket.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        Ok(_) => assert!(answer.is_empty(), "it was answered: {answer:?}"),
        // Closing a socket that holds unread bytes resets the connection.
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

/// Node 0 of two, on lanes `lanes`, meshing in the background; its address; node 1's listener and address.
fn half_a_mesh<R>(
    lanes: u16,
    test: impl FnOnce(Listener, &[SocketAddr]) -> R,
) -> (Result<TcpTransport, FabricError>, R) {
    half_a_mesh_with(|addresses| config(0, addresses, lanes), test)
}

/// The same with node 0's configuration made by `zero_config`.
fn half_a_mesh_with<R>(
    zero_config: impl FnOnce(&[SocketAddr]) -> MeshConfig,
    test: impl FnOnce(Listener, &[SocketAddr]) -> R,
) -> (Result<TcpTransport, FabricError>, R) {
    let (mut listeners, addresses) = listeners(2);
    let one = listeners.pop().unwrap();
    let zero = listeners.pop().unwrap();
    let zero_config = zero_config(&addresses);
    thread::scope(|scope| {
        let meshing = scope.spawn(move || zero.mesh(zero_config));
        let result = test(one, &addresses);
        (meshing.join().unwrap(), result)
    })
}

/// Both nodes reach each other on `lanes` lanes.
fn expect_sound(zero: &TcpTransport, one: &TcpTransport, lanes: u16) {
    for lane in 0..lanes {
        for (from, to) in [(zero, one), (one, zero)] {
            from.send(to.node(), lane, &[b"hello ", b"there"]).unwrap();
            assert_eq!(Tap::new(to, lane).take(1), [(from.node(), b"hello there".to_vec())]);
        }
    }
}

#[test]
fn strangers_are_turned_away_and_the_mesh_completes() {
    let mut wrong_machine = hello(1, 0, 0, 2, 2);
    wrong_machine[20] ^= 1;
    let mut kind = hello(1, 0, 0, 2, 2);
    kind[12] = 2;
    let mut version_length = hello(1, 0, 0, 2, 2);
    version_length[42] = 200;
    let mut tail = hello(1, 0, 0, 2, 2);
    tail[127] = 1;
    let mut gap = hello(1, 0, 0, 2, 2);
    gap[107] = 1;
    let mut cover = hello(1, 0, 0, 2, 2);
    cover[108] = 3;
    let garbage: [Vec<u8>; 16] = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 128],
        vec![0; 5000],
        wrong_machine,
        kind,
        version_length,
        tail,
        gap,
        cover,
        plain_hello(1, 0, 0, 2, 2),
        hello(2, 0, 0, 2, 2),
        hello(0, 0, 0, 2, 2),
        hello(1, 1, 0, 2, 2),
        hello(1, 0, 2, 2, 2),
        hello(1, 0, 0, 3, 2),
        hello(1, 0, 0, 2, 3),
    ];
    let (zero, one) = half_a_mesh(2, |listener, addresses| {
        for bytes in &garbage {
            expect_closed(connect(addresses[0]), bytes);
        }
        listener.mesh(config(1, addresses, 2)).unwrap()
    });
    expect_sound(&zero.unwrap(), &one, 2);
}

#[test]
fn silent_and_half_spoken_strangers_do_not_delay_the_mesh() {
    let began = Instant::now();
    let (zero, (one, strangers)) = half_a_mesh(2, |listener, addresses| {
        let strangers: Vec<TcpStream> = (0..20)
            .map(|i| {
                let mut socket = connect(addresses[0]);
                socket.write_all(&hello(1, 0, 0, 2, 2)[..i * 6]).unwrap();
                socket
            })
            .collect();
        (listener.mesh(config(1, addresses, 2)).unwrap(), strangers)
    });
    let zero = zero.unwrap();
    assert!(began.elapsed() < Duration::from_secs(4), "the mesh waited for a stranger");
    for stranger in strangers {
        expect_closed(stranger, &[]);
    }
    expect_sound(&zero, &one, 2);
}

#[test]
fn many_silent_strangers_are_let_go_oldest_first() {
    let began = Instant::now();
    let (zero, one) = half_a_mesh(1, |listener, addresses| {
        let mut crowd: Vec<TcpStream> = (0..100).map(|_| connect(addresses[0])).collect();
        expect_closed(crowd.remove(0), &[]);
        assert!(
            began.elapsed() < Duration::from_secs(4),
            "it had to go before its time to say hello was over"
        );
        listener.mesh(config(1, addresses, 1)).unwrap()
    });
    expect_sound(&zero.unwrap(), &one, 1);
}

#[test]
fn a_stranger_who_hangs_up_at_once_is_forgotten() {
    let (zero, one) = half_a_mesh(1, |listener, addresses| {
        (0..10).for_each(|_| drop(connect(addresses[0])));
        listener.mesh(config(1, addresses, 1)).unwrap()
    });
    expect_sound(&zero.unwrap(), &one, 1);
}

#[test]
fn a_second_connection_for_a_lane_is_closed_and_the_first_one_stays() {
    let (zero, _open) = half_a_mesh(2, |_, addresses| {
        let mut first = Raw::connect(addresses[0], 1, 0, &hello(1, 0, 1, 2, 2));
        let mut second = Raw::half(connect(addresses[0]), 1, 0, &hello(1, 0, 1, 2, 2));
        let tag = second.sealer.seal(b"gestalt lane", &mut [0; 8]).unwrap();
        expect_closed(second.socket, &[&[0; 8][..], &tag].concat());
        // The other lane completes the mesh; then the first connection carries frames.
        let other = Raw::connect(addresses[0], 1, 0, &hello(1, 0, 0, 2, 2));
        let frame = first.frame(b"abc");
        first.socket.write_all(&frame).unwrap();
        (first, other)
    });
    let zero = zero.unwrap();
    assert_eq!(Tap::new(&zero, 1).take(1), [(NodeId(1), b"abc".to_vec())]);
}

#[test]
fn another_version_is_named_with_this_one_on_both_sides() {
    let (listeners, addresses) = listeners(2);
    let made = mesh_all(listeners, |node| MeshConfig {
        version: format!("0.{node}.7"),
        timeout: Duration::from_secs(1),
        ..config(node, &addresses, 2)
    });
    for result in made {
        let Err(FabricError::Setup(why)) = result else { panic!("two versions made a mesh") };
        assert!(why.contains("0.0.7") && why.contains("0.1.7"), "{why}");
    }
}

#[test]
fn another_protocol_is_told_so_and_stops_nothing() {
    let mut newer = hello(1, 0, 0, 1, 2);
    newer[8] = 9;
    newer[120] = 77;
    let (zero, one) = half_a_mesh(1, |listener, addresses| {
        let mut socket = connect(addresses[0]);
        socket.write_all(&newer).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        assert_eq!((answer.len(), answer[12]), (128, 3), "it was told so with a refusal");
        listener.mesh(config(1, addresses, 1)).unwrap()
    });
    expect_sound(&zero.unwrap(), &one, 1);
}

#[test]
fn a_missing_peer_is_named_when_the_time_is_over() {
    let (listeners, addresses) = listeners(4);
    // Nodes 1 and 3 never come: 1 should accept, 3 should connect.
    let mut listeners: Vec<_> = listeners.into_iter().map(Some).collect();
    listeners[1] = None;
    let two = listeners[2].take().unwrap();
    let _zero = listeners[0].take().unwrap();
    let short = MeshConfig { timeout: Duration::from_millis(300), ..config(2, &addresses, 1) };
    let began = Instant::now();
    let Err(FabricError::Setup(why)) = two.mesh(short) else { panic!("a mesh of absent nodes") };
    assert!(began.elapsed() < Duration::from_secs(10));
    for part in ["node 0 (", "node 1 (cannot connect", "node 3 (it has not connected"] {
        assert!(why.contains(part), "{part:?} is not in {why:?}");
    }
}

#[test]
fn a_peer_that_comes_late_is_waited_for() {
    // Bound and not listening: keeps the port free of others, and two such sockets may share it.
    let reserved = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&reserved, sockopt::ReuseAddr, &true).unwrap();
    bind(reserved.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    let port = getsockname::<SockaddrIn>(reserved.as_raw_fd()).unwrap().port();
    let here = SocketAddr::from(([127, 0, 0, 1], port));

    let one = Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let addresses = [here, one.local_addrs()[0]];
    let one_config = config(1, &addresses, 2);
    // First there is something else that hangs up, then nothing, then node 0.
    let other = TcpListener::bind(here).unwrap();
    thread::scope(|scope| {
        let meshing = scope.spawn(move || one.mesh(one_config));
        for _ in 0..3 {
            assert!(readable(other.as_fd(), PATIENCE.as_millis() as u16), "node 1 does not try again");
            let (mut socket, _) = other.accept().unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.read_exact(&mut [0; 128 + 48]).unwrap();
        }
        drop(other);
        let zero = Listener::bind(&[here]).unwrap().mesh(config(0, &addresses, 2)).unwrap();
        expect_sound(&zero, &meshing.join().unwrap().unwrap(), 2);
    });
}

#[test]
fn an_address_in_use_is_named() {
    let first = Listener::bind(&["127.0.0.1:0".parse().unwrap()]).unwrap();
    let error = Listener::bind(first.local_addrs()).unwrap_err().to_string();
    assert!(error.contains(&first.local_addrs()[0].to_string()) && error.contains("in use"), "{error}");
    let foreign = Listener::bind(&["192.0.2.1:0".parse().unwrap()]).unwrap_err().to_string();
    assert!(foreign.contains("192.0.2.1"), "{foreign}");
}

#[test]
fn configurations_out_of_range_are_refused_at_once() {
    let wrong: [fn(&mut MeshConfig); 9] = [
        |c| c.addresses.clear(),
        |c| c.addresses = vec![c.addresses[0].clone(); 513],
        |c| c.addresses[1].push(([127, 0, 0, 1], 1).into()),
        |c| c.node = NodeId(2),
        |c| c.lanes = 0,
        |c| c.version.clear(),
        |c| c.version = "v".repeat(65),
        |c| c.keys.nodes.truncate(1),
        |c| c.keys.nodes.swap(0, 1),
    ];
    for change in wrong {
        let (mut listeners, addresses) = listeners(2);
        let mut config = config(0, &addresses, 1);
        change(&mut config);
        assert!(matches!(listeners.remove(0).mesh(config), Err(FabricError::Setup(_))));
    }
}

/// Node 0 with frames in the clear, and a peer made by hand.
fn plain_pair() -> (TcpTransport, TcpStream) {
    let plain = |addresses: &[SocketAddr]| MeshConfig { plaintext: true, ..config(0, addresses, 1) };
    let (zero, raw) =
        half_a_mesh_with(plain, |_, addresses| Raw::connect(addresses[0], 1, 0, &plain_hello(1, 0, 0, 1, 2)));
    (zero.unwrap(), raw.socket)
}

#[test]
fn an_impossible_frame_length_loses_that_peer_after_its_sound_frames() {
    for bad in [0u32, MAX_FRAME as u32 + 1, u32::MAX] {
        let (zero, mut socket) = plain_pair();
        let mut tap = Tap::new(&zero, 0);
        socket.write_all(&[2, 0, 0, 0, b'o', b'k']).unwrap();
        socket.write_all(&bad.to_le_bytes()).unwrap();
        assert_eq!(tap.take(1), [(NodeId(1), b"ok".to_vec())]);
        let error = tap.expect_loss().to_string();
        assert!(error.contains("node 1 was lost") && error.contains(&bad.to_string()), "{error}");
        assert!(zero.send(NodeId(1), 0, &[b"no"]).is_err());
        let mut rest = Vec::new();
        assert!(matches!(socket.read_to_end(&mut rest), Ok(0)), "the peer sees the end");
    }
}

#[test]
fn a_peer_that_ends_in_the_middle_of_a_frame_is_lost_with_that_said() {
    let (zero, mut socket) = plain_pair();
    socket.write_all(&[200, 0, 0, 0, 1, 2, 3]).unwrap();
    drop(socket);
    let error = Tap::new(&zero, 0).expect_loss().to_string();
    assert!(error.contains("in the middle of a frame"), "{error}");
}

#[test]
fn a_dropped_transport_leaves_no_socket_open() {
    let (zero, mut socket) = plain_pair();
    let receiver = zero.take_receiver(0);
    zero.send(NodeId(1), 0, &[b"bye"]).unwrap();
    drop(zero);
    drop(receiver);
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [3, 0, 0, 0, b'b', b'y', b'e']);
}
