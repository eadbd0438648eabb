//! One shard's thread: faults and messages in, the protocol's effects out.

mod effects;

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver as Inbox, Sender};
use fabric::{LaneId, NodeId, Receiver, Transport};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;

use self::effects::{body_of, is_zero};
use super::ahead::{ReadAhead, Window};
use super::budget::copies_of_shard;
use super::direct::{Job, Jobs};
use super::discard::Discards;
use super::hold::held::cpu_time;
use super::hold::{Claim, HoldPolicy, Holds};
use super::outbox::Outbox;
use super::recall::Recall;
use super::ship::{Asked, Called, PATIENCE, Vcpus};
use super::{EngineConfig, EngineError, recall};
use crate::memory::DualMemory;
use crate::page::{BLOCK, Homes, PAGE_SIZE, Page, Shards};
use crate::protocol::{
    Body, Class, Effect, Eviction, Kind, Message, Operation, PageMap, Protocol, Rights, RunPolicy, Shipping,
};
use crate::stats::ShardStats;
use crate::trace::{self, Event};
use crate::uffd::{Fault, Mode, Uffd};

/// What other threads may ask of a shard.
pub enum Request {
    /// What is under way.
    Describe(Sender<Vec<String>>),
    /// Nobody needs the content of these pages of this shard, of one home and one block.
    Discard(Range<u64>, Sender<()>),
    /// A device reads or overwrites pages of this shard.
    Direct(Box<Job>),
    /// Faults of these vCPUs may be answered by shipping.
    Ship(Arc<dyn Vcpus>, Shipping),
    /// A vCPU does this with a page.
    Operate { page: Page, token: u32, operation: Operation },
    /// A page of this home is of this class.
    SetClass(Page, Class),
}

/// Frames whose pages went away, kept this many at most before they are given back to the host; fewer where the
/// node has a budget, in which they count.
const GARBAGE: usize = 4096;

/// The longest sleep, so that a stuck fault is noticed.
const TICK: Duration = Duration::from_secs(1);

pub struct Shard {
    core: Core,
    receiver: Box<dyn Receiver>,
    spin: Duration,
    stuck: Duration,
}

/// All of the shard but its receiver, which calls back into it.
struct Core {
    homes: Homes,
    home: std::ops::Range<u64>,
    lane: LaneId,
    protocol: Protocol,
    memory: Arc<DualMemory>,
    uffd: Arc<Uffd>,
    transport: Arc<dyn Transport>,
    stats: Arc<ShardStats>,
    effects: Vec<Effect>,
    policy: Arc<HoldPolicy>,
    holds: Holds,
    misses: Vec<MissClock>,
    /// The vCPUs whose faults may be answered by shipping, if anything is shipped.
    vcpus: Option<Arc<dyn Vcpus>>,
    /// Which of them were called out.
    called: Vec<Called>,
    /// Operations of vCPUs that are under way.
    asked: Vec<Asked>,
    /// Pages that must come though they were to stay where they are.
    unshippable: Vec<Page>,
    recall: Recall,
    read_ahead: ReadAhead,
    /// What a miss recalled, before it is asked for.
    recalled: Vec<recall::Companion>,
    /// Pages that were recalled and not touched yet, and with which page.
    untouched: PageMap<Page>,
    /// Pages that were recalled and have not come yet, and for whom.
    coming: PageMap<Claim>,
    garbage: Vec<Page>,
    most_garbage: usize,
    discards: Discards,
    jobs: Jobs,
    outbox: Outbox,
    /// Pages in a row that are to be mapped read-only, and how many they are.
    to_map: Option<(Page, u64)>,
}

/// When a fault that needs another node began.
struct MissClock {
    page: Page,
    since: Instant,
}

impl Shard {
    pub fn new(
        config: &EngineConfig,
        shards: Shards,
        id: u16,
        memory: Arc<DualMemory>,
        transport: Arc<dyn Transport>,
        stats: Arc<ShardStats>,
        policy: Arc<HoldPolicy>,
    ) -> Result<Shard, EngineError> {
        let uffd = Arc::new(Uffd::open().map_err(EngineError::Setup)?);
        let home = config.homes.range(config.node);
        for node in 0..config.homes.nodes() {
            let node = NodeId(node as u16);
            let mode = if node == config.node { Mode::Home } else { Mode::Remote };
            for range in shards.ranges(id, config.homes.range(node)) {
                let start = memory.guest_address(Page(range.start));
                let len = (range.end - range.start) * PAGE_SIZE as u64;
                uffd.register(start, len, mode).map_err(|e| {
                    EngineError::Setup(format!("userfaultfd cannot watch the guest's memory: {e}"))
                })?;
            }
        }
        let lane = config.first_lane + id;
        let receiver = transport
            .take_receiver(lane)
            .ok_or_else(|| EngineError::Setup(format!("the transport has no lane {lane} for shard {id}")))?;
        let mut protocol =
            Protocol::new(config.node, Arc::new(config.homes.clone()), BLOCK, RunPolicy::default());
        let mut most_garbage = GARBAGE;
        if let Some(budget) = config.budget {
            let copies = copies_of_shard(budget, &config.homes, config.node, shards.count())?;
            most_garbage = (copies / 16).min(GARBAGE);
            protocol.set_budget(copies - most_garbage, Eviction::Clock);
        }
        let core = Core {
            homes: config.homes.clone(),
            home,
            lane,
            protocol,
            memory,
            uffd,
            transport,
            stats,
            effects: Vec::with_capacity(64),
            holds: Holds::new(policy.clone()),
            policy,
            misses: Vec::with_capacity(64),
            vcpus: None,
            called: Vec::new(),
            asked: Vec::new(),
            unshippable: Vec::new(),
            recall: Recall::new(),
            read_ahead: ReadAhead::new(config.homes.clone()),
            recalled: Vec::with_capacity(64),
            untouched: PageMap::default(),
            coming: PageMap::default(),
            garbage: Vec::with_capacity(most_garbage),
            most_garbage,
            discards: Discards::default(),
            jobs: Jobs::default(),
            outbox: Outbox::default(),
            to_map: None,
        };
        Ok(Shard { core, receiver, spin: config.spin, stuck: config.stuck })
    }

    /// What watches this shard's pages. When it is closed, the kernel lets who touches a page that is not here go
    /// on with zeroes.
    pub fn uffd(&self) -> Arc<Uffd> {
        self.core.uffd.clone()
    }

    /// Works until told to stop.
    pub fn run(
        mut self,
        inbox: &Inbox<Request>,
        bell: &EventFd,
        stop: &AtomicBool,
    ) -> Result<(), EngineError> {
        trace::event(Event::ShardThread, self.core.lane.into(), 0);
        if !base::thread::make_urgent() {
            tracing::debug!("no right to a real-time priority: page faults may wait for a time slice");
        }
        let mut idle_since: Option<Instant> = None;
        while !stop.load(Ordering::Acquire) {
            for request in inbox.try_iter() {
                self.core.request(request)?;
            }
            if self.work()? {
                idle_since = None;
                continue;
            }
            let now = Instant::now();
            if now - *idle_since.get_or_insert(now) < self.spin {
                std::hint::spin_loop();
                continue;
            }
            self.core.collect_garbage()?;
            self.core.check_stuck(now, self.stuck)?;
            if self.receiver.arm()? {
                continue;
            }
            if self.sleep(bell)? && bell.read().is_ok() {
                self.core.holds.reconsider(self.core.policy.now());
            }
        }
        Ok(())
    }

    /// One round over everything that may have something to do; whether anything had.
    fn work(&mut self) -> Result<bool, EngineError> {
        let core = &mut self.core;
        // First: a demand for a page whose hold is over must not wait.
        let released = core.release_due()?;
        let mut result = Ok(());
        core.outbox.gathering = true;
        let frames = self.receiver.poll(&mut |from, frame| {
            if result.is_ok() {
                result = core.receive(from, frame);
            }
        });
        core.outbox.gathering = false;
        result?;
        core.settle()?;
        let frames = frames?;
        let faults = core.take_faults()?;
        core.fetch_unshippable()?;
        Ok(frames + faults + released > 0)
    }

    /// Waits for something to do; whether the bell rang.
    fn sleep(&self, bell: &EventFd) -> Result<bool, EngineError> {
        // A hold that ends matters only to who waits for it; the others end when something happens.
        let tick = if self.core.called.is_empty() { TICK } else { PATIENCE };
        let now = self.core.policy.now();
        let next = self.core.holds.next_look().map(|look_at| look_at.saturating_sub(now));
        let timeout = next.map_or(tick, Duration::from_nanos).min(tick);
        let mut fds = [self.receiver.fd(), self.core.uffd.as_fd(), bell.as_fd()]
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
            }
            Request::Discard(pages, done) => {
                let (first, count) = (Page(pages.start), pages.end - pages.start);
                self.discards.begin(pages, done);
                self.protocol.discard(first, (count - 1) as u16, &mut self.effects);
                self.apply_together()?;
            }
            Request::Direct(job) => self.direct(job)?,
            Request::Ship(vcpus, shipping) => {
                self.protocol.set_shipping(shipping);
                self.vcpus = Some(vcpus);
            }
            Request::Operate { page, token, operation } => {
                ShardStats::count(&self.stats.operations);
                self.asked.push(Asked { page, token, since: Instant::now() });
                if self.protocol.operate(page, token, operation, &mut self.effects) {
                    self.apply(Body::Absent)?;
                } else {
                    self.operated(page, token, None);
                }
            }
            Request::SetClass(page, class) => self.protocol.set_class(page, class),
        }
        Ok(())
    }

    /// A vCPU's operation was done, or was not.
    fn operated(&mut self, page: Page, token: u32, old: Option<u128>) {
        self.asked.retain(|asked| (asked.page, asked.token) != (page, token));
        ShardStats::count(if old.is_some() {
            &self.stats.operations_done
        } else {
            &self.stats.operations_refused
        });
        if let Some(vcpus) = &self.vcpus {
            vcpus.answered(token, old);
        }
    }

    /// The page stays where it is: those who wait for it and can do without are called out, and if one cannot it comes.
    fn ship(&mut self, page: Page) {
        self.misses.retain(|miss| miss.page != page);
        let mut must_come = false;
        for thread in self.holds.give_up(page, self.policy.now()) {
            if self.vcpus.as_ref().is_some_and(|vcpus| vcpus.call_out(thread, page)) {
                self.called.push(Called { page, thread, since: Instant::now() });
            } else {
                must_come = true;
            }
        }
        if must_come {
            self.unshippable.push(page);
        }
    }

    /// Lets the pages come that cannot be done without after all, among them those of vCPUs that were called out and do not
    /// look. Rare: so they come to be written, which serves who reads as well.
    fn fetch_unshippable(&mut self) -> Result<(), EngineError> {
        if let Some(vcpus) = self.vcpus.as_ref().filter(|_| !self.called.is_empty()) {
            let unshippable = &mut self.unshippable;
            self.called.retain(|called| {
                let waits = vcpus.is_called(called.thread, called.page);
                let stuck = waits && called.since.elapsed() > PATIENCE;
                if stuck {
                    unshippable.push(called.page);
                }
                waits && !stuck
            });
        }
        while let Some(page) = self.unshippable.pop() {
            self.protocol.fault(page, true, &mut self.effects);
            self.apply(Body::Absent)?;
            if self.protocol.is_missing(page) && !self.misses.iter().any(|miss| miss.page == page) {
                self.misses.push(MissClock { page, since: Instant::now() });
            }
        }
        Ok(())
    }

    /// Asks for all pages of a device's request at once.
    fn direct(&mut self, job: Box<Job>) -> Result<(), EngineError> {
        let (job, gathering) = (self.jobs.begin(job), std::mem::replace(&mut self.outbox.gathering, true));
        let mut at = 0;
        while let Some((page, bytes)) = self.jobs.page(job, at) {
            let asked = match bytes {
                None => self.protocol.load(page, &mut self.effects),
                Some(_) => self.protocol.store(page, &mut self.effects),
            };
            if asked {
                self.jobs.expect(page, job, at);
                self.apply(bytes.as_ref().map_or(Body::Absent, body_of))?;
            } else {
                self.jobs.end_one(job);
            }
            at += 1;
        }
        self.outbox.gathering = gathering;
        self.settle()
    }

    fn take_faults(&mut self) -> Result<usize, EngineError> {
        let (mut faults, mut n) = ([None; 16], 0);
        let count = self
            .uffd
            .read(|fault: Fault| {
                faults[n] = Some(fault);
                n += 1;
            })
            .map_err(|source| EngineError::System { what: "read faults", source })?;
        for fault in faults.into_iter().flatten() {
            self.fault(fault)?;
        }
        Ok(count)
    }

    fn fault(&mut self, fault: Fault) -> Result<(), EngineError> {
        // The kernel only reports what was registered.
        let Some(page) = self.memory.page_at(fault.address) else { return Ok(()) };
        ShardStats::count(&self.stats.events);
        trace::event(Event::Fault, page.0, fault.flags());
        if self.holds.waits_again(page, fault.thread) {
            ShardStats::count(&self.stats.resumed_waits);
        }
        let claim = self.holds.waits(page, fault.thread, self.policy.now(), &cpu_time);
        let want = if fault.write { Rights::Exclusive } else { Rights::Shared };
        if fault.write {
            self.recall.wanted(page, claim);
        }
        if let Some(first) = self.untouched.remove(page) {
            ShardStats::count(&self.stats.prefetches_used);
            self.recall.touched(first, page);
            if self.protocol.rights(page) >= want {
                self.protocol.hold(page);
                self.holds.hold_for(page, claim, self.policy.now());
            }
        }
        let window = if fault.write { None } else { self.read_ahead.touched(page) };
        let upgrade = fault.write && self.protocol.rights(page) == Rights::Shared;
        let was_missing = self.protocol.is_missing(page);
        if self.vcpus.as_ref().is_some_and(|vcpus| vcpus.may_ship(fault.thread, page)) {
            self.protocol.set_time(self.policy.now() / 1000);
            self.protocol.fault_may_ship(page, fault.write, &mut self.effects);
        } else {
            self.protocol.fault(page, fault.write, &mut self.effects);
        }
        self.apply(Body::Absent)?;
        match (was_missing, self.protocol.is_missing(page)) {
            (false, false) => ShardStats::count(&self.stats.local_faults),
            (false, true) => {
                let counter = if fault.write {
                    &self.stats.remote_write_faults
                } else {
                    &self.stats.remote_read_faults
                };
                ShardStats::count(counter);
                if upgrade {
                    ShardStats::count(&self.stats.upgrades);
                }
                self.misses.push(MissClock { page, since: Instant::now() });
                if fault.write {
                    self.prefetch_companions(page, claim)?;
                } else if !self.home.contains(&page.0) {
                    self.read_ahead.missed(page);
                }
            }
            _ => {}
        }
        self.fetch(window)
    }

    /// Asks for the pages that a reader will need next.
    fn fetch(&mut self, window: Option<Window>) -> Result<(), EngineError> {
        let Some(Window { pages, marker }) = window else { return Ok(()) };
        for page in pages.map(Page) {
            if self.protocol.prefetch(page, false, &mut self.effects) {
                ShardStats::count(&self.stats.prefetches);
                if page != marker {
                    // A fault that nobody waits for: the page is mapped when it comes.
                    self.protocol.fault(page, false, &mut self.effects);
                }
            }
        }
        self.apply_together()
    }

    /// Asks for what was needed together with this page before.
    fn prefetch_companions(&mut self, page: Page, claim: Claim) -> Result<(), EngineError> {
        let mut recalled = std::mem::take(&mut self.recalled);
        self.recall.companions(page, &mut recalled);
        for companion in recalled.drain(..) {
            if self.protocol.prefetch(companion.page, true, &mut self.effects) {
                ShardStats::count(&self.stats.prefetches);
                self.coming.insert(companion.page, claim);
                if companion.is_sure() {
                    self.recall.touched(page, companion.page);
                    // A fault that nobody waits for: the page is mapped when it comes.
                    self.protocol.fault(companion.page, true, &mut self.effects);
                } else {
                    self.untouched.insert(companion.page, page);
                }
            }
        }
        self.recalled = recalled;
        self.apply_together()
    }

    /// Carries out what the protocol asked for; messages for one node leave together.
    fn apply_together(&mut self) -> Result<(), EngineError> {
        let gathering = std::mem::replace(&mut self.outbox.gathering, true);
        let done = self.apply(Body::Absent);
        self.outbox.gathering = gathering;
        done?;
        self.settle()
    }

    fn receive(&mut self, from: NodeId, frame: &[u8]) -> Result<(), EngineError> {
        let (message, body) = Message::parse(frame, self.homes.nodes(), self.homes.pages())
            .map_err(|why| fabric::FabricError::PeerLost { peer: from, why: format!("it {why}") })?;
        ShardStats::count(&self.stats.messages_received);
        trace::event(
            Event::Receive,
            message.page.0,
            u64::from(message.kind.code()) << 16 | u64::from(from.0),
        );
        let zeroes = self.surrender(&message)?;
        self.protocol.set_time(self.policy.now() / 1000);
        self.protocol.message(from, message, zeroes, &mut self.effects)?;
        self.apply(body)?;
        if let Kind::Data { .. } = message.kind {
            let window = self.read_ahead.arrived(message.page);
            self.fetch(window)?;
        }
        // A write that came while a read was under way goes on as a miss of its own. (What was asked for ahead
        // of its need is no miss: nobody waits for it, and when it comes it may not even be mapped.)
        let page = message.page;
        let waited_for = self.holds.is_awaited(page);
        if waited_for && self.protocol.is_missing(page) && !self.misses.iter().any(|m| m.page == page) {
            ShardStats::count(&self.stats.remote_write_faults);
            self.misses.push(MissClock { page, since: Instant::now() });
        }
        Ok(())
    }

    /// Releases pages that were held long enough.
    fn release_due(&mut self) -> Result<usize, EngineError> {
        let mut released = 0;
        while let Some((page, claim)) = self.holds.due(self.policy.now()) {
            self.protocol.release(page, &mut self.effects);
            if !self.effects.is_empty() {
                self.policy.lost(claim, self.policy.now());
            }
            self.apply(Body::Absent)?;
            released += 1;
        }
        Ok(released)
    }

    /// Before a Get of pages that never left this home: finds out how many of them nobody has touched, and
    /// makes sure that nobody will without an event. The order is what makes the answer true: the frames are
    /// in the file before they are unmapped, and looked at after.
    fn surrender(&mut self, message: &Message) -> Result<u8, EngineError> {
        let most = self.protocol.untouched(message);
        let first = message.page;
        let absent = if most == 0 { 0 } else { self.memory.absent(first, u64::from(most)) };
        if absent == 0 {
            return Ok(0);
        }
        let pages = || (first.0..first.0 + absent).map(Page);
        pages().for_each(|page| self.memory.ensure_frame(page));
        self.stats.count_withdrawal();
        self.memory.unmap(first, absent).map_err(|source| EngineError::Page {
            what: "unmapping",
            page: first.0,
            source,
        })?;
        // SAFETY: just unmapped, and only this shard maps its pages again or writes them.
        let zeroes = pages().take_while(|&page| is_zero(unsafe { self.memory.frame(page) })).count();
        Ok(zeroes as u8)
    }

    fn check_stuck(&self, now: Instant, limit: Duration) -> Result<(), EngineError> {
        if self.jobs.oldest().is_some_and(|since| now.saturating_duration_since(since) > limit) {
            let state = format!("a device waits for its pages; {}", self.protocol.describe().join("; "));
            return Err(EngineError::Stuck { seconds: limit.as_secs(), state });
        }
        if let Some(asked) =
            self.asked.iter().find(|asked| now.saturating_duration_since(asked.since) > limit)
        {
            let state = format!("a vCPU waits for what it does with page {:#x} elsewhere", asked.page.0);
            return Err(EngineError::Stuck { seconds: limit.as_secs(), state });
        }
        match self.misses.iter().find(|m| now.saturating_duration_since(m.since) > limit) {
            Some(miss) => Err(EngineError::Stuck {
                seconds: limit.as_secs(),
                state: format!(
                    "page {:#x}, rights {:?}; {}",
                    miss.page.0,
                    self.protocol.rights(miss.page),
                    self.protocol.describe().join("; ")
                ),
            }),
            None => Ok(()),
        }
    }
}
