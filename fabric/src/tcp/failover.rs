//! Failover between the rails of a machine that has several: lanes move when a rail dies, and back when it
//! returns.
//!
//! ```text
//!              told by the lane's receiver                  a connection over any rail
//! up on a rail ──────────────────────────> down since t ──────────────────────────────> up on that rail
//!      ^                                       │ RESUME over, or every rail refuses          │
//!      │                                       └──> the peer is lost                         │
//!      └────────── every second, if that is not the lane's own rail: its own is tried ───────┘
//! ```
//!
//! The node with the higher id connects, as in the mesh. One thread does all this; it sleeps unless something
//! happens.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::connecting::{Connecting, Connection, Lanes};
use super::lane::Lane;
use super::mailbox::Mailbox;
use crate::{FabricError, LaneId, NodeId};

/// How long a lane may be down before the peer is lost.
const RESUME: Duration = Duration::from_secs(3);

/// How often a lane that is not on its own rail tries to get back to it.
const RETURN: Duration = Duration::from_secs(1);

/// The rail that a lane is on, and what became of it.
struct Position {
    rail: usize,
    down: Option<Instant>,
    /// Attempts since then that were refused, one after the other.
    refused: usize,
    /// When its own rail was tried last.
    tried: Instant,
}

/// The lanes of all peers.
struct Failover {
    own: NodeId,
    rails: usize,
    plaintext: bool,
    lanes: Vec<Weak<Lane>>,
    positions: HashMap<(NodeId, LaneId), Position>,
    /// Lanes that must be connected again.
    dial: Vec<(NodeId, LaneId)>,
}

/// Starts the thread. `rails` says on which rail each lane to each peer is.
pub(super) fn start(
    connecting: Connecting,
    mailbox: Arc<Mailbox>,
    lanes: &[Arc<Lane>],
    rails: Vec<(NodeId, LaneId, usize)>,
    plaintext: bool,
) -> Result<(), FabricError> {
    let tried = Instant::now();
    let position = |(peer, lane, rail)| ((peer, lane), Position { rail, down: None, refused: 0, tried });
    let failover = Failover {
        own: connecting.own.identity.node,
        rails: connecting.rails(),
        plaintext,
        lanes: lanes.iter().map(Arc::downgrade).collect(),
        positions: rails.into_iter().map(position).collect(),
        dial: Vec::new(),
    };
    let run = move || {
        // Lanes that are down stop the guest.
        base::thread::make_urgent();
        run(failover, connecting, &mailbox);
    };
    let started = thread::Builder::new().name("rails".into()).spawn(run);
    started.map(drop).map_err(|source| FabricError::Io { what: "starting the rails' thread", source })
}

fn run(mut failover: Failover, mut connecting: Connecting, mailbox: &Mailbox) {
    connecting.patient = false;
    while !mailbox.is_stopped() {
        let now = Instant::now();
        for (peer, lane) in mailbox.take() {
            failover.broken(peer, lane, now);
        }
        let next = failover.check_times(now, &mut connecting);
        for (peer, lane) in std::mem::take(&mut failover.dial) {
            if !connecting.is_dialling(peer, lane) {
                let rail = failover.positions.get(&(peer, lane)).map_or(0, |position| position.rail + 1);
                connecting.dial(peer, lane, rail, false);
            }
        }
        if let Err(error) = connecting.turn(next, Some(mailbox.as_fd()), &mut failover) {
            tracing::warn!(%error, "lanes cannot move to another rail for now");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Failover {
    fn lane(&self, lane: LaneId) -> Option<Arc<Lane>> {
        self.lanes.get(usize::from(lane))?.upgrade()
    }

    /// A lane says that its connection is over; it may have another by now.
    fn broken(&mut self, peer: NodeId, lane: LaneId, now: Instant) {
        if self.lane(lane).is_some_and(|lane| lane.is_down(peer)) {
            self.down(peer, lane, now);
        }
    }

    fn down(&mut self, peer: NodeId, lane: LaneId, now: Instant) {
        let Some(position) = self.positions.get_mut(&(peer, lane)) else { return };
        if position.down.is_none() {
            tracing::warn!("lane {lane} to {peer} lost rail {} and moves to another", position.rail);
            (position.down, position.refused) = (Some(now), 0);
        }
        if peer < self.own {
            self.dial.push((peer, lane));
        }
    }

    /// Gives up peers whose time is over, and has lanes try their own rails; when to do so again.
    fn check_times(&mut self, now: Instant, connecting: &mut Connecting) -> Instant {
        let mut next = now + Duration::from_secs(60);
        let (mut over, mut back) = (Vec::new(), Vec::new());
        for (&(peer, lane), position) in &mut self.positions {
            let own_rail = usize::from(lane) % self.rails;
            if let Some(since) = position.down {
                if now >= since + RESUME || position.refused >= 2 * self.rails {
                    over.push((peer, lane));
                }
                next = next.min(since + RESUME);
            } else if peer < self.own && position.rail != own_rail {
                if now >= position.tried + RETURN {
                    position.tried = now;
                    back.push((peer, lane, own_rail));
                }
                next = next.min(position.tried + RETURN);
            }
        }
        for (peer, lane) in over {
            self.positions.remove(&(peer, lane));
            connecting.hang_up(peer, lane);
            if let Some(lane) = self.lane(lane) {
                lane.give_up(peer, "no rail to it is left");
            }
        }
        for (peer, lane, rail) in back {
            if !connecting.is_dialling(peer, lane) {
                connecting.dial(peer, lane, rail, true);
            }
        }
        next
    }
}

impl Lanes for Failover {
    fn received(&mut self, peer: NodeId, lane: LaneId) -> Result<u64, String> {
        if !self.positions.contains_key(&(peer, lane)) {
            return Err(format!("{peer} was lost before"));
        }
        let count = self.lane(lane).ok_or("this node has ended")?.suspend(peer)?;
        if let Some(position) = self.positions.get_mut(&(peer, lane)) {
            position.down.get_or_insert_with(Instant::now);
        }
        Ok(count)
    }

    fn up(&mut self, connection: Connection) {
        let (peer, lane, rail) = (connection.met.peer, connection.met.lane, connection.rail);
        let Some(link) = self.lane(lane) else { return };
        match link.resume(connection, self.plaintext) {
            Ok(()) => {
                if let Some(position) = self.positions.get_mut(&(peer, lane)) {
                    tracing::info!(
                        "lane {lane} to {peer} is on rail {rail}, and was on rail {}",
                        position.rail
                    );
                    *position = Position { rail, down: None, refused: 0, tried: Instant::now() };
                }
            }
            Err(error) => {
                self.positions.remove(&(peer, lane));
                tracing::warn!("lane {lane} could not move: {error}");
            }
        }
    }

    fn failed(&mut self, peer: NodeId, lane: Option<LaneId>, _: &str, refused: bool) {
        let Some((lane, position)) =
            lane.and_then(|lane| Some((lane, self.positions.get_mut(&(peer, lane))?)))
        else {
            return;
        };
        position.refused = if refused { position.refused + 1 } else { 0 };
        // An attempt to return that broke off in its middle leaves the lane without any connection.
        if position.down.is_some() && peer < self.own {
            self.dial.push((peer, lane));
        }
    }
}
