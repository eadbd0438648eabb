//! Keeps the lanes of a machine of several rails connected: moves them when a rail dies, and back when it returns.
//!
//! ```text
//!              told by the lane's receiver                  a connection over any rail
//! up on a rail ──────────────────────────> down since t ──────────────────────────────> up on that rail
//!      ^                                       │ RESUME over, or every rail refuses          │
//!      │                                       └──> the peer is lost                         │
//!      └────────── every second, if that is not the lane's own rail: its own is tried ───────┘
//! ```
//!
//! The node with the higher id connects, as in the mesh. One thread does all this; it sleeps unless something happens.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::doors::{Doors, Lanes, Ready};
use super::lane::Lane;
use crate::{FabricError, LaneId, NodeId};

/// How long a lane may be down before the peer is lost.
const RESUME: Duration = Duration::from_secs(3);

/// How often a lane that is not on its own rail tries to get back to it.
const RETURN: Duration = Duration::from_secs(1);

/// What the lanes tell the keeper.
pub(super) struct Mailbox {
    broken: Mutex<Vec<(NodeId, LaneId)>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Mailbox {
    pub(super) fn new() -> Result<Mailbox, FabricError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|error| FabricError::Io { what: "creating an eventfd", source: error.into() })?;
        Ok(Mailbox { broken: Mutex::default(), wake, stop: AtomicBool::new(false) })
    }

    /// The connection of a lane is over.
    pub(super) fn broken(&self, peer: NodeId, lane: LaneId) {
        base::lock(&self.broken).push((peer, lane));
        self.ring();
    }

    /// The transport is gone: there is nothing to keep.
    pub(super) fn stop(&self) {
        self.stop.store(true, Relaxed);
        self.ring();
    }

    fn ring(&self) {
        // Fails only if it has been rung 2^64 times and not been heard.
        let _ = self.wake.write(1);
    }

    fn take(&self) -> Vec<(NodeId, LaneId)> {
        // Fails only if it was not rung.
        let _ = self.wake.read();
        std::mem::take(&mut base::lock(&self.broken))
    }
}

/// Where a lane is.
struct Place {
    rail: usize,
    down: Option<Instant>,
    /// Attempts since then that were refused, one after the other.
    refused: usize,
    /// When its own rail was tried last.
    tried: Instant,
}

/// The lanes as the doors see them.
struct Keeper {
    own: NodeId,
    rails: usize,
    plaintext: bool,
    lanes: Vec<Weak<Lane>>,
    places: HashMap<(NodeId, LaneId), Place>,
    /// Lanes that must be connected again.
    dial: Vec<(NodeId, LaneId)>,
}

/// Starts the thread. `rails` says on which rail each lane to each peer is.
pub(super) fn start(
    doors: Doors,
    mailbox: Arc<Mailbox>,
    lanes: &[Arc<Lane>],
    places: Vec<(NodeId, LaneId, usize)>,
    plaintext: bool,
) -> Result<(), FabricError> {
    let tried = Instant::now();
    let place = |(peer, lane, rail)| ((peer, lane), Place { rail, down: None, refused: 0, tried });
    let keeper = Keeper {
        own: doors.own.identity.node,
        rails: doors.rails(),
        plaintext,
        lanes: lanes.iter().map(Arc::downgrade).collect(),
        places: places.into_iter().map(place).collect(),
        dial: Vec::new(),
    };
    let run = move || {
        // Lanes that are down stop the guest.
        base::thread::make_urgent();
        run(keeper, doors, &mailbox);
    };
    let started = thread::Builder::new().name("rails".into()).spawn(run);
    started.map(drop).map_err(|source| FabricError::Io { what: "starting the rails' thread", source })
}

fn run(mut keeper: Keeper, mut doors: Doors, mailbox: &Mailbox) {
    doors.patient = false;
    while !mailbox.stop.load(Relaxed) {
        let now = Instant::now();
        for (peer, lane) in mailbox.take() {
            keeper.broken(peer, lane, now);
        }
        let next = keeper.look(now, &mut doors);
        for (peer, lane) in std::mem::take(&mut keeper.dial) {
            if !doors.is_dialling(peer, lane) {
                let rail = keeper.places.get(&(peer, lane)).map_or(0, |place| place.rail + 1);
                doors.dial(peer, lane, rail, false);
            }
        }
        if let Err(error) = doors.turn(next, Some(mailbox.wake.as_fd()), &mut keeper) {
            tracing::warn!(%error, "lanes cannot move to another rail for now");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Keeper {
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
        let Some(place) = self.places.get_mut(&(peer, lane)) else { return };
        if place.down.is_none() {
            tracing::warn!("lane {lane} to {peer} lost rail {} and moves to another", place.rail);
            (place.down, place.refused) = (Some(now), 0);
        }
        if peer < self.own {
            self.dial.push((peer, lane));
        }
    }

    /// Gives up peers whose time is over, and has lanes try their own rails; when to look again.
    fn look(&mut self, now: Instant, doors: &mut Doors) -> Instant {
        let mut next = now + Duration::from_secs(60);
        let (mut over, mut back) = (Vec::new(), Vec::new());
        for (&(peer, lane), place) in &mut self.places {
            let own_rail = usize::from(lane) % self.rails;
            if let Some(since) = place.down {
                if now >= since + RESUME || place.refused >= 2 * self.rails {
                    over.push((peer, lane));
                }
                next = next.min(since + RESUME);
            } else if peer < self.own && place.rail != own_rail {
                if now >= place.tried + RETURN {
                    place.tried = now;
                    back.push((peer, lane, own_rail));
                }
                next = next.min(place.tried + RETURN);
            }
        }
        for (peer, lane) in over {
            self.places.remove(&(peer, lane));
            doors.hang_up(peer, lane);
            if let Some(lane) = self.lane(lane) {
                lane.give_up(peer, "no rail to it is left");
            }
        }
        for (peer, lane, rail) in back {
            if !doors.is_dialling(peer, lane) {
                doors.dial(peer, lane, rail, true);
            }
        }
        next
    }
}

impl Lanes for Keeper {
    fn received(&mut self, peer: NodeId, lane: LaneId) -> Result<u64, String> {
        if !self.places.contains_key(&(peer, lane)) {
            return Err(format!("{peer} was lost before"));
        }
        let count = self.lane(lane).ok_or("this node has ended")?.suspend(peer)?;
        if let Some(place) = self.places.get_mut(&(peer, lane)) {
            place.down.get_or_insert_with(Instant::now);
        }
        Ok(count)
    }

    fn up(&mut self, Ready { met, socket, rail }: Ready) {
        let (peer, lane) = (met.peer, met.lane);
        let Some(link) = self.lane(lane) else { return };
        match link.resume(peer, socket, met, self.plaintext) {
            Ok(()) => {
                if let Some(place) = self.places.get_mut(&(peer, lane)) {
                    tracing::info!("lane {lane} to {peer} is on rail {rail}, and was on rail {}", place.rail);
                    *place = Place { rail, down: None, refused: 0, tried: Instant::now() };
                }
            }
            Err(error) => {
                self.places.remove(&(peer, lane));
                tracing::warn!("lane {lane} could not move: {error}");
            }
        }
    }

    fn failed(&mut self, peer: NodeId, lane: Option<LaneId>, _: &str, refused: bool) {
        let Some((lane, place)) = lane.and_then(|lane| Some((lane, self.places.get_mut(&(peer, lane))?)))
        else {
            return;
        };
        place.refused = if refused { place.refused + 1 } else { 0 };
        // An attempt to return that broke off in its middle leaves the lane without any connection.
        if place.down.is_some() && peer < self.own {
            self.dial.push((peer, lane));
        }
    }
}
