//! One lane to one peer over several rails, without any I/O of its own: which rail it is on, and what to send again.
//!
//! One side *leads*: it chooses the rail. The other follows, and asks for another rail when its own lost the peer.
//!
//! ```text
//!                  the rail lost the peer; the follower asks; the lane's own rail is back
//! leader:   Up ───────────────────────────────────────────────────────────────────────> Moving ── no rail works ──> lost
//!            ^            resume(move, frames received) goes first on the new rail        │
//!            └───── the follower's resume of that move: what it lacks is sent again ──────┘
//!
//! follower: Up ── the rail lost the peer: ask(move) on one that works ──> Moving
//!            ^                                                              │
//!            └── a newer resume, on whatever rail: answered with its own ───┘
//! ```
//!
//! Moves are numbered, so that what is said of an earlier one, and may come late on another rail, is known as such.
//! Frames on a rail that the lane is not on are ignored: the peer sends them again.
//!
//! A rail that was lost and that the transport below has connected again is *tried* before it is used: the leader says
//! `try` on it, and the follower says it back.
//!
//! A message is one byte that says what it is, and its body: a frame, or numbers (`u64`, little-endian).

use crate::tcp::retained::Retained;
use crate::{LaneId, MAX_BACKLOG};

/// A frame of the lane.
const FRAME: u8 = 0;
/// How many frames have been received.
const ACKNOWLEDGE: u8 = 1;
/// A move's number and how many frames have been received: the first message on a rail that the lane moves to.
const RESUME: u8 = 2;
/// The peer is not to be heard any more.
const GIVE_UP: u8 = 3;
/// The number of the last move: the follower cannot go on where that went.
const ASK: u8 = 4;
/// Does this rail work? The answer is the same.
const TRY: u8 = 5;

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
    /// This side chooses the rail.
    leads: bool,
    /// The rail that it is on whenever that works.
    own: usize,
    rail: usize,
    state: State,
    /// By rail.
    rails: Vec<Rail>,
    /// How many moves there were.
    moves: u64,
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
    /// The peer has not resumed yet.
    Moving,
}

/// What is known of a rail.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum Rail {
    Works,
    Lost,
    /// It is connected again, and the follower has not answered on it yet.
    Tried,
}

impl Link {
    /// A lane that begins on a rail of its own. Of the two sides one `leads`.
    pub(super) fn new(lane: LaneId, rails: usize, leads: bool) -> Link {
        let own = usize::from(lane) % rails;
        Link {
            retained: Retained::default(),
            leads,
            own,
            rail: own,
            state: State::Up,
            rails: vec![Rail::Works; rails],
            moves: 0,
            received: 0,
            unacknowledged: (0, 0),
            lost: None,
        }
    }

    /// The rail that it is on, once the peer has resumed there.
    pub(super) fn settled(&self) -> Option<usize> {
        (self.state != State::Moving).then_some(self.rail)
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
        if self.lost.is_some() {
            return Ok(None);
        }
        let here = self.settled() == Some(rail);
        let (kind, body) = message.split_first().unwrap_or((&GIVE_UP, &[0]));
        let sound = match (*kind, body.len()) {
            (FRAME, 1..) if here => {
                self.account(wire, body.len());
                return Ok(Some(body));
            }
            (ACKNOWLEDGE, 8) if here => match self.retained.acknowledge(number(body)) {
                Ok(()) => true,
                Err(_) => return Err(self.give_up(wire, NEVER_SENT)),
            },
            // The peer sends again what it sent on a rail that the lane has left or has not come to yet.
            (FRAME, 1..) | (ACKNOWLEDGE, 8) => true,
            (RESUME, 16) => return self.resume(wire, rail, number(body), number(&body[8..])).map(|()| None),
            (ASK, 8) => self.asked(wire, rail, number(body)),
            (TRY, 0) => {
                self.tried(wire, rail);
                true
            }
            (GIVE_UP, 0) => return Err(self.end("it gave the session up")),
            _ => false,
        };
        if sound { Ok(None) } else { Err(self.give_up(wire, UNSOUND)) }
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

    /// The peer is on `rail` with a move, and has `count` frames.
    fn resume(&mut self, wire: &impl Wire, rail: usize, moved: u64, count: u64) -> Result<(), String> {
        if self.leads {
            if moved < self.moves {
                return Ok(());
            }
            if moved > self.moves || rail != self.rail || self.state != State::Moving {
                return Err(self.give_up(wire, UNSOUND));
            }
        } else {
            // One that another has overtaken on a rail that was quicker.
            if moved <= self.moves {
                return Ok(());
            }
            (self.rails[rail], self.moves) = (Rail::Works, moved);
            self.move_to(wire, rail);
        }
        if self.retained.rewind(count).is_err() {
            return Err(self.give_up(wire, NEVER_SENT));
        }
        self.state = State::Up;
        self.pump(wire);
        self.return_home(wire);
        Ok(())
    }

    /// The follower cannot go on where move number `moved` went, and says so on `rail`; `false` if it cannot say that.
    fn asked(&mut self, wire: &impl Wire, rail: usize, moved: u64) -> bool {
        if !self.leads || moved > self.moves {
            return false;
        }
        if moved == self.moves {
            if rail == self.rail {
                return false;
            }
            self.rails[self.rail] = Rail::Lost;
            // An answer may still come where it is tried.
            if self.rails[rail] == Rail::Lost {
                self.rails[rail] = Rail::Works;
            }
            self.lead_to(wire, rail);
        }
        true
    }

    /// The peer tries `rail`, or answers there.
    fn tried(&mut self, wire: &impl Wire, rail: usize) {
        if !self.leads {
            self.rails[rail] = Rail::Works;
            // Where it is not taken, the rail reports its loss.
            wire.put(rail, &[&[TRY]]);
        } else if self.rails[rail] == Rail::Tried {
            // Where it is not, the follower has asked for another one since.
            self.rails[rail] = Rail::Works;
            self.return_home(wire);
        }
    }

    /// Goes to the lane's own rail if it is elsewhere without need.
    fn return_home(&mut self, wire: &impl Wire) {
        let away = self.state == State::Up && self.rail != self.own;
        if self.leads && away && self.rails[self.own] == Rail::Works {
            self.lead_to(wire, self.own);
        }
    }

    fn lead_to(&mut self, wire: &impl Wire, rail: usize) {
        self.moves += 1;
        self.move_to(wire, rail);
    }

    fn move_to(&mut self, wire: &impl Wire, rail: usize) {
        (self.rail, self.state, self.unacknowledged) = (rail, State::Moving, (0, 0));
        // Where it is not taken, the rail reports its loss, and the lane moves on.
        wire.put(rail, &[&[RESUME], &self.moves.to_le_bytes(), &self.received.to_le_bytes()]);
    }

    /// A rail has lost the peer because of `why`. An error, with the same, if no other one works.
    pub(super) fn rail_lost(&mut self, wire: &impl Wire, rail: usize, why: &str) -> Result<(), String> {
        self.rails[rail] = Rail::Lost;
        // A follower that has asked on another rail may have asked on this one.
        let elsewhere = rail != self.rail && (self.leads || self.state != State::Moving);
        if self.lost.is_some() || elsewhere {
            return Ok(());
        }
        let count = self.rails.len();
        let next = |state| {
            let mut rails = (0..count).map(|step| (self.rail + step) % count);
            rails.find(|rail| self.rails[*rail] == state)
        };
        let Some(next) = next(Rail::Works).or_else(|| next(Rail::Tried)) else {
            return Err(self.end(why));
        };
        if self.leads {
            self.lead_to(wire, next);
        } else {
            self.state = State::Moving;
            wire.put(next, &[&[ASK], &self.moves.to_le_bytes()]);
        }
        Ok(())
    }

    /// A rail that had lost the peer is connected to it again.
    pub(super) fn rail_returned(&mut self, wire: &impl Wire, rail: usize) {
        if !self.leads {
            // It may be asked on; the leader tries it.
            self.rails[rail] = Rail::Works;
        } else if self.lost.is_none() {
            self.rails[rail] = Rail::Tried;
            wire.put(rail, &[&[TRY]]);
        }
    }

    /// Ends the lane, and has the peer end it.
    fn give_up(&mut self, wire: &impl Wire, why: &str) -> String {
        for rail in (0..self.rails.len()).filter(|rail| self.rails[*rail] != Rail::Lost) {
            wire.put(rail, &[&[GIVE_UP]]);
        }
        self.end(why)
    }

    fn end(&mut self, why: &str) -> String {
        self.retained = Retained::default();
        self.lost.get_or_insert_with(|| why.to_owned()).clone()
    }
}

/// The number that the first eight bytes are.
fn number(bytes: &[u8]) -> u64 {
    bytes.first_chunk().copied().map(u64::from_le_bytes).unwrap_or_default()
}

const NEVER_SENT: &str = "it says that it has frames which were never sent to it";
const UNSOUND: &str = "it sent a message that no sound node sends at that place";

/// A peer that sends what `data` says, on any rail, while rails are lost and return and frames are sent: whether it
/// follows, then in turn a byte of what, a byte of how much, and the bytes.
#[cfg(fuzzing)]
pub fn fuzz(data: &[u8]) {
    const RAILS: usize = 3;
    struct Takes;
    impl Wire for Takes {
        fn put(&self, _: usize, _: &[&[u8]]) -> bool {
            true
        }
    }
    let Some((&leads, mut rest)) = data.split_first() else { return };
    let mut link = Link::new(0, RAILS, leads & 1 == 1);
    while let Some((&[what, len], more)) = rest.split_first_chunk() {
        let (bytes, more) = more.split_at(usize::from(len).min(more.len()));
        rest = more;
        let (rail, lost) = (usize::from(what) % RAILS, link.lost.is_some());
        match usize::from(what) / RAILS % 5 {
            0 => assert_eq!(link.send(&Takes, 1 + bytes.len(), &[b"x", bytes]).is_err(), lost),
            1 => drop(link.rail_lost(&Takes, rail, "cut")),
            // A transport says so of a rail that was lost only.
            2 if link.rails[rail] == Rail::Lost => link.rail_returned(&Takes, rail),
            _ => match link.take(&Takes, rail, bytes) {
                Ok(Some(frame)) => assert!(!lost && rail == link.rail && frame.len() + 1 == bytes.len()),
                Ok(None) => {}
                Err(why) => assert!(!lost && !why.is_empty() && link.lost == Some(why)),
            },
        }
        let dead = link.rails[link.rail] == Rail::Lost && (link.leads || link.state != State::Moving);
        assert!(link.lost.is_some() || !dead, "a lane is on a rail that was lost");
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
        /// By rail: it is connected again, and that was not noticed.
        returned: [bool; RAILS],
    }

    impl End {
        fn new(lane: LaneId, leads: bool) -> End {
            End {
                link: Link::new(lane, RAILS, leads),
                out: Way::default(),
                sent: 0,
                got: Vec::new(),
                noticed: [false; RAILS],
                returned: [false; RAILS],
            }
        }

        fn send(&mut self) {
            self.link.send(&self.out, 8, &[&self.sent.to_le_bytes()]).unwrap();
            self.sent += 1;
        }

        /// Takes the next message of the other end on `rail`, if there is one.
        fn take(&mut self, other: &End, rail: usize) -> bool {
            let Some(message) = other.out.rails[rail].borrow_mut().pop_front() else { return false };
            // Nothing comes from a rail after the news that it is lost.
            if !self.noticed[rail]
                && let Some(frame) = self.link.take(&self.out, rail, &message).unwrap()
            {
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
            if !self.noticed[rail] {
                self.noticed[rail] = true;
                self.out.cut[rail].set(true);
                self.link.rail_lost(&self.out, rail, "cut").unwrap();
            }
        }

        /// It notices that the rail is back.
        fn greet(&mut self, rail: usize) {
            if std::mem::take(&mut self.returned[rail]) {
                self.link.rail_returned(&self.out, rail);
            }
        }
    }

    /// The first of them leads.
    fn ends(lane: LaneId) -> [End; 2] {
        [End::new(lane, true), End::new(lane, false)]
    }

    /// The rail is connected anew, once both ends have noticed that it was lost.
    fn connect(ends: &mut [End; 2], rail: usize) {
        if ends.iter().all(|end| end.noticed[rail]) {
            for end in ends {
                end.out.rails[rail].borrow_mut().clear();
                end.out.cut[rail].set(false);
                (end.noticed[rail], end.returned[rail]) = (false, true);
            }
        }
    }

    /// Everything on all rails arrives, and what is answered to it.
    fn settle(ends: &mut [End; 2]) {
        let [a, b] = ends;
        while (0..RAILS).any(|rail| a.take(b, rail) | b.take(a, rail)) {}
    }

    #[test]
    fn a_lane_moves_and_sends_again_what_the_peer_does_not_have() {
        let mut both = ends(0);
        let [a, b] = &mut both;
        (0..5).for_each(|_| a.send());
        assert!(b.take(a, 0) && b.take(a, 0));
        a.cut(0, 0);
        a.notice(0);
        a.send();
        assert!(b.take(a, 1), "a's resume takes b along");
        assert_eq!(b.link.settled(), Some(1));
        settle(&mut both);
        assert_eq!(both[1].got, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_follower_that_notices_first_has_the_leader_move() {
        let mut both = ends(0);
        both[1].cut(0, 0);
        both[1].send();
        both[1].notice(0);
        assert_eq!(both[1].link.settled(), None);
        settle(&mut both);
        assert_eq!(both[0].link.settled(), Some(1));
        assert_eq!(both[0].got, [0]);
    }

    #[test]
    fn a_lane_returns_to_its_own_rail_once_the_follower_has_answered_there() {
        let mut both = ends(0);
        for end in &mut both {
            end.cut(0, 0);
            end.notice(0);
        }
        settle(&mut both);
        assert_eq!(both[0].link.settled(), Some(1));
        connect(&mut both, 0);
        both[0].greet(0);
        assert_eq!(both[0].link.settled(), Some(1), "nobody has answered yet");
        both[0].send();
        settle(&mut both);
        assert_eq!(both.each_ref().map(|end| end.link.settled()), [Some(0); 2]);
        assert_eq!(both[1].got, [0]);
    }

    #[test]
    fn a_rail_that_is_connected_and_carries_nothing_is_not_used() {
        let mut both = ends(0);
        both.iter_mut().for_each(|end| end.notice(0));
        settle(&mut both);
        connect(&mut both, 0);
        both[0].greet(0);
        both[0].cut(0, 0);
        both[0].notice(0);
        both[0].send();
        settle(&mut both);
        assert_eq!(both[0].link.settled(), Some(1));
        assert_eq!(both[1].got, [0]);
    }

    #[test]
    fn a_follower_may_ask_on_a_rail_that_is_tried() {
        let mut both = ends(2);
        both.iter_mut().for_each(|end| end.notice(0));
        connect(&mut both, 0);
        both.iter_mut().for_each(|end| end.greet(0));
        both[1].notice(2);
        both[1].send();
        settle(&mut both);
        assert_eq!(both[0].link.settled(), Some(0));
        assert_eq!(both[0].got, [0]);
    }

    #[test]
    fn what_the_leader_said_on_a_rail_that_it_has_left_since_is_ignored() {
        let [mut a, mut b] = ends(0);
        a.notice(0);
        a.notice(1);
        assert!(b.take(&a, 2));
        // Its earlier resume on rail 1 comes late.
        let late = [&[RESUME][..], &1u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
        assert_eq!(b.link.take(&b.out, 1, &late), Ok(None));
        assert_eq!(b.link.settled(), Some(2));
    }

    #[test]
    fn with_the_last_rail_the_peer_is_lost_for_the_reason_that_the_rail_gave() {
        for leads in [true, false] {
            let mut a = End::new(1, leads);
            for rail in [1, 2] {
                a.link.rail_lost(&a.out, rail, "cut").unwrap();
            }
            assert_eq!(a.link.rail_lost(&a.out, 0, "its cable is cut"), Err("its cable is cut".into()));
            assert_eq!(a.link.send(&a.out, 1, &[b"x"]), Err("its cable is cut".into()));
        }
    }

    #[test]
    fn nonsense_ends_the_lane_on_both_sides() {
        let resume = [&[RESUME][..], &1u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
        let ask = |moved: u64| [&[ASK][..], &moved.to_le_bytes()].concat();
        let everybody =
            [&[][..], &[FRAME], &[9, 1], &[ACKNOWLEDGE, 1], &[RESUME, 0], &[TRY, 0], &[GIVE_UP, 1]];
        let (early, here) = (ask(1), ask(0));
        let to_leader = [&resume[..], &early, &here];
        let to_follower = [&here[..]];
        let cases = everybody.iter().flat_map(|nonsense| [(true, *nonsense), (false, *nonsense)]);
        let cases = cases.chain(to_leader.map(|nonsense| (true, nonsense)));
        for (leads, nonsense) in cases.chain(to_follower.map(|nonsense| (false, nonsense))) {
            let (mut a, mut b) = (End::new(0, leads), End::new(0, !leads));
            assert!(a.link.take(&a.out, 0, nonsense).is_err(), "{nonsense:?}");
            if let Some(farewell) = a.out.rails[0].borrow_mut().pop_front() {
                assert!(b.link.take(&b.out, 0, &farewell).is_err());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

        /// Two of three rails fail and return at any moment, for one end or both, with any part of what was under way:
        /// every frame comes once and in order, both ways, and in the end on the lane's own rail.
        #[test]
        fn nothing_is_lost_doubled_or_reordered(
            lane in 0..RAILS as u16,
            spared in 0..RAILS,
            events in prop::collection::vec((0u8..10, 0..2usize, 0..RAILS, 0..6usize), 1..300),
        ) {
            let mut both = ends(lane);
            for (event, who, rail, number) in events {
                match event {
                    0..=2 => both[who].send(),
                    3..=6 => {
                        let [a, b] = &mut both;
                        let (here, there) = if who == 0 { (a, &*b) } else { (b, &*a) };
                        here.take(there, rail);
                    }
                    7 => {
                        connect(&mut both, rail);
                        if number % 2 == 0 {
                            both[who].greet(rail);
                        }
                    }
                    8 => both[who].greet(rail),
                    _ if rail == spared => {}
                    _ => {
                        both[who].greet(rail);
                        both[who].cut(rail, number);
                        // It is noticed now, or later.
                        if number % 2 == 0 {
                            both[who].notice(rail);
                        }
                    }
                }
            }
            // In the end every cut is noticed on both sides, after what still arrives.
            for rail in 0..RAILS {
                let cut = both.iter().any(|end| end.out.cut[rail].get());
                both.iter_mut().for_each(|end| end.greet(rail));
                let [a, b] = &mut both;
                while cut && (a.take(b, rail) | b.take(a, rail)) {}
                both.iter_mut().filter(|_| cut).for_each(|end| end.notice(rail));
            }
            settle(&mut both);
            for (here, there) in [(0, 1), (1, 0)] {
                let all: Vec<u64> = (0..both[there].sent).collect();
                prop_assert_eq!(&both[here].got, &all);
            }
            for rail in 0..RAILS {
                connect(&mut both, rail);
                both.iter_mut().for_each(|end| end.greet(rail));
            }
            both.iter_mut().for_each(End::send);
            settle(&mut both);
            for (here, there) in [(0, 1), (1, 0)] {
                prop_assert_eq!(both[here].got.len() as u64, both[there].sent);
                prop_assert_eq!(both[here].link.settled(), Some(usize::from(lane) % RAILS));
            }
        }
    }
}
