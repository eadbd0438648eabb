//! The conformance suite: one list of tests over every transport, of the promises of [`fabric::Transport`]
//! and [`fabric::Receiver`].
//!
//! A transport joins by a line in `for_each_transport!`. Every wait ends after [`PATIENCE`].

mod common;

use std::sync::Barrier;
use std::thread;

use common::{Kind, PATIENCE, Tap, readable};
use fabric::{FabricError, MAX_BACKLOG, MAX_FRAME, NodeId, Transport, TransportStats};

macro_rules! for_each_transport {
    ($($test:ident),+ $(,)?) => {
        mod tcp { $(#[test] fn $test() { super::$test(crate::common::Kind::Tcp); })+ }
        mod tcp_plain { $(#[test] fn $test() { super::$test(crate::common::Kind::TcpPlain); })+ }
        mod tcp_rails { $(#[test] fn $test() { super::$test(crate::common::Kind::TcpRails); })+ }
        mod sim { $(#[test] fn $test() { super::$test(crate::common::Kind::Sim); })+ }
        mod rdma {
            $(#[test] fn $test() {
                if crate::common::rdma_is_there() {
                    super::$test(crate::common::Kind::Rdma);
                }
            })+
        }
        mod rdma_rails {
            $(#[test] fn $test() {
                if crate::common::two_rdma_devices().is_some() {
                    super::$test(crate::common::Kind::RdmaRails);
                }
            })+
        }
    };
}

for_each_transport! {
    a_transport_knows_its_place,
    a_receiver_is_taken_once,
    frames_arrive_in_order_per_lane,
    lanes_are_independent,
    the_tiniest_and_the_longest_frame_arrive_whole,
    frames_of_many_parts_and_of_empty_parts_arrive_whole,
    a_slow_receiver_loses_nothing_and_keeps_the_order,
    frames_sent_together_arrive_one_by_one_in_order_also_behind_a_backlog,
    a_backlog_is_flushed_by_a_receiver_that_sleeps_on_its_descriptor,
    a_receiver_that_never_comes_costs_the_session_and_not_all_memory,
    several_threads_on_one_lane_interleave_whole_frames,
    every_node_reaches_every_other,
    a_sink_may_send,
    a_lost_peer_is_reported_once_after_its_frames_and_others_go_on,
    two_lost_peers_are_both_reported,
    sending_to_a_lost_peer_fails_every_time,
    refused_frames_send_nothing,
    the_descriptor_is_readable_exactly_while_there_is_work,
    a_sleeping_receiver_is_woken,
    arm_says_whether_there_is_work,
    totals_count_frames_on_both_sides,
    a_machine_of_one_node_has_nobody_to_hear,
}

/// The numbered frame `i`, `len` bytes long (at least 8).
fn numbered(i: u64, len: usize) -> Vec<u8> {
    let mut frame = vec![i as u8; len];
    frame[..8].copy_from_slice(&i.to_le_bytes());
    frame
}

fn number(frame: &[u8]) -> u64 {
    u64::from_le_bytes(frame[..8].try_into().unwrap())
}

fn is_lost(result: Result<impl std::fmt::Debug, FabricError>, who: u16) -> bool {
    matches!(result, Err(FabricError::PeerLost { peer, .. }) if peer == NodeId(who))
}

fn a_transport_knows_its_place(kind: Kind) {
    for (i, node) in kind.cluster(3, 2).iter().enumerate() {
        assert_eq!((node.node().index(), node.nodes(), node.lanes()), (i, 3, 2));
    }
}

fn a_receiver_is_taken_once(kind: Kind) {
    let nodes = kind.cluster(2, 2);
    assert!(nodes[0].take_receiver(2).is_none(), "there are lanes 0 and 1 only");
    let _first = nodes[0].take_receiver(1).unwrap();
    assert!(nodes[0].take_receiver(1).is_none());
    assert!(nodes[0].take_receiver(0).is_some());
}

fn frames_arrive_in_order_per_lane(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let (mut tap, mut flush) = (Tap::new(&*nodes[1], 0), Tap::new(&*nodes[0], 0));
    for i in 0..2000 {
        nodes[0].send(NodeId(1), 0, &[&numbered(i, 8 + i as usize % 600)]).unwrap();
    }
    for (i, (from, frame)) in tap.take_with(2000, || flush.poll()).into_iter().enumerate() {
        assert_eq!((from, frame), (NodeId(0), numbered(i as u64, 8 + i % 600)));
    }
    tap.expect_silence();
}

fn lanes_are_independent(kind: Kind) {
    let nodes = kind.cluster(2, 3);
    let mut taps: Vec<Tap> = (0..3).map(|lane| Tap::new(&*nodes[1], lane)).collect();
    // Lane 0 is stuck behind a receiver that does not come; the others are not.
    for i in 0..200 {
        nodes[0].send(NodeId(1), 0, &[&numbered(i, MAX_FRAME)]).unwrap();
    }
    for lane in [2, 1] {
        nodes[0].send(NodeId(1), lane, &[&[lane as u8; 9]]).unwrap();
        assert_eq!(taps[usize::from(lane)].take(1), [(NodeId(0), vec![lane as u8; 9])]);
    }
    let mut flush = Tap::new(&*nodes[0], 0);
    let late = taps[0].take_with(200, || flush.poll());
    assert!(late.iter().map(|(_, frame)| number(frame)).eq(0..200));
}

fn the_tiniest_and_the_longest_frame_arrive_whole(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let (mut tap, mut flush) = (Tap::new(&*nodes[1], 0), Tap::new(&*nodes[0], 0));
    let frames = [vec![7], numbered(1, MAX_FRAME), vec![8], numbered(2, MAX_FRAME - 1), vec![9, 9]];
    for frame in &frames {
        nodes[0].send(NodeId(1), 0, &[frame]).unwrap();
    }
    let got = tap.take_with(frames.len(), || flush.poll());
    assert!(got.into_iter().map(|(_, frame)| frame).eq(frames));
}

fn frames_of_many_parts_and_of_empty_parts_arrive_whole(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let mut tap = Tap::new(&*nodes[1], 0);
    let bytes: Vec<u8> = (0..3000u32).map(|i| (i * 7) as u8).collect();
    for chunk in [3000, 1500, 300, 214, 200, 187, 30, 1] {
        let parts: Vec<&[u8]> = bytes.chunks(chunk).collect();
        nodes[0].send(NodeId(1), 0, &parts).unwrap();
    }
    nodes[0].send(NodeId(1), 0, &[&[], &bytes, &[], &[]]).unwrap();
    assert!(tap.take(9).iter().all(|(_, frame)| *frame == bytes));
}

fn frames_sent_together_arrive_one_by_one_in_order_also_behind_a_backlog(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let (mut tap, mut flush) = (Tap::new(&*nodes[1], 0), Tap::new(&*nodes[0], 0));
    // 30 MiB, in batches of more frames than the kernel takes at once; some frames end in nothing.
    let len = |i: u64| 8 + if i.is_multiple_of(3) { 0 } else { (i * 7919) as usize % 8192 };
    let (batches, each) = (40, 200);
    for batch in 0..batches {
        let frames: Vec<Vec<u8>> = (batch * each..(batch + 1) * each).map(|i| numbered(i, len(i))).collect();
        let parts: Vec<[&[u8]; 2]> = frames.iter().map(|frame| [&frame[..8], &frame[8..]]).collect();
        nodes[0].send_all(NodeId(1), 0, &parts).unwrap();
    }
    nodes[0].send_all(NodeId(1), 0, &[]).unwrap();
    let total = batches * each;
    for (i, (_, frame)) in (0..).zip(tap.take_with(total as usize, || flush.poll())) {
        assert!(frame == numbered(i, len(i)), "frame {i} is wrong");
    }
    assert_eq!(nodes[0].stats().frames_sent, total);
    tap.expect_silence();
    assert!(nodes[0].send_all(NodeId(1), 0, &[[&[1], &[]], [&[], &[]]]).is_err(), "an empty frame was taken");
}

fn a_slow_receiver_loses_nothing_and_keeps_the_order(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let (mut tap, mut flush) = (Tap::new(&*nodes[1], 0), Tap::new(&*nodes[0], 0));
    // 32 MiB in frames of many lengths: far more than any socket takes, so the end waits in the backlog.
    let len = |i: u64| 8 + (i * 7919) as usize % (MAX_FRAME - 8);
    let total = 1000;
    for i in 0..total {
        nodes[0].send(NodeId(1), 0, &[&numbered(i, len(i))[..8], &numbered(i, len(i))[8..]]).unwrap();
    }
    let mut next = 0;
    for (_, frame) in tap.take_with(total as usize / 2, || flush.poll()) {
        assert!(frame == numbered(next, len(next)), "frame {next} is wrong");
        next += 1;
    }
    // The backlog is half empty; what is sent now must not pass it.
    nodes[0].send(NodeId(1), 0, &[&numbered(total, 8)]).unwrap();
    for (_, frame) in tap.take_with((total - next) as usize, || flush.poll()) {
        assert!(frame == numbered(next, len(next)), "frame {next} is wrong");
        next += 1;
    }
    assert_eq!(tap.take_with(1, || flush.poll()), [(NodeId(0), numbered(total, 8))]);
    tap.expect_silence();
    // With the backlog gone the sender's lane has nothing to do either, and may sleep.
    flush.expect_silence();
}

fn a_backlog_is_flushed_by_a_receiver_that_sleeps_on_its_descriptor(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let mut tap = Tap::new(&*nodes[1], 0);
    thread::scope(|scope| {
        // Node 0's lane thread sleeps before there is a backlog, as in a node with nothing to do.
        let flusher = Tap::new(&*nodes[0], 0);
        let flusher = scope.spawn(move || {
            let mut flusher = flusher;
            flusher.take(1);
        });
        for i in 0..300 {
            nodes[0].send(NodeId(1), 0, &[&numbered(i, MAX_FRAME)]).unwrap();
        }
        assert!(tap.take(300).iter().map(|(_, frame)| number(frame)).eq(0..300));
        nodes[1].send(NodeId(0), 0, &[b"done"]).unwrap();
        flusher.join().unwrap();
    });
}

fn a_receiver_that_never_comes_costs_the_session_and_not_all_memory(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let mut own = Tap::new(&*nodes[0], 0);
    let frame = vec![1; MAX_FRAME];
    let most = 2 * MAX_BACKLOG / MAX_FRAME;
    let failed = (0..most).find_map(|_| nodes[0].send(NodeId(1), 0, &[&frame]).err());
    let error = failed.expect("twice the backlog was taken without an error");
    assert!(error.to_string().contains("behind"), "{error}");
    assert!(is_lost(Err::<(), _>(error), 1));
    let error = own.expect_loss();
    assert!(error.to_string().contains("behind"), "the receiver says the same: {error}");
    // And the other side sees an end as well, after what had reached it.
    let mut tap = Tap::new(&*nodes[1], 0);
    assert!(is_lost(Err::<(), _>(tap.expect_loss()), 0));
}

fn several_threads_on_one_lane_interleave_whole_frames(kind: Kind) {
    const THREADS: u64 = 4;
    const EACH: u64 = 1500;
    let nodes = kind.cluster(2, 1);
    let (mut tap, mut flush) = (Tap::new(&*nodes[1], 0), Tap::new(&*nodes[0], 0));
    let start = Barrier::new(THREADS as usize);
    let sender: &dyn Transport = &*nodes[0];
    let (start, len) = (&start, |i: u64| 8 + (i * 131) as usize % 9000);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                start.wait();
                for i in 0..EACH {
                    let frame = numbered(thread << 32 | i, len(i));
                    sender.send(NodeId(1), 0, &[&frame[..5], &frame[5..]]).unwrap();
                }
            });
        }
        let mut next = [0; THREADS as usize];
        for (_, frame) in tap.take_with((THREADS * EACH) as usize, || flush.poll()) {
            let (thread, i) = (number(&frame) >> 32, number(&frame) & 0xffff_ffff);
            assert_eq!(i, next[thread as usize], "the order of thread {thread}");
            assert!(frame == numbered(thread << 32 | i, len(i)), "frame {i} of thread {thread} is torn");
            next[thread as usize] += 1;
        }
    });
}

fn every_node_reaches_every_other(kind: Kind) {
    // More peers than the TCP receiver tries directly.
    let nodes = kind.cluster(5, 2);
    for lane in 0..2 {
        for from in &nodes {
            for to in (0..5).map(NodeId).filter(|to| *to != from.node()) {
                from.send(to, lane, &[&[from.node().0 as u8, to.0 as u8, lane as u8]]).unwrap();
            }
        }
        for node in &nodes {
            let mut got = Tap::new(&**node, lane).take(4);
            got.sort();
            let expected = (0..5).filter(|from| *from != node.node().0);
            assert!(
                got.into_iter()
                    .eq(expected
                        .map(|from| (NodeId(from), vec![from as u8, node.node().0 as u8, lane as u8])))
            );
        }
    }
}

fn a_sink_may_send(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let (mut near, mut far) = (Tap::new(&*nodes[0], 0), nodes[1].take_receiver(0).unwrap());
    for i in 0..100 {
        nodes[0].send(NodeId(1), 0, &[&numbered(i, 20)]).unwrap();
    }
    let mut answered = 0;
    let back = near.take_with(100, || {
        answered += far.poll(&mut |from, frame| nodes[1].send(from, 0, &[frame, b"!"]).unwrap()).unwrap();
    });
    assert_eq!(answered, 100);
    for (i, (_, frame)) in back.iter().enumerate() {
        assert_eq!((number(frame), frame.len(), frame[20]), (i as u64, 21, b'!'));
    }
}

fn a_lost_peer_is_reported_once_after_its_frames_and_others_go_on(kind: Kind) {
    for size in [2, 3, 5] {
        let mut nodes = kind.cluster(size, 1);
        let gone = nodes.pop().unwrap();
        let mut tap = Tap::new(&*nodes[0], 0);
        for i in 0..50 {
            gone.send(NodeId(0), 0, &[&numbered(i, 2000)]).unwrap();
        }
        drop(gone);
        let last_words = tap.take(50);
        assert!(last_words.iter().map(|(_, frame)| number(frame)).eq(0..50));
        assert!(is_lost(Err::<(), _>(tap.expect_loss()), size as u16 - 1));
        tap.expect_silence();
        for other in &nodes[1..] {
            other.send(NodeId(0), 0, &[b"still here"]).unwrap();
            assert_eq!(tap.take(1), [(other.node(), b"still here".to_vec())]);
            nodes[0].send(other.node(), 0, &[b"me too"]).unwrap();
        }
        tap.expect_silence();
    }
}

fn two_lost_peers_are_both_reported(kind: Kind) {
    let mut nodes = kind.cluster(5, 1);
    let mut tap = Tap::new(&*nodes[0], 0);
    nodes.truncate(3);
    let mut lost: Vec<String> = (0..2).map(|_| tap.expect_loss().to_string()).collect();
    lost.sort();
    assert!(lost[0].starts_with("node 3 was lost") && lost[1].starts_with("node 4 was lost"), "{lost:?}");
    tap.expect_silence();
}

fn sending_to_a_lost_peer_fails_every_time(kind: Kind) {
    let mut nodes = kind.cluster(2, 1);
    let mut tap = Tap::new(&*nodes[0], 0);
    nodes.truncate(1);
    tap.expect_loss();
    for _ in 0..3 {
        assert!(is_lost(nodes[0].send(NodeId(1), 0, &[b"anybody?"]), 1));
    }
}

fn refused_frames_send_nothing(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let mut tap = Tap::new(&*nodes[1], 0);
    let long = vec![0; MAX_FRAME];
    let refused = |result| matches!(result, Err(FabricError::Refused(_)));
    assert!(refused(nodes[0].send(NodeId(1), 0, &[&long, b"x"])), "one byte too long");
    assert!(refused(nodes[0].send(NodeId(1), 0, &[])), "empty");
    assert!(refused(nodes[0].send(NodeId(1), 0, &[&[], &[]])), "empty");
    assert!(refused(nodes[0].send(NodeId(0), 0, &[b"x"])), "to itself");
    assert!(refused(nodes[0].send(NodeId(2), 0, &[b"x"])), "no such node");
    assert!(refused(nodes[0].send(NodeId(1), 1, &[b"x"])), "no such lane");
    assert_eq!(nodes[0].stats(), TransportStats::default());
    nodes[0].send(NodeId(1), 0, &[b"the session goes on"]).unwrap();
    assert_eq!(tap.take(1), [(NodeId(0), b"the session goes on".to_vec())]);
}

fn the_descriptor_is_readable_exactly_while_there_is_work(kind: Kind) {
    for size in [2, 5] {
        let nodes = kind.cluster(size, 1);
        let mut tap = Tap::new(&*nodes[0], 0);
        assert!(!readable(tap.fd(), 0), "nothing was sent yet");
        nodes[1].send(NodeId(0), 0, &[b"hi"]).unwrap();
        assert!(readable(tap.fd(), PATIENCE.as_millis() as u16));
        assert!(readable(tap.fd(), 0), "level-triggered: it stays readable until the frame is taken");
        tap.take(1);
        assert!(!readable(tap.fd(), 0), "the work is done");
        drop(nodes);
        assert!(readable(tap.fd(), PATIENCE.as_millis() as u16), "a loss is work");
    }
}

fn a_sleeping_receiver_is_woken(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let tap = Tap::new(&*nodes[0], 0);
    thread::scope(|scope| {
        let (asleep, told) = std::sync::mpsc::channel();
        let sleeper = scope.spawn(move || {
            let mut tap = tap;
            assert!(!tap.arm(), "nothing was sent yet");
            asleep.send(()).unwrap();
            assert!(readable(tap.fd(), PATIENCE.as_millis() as u16));
            tap.take(1)
        });
        told.recv().unwrap();
        nodes[1].send(NodeId(0), 0, &[b"wake up"]).unwrap();
        assert_eq!(sleeper.join().unwrap(), [(NodeId(1), b"wake up".to_vec())]);
    });
}

fn arm_says_whether_there_is_work(kind: Kind) {
    let nodes = kind.cluster(2, 1);
    let mut tap = Tap::new(&*nodes[0], 0);
    assert!(!tap.arm());
    nodes[1].send(NodeId(0), 0, &[b"hi"]).unwrap();
    assert!(readable(tap.fd(), PATIENCE.as_millis() as u16));
    assert!(tap.arm());
    tap.take(1);
    assert!(!tap.arm());
}

fn totals_count_frames_on_both_sides(kind: Kind) {
    let nodes = kind.cluster(2, 2);
    let mut taps = [Tap::new(&*nodes[1], 0), Tap::new(&*nodes[1], 1)];
    for lane in [0, 1, 1] {
        nodes[0].send(NodeId(1), lane, &[&[1; 100]]).unwrap();
    }
    taps[0].take(1);
    taps[1].take(2);
    let (sent, received) = (nodes[0].stats(), nodes[1].stats());
    assert_eq!((sent.frames_sent, sent.frames_received), (3, 0));
    assert_eq!((received.frames_sent, received.frames_received), (0, 3));
    assert!(sent.bytes_sent >= 300, "{sent:?}");
    assert_eq!(sent.bytes_sent, received.bytes_received, "nothing is in flight");
}

fn a_machine_of_one_node_has_nobody_to_hear(kind: Kind) {
    let nodes = kind.cluster(1, 2);
    let mut tap = Tap::new(&*nodes[0], 1);
    tap.expect_silence();
}
