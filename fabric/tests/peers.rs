//! Strangers, eavesdroppers and peers that break the rules: admission, trust, and the secrecy of what leaves
//! a node.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{Raw, Tap, config, connect, hello, key, listeners, mesh_all};
use fabric::secure::TAG;
use fabric::tcp::{MeshConfig, TcpTransport};
use fabric::{FabricError, MAX_FRAME, NodeId, Transport};

/// What passed in each direction of one connection.
#[derive(Default)]
struct Passed {
    /// From who connected.
    calls: Vec<u8>,
    /// From who was called.
    answers: Vec<u8>,
}

type Recording = Arc<Mutex<Vec<Passed>>>;

/// Stands between who connects to its address and `to`, and writes down what passes.
fn wiretap(to: SocketAddr) -> (SocketAddr, Recording) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let recording = Recording::default();
    let passed = recording.clone();
    thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(to).unwrap());
            let index = {
                let mut all = passed.lock().unwrap();
                all.push(Passed::default());
                all.len() - 1
            };
            let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            let (calls, answers) = (passed.clone(), passed.clone());
            thread::spawn(move || pass(near, far, |bytes| calls.lock().unwrap()[index].calls.extend(bytes)));
            thread::spawn(move || {
                pass(back_from, back_to, |bytes| answers.lock().unwrap()[index].answers.extend(bytes))
            });
        }
    });
    (address, recording)
}

fn pass(mut from: TcpStream, mut to: TcpStream, note: impl Fn(&[u8])) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        note(&buffer[..n]);
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Two nodes of `lanes` lanes; all that node 1 says to node 0 and hears from it is written down.
fn tapped(lanes: u16, plaintext: bool) -> (TcpTransport, TcpTransport, Recording) {
    let (listeners, addresses) = listeners(2);
    let (tap, recording) = wiretap(addresses[0]);
    let seen = [vec![addresses[0], addresses[1]], vec![tap, addresses[1]]];
    let mut made =
        mesh_all(listeners, |node| MeshConfig { plaintext, ..config(node, &seen[node], lanes) }).into_iter();
    (made.next().unwrap().unwrap(), made.next().unwrap().unwrap(), recording)
}

/// Bytes of a handshake from who connects, and from who is called.
const CALLS: usize = 128 + 48 + 8 + TAG;
const ANSWERS: usize = 128 + 48 + 8 + TAG;

#[test]
fn plaintext_frames_and_nothing_else_leave_a_node() {
    let (zero, one, recording) = tapped(1, true);
    // Long frames fill every buffer on the way with a pattern; shorter ones must not carry it on.
    let frames: [&[u8]; 5] = [&[0xa5; MAX_FRAME], b"short", &[0x5a; 5000], b"x", b"the end"];
    let mut sent = Vec::new();
    for frame in frames {
        sent.extend((frame.len() as u32).to_le_bytes());
        sent.extend(frame);
    }
    let mut taps = [Tap::new(&zero, 0), Tap::new(&one, 0)];
    for (from, to) in [(&zero, 1u16), (&one, 0)] {
        for frame in frames {
            from.send(NodeId(to), 0, &[frame]).unwrap();
        }
        let [zero_tap, one_tap] = &mut taps;
        let (tap, other) = if to == 1 { (one_tap, zero_tap) } else { (zero_tap, one_tap) };
        assert_eq!(tap.take_with(frames.len(), || other.poll()).len(), frames.len());
    }
    let all = recording.lock().unwrap();
    let [passed] = &all[..] else { panic!("{} connections", all.len()) };
    assert!(passed.calls[CALLS..] == sent, "node 1 sent something else than its frames");
    assert!(passed.answers[ANSWERS..] == sent, "node 0 sent something else than its frames");
    // Of the greetings every byte is known: no padding with what happened to lie in memory.
    assert!(passed.calls[..128] == common::plain_hello(1, 0, 0, 1, 2));
    let mut accept = common::plain_hello(0, 1, 0, 1, 2);
    accept[12] = 2;
    assert!(passed.answers[..128] == accept);
}

#[test]
fn sealed_frames_are_not_to_be_read_on_the_wire_and_have_the_length_that_they_must() {
    let (zero, one, recording) = tapped(1, false);
    let secret = b"what nobody else should read";
    let mut tap = Tap::new(&one, 0);
    for _ in 0..10 {
        zero.send(NodeId(1), 0, &[secret, &[0; 4096]]).unwrap();
    }
    for (_, frame) in tap.take(10) {
        assert!(frame.starts_with(secret));
    }
    let all = recording.lock().unwrap();
    let answers = &all[0].answers;
    assert_eq!(answers.len(), ANSWERS + 10 * (4 + secret.len() + 4096 + TAG));
    assert!(!answers.windows(secret.len()).any(|window| window == secret));
    assert!(!answers[ANSWERS..].windows(32).any(|window| window == [0; 32]), "a page of zeros shows");
}

#[test]
fn a_node_with_another_key_is_refused_on_either_side_with_that_said() {
    for wrong in [0, 1] {
        let (listeners, addresses) = listeners(2);
        let made = mesh_all(listeners, |node| {
            let mut config = MeshConfig { timeout: Duration::from_secs(1), ..config(node, &addresses, 1) };
            if node == wrong {
                config.keys.own = key(7);
                config.keys.nodes[node] = key(7).public();
            }
            config
        });
        for result in made {
            let Err(FabricError::Setup(why)) = result else { panic!("two keys made a mesh") };
            assert!(why.contains("node 0") && why.contains("node 1"), "{why}");
        }
    }
}

#[test]
fn a_node_that_claims_anothers_place_is_refused_and_the_other_gets_it() {
    let (mut listeners, addresses) = listeners(3);
    let (two, one) = (listeners.pop().unwrap(), listeners.pop().unwrap());
    let zero = listeners.pop().unwrap();
    let configs: Vec<_> = (0..3).map(|node| config(node, &addresses, 1)).collect();
    let configs = &configs;
    thread::scope(|scope| {
        let zero = scope.spawn(move || zero.mesh(configs[0].clone()).unwrap());
        // Node 2's key, node 1's name.
        let said = hello(1, 0, 0, 1, 3);
        let mut liar = connect(addresses[0]);
        let mut shake = fabric::secure::Handshake::call(
            fabric::secure::Pattern::BothKnown,
            &key(2),
            &key(0).public(),
            &said,
        )
        .unwrap();
        liar.write_all(&[&said[..], &shake.write().unwrap()].concat()).unwrap();
        expect_end_without_answer(liar);
        let one = scope.spawn(move || one.mesh(configs[1].clone()).unwrap());
        let two = two.mesh(configs[2].clone()).unwrap();
        let (zero, one) = (zero.join().unwrap(), one.join().unwrap());
        one.send(NodeId(0), 0, &[b"it is me"]).unwrap();
        assert_eq!(Tap::new(&zero, 0).take(1), [(NodeId(1), b"it is me".to_vec())]);
        drop(two);
    });
}

fn expect_end_without_answer(mut socket: TcpStream) {
    let mut answer = Vec::new();
    // A reset is an end as well.
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.is_empty(), "it was answered with {} bytes", answer.len());
}

#[test]
fn a_replayed_handshake_does_not_get_a_lane() {
    let (mut listeners, addresses) = listeners(2);
    let (one, zero) = (listeners.pop().unwrap(), listeners.pop().unwrap());
    let zero_config = config(0, &addresses, 2);
    thread::scope(|scope| {
        let zero = scope.spawn(move || zero.mesh(zero_config).unwrap());
        let (tap, recording) = wiretap(addresses[0]);
        // Lane 0 is connected, and so the listener is still open for lane 1: what was said for lane 0 is said
        // again.
        let first = Raw::connect(tap, 1, 0, &hello(1, 0, 0, 2, 2));
        let said = recording.lock().unwrap()[0].calls.clone();
        assert_eq!(said.len(), CALLS);
        replay(addresses[0], &said);
        drop(first);
        // The same for a lane that is still free: recorded from a caller that broke off.
        let half = Raw::half(connect(tap), 1, 0, &hello(1, 0, 1, 2, 2));
        let said = recording.lock().unwrap()[1].calls.clone();
        drop(half);
        replay(addresses[0], &[&said[..], &[0; 8 + TAG]].concat());
        let other = Raw::connect(addresses[0], 1, 0, &hello(1, 0, 1, 2, 2));
        let zero = zero.join().unwrap();
        zero.send(NodeId(1), 1, &[b"for the real one"]).unwrap();
        let mut other = other;
        assert_eq!(other.take(), b"for the real one");
        drop(one);
    });
}

/// Says what was recorded, and gets an accept that it cannot use, and the end.
fn replay(address: SocketAddr, said: &[u8]) {
    let mut socket = connect(address);
    socket.write_all(said).unwrap();
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.len() <= 128 + 48, "a replay was confirmed");
}

/// Node 0 of three, and both others made by hand.
fn with_raw_peers() -> (TcpTransport, Raw, Raw) {
    let (mut listeners, addresses) = listeners(3);
    let (address, zero_config) = (addresses[0], config(0, &addresses, 1));
    let zero = listeners.remove(0);
    thread::scope(|scope| {
        let zero = scope.spawn(move || zero.mesh(zero_config).unwrap());
        let one = Raw::connect(address, 1, 0, &hello(1, 0, 0, 1, 3));
        let two = Raw::connect(address, 2, 0, &hello(2, 0, 0, 1, 3));
        (zero.join().unwrap(), one, two)
    })
}

/// What node 1 sends after a valid frame; it must lose node 1, with `why`, and leave node 2 alone.
fn expect_loss_of_one(why: &str, nonsense: impl FnOnce(&mut Raw) -> Vec<u8>) {
    let (zero, mut one, mut two) = with_raw_peers();
    let mut tap = Tap::new(&zero, 0);
    let valid = one.frame(b"valid");
    one.socket.write_all(&valid).unwrap();
    assert_eq!(tap.take(1), [(NodeId(1), b"valid".to_vec())]);
    let nonsense = nonsense(&mut one);
    one.socket.write_all(&nonsense).unwrap();
    let _ = one.socket.shutdown(Shutdown::Write);
    match tap.expect_loss() {
        FabricError::PeerLost { peer: NodeId(1), why: said } => assert!(said.contains(why), "{said}"),
        other => panic!("{other}"),
    }
    let frame = two.frame(b"I am here");
    two.socket.write_all(&frame).unwrap();
    assert_eq!(
        tap.take(1),
        [(NodeId(2), b"I am here".to_vec())],
        "the nonsense was delivered, or node 2 was lost"
    );
    zero.send(NodeId(2), 0, &[b"so am I"]).unwrap();
    assert_eq!(two.take(), b"so am I");
}

#[test]
fn a_replayed_frame_ends_its_session_and_nothing_else() {
    let (zero, mut one, _two) = with_raw_peers();
    let mut tap = Tap::new(&zero, 0);
    let frame = one.frame(b"pay");
    one.socket.write_all(&[&frame[..], &frame].concat()).unwrap();
    assert_eq!(tap.take(1), [(NodeId(1), b"pay".to_vec())], "the first is taken");
    assert!(tap.expect_loss().to_string().contains("repeated"));
    tap.expect_silence();
}

#[test]
fn frames_out_of_order_end_their_session_and_nothing_else() {
    expect_loss_of_one("changed, repeated or out of order", |one| {
        let (first, second) = (one.frame(b"first"), one.frame(b"second"));
        [second, first].concat()
    });
}

#[test]
fn a_changed_bit_anywhere_in_a_frame_ends_its_session_and_nothing_else() {
    // Body, and both ends of the seal.
    for at in [4, 8, 9, 4 + 5 + TAG - 1] {
        expect_loss_of_one("changed, repeated or out of order", |one| {
            let mut frame = one.frame(b"hello");
            frame[at] ^= 0x10;
            frame
        });
    }
    // The length is covered too: one less, and the rest does not fit.
    expect_loss_of_one("changed, repeated or out of order", |one| {
        let mut frame = one.frame(b"hello");
        frame[0] -= 1;
        frame
    });
    expect_loss_of_one("which no node does", |one| {
        let mut frame = one.frame(b"hello");
        frame[3] = 0x80;
        frame
    });
}

#[test]
fn a_frame_cut_short_ends_its_session_and_nothing_else() {
    for missing in [1, TAG, TAG + 1] {
        expect_loss_of_one("in the middle of a frame", |one| {
            let mut frame = one.frame(b"hello");
            frame.truncate(frame.len() - missing);
            frame
        });
    }
}

#[test]
fn garbage_after_the_handshake_ends_its_session_and_nothing_else() {
    expect_loss_of_one("which no node does", |_| vec![0xff; 1000]);
    expect_loss_of_one("changed, repeated or out of order", |_| [&[40, 0, 0, 0][..], &[0xee; 1000]].concat());
    expect_loss_of_one("changed, repeated or out of order", |_| {
        b"\x05\0\0\0plain and no seal at all".to_vec()
    });
}
