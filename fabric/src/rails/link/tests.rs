//! Two ends of a lane over rails that fail and return.

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

/// The rail is connected again, once both ends have noticed that it was lost.
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
    let everybody = [&[][..], &[FRAME], &[9, 1], &[ACKNOWLEDGE, 1], &[RESUME, 0], &[TRY, 0], &[GIVE_UP, 1]];
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

    /// Two of three rails fail and return at any moment, for one end or both, with any part of what was under
    /// way: every frame comes once and in order, both ways, and in the end on the lane's own rail.
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
