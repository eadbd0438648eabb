//! One shard's thread: faults and messages in, the protocol's effects out.
//!
//! [`Shard`] is the thread and [`Core`] what it works with, a part for each concern:
//! - `faults`: threads that are stopped at pages, and since when other nodes are asked for these.
//! - `prefetch`: what is asked for ahead of its need.
//! - `holds`: who waits for which page, and pages that are kept after they were won.
//! - `devices`: what devices and the balloon wait for.
//! - `shipping`: vCPUs that were called out because their page stays where it is.
//! - `mapping`: the guest view's page tables and the frames behind them.
//! - `effects`: what the protocol asks for, carried out with these.

mod devices;
mod effects;
mod faults;
mod holds;
mod mapping;
mod prefetch;
mod shipping;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver as Inbox;
use fabric::{NodeId, Receiver, Transport};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;

use self::devices::Devices;
use self::faults::Misses;
use self::holds::Holds;
use self::mapping::Mapping;
use self::prefetch::Prefetch;
use self::shipping::{PATIENCE, Shipping};
use super::budget::copies_of_shard;
use super::chains::Chains;
use super::outbox::Outbox;
use super::request::Request;
use super::{EngineConfig, EngineError};
use crate::memory::DualMemory;
use crate::page::{BLOCK, Shards};
use crate::protocol::{Body, Effect, Eviction, Kind, Message, Protocol, RunPolicy};
use crate::stats::ShardStats;
use crate::trace::{self, Event};
use crate::uffd::Uffd;

/// Frames whose pages went away, kept this many at most before they are given back to the host; fewer where
/// the node has a budget, in which they count.
const GARBAGE: usize = 4096;

/// The longest sleep, so that a stuck fault is noticed.
const TICK: Duration = Duration::from_secs(1);

/// Rounds of work between two checks of a shard that is never idle for something stuck.
const BUSY_ROUNDS: u32 = 256;

/// A shard, to be run by a thread of its own.
pub struct Shard {
    core: Core,
    receiver: Box<dyn Receiver>,
    spin: Duration,
    stuck: Duration,
}

/// All of the shard but its receiver, which calls back into it.
struct Core {
    protocol: Protocol,
    /// What the protocol asks for, until it is carried out.
    effects: Vec<Effect>,
    stats: Arc<ShardStats>,
    outbox: Outbox,
    mapping: Mapping,
    misses: Misses,
    prefetch: Prefetch,
    holds: Holds,
    devices: Devices,
    shipping: Shipping,
    /// When it was last looked for what is stuck.
    looked: Instant,
    /// What began before is looked at as if it had begun then.
    forgiven: Instant,
}

impl Shard {
    /// Shard `id`, which watches its part of `memory` from now on.
    ///
    /// # Errors
    /// [`EngineError::Setup`]: userfaultfd, the transport or the budget does not allow it.
    pub fn new(
        config: &EngineConfig,
        shards: Shards,
        id: u16,
        memory: Arc<DualMemory>,
        transport: Arc<dyn Transport>,
        stats: Arc<ShardStats>,
        chains: Arc<Chains>,
    ) -> Result<Shard, EngineError> {
        let mut protocol =
            Protocol::new(config.node, Arc::new(config.homes.clone()), BLOCK, RunPolicy::default());
        let mut most_garbage = GARBAGE;
        if let Some(budget) = config.budget {
            let copies = copies_of_shard(budget, &config.homes, config.node, shards.count())?;
            most_garbage = (copies / 16).min(GARBAGE);
            protocol.set_budget(copies - most_garbage, Eviction::Clock);
        }
        let mapping = Mapping::new(config, shards, id, memory, most_garbage, stats.clone())?;
        let lane = config.first_lane + id;
        let receiver = transport
            .take_receiver(lane)
            .ok_or_else(|| EngineError::Setup(format!("the transport has no lane {lane} for shard {id}")))?;
        let core = Core {
            protocol,
            effects: Vec::with_capacity(64),
            stats,
            outbox: Outbox::new(transport, lane),
            mapping,
            misses: Misses::new(),
            prefetch: Prefetch::new(config.homes.clone()),
            holds: Holds::new(chains),
            devices: Devices::default(),
            shipping: Shipping::default(),
            looked: Instant::now(),
            forgiven: Instant::now(),
        };
        Ok(Shard { core, receiver, spin: config.spin, stuck: config.stuck })
    }

    /// What watches this shard's pages. When it is closed, the kernel lets who touches a page that is not
    /// here go on with zeroes.
    pub fn uffd(&self) -> Arc<Uffd> {
        self.core.mapping.uffd().clone()
    }

    /// Works until told to stop.
    pub fn run(
        mut self,
        inbox: &Inbox<Request>,
        bell: &EventFd,
        stop: &AtomicBool,
    ) -> Result<(), EngineError> {
        trace::event(Event::ShardThread, self.core.outbox.lane().into(), 0);
        if !base::thread::make_urgent() {
            tracing::debug!("no right to a real-time priority: page faults may wait for a time slice");
        }
        let mut idle_since: Option<Instant> = None;
        let mut busy = 0u32;
        while !stop.load(Ordering::Acquire) {
            for request in inbox.try_iter() {
                self.core.request(request)?;
            }
            if self.work()? {
                idle_since = None;
                busy = busy.wrapping_add(1);
                if busy.is_multiple_of(BUSY_ROUNDS) {
                    self.core.check_stuck(self.stuck)?;
                }
                continue;
            }
            let now = Instant::now();
            if now - *idle_since.get_or_insert(now) < self.spin {
                std::hint::spin_loop();
                continue;
            }
            self.core.collect_garbage()?;
            self.core.check_stuck(self.stuck)?;
            if self.receiver.arm()? {
                continue;
            }
            if self.sleep(bell)? {
                // Who rang has asked for something, or wants this to stop; another may have taken the ring.
                let _ = bell.read();
            }
        }
        Ok(())
    }

    /// One round over everything that may have something to do; whether anything had.
    fn work(&mut self) -> Result<bool, EngineError> {
        let Shard { core, receiver, .. } = self;
        // First: a demand for a page whose hold is over must not wait.
        let released = core.release_due()?;
        let frames = core.together(|core| {
            let mut result = Ok(());
            let frames = receiver.poll(&mut |from, frame| {
                if result.is_ok() {
                    result = core.receive(from, frame);
                }
            });
            result.map(|()| frames)
        })??;
        let faults = core.take_faults()?;
        core.fetch_unshippable()?;
        Ok(frames + faults + released > 0)
    }

    /// Waits for something to do; whether the bell rang.
    fn sleep(&self, bell: &EventFd) -> Result<bool, EngineError> {
        // A hold that ends matters only to who waits for it; the others end when something happens.
        let now = self.core.holds.now();
        let next = self.core.holds.next_look().map(|look_at| look_at.saturating_sub(now));
        let tick = if self.core.shipping.is_at_rest() { TICK } else { PATIENCE };
        let timeout = next.map_or(tick, Duration::from_nanos).min(tick);
        let mut fds = [self.receiver.fd(), self.core.mapping.uffd().as_fd(), bell.as_fd()]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match ppoll(&mut fds, Some(TimeSpec::from_duration(timeout)), None) {
            Ok(_) => Ok(fds[2].any() == Some(true)),
            Err(nix::Error::EINTR) => Ok(false),
            Err(e) => Err(EngineError::System { what: "wait for work", source: e.into() }),
        }
    }
}

impl Core {
    fn request(&mut self, request: Request) -> Result<(), EngineError> {
        match request {
            Request::Describe(reply) => {
                // Who looks at a node at rest does not count what it could give back at once.
                self.collect_garbage()?;
                // Who asked may have stopped waiting.
                drop(reply.send(self.protocol.describe()));
                Ok(())
            }
            Request::Reconsider => {
                self.holds.reconsider(self.holds.now());
                Ok(())
            }
            Request::Discard(pages, done) => self.discard(pages, done),
            Request::Direct(job) => self.direct(job),
            Request::Ship(vcpus, shipping) => {
                self.ship_for(vcpus, shipping);
                Ok(())
            }
            Request::Operate { page, token, operation } => self.operate(page, token, operation),
            Request::SetClass(page, class) => {
                self.protocol.set_class(page, class);
                Ok(())
            }
        }
    }

    fn receive(&mut self, from: NodeId, frame: &[u8]) -> Result<(), EngineError> {
        let homes = self.mapping.homes();
        let (message, body) = Message::parse(frame, homes.nodes(), homes.pages())
            .map_err(|why| fabric::FabricError::PeerLost { peer: from, why: format!("it {why}") })?;
        ShardStats::count(&self.stats.messages_received);
        trace::event(
            Event::Receive,
            message.page.0,
            u64::from(message.kind.code()) << 16 | u64::from(from.0),
        );
        let zeroes = self.mapping.surrender(message.page, self.protocol.untouched(&message))?;
        self.set_time();
        self.protocol.message(from, message, zeroes, &mut self.effects)?;
        self.apply(body)?;
        if let Kind::Data { .. } = message.kind {
            let window = self.prefetch.arrived(message.page);
            self.fetch(window)?;
        }
        self.miss_again(message.page);
        Ok(())
    }

    /// Tells the protocol the time, by which pages have their classes.
    fn set_time(&mut self) {
        if !self.shipping.is_on() {
            return;
        }
        self.protocol.set_time(self.holds.now() / 1000);
    }

    /// Releases pages that were kept long enough.
    fn release_due(&mut self) -> Result<usize, EngineError> {
        let mut released = 0;
        while let Some((page, chain)) = self.holds.due() {
            self.protocol.release(page, &mut self.effects);
            if !self.effects.is_empty() {
                self.holds.broken(chain);
            }
            self.apply(Body::Absent)?;
            released += 1;
        }
        Ok(released)
    }

    /// Whatever waits is watched: who touched a page, whether its miss began then or when it was asked for
    /// ahead of its need; devices; who gives pages up; and vCPUs whose instructions were shipped.
    fn check_stuck(&mut self, limit: Duration) -> Result<(), EngineError> {
        let now = Instant::now();
        if now - std::mem::replace(&mut self.looked, now) > 4 * TICK {
            // This node stood still, and the others may have: what waits has waited since now.
            self.forgiven = now;
        }
        if now - self.forgiven <= limit {
            return Ok(());
        }
        let is_late = |since: Instant| now.saturating_duration_since(since) > limit;
        let (what, page) = if let Some(page) = self.holds.waits_for_longer_than(limit, self.holds.now()) {
            ("a page fault", Some(page))
        } else if let Some(page) = self.misses.find(is_late) {
            ("a page that must come", Some(page))
        } else if self.devices.jobs.oldest().is_some_and(is_late) {
            ("a device's access to memory", None)
        } else if self.devices.discards.stands_still_since().is_some_and(is_late) {
            ("the giving up of pages that nobody needs", None)
        } else if let Some(page) = self.shipping.find(is_late) {
            ("an instruction that was shipped", Some(page))
        } else {
            return Ok(());
        };
        let page = page.map(|page| format!("page {:#x}, rights {:?}; ", page.0, self.protocol.rights(page)));
        let state = page.unwrap_or_default() + &self.protocol.describe().join("; ");
        Err(EngineError::Stuck { what, seconds: limit.as_secs(), state })
    }
}
