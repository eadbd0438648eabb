//! One lane to one peer over several rails, without any I/O of its own: which rail it is on, and what to send again.
//!
//! ```text
//!            this node's rail lost the peer, or the peer resumes on another one
//! Up ───────────────────────────────────────────────────────────────────────────> Moving ── the last rail is left ──> lost
//!  ^    resume(frames received) is the first message on the new rail, both ways     │
//!  └──────────────── the peer's resume: what it does not have is sent again ────────┘
//! ```
//!
//! Both sides take the rails in the same order, and whichever notices first takes the other along. What arrives on a
//! rail that was left is ignored: the peer sends it again. A rail that was left is not used again.
//!
//! A message is one byte that says what it is, and its body: a frame, or a count (`u64`, little-endian).

use crate::tcp::retained::Retained;
use crate::{LaneId, MAX_BACKLOG};

/// A frame of the lane.
const FRAME: u8 = 0;
/// How many frames have been received.
const ACKNOWLEDGE: u8 = 1;
/// The same, as the first message on a rail that the lane moves to.
const RESUME: u8 = 2;
/// The peer is not to be heard any more.
const GIVE_UP: u8 = 3;

/// A lane acknowledges at least every so many frames, and every so many bytes.
const ACKNOWLEDGE_FRAMES: u64 = 64;
const ACKNOWLEDGE_BYTES: u64 = 128 * 1024;

/// The way to the peer.
pub(super) trait Wire {
    /// Sends a message on a rail; `false` if the rail has lost the peer, which it will also report by itself.
    fn put(&self, rail: usize, parts: &[&[u8]]) -> bool;
}

/// One lane to one peer.
pub(super) struct Link {
    retained: Retained,
    rail: usize,
    state: State,
    /// By rail: it was lost, or the peer has left it.
    left: Vec<bool>,
    /// Frames received since the beginning.
    received: u64,
    /// How many of them, and how many bytes, are not acknowledged yet.
    unacknowledged: (u64, u64),
    lost: Option<String>,
}

#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum State {
    /// Frames travel on the rail.
    Up,
    /// The rail took no frame: it is about to report why.
    Stalled,
    /// The peer has not said on this rail yet how much it has.
    Moving,
}

impl Link {
    /// A lane that begins on a rail of its own.
    pub(super) fn new(lane: LaneId, rails: usize) -> Link {
        Link {
            retained: Retained::default(),
            rail: usize::from(lane) % rails,
            state: State::Up,
            left: vec![false; rails],
            received: 0,
            unacknowledged: (0, 0),
            lost: None,
        }
    }

    /// The rail that it is on.
    pub(super) fn rail(&self) -> usize {
        self.rail
    }

    /// Why the peer is lost, once it is.
    pub(super) fn loss(&self) -> Option<&String> {
        self.lost.as_ref()
    }

    /// Sends a frame of `len` bytes, or keeps it until it can be sent. An error is why the peer is lost.
    pub(super) fn send(&mut self, wire: &impl Wire, len: usize, parts: &[&[u8]]) -> Result<(), String> {
        if let Some(why) = &self.lost {
            return Err(why.clone());
        }
        self.retained.push(len, parts);
        if self.retained.len() > MAX_BACKLOG {
            let why = format!("it is more than {} MiB behind with what was sent to it", MAX_BACKLOG >> 20);
            return Err(self.give_up(wire, &why));
        }
        self.pump(wire);
        Ok(())
    }

    fn pump(&mut self, wire: &impl Wire) {
        while self.state == State::Up
            && let Some([front, back]) = self.retained.unsent()
        {
            if wire.put(self.rail, &[&[FRAME], front, back]) {
                self.retained.sent();
            } else {
                self.state = State::Stalled;
            }
        }
    }

    /// Takes a message that came on `rail`; the frame in it, if it is one. An error is why the peer is lost.
    pub(super) fn take<'a>(
        &mut self,
        wire: &impl Wire,
        rail: usize,
        message: &'a [u8],
    ) -> Result<Option<&'a [u8]>, String> {
        if self.lost.is_some() || self.left[rail] {
            return Ok(None);
        }
        let (kind, body) = message.split_first().unwrap_or((&GIVE_UP, &[]));
        let count = body.try_into().map(u64::from_le_bytes);
        let here = rail == self.rail && self.state != State::Moving;
        match (*kind, count) {
            (FRAME, _) if here && !body.is_empty() => {
                self.account(wire, body.len());
                Ok(Some(body))
            }
            (ACKNOWLEDGE, Ok(count)) if here => match self.retained.acknowledge(count) {
                Ok(()) => Ok(None),
                Err(_) => Err(self.give_up(wire, NEVER_SENT)),
            },
            (RESUME, Ok(count)) if !here => self.resume(wire, rail, count).map(|()| None),
            (GIVE_UP, _) if body.is_empty() => Err(self.end("it gave the session up")),
            _ => Err(self.give_up(wire, "it sent a message that no sound node sends at that place")),
        }
    }

    /// Counts a frame, and acknowledges when it is time.
    fn account(&mut self, wire: &impl Wire, bytes: usize) {
        self.received += 1;
        let (frames, total) = &mut self.unacknowledged;
        (*frames, *total) = (*frames + 1, *total + bytes as u64);
        if *frames >= ACKNOWLEDGE_FRAMES || *total >= ACKNOWLEDGE_BYTES {
            self.unacknowledged = (0, 0);
            // Where it is not taken, the next rail tells the count.
            wire.put(self.rail, &[&[ACKNOWLEDGE], &self.received.to_le_bytes()]);
        }
    }

    /// The peer is on `rail` and has `count` frames.
    fn resume(&mut self, wire: &impl Wire, rail: usize, count: u64) -> Result<(), String> {
        if rail != self.rail {
            // It took the rails in their order, and what it said on those between may still come.
            let rails = self.left.len();
            (0..rails).map(|step| (self.rail + step) % rails).take_while(|left| *left != rail).for_each(
                |left| {
                    self.left[left] = true;
                },
            );
            self.move_to(wire, rail);
        }
        if self.retained.rewind(count).is_err() {
            return Err(self.give_up(wire, NEVER_SENT));
        }
        self.state = State::Up;
        self.pump(wire);
        Ok(())
    }

    fn move_to(&mut self, wire: &impl Wire, rail: usize) {
        (self.rail, self.state, self.unacknowledged) = (rail, State::Moving, (0, 0));
        // Where it is not taken, the rail reports its loss, and the lane moves on.
        wire.put(rail, &[&[RESUME], &self.received.to_le_bytes()]);
    }

    /// A rail has lost the peer because of `why`. An error, with the same, if it was the last one.
    pub(super) fn rail_lost(&mut self, wire: &impl Wire, rail: usize, why: &str) -> Result<(), String> {
        self.left[rail] = true;
        if self.lost.is_some() || rail != self.rail {
            return Ok(());
        }
        let rails = self.left.len();
        match (1..rails).map(|step| (rail + step) % rails).find(|rail| !self.left[*rail]) {
            Some(next) => {
                self.move_to(wire, next);
                Ok(())
            }
            None => Err(self.end(why)),
        }
    }

    /// Ends the lane, and has the peer end it.
    fn give_up(&mut self, wire: &impl Wire, why: &str) -> String {
        for rail in (0..self.left.len()).filter(|rail| !self.left[*rail]) {
            wire.put(rail, &[&[GIVE_UP]]);
        }
        self.end(why)
    }

    fn end(&mut self, why: &str) -> String {
        self.retained = Retained::default();
        self.lost.get_or_insert_with(|| why.to_owned()).clone()
    }
}

const NEVER_SENT: &str = "it says that it has frames which were never sent to it";

/// A peer that sends what `data` says, on any rail, while rails are lost and frames are sent: in turn a byte of what, a
/// byte of how much, and the bytes.
#[cfg(fuzzing)]
pub fn fuzz(data: &[u8]) {
    const RAILS: usize = 3;
    struct Takes;
    impl Wire for Takes {
        fn put(&self, _: usize, _: &[&[u8]]) -> bool {
            true
        }
    }
    let (mut link, mut rest) = (Link::new(0, RAILS), data);
    while let Some((&[what, len], more)) = rest.split_first_chunk() {
        let (bytes, more) = more.split_at(usize::from(len).min(more.len()));
        rest = more;
        let (rail, lost) = (usize::from(what) % RAILS, link.lost.is_some());
        match usize::from(what) / RAILS % 4 {
            0 => assert_eq!(link.send(&Takes, 1 + bytes.len(), &[b"x", bytes]).is_err(), lost),
            1 => drop(link.rail_lost(&Takes, rail, "cut")),
            _ => match link.take(&Takes, rail, bytes) {
                Ok(Some(frame)) => assert!(!lost && rail == link.rail && frame.len() + 1 == bytes.len()),
                Ok(None) => {}
                Err(why) => assert!(!lost && !why.is_empty() && link.lost == Some(why)),
            },
        }
        assert!(link.lost.is_some() || !link.left[link.rail], "a lane is on a rail that it has not left");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const RAILS: usize = 3;

    /// What one end has put on each rail, and which of them are cut for it.
    #[derive(Default)]
    struct Way {
        rails: [RefCell<VecDeque<Vec<u8>>>; RAILS],
        cut: [Cell<bool>; RAILS],
    }

    impl Wire for Way {
        fn put(&self, rail: usize, parts: &[&[u8]]) -> bool {
            if !self.cut[rail].get() {
                self.rails[rail].borrow_mut().push_back(parts.concat());
            }
            !self.cut[rail].get()
        }
    }

    struct End {
        link: Link,
        out: Way,
        sent: u64,
        got: Vec<u64>,
        /// By rail: its failure was noticed.
        noticed: [bool; RAILS],
    }

    impl End {
        fn new(lane: LaneId) -> End {
            End {
                link: Link::new(lane, RAILS),
                out: Way::default(),
                sent: 0,
                got: Vec::new(),
                noticed: [false; RAILS],
            }
        }

        fn send(&mut self) {
            self.link.send(&self.out, 8, &[&self.sent.to_le_bytes()]).unwrap();
            self.sent += 1;
        }

        /// Takes the next message of the other end on `rail`, if there is one.
        fn take(&mut self, other: &End, rail: usize) -> bool {
            let Some(message) = other.out.rails[rail].borrow_mut().pop_front() else { return false };
            if let Some(frame) = self.link.take(&self.out, rail, &message).unwrap() {
                self.got.push(u64::from_le_bytes(frame.try_into().unwrap()));
            }
            true
        }

        /// The rail fails for this end: what is on its way to the other one is gone but for the first messages.
        fn cut(&mut self, rail: usize, arrive: usize) {
            self.out.cut[rail].set(true);
            self.out.rails[rail].borrow_mut().truncate(arrive);
        }

        /// It notices that.
        fn notice(&mut self, rail: usize) {
            self.noticed[rail] = true;
            self.link.rail_lost(&self.out, rail, "cut").unwrap();
        }
    }

    #[test]
    fn a_lane_moves_and_sends_again_what_the_peer_does_not_have() {
        let (mut a, mut b) = (End::new(0), End::new(0));
        (0..5).for_each(|_| a.send());
        assert!(b.take(&a, 0) && b.take(&a, 0));
        a.cut(0, 0);
        a.link.rail_lost(&a.out, 0, "cut").unwrap();
        a.send();
        assert!(b.take(&a, 1), "a's resume takes b along");
        assert_eq!(b.link.rail(), 1);
        while a.take(&b, 1) || b.take(&a, 1) {}
        assert_eq!(b.got, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn what_the_peer_said_on_a_rail_that_it_has_left_since_is_ignored() {
        let (mut a, mut b) = (End::new(0), End::new(0));
        a.link.rail_lost(&a.out, 0, "cut").unwrap();
        a.link.rail_lost(&a.out, 1, "cut").unwrap();
        assert!(b.take(&a, 2) && b.take(&a, 1));
        assert_eq!(b.link.rail(), 2);
    }

    #[test]
    fn with_the_last_rail_the_peer_is_lost_for_the_reason_that_the_rail_gave() {
        let mut a = End::new(1);
        for rail in [1, 2] {
            a.link.rail_lost(&a.out, rail, "cut").unwrap();
        }
        assert_eq!(a.link.rail_lost(&a.out, 0, "its cable is cut"), Err("its cable is cut".into()));
        assert_eq!(a.link.send(&a.out, 1, &[b"x"]), Err("its cable is cut".into()));
    }

    #[test]
    fn nonsense_ends_the_lane_on_both_sides() {
        for nonsense in [&[][..], &[FRAME], &[9, 1], &[ACKNOWLEDGE, 1], &[RESUME, 0, 0, 0, 0, 0, 0, 0, 0]] {
            let (mut a, mut b) = (End::new(0), End::new(0));
            assert!(a.link.take(&a.out, 0, nonsense).is_err(), "{nonsense:?}");
            if let Some(farewell) = a.out.rails[0].borrow_mut().pop_front() {
                assert!(b.link.take(&b.out, 0, &farewell).is_err());
            }
        }
        let mut a = End::new(0);
        assert!(a.link.take(&a.out, 1, &[FRAME, 1]).is_err(), "a frame on a rail that was not moved to");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Two of three rails fail at any moment, for one end or both, with any part of what was under way: every
        /// frame comes once and in order, both ways.
        #[test]
        fn nothing_is_lost_doubled_or_reordered(
            lane in 0..RAILS as u16,
            events in prop::collection::vec((0u8..8, 0..2usize, 0..RAILS, 0..6usize), 1..300),
        ) {
            let mut ends = [End::new(lane), End::new(lane)];
            let spared = usize::from(lane + 2) % RAILS;
            for (event, who, rail, number) in events {
                match event {
                    0..=2 => ends[who].send(),
                    3..=6 => {
                        let [a, b] = &mut ends;
                        let (here, there) = if who == 0 { (a, &*b) } else { (b, &*a) };
                        here.take(there, rail);
                    }
                    _ if rail == spared => {}
                    _ => {
                        ends[who].cut(rail, number);
                        // It is noticed now, or later.
                        if number % 2 == 0 {
                            ends[who].notice(rail);
                        }
                    }
                }
            }
            // In the end every cut is noticed on both sides, after what still arrives.
            for rail in 0..RAILS {
                let cut = ends.iter().any(|end| end.out.cut[rail].get());
                let [a, b] = &mut ends;
                while cut && (a.take(b, rail) | b.take(a, rail)) {}
                for end in ends.iter_mut().filter(|end| cut && !end.noticed[rail]) {
                    end.out.cut[rail].set(true);
                    end.notice(rail);
                }
            }
            loop {
                let [a, b] = &mut ends;
                let some = (0..RAILS).filter(|rail| a.take(b, *rail) | b.take(a, *rail)).count();
                if some == 0 {
                    break;
                }
            }
            for (here, there) in [(0, 1), (1, 0)] {
                let all: Vec<u64> = (0..ends[there].sent).collect();
                prop_assert_eq!(&ends[here].got, &all);
            }
        }
    }
}
