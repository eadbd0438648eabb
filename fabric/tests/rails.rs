//! Lanes over two rails, of which one dies and comes back.

mod common;

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, Tap, mesh_all, rail_config, rail_listeners, readable, traffic};
use fabric::tcp::{MeshConfig, TcpTransport};
use fabric::{FabricError, NodeId, Transport};
use nix::sched::{CloneFlags, unshare};

/// Stands between who connects to its address and a node, and can be cut.
struct Cable {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    cut: bool,
    open: Vec<TcpStream>,
    /// Connections so far that passed.
    passed: u64,
}

impl Cable {
    fn new(to: SocketAddr) -> Cable {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                let mut state = shared.lock().unwrap();
                // Without a connection behind it what came is closed.
                if state.cut {
                    continue;
                }
                let Ok(far) = TcpStream::connect(to) else { continue };
                state.passed += 1;
                for (from, into) in [(&near, &far), (&far, &near)] {
                    let (mut from, mut into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    thread::spawn(move || {
                        let _ = io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Both);
                    });
                }
                state.open.extend([near, far]);
            }
        });
        Cable { address, state }
    }

    /// Ends what passes, in the middle of whatever it is, and lets nothing pass.
    fn cut(&self) {
        let mut state = self.state.lock().unwrap();
        state.cut = true;
        for socket in state.open.drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn restore(&self) {
        self.state.lock().unwrap().cut = false;
    }

    fn passed(&self) -> u64 {
        self.state.lock().unwrap().passed
    }
}

/// Two nodes with two lanes, connected by two cables.
fn cabled(plaintext: bool) -> ([TcpTransport; 2], [Cable; 2]) {
    let (listeners, addresses) = rail_listeners(2, 2);
    let cables = [Cable::new(addresses[0][0]), Cable::new(addresses[0][1])];
    let seen = [vec![cables[0].address, cables[1].address], addresses[1].clone()];
    let made = mesh_all(listeners, |node| MeshConfig { plaintext, ..rail_config(node, &seen, 2) });
    let mut made = made.into_iter().map(Result::unwrap);
    ([made.next().unwrap(), made.next().unwrap()], cables)
}

/// Frames of each lane in each direction.
const FRAMES: u64 = 20_000;
/// Frames between a cut, the cable's return, and the next cut.
const PERIOD: u64 = 480;

fn moves_under_traffic(plaintext: bool) {
    let (nodes, cables) = cabled(plaintext);
    let mut cuts = 0;
    traffic(nodes.each_ref().map(|node| node as &dyn Transport), FRAMES, |slowest| {
        for turn in 1.. {
            let mut come = slowest();
            while come < turn * PERIOD && come < FRAMES {
                come = slowest();
            }
            if come >= FRAMES {
                break;
            }
            // One turn cuts a cable, the next mends it: never both.
            let cable = &cables[(turn as usize / 2) % 2];
            if turn % 2 == 1 {
                cables.iter().for_each(Cable::restore);
            } else {
                cable.cut();
                cuts += 1;
            }
        }
    });
    assert!(cuts >= 20, "only {cuts} cuts");
    for (transport, cable) in nodes.iter().zip(&cables) {
        assert!(cable.passed() > 4, "lanes used a cable {} times", cable.passed());
        let stats = transport.stats();
        assert_eq!((stats.frames_sent, stats.frames_received), (2 * FRAMES, 2 * FRAMES));
    }
}

#[test]
fn twenty_cuts_under_traffic_lose_double_and_reorder_nothing() {
    moves_under_traffic(false);
}

#[test]
fn the_same_in_plaintext() {
    moves_under_traffic(true);
}

#[test]
fn a_rail_that_returns_is_used_again() {
    let (nodes, cables) = cabled(false);
    let mut taps: Vec<Tap> = nodes.iter().flat_map(|node| [Tap::new(node, 0), Tap::new(node, 1)]).collect();
    let deadline = Instant::now() + PATIENCE;
    let before = [cables[0].passed(), cables[1].passed()];
    assert_eq!(before, [1, 1], "a lane on each");
    let mut wait_for = |cable: &Cable, passed: u64| {
        while cable.passed() < passed {
            taps.iter_mut().for_each(Tap::poll);
            assert!(Instant::now() < deadline);
        }
    };
    cables[0].cut();
    wait_for(&cables[1], 2);
    cables[0].restore();
    wait_for(&cables[0], 2);
    nodes[0].send(NodeId(1), 0, &[b"back"]).unwrap();
    assert_eq!(taps[2].take(1), [(NodeId(0), b"back".to_vec())]);
}

#[test]
fn with_the_last_rail_gone_the_peer_is_lost_within_five_seconds() {
    let (nodes, cables) = cabled(false);
    let mut taps = [Tap::new(&nodes[0], 0), Tap::new(&nodes[1], 0)];
    nodes[0].send(NodeId(1), 0, &[b"one"]).unwrap();
    assert_eq!(taps[1].take(1).len(), 1);
    cables.iter().for_each(Cable::cut);
    let cut = Instant::now();
    thread::scope(|scope| {
        for (tap, peer) in taps.iter_mut().zip([1, 0]) {
            scope.spawn(move || {
                match tap.expect_loss() {
                    FabricError::PeerLost { peer: lost, why } => {
                        assert_eq!(lost, NodeId(peer));
                        assert!(why.contains("no rail to it is left"), "{why}");
                    }
                    other => panic!("{other}"),
                }
                tap.expect_silence();
            });
        }
    });
    assert!(cut.elapsed() < Duration::from_secs(5), "{:?}", cut.elapsed());
    assert!(nodes[0].send(NodeId(1), 0, &[b"no"]).is_err());
}

#[test]
fn a_machine_starts_with_one_of_two_rails_dead() {
    let (listeners, addresses) = rail_listeners(2, 2);
    let dead = Cable::new(addresses[0][1]);
    dead.cut();
    let seen = [vec![addresses[0][0], dead.address], addresses[1].clone()];
    let made: Vec<TcpTransport> =
        mesh_all(listeners, |node| rail_config(node, &seen, 2)).into_iter().map(Result::unwrap).collect();
    for lane in 0..2 {
        made[0].send(NodeId(1), lane, &[b"here"]).unwrap();
        assert_eq!(Tap::new(&made[1], lane).take(1), [(NodeId(0), b"here".to_vec())]);
    }
}

/// Runs `ip` with these words; whether it did as told.
fn ip(words: &str) -> bool {
    let status = Command::new("ip").args(words.split(' ')).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// In a network of this thread's and its threads' own, where packets to the second rail vanish without a
/// word.
#[test]
fn a_rail_that_falls_silent_is_left_before_the_peer_counts_as_silent() {
    let test = || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ip("link set lo up") {
            return println!("skipped: this user may not make networks, or there is no `ip`");
        }
        let (listeners, addresses) = rail_listeners(2, 2);
        let nodes: Vec<TcpTransport> = mesh_all(listeners, |node| rail_config(node, &addresses, 2))
            .into_iter()
            .map(Result::unwrap)
            .collect();
        let mut taps: Vec<Tap> = (0..4).map(|i| Tap::new(&nodes[i / 2], i as u16 % 2)).collect();
        let mut exchange = |what: &[u8]| {
            let began = Instant::now();
            for (from, to) in [(0, 1), (1, 0)] {
                (0..2).for_each(|lane| nodes[from].send(NodeId(to), lane, &[what]).unwrap());
            }
            let mut missing = 4;
            while missing > 0 {
                for tap in &mut taps {
                    readable(tap.fd(), 1);
                    let got = tap.poll_some();
                    assert!(got.iter().all(|(_, frame)| frame == what));
                    missing -= got.len();
                }
                assert!(began.elapsed() < PATIENCE, "{missing} frames are missing");
            }
            began.elapsed()
        };
        exchange(b"before");
        assert!(ip("route add blackhole 127.0.0.2/32 table local"), "there is a second rail to silence");
        let took = exchange(b"during");
        assert!(took < Duration::from_millis(2500), "the lane moved after {took:?}");
        assert!(ip("route del blackhole 127.0.0.2/32 table local"));
        exchange(b"after");
    };
    thread::spawn(test).join().unwrap();
}
