//! The worker: one node of a cell, which carries out the bench's commands.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base::trace;
use coherence::memory::DualMemory;
use coherence::page::PAGE_SIZE;
use coherence::testing;
use fabric::secure::PrivateKey;
use fabric::sim::SimTransport;
use fabric::tcp::{Listener, MeshConfig, MeshKeys};
use fabric::{NodeId, Transport};

use super::bare::Bare;
use super::command::{Command, Op, Pages, Polling, Reply, Setup, Side, Times};
use super::ours::Ours;
use crate::handover::guest::{self, Guest, Job};
use crate::place;
use crate::report::quantiles;

/// Events of the trace that are looked at.
const TRACE: usize = 60_000;

enum Part {
    Ours(Ours),
    Bare(Bare),
}

enum Door {
    Fabric(Listener),
    Plain(TcpListener),
}

/// One node.
pub struct Worker {
    /// Before the memory that it uses.
    guest: Option<Guest>,
    transport: Option<SimTransport>,
    door: Option<Door>,
    part: Option<Part>,
    polling: Polling,
}

impl Worker {
    /// A node that talks over `transport`, or over TCP.
    pub fn new(transport: Option<SimTransport>) -> Worker {
        Worker { guest: None, transport, door: None, part: None, polling: Polling::Blocking }
    }

    /// Does what it is told; a failure is an answer too.
    pub fn obey(&mut self, command: Command) -> Reply {
        self.try_obey(command).unwrap_or_else(|error| Reply::Failed(format!("{error:#}")))
    }

    fn try_obey(&mut self, command: Command) -> Result<Reply> {
        let any = ([127, 0, 0, 1], 0).into();
        match command {
            Command::Listen(Side::Ours, rails) => {
                let listener = Listener::bind(&vec![any; rails])?;
                let addresses = listener.local_addrs().to_vec();
                self.door = Some(Door::Fabric(listener));
                return Ok(Reply::Addresses(addresses));
            }
            Command::Listen(Side::Floor, _) => {
                let listener = TcpListener::bind(any)?;
                let address = listener.local_addr()?;
                self.door = Some(Door::Plain(listener));
                return Ok(Reply::Addresses(vec![address]));
            }
            Command::Start(setup) => self.start(&setup)?,
            Command::Fill(pages) => self.each(pages, |word| word.store(0x1234_5678, Ordering::Relaxed))?,
            Command::Look(pages) => self.each(pages, |word| _ = word.load(Ordering::Relaxed))?,
            Command::Touch(op, pages, threads) => {
                if let Part::Bare(bare) = self.part()? {
                    bare.expect(op, threads)?;
                }
                let busy = self.polling == Polling::Busy;
                return Ok(Reply::Times(touch(self.memory()?, op, pages, threads, busy)));
            }
            Command::Stream(pages) => return self.stream(pages),
            Command::PingPong { page, rounds, turn } => {
                let word = word(self.memory()?, page);
                let begin = Instant::now();
                for _ in 0..rounds {
                    let order = Ordering::SeqCst;
                    while word.compare_exchange_weak(turn, 1 - turn, order, order).is_err() {
                        std::hint::spin_loop();
                    }
                }
                return Ok(Reply::Times(per_operation(begin.elapsed(), 2 * rounds)));
            }
            Command::Trace => {
                let mut text = Vec::new();
                trace::dump(&mut text, TRACE)?;
                return Ok(Reply::Trace(String::from_utf8_lossy(&text).into_owned()));
            }
            Command::Counters => {
                return Ok(Reply::Counters(match self.part()? {
                    Part::Ours(ours) => ours.counters(),
                    Part::Bare(_) => Vec::new(),
                }));
            }
            Command::RoundTrips(count) => {
                let Part::Bare(bare) = self.part()? else { bail!("round trips are the floor's") };
                let (median_us, p99_us) = quantiles(&mut bare.round_trips(count)?);
                return Ok(Reply::Times(Times { median_us, p99_us, ..Times::default() }));
            }
            Command::Code(program) => {
                let memory = self.memory()?;
                ::tests::cpl3::write_tables(memory);
                testing::write(memory, guest::CODE as usize, &program.code());
            }
            Command::Run(job) => return self.run(&job),
            Command::Quit => {
                self.guest = None;
                self.part = None;
            }
        }
        if let Some(Part::Ours(ours)) = &self.part {
            ours.check()?;
        }
        Ok(Reply::Done)
    }

    fn start(&mut self, setup: &Setup) -> Result<()> {
        place::pin(&setup.cpus);
        self.polling = setup.polling;
        place::realtime((setup.polling == Polling::Busy).then_some(2));
        self.part = Some(match (setup.side, self.door.take(), self.transport.take()) {
            (Side::Ours, _, Some(transport)) => Part::Ours(Ours::start(setup, Arc::new(transport))?),
            (Side::Ours, Some(Door::Fabric(listener)), None) => {
                let transport: Arc<dyn Transport> = Arc::new(listener.mesh(MeshConfig {
                    node: NodeId(setup.node),
                    addresses: setup.addresses.clone(),
                    lanes: guest::LANE + 1,
                    machine: [7; 16],
                    version: "bench".into(),
                    keys: keys(setup.node, setup.addresses.len()),
                    plaintext: setup.plaintext,
                    timeout: Duration::from_secs(10),
                    silence: Duration::from_secs(10),
                })?);
                Part::Ours(Ours::start(setup, transport)?)
            }
            (Side::Floor, door, transport) => {
                let listener = match &door {
                    Some(Door::Plain(listener)) => Some(listener),
                    _ => None,
                };
                let memory = Arc::new(DualMemory::new(setup.pages.iter().sum())?);
                Part::Bare(Bare::start(setup, memory, listener, transport)?)
            }
            _ => bail!("a node must listen before it starts"),
        });
        Ok(())
    }

    /// Runs the code on this node's vCPU, which is made when it is needed first.
    fn run(&mut self, job: &Job) -> Result<Reply> {
        let Some(Part::Ours(ours)) = &self.part else { bail!("a guest needs an engine") };
        if self.guest.is_none() {
            let guest = Guest::new(ours.engine(), ours.memory(), ours.transport().clone(), ours.ships())?;
            self.guest = Some(guest);
        }
        let guest = self.guest.as_mut().context("there is no guest")?;
        guest.run(job)?;
        ours.check()?;
        Ok(Reply::Count(testing::word(ours.memory(), job.count as usize).load(Ordering::SeqCst)))
    }

    fn part(&mut self) -> Result<&mut Part> {
        self.part.as_mut().context("a node must be started first")
    }

    fn memory(&mut self) -> Result<&Arc<DualMemory>> {
        Ok(match self.part()? {
            Part::Ours(ours) => ours.memory(),
            Part::Bare(bare) => bare.memory(),
        })
    }

    fn each(&mut self, pages: Pages, visit: impl Fn(&AtomicU64)) -> Result<()> {
        let memory = self.memory()?;
        (pages.first..pages.first + pages.count).for_each(|page| visit(word(memory, page)));
        Ok(())
    }

    fn stream(&mut self, pages: Pages) -> Result<Reply> {
        if let Part::Bare(bare) = self.part()? {
            bare.halt()?;
            let begin = Instant::now();
            bare.stream(pages.first, pages.count)?;
            return Ok(Reply::Times(per_operation(begin.elapsed(), pages.count)));
        }
        let begin = Instant::now();
        self.each(pages, |word| _ = word.load(Ordering::Relaxed))?;
        Ok(Reply::Times(per_operation(begin.elapsed(), pages.count)))
    }
}

/// Keys that are no secret: who can connect to the bench is on this host.
pub fn keys(node: u16, nodes: usize) -> MeshKeys {
    let key = |node: usize| PrivateKey::from_bytes([node as u8 + 1; 32]);
    MeshKeys { own: key(node.into()), nodes: (0..nodes).map(|node| key(node).public()).collect() }
}

fn per_operation(elapsed: Duration, count: u64) -> Times {
    Times { each_us: elapsed.as_secs_f64() * 1e6 / count as f64, ..Times::default() }
}

/// A word of the page, not its first, as this node's CPUs see it.
fn word(memory: &DualMemory, page: u64) -> &AtomicU64 {
    testing::word(memory, page as usize * PAGE_SIZE + 64)
}

/// The pages' numbers in an order in which none follows its neighbour, the same in every run.
fn mixed(pages: Pages) -> Vec<u64> {
    let mut order: Vec<u64> = (pages.first..pages.first + pages.count).collect();
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for i in (1..order.len()).rev() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        order.swap(i, x as usize % (i + 1));
    }
    order
}

fn touch(memory: &Arc<DualMemory>, op: Op, pages: Pages, threads: usize, busy: bool) -> Times {
    let order = mixed(pages);
    let begin = Instant::now();
    let mut stamps: Vec<(u64, u64, u64, u64)> = Vec::with_capacity(order.len());
    if threads == 1 {
        stamps = order.iter().map(|&page| timed(memory, op, page)).collect();
    } else {
        std::thread::scope(|scope| {
            let handles: Vec<_> = order
                .chunks(order.len().div_ceil(threads))
                .map(|part| {
                    scope.spawn(move || {
                        place::realtime(busy.then_some(2));
                        part.iter().map(|&page| timed(memory, op, page)).collect::<Vec<_>>()
                    })
                })
                .collect();
            for handle in handles {
                stamps.extend(handle.join().unwrap_or_default());
            }
        });
    }
    let elapsed = begin.elapsed();
    let mut times: Vec<u64> = stamps.iter().map(|stamp| stamp.3).collect();
    let (median_us, p99_us) = quantiles(&mut times);
    let stamps = if threads == 1 { stamps.iter().map(|s| (s.0, s.1, s.2)).collect() } else { Vec::new() };
    Times { median_us, p99_us, stamps, ..per_operation(elapsed, pages.count) }
}

/// Page, time stamp counter before and after the touch, nanoseconds.
fn timed(memory: &DualMemory, op: Op, page: u64) -> (u64, u64, u64, u64) {
    let word = word(memory, page);
    let (began, before) = (Instant::now(), trace::now());
    if op.writes() {
        word.store(page, Ordering::SeqCst);
    } else {
        word.load(Ordering::SeqCst);
    }
    let after = trace::now();
    (page, before, after, began.elapsed().as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_pages_are_the_same_pages_in_no_order_that_could_be_guessed() {
        let pages = Pages { first: 100, count: 1000 };
        let mut order = mixed(pages);
        let neighbours = order.windows(2).filter(|w| w[1].abs_diff(w[0]) == 1).count();
        assert!(neighbours < 10, "{neighbours}");
        order.sort_unstable();
        assert!(order.into_iter().eq(100..1100));
    }
}
