//! The link of one lane to one peer over several rails, without any I/O: the rail that it is on, and what is
//! to be sent again.
//!
//! One side *leads*: it chooses the rail. The other follows, and asks for another rail when its own lost the
//! peer.
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
//! Moves are numbered, so that what is said of an earlier one, and may come late on another rail, is known as
//! such. Frames on a rail that the lane is not on are ignored: the peer sends them again.
//!
//! A rail that was lost and that the transport below has connected again is *tried* before it is used: the
//! leader says `try` on it, and the follower says it back.
//!
//! A message is one byte that says what it is, and its body: a frame, or numbers (`u64`, little-endian).

use crate::resend::{NeverSent, Retained, Unacknowledged};
use crate::transport::too_far_behind;
use crate::{LaneId, MAX_BACKLOG};

/// A frame of the lane.
const FRAME: u8 = 0;
/// How many frames have been received.
const ACKNOWLEDGE: u8 = 1;
/// A move's number and how many frames have been received: the first message on a rail that the lane moves
/// to.
const RESUME: u8 = 2;
/// The peer is not to be heard any more.
const GIVE_UP: u8 = 3;
/// The number of the last move: the follower cannot go on where that went.
const ASK: u8 = 4;
/// Does this rail work? The answer is the same.
const TRY: u8 = 5;

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
    state: LinkState,
    /// By rail.
    rails: Vec<Rail>,
    /// How many moves there were.
    moves: u64,
    /// Frames received since the beginning.
    received: u64,
    unacknowledged: Unacknowledged,
    lost: Option<String>,
}

#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum LinkState {
    /// Frames travel on the rail.
    Up,
    /// The rail took no frame: it is about to report why.
    Stalled,
    /// The peer has not resumed yet.
    Moving,
}

/// The state of a rail, as far as it is known.
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
            state: LinkState::Up,
            rails: vec![Rail::Works; rails],
            moves: 0,
            received: 0,
            unacknowledged: Unacknowledged::default(),
            lost: None,
        }
    }

    /// The rail that it is on, once the peer has resumed there.
    pub(super) fn settled(&self) -> Option<usize> {
        (self.state != LinkState::Moving).then_some(self.rail)
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
            return Err(self.give_up(wire, &too_far_behind()));
        }
        self.pump(wire);
        Ok(())
    }

    fn pump(&mut self, wire: &impl Wire) {
        while self.state == LinkState::Up
            && let Some([front, back]) = self.retained.unsent()
        {
            if wire.put(self.rail, &[&[FRAME], front, back]) {
                self.retained.sent();
            } else {
                self.state = LinkState::Stalled;
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
        let is_in_place = match (*kind, body.len()) {
            (FRAME, 1..) if here => {
                self.account(wire, body.len());
                return Ok(Some(body));
            }
            (ACKNOWLEDGE, 8) if here => match self.retained.acknowledge(number(body)) {
                Ok(()) => true,
                Err(_) => return Err(self.give_up(wire, &NeverSent.to_string())),
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
        if is_in_place { Ok(None) } else { Err(self.give_up(wire, OUT_OF_PLACE)) }
    }

    /// Counts a frame, and acknowledges when it is time.
    fn account(&mut self, wire: &impl Wire, bytes: usize) {
        self.received += 1;
        if self.unacknowledged.add(1, bytes as u64) {
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
            if moved > self.moves || rail != self.rail || self.state != LinkState::Moving {
                return Err(self.give_up(wire, OUT_OF_PLACE));
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
            return Err(self.give_up(wire, &NeverSent.to_string()));
        }
        self.state = LinkState::Up;
        self.pump(wire);
        self.return_home(wire);
        Ok(())
    }

    /// The follower cannot go on where move number `moved` went, and says so on `rail`; `false` if it cannot
    /// say that.
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
        let away = self.state == LinkState::Up && self.rail != self.own;
        if self.leads && away && self.rails[self.own] == Rail::Works {
            self.lead_to(wire, self.own);
        }
    }

    fn lead_to(&mut self, wire: &impl Wire, rail: usize) {
        self.moves += 1;
        self.move_to(wire, rail);
    }

    fn move_to(&mut self, wire: &impl Wire, rail: usize) {
        (self.rail, self.state, self.unacknowledged) = (rail, LinkState::Moving, Unacknowledged::default());
        // Where it is not taken, the rail reports its loss, and the lane moves on.
        wire.put(rail, &[&[RESUME], &self.moves.to_le_bytes(), &self.received.to_le_bytes()]);
    }

    /// A rail has lost the peer because of `why`. An error, with the same, if no other one works.
    pub(super) fn rail_lost(&mut self, wire: &impl Wire, rail: usize, why: &str) -> Result<(), String> {
        self.rails[rail] = Rail::Lost;
        // A follower that has asked on another rail may have asked on this one.
        let elsewhere = rail != self.rail && (self.leads || self.state != LinkState::Moving);
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
            self.state = LinkState::Moving;
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

const OUT_OF_PLACE: &str = "it sent a message that no node sends at that place";

/// A peer that sends what `data` says, on any rail, while rails are lost and return and frames are sent:
/// whether it follows, then in turn a byte of what, a byte of how much, and the bytes.
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
        let dead = link.rails[link.rail] == Rail::Lost && (link.leads || link.state != LinkState::Moving);
        assert!(link.lost.is_some() || !dead, "a lane is on a rail that was lost");
    }
}

#[cfg(test)]
mod tests;
