//! The floor: a fault handler and servers that know nothing of coherence. They move the bytes that the
//! operation needs, once, and make the system calls that land them.

use std::net::TcpListener;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use coherence::uffd::{Mode, Uffd};
use fabric::sim::SimTransport;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::command::{Op, Polling, Setup};
use super::wire::{Head, Queues, Sockets, Wire, head, page};

/// Answer with the page.
const GET: u8 = 1;
/// Answer without.
const ACK: u8 = 2;
/// Answer without, and make the sharers do so too.
const UPGRADE: u8 = 3;
/// Make node 2 answer with the page.
const FORWARD: u8 = 4;
/// Pour that many pages.
const POUR: u8 = 5;
/// Answer with as many bytes as were sent.
const ECHO: u8 = 6;
const ANSWER: u8 = 7;

/// What makes a message of 64 bytes.
const SMALL: [u8; 48] = [0x55; 48];

/// Pages poured with one call.
const GULP: usize = 64;

/// A node of the floor.
pub struct Bare {
    memory: Arc<DualMemory>,
    orders: Arc<Orders>,
    uffd: Arc<Uffd>,
    setup: Setup,
    wire: Option<Box<dyn Wire>>,
    thread: Option<JoinHandle<Result<Box<dyn Wire>>>>,
}

/// What the handler must know of the faults that come.
struct Orders {
    op: AtomicU8,
    /// How many threads may wait at a time.
    threads: AtomicUsize,
    stop: AtomicBool,
    bell: EventFd,
}

impl Bare {
    /// Connects with the others; all but node 0 serve from now on.
    ///
    /// # Errors
    /// What the host says.
    pub fn start(
        setup: &Setup,
        memory: Arc<DualMemory>,
        listener: Option<&TcpListener>,
        transport: Option<SimTransport>,
    ) -> Result<Bare> {
        let mut wire: Box<dyn Wire> = match (transport, listener) {
            (Some(transport), _) => Box::new(Queues::new(transport)?),
            (None, Some(listener)) => {
                let addresses: Vec<_> =
                    setup.addresses.iter().filter_map(|rails| rails.first().copied()).collect();
                Box::new(Sockets::mesh(setup.node, listener, &addresses)?)
            }
            (None, None) => bail!("a node must listen before it starts"),
        };
        let uffd = Arc::new(Uffd::open().map_err(anyhow::Error::msg)?);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let orders = Arc::new(Orders {
            op: AtomicU8::new(0),
            threads: AtomicUsize::new(1),
            stop: AtomicBool::new(false),
            bell: EventFd::from_flags(flags)?,
        });
        let mut bare =
            Bare { memory: memory.clone(), orders, uffd, setup: setup.clone(), wire: None, thread: None };
        if setup.node == 0 {
            bare.uffd.register(memory.guest_address(Page(0)), memory.len() as u64, Mode::Remote)?;
            bare.wire = Some(wire);
        } else {
            let (nodes, busy) = (setup.pages.len() as u16, setup.polling == Polling::Busy);
            bare.thread = Some(std::thread::Builder::new().name("server".into()).spawn(move || {
                base::thread::make_urgent();
                serve(&mut *wire, &memory, nodes, busy)?;
                Ok(wire)
            })?);
        }
        Ok(bare)
    }

    /// The node's memory.
    pub fn memory(&self) -> &Arc<DualMemory> {
        &self.memory
    }

    /// Makes the handler ready for faults of `threads` threads that need `op`.
    ///
    /// # Errors
    /// The host has no threads left, or the handler failed.
    pub fn expect(&mut self, op: Op, threads: usize) -> Result<()> {
        self.halt()?;
        self.orders.op.store(op as u8, Ordering::Release);
        self.orders.threads.store(threads, Ordering::Release);
        let wire = self.wire.take().context("only node 0 has faults")?;
        let mut handler = Handler {
            wire,
            uffd: self.uffd.clone(),
            memory: self.memory.clone(),
            op,
            threads,
            nodes: self.setup.pages.len() as u16,
            waiting: Vec::new(),
        };
        let (orders, polling) = (self.orders.clone(), self.setup.polling);
        self.thread = Some(std::thread::Builder::new().name("handler".into()).spawn(move || {
            base::thread::make_urgent();
            handler.run(&orders, polling)?;
            Ok(handler.wire)
        })?);
        Ok(())
    }

    /// Receives `count` pages from node 1 as one stream into this node's memory, page `first` on.
    ///
    /// # Errors
    /// The handler failed, or the home is gone.
    pub fn stream(&mut self, first: u64, count: u64) -> Result<()> {
        let wire = self.wire.as_mut().context("the handler still has the wire")?;
        wire.send(1, &head(POUR, count), &[])?;
        let mut gulp = vec![0; GULP * PAGE_SIZE];
        for page in (first..first + count).step_by(GULP) {
            let pages = (first + count - page).min(GULP as u64);
            let bytes = &mut gulp[..pages as usize * PAGE_SIZE];
            wire.drain(1, bytes)?;
            for (page, bytes) in (page..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
                // SAFETY: the guest view is not touched while this runs, and nobody else fills pages.
                unsafe { self.memory.fill(Page(page), Some(bytes)) };
            }
        }
        Ok(())
    }

    /// Sends 64 bytes to node 1 and back, `count` times; how long each took, in nanoseconds.
    ///
    /// # Errors
    /// The handler failed, or the home is gone.
    pub fn round_trips(&mut self, count: u64) -> Result<Vec<u64>> {
        self.halt()?;
        let mut wire = self.wire.take().context("only node 0 asks")?;
        let busy = self.setup.polling == Polling::Busy;
        let thread = std::thread::Builder::new().name("round trips".into()).spawn(move || {
            base::thread::make_urgent();
            let mut times = Vec::new();
            for i in 0..count {
                let begin = Instant::now();
                wire.send(1, &head(ECHO, i), &SMALL)?;
                let mut answered = false;
                while !answered {
                    wire.receive(!busy, &mut |_, head, _| answered |= page(head) == i)?;
                }
                times.push(begin.elapsed().as_nanos() as u64);
            }
            anyhow::Ok((wire, times))
        })?;
        let (wire, times) = thread.join().map_err(|_| anyhow::anyhow!("the round trips panicked"))??;
        self.wire = Some(wire);
        Ok(times)
    }

    /// Ends node 0's handler and gets the wire back.
    ///
    /// # Errors
    /// What ended it before.
    pub fn halt(&mut self) -> Result<()> {
        if self.setup.node != 0 {
            return Ok(());
        }
        if let Some(thread) = self.thread.take() {
            self.orders.stop.store(true, Ordering::Release);
            self.orders.bell.write(1)?;
            let wire = thread.join().map_err(|_| anyhow::anyhow!("the handler panicked"))??;
            self.orders.stop.store(false, Ordering::Release);
            self.orders.bell.read()?;
            self.wire = Some(wire);
        }
        Ok(())
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // A server ends when its peers close their connections.
        let _ = self.halt();
    }
}

/// Answers until a peer is gone.
fn serve(wire: &mut dyn Wire, memory: &DualMemory, nodes: u16, busy: bool) -> Result<()> {
    let mut wanted: Vec<(u8, u64)> = Vec::new();
    loop {
        let take = &mut |_: u16, head: &Head, _: &[u8]| wanted.push((head[0], page(head)));
        if wire.receive(!busy, take).is_err() {
            return Ok(());
        }
        for (kind, page) in wanted.drain(..) {
            // SAFETY: while pages are asked for nobody writes them; the bench fills them before.
            let frame = |page: u64| unsafe { memory.frame(Page(page)) };
            match kind {
                GET => wire.send(0, &head(ANSWER, page), frame(page))?,
                ACK => wire.send(0, &head(ANSWER, page), &[])?,
                ECHO => wire.send(0, &head(ANSWER, page), &SMALL)?,
                UPGRADE => {
                    for sharer in 2..nodes {
                        wire.send(sharer, &head(ACK, page), &[])?;
                    }
                    wire.send(0, &head(ANSWER, page), &[])?;
                }
                FORWARD => wire.send(2, &head(GET, page), &[])?,
                POUR => {
                    let first = memory.guest_view();
                    for at in (0..page as usize).step_by(GULP) {
                        let length = (page as usize - at).min(GULP) * PAGE_SIZE;
                        // SAFETY: the home's pages are at least as many as are asked for, mapped and not
                        // watched, and the bench has filled them before.
                        let bytes = unsafe { std::slice::from_raw_parts(first.add(at * PAGE_SIZE), length) };
                        wire.pour(0, bytes)?;
                    }
                }
                _ => bail!("a bare node was asked for nonsense"),
            }
        }
    }
}

struct Handler {
    wire: Box<dyn Wire>,
    uffd: Arc<Uffd>,
    memory: Arc<DualMemory>,
    op: Op,
    threads: usize,
    nodes: u16,
    /// Pages under way, and how many answers they need.
    waiting: Vec<(u64, u16)>,
}

impl Handler {
    fn run(&mut self, orders: &Orders, polling: Polling) -> Result<()> {
        loop {
            let (faults, answers) = (self.waiting.len() < self.threads, !self.waiting.is_empty());
            let mut look = faults;
            if polling == Polling::Blocking && faults {
                let mut fds = [self.uffd.as_fd(), orders.bell.as_fd(), self.wire.fd()]
                    .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                let most = if answers { 3 } else { 2 };
                match poll(&mut fds[..most], PollTimeout::NONE) {
                    Ok(_) | Err(nix::Error::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
                look = fds[0].any() == Some(true);
            }
            if look {
                self.take_faults()?;
            }
            if answers {
                self.take_answers(polling == Polling::Blocking && !faults)?;
            }
            if orders.stop.load(Ordering::Relaxed) && self.waiting.is_empty() {
                return Ok(());
            }
        }
    }

    fn take_faults(&mut self) -> Result<()> {
        let (mut pages, mut n) = ([0; 16], 0);
        self.uffd.read(|fault| {
            pages[n] = (fault.address - self.memory.guest_address(Page(0))) / PAGE_SIZE as u64;
            n += 1;
        })?;
        for &page in &pages[..n] {
            let (kind, answers) = match self.op {
                Op::Read | Op::Write => (GET, 1),
                Op::Upgrade => (UPGRADE, self.nodes - 1),
                Op::ReadDirty | Op::WriteDirty => (FORWARD, 1),
            };
            self.waiting.push((page, answers));
            self.wire.send(1, &head(kind, page), &[])?;
        }
        Ok(())
    }

    fn take_answers(&mut self, wait: bool) -> Result<()> {
        let op = self.op;
        let Handler { wire, uffd, memory, waiting, .. } = self;
        let mut result = Ok(());
        wire.receive(wait, &mut |_, head, body| {
            let page = page(head);
            let Some(i) = waiting.iter().position(|w| w.0 == page) else { return };
            waiting[i].1 -= 1;
            if waiting[i].1 > 0 {
                return;
            }
            waiting.swap_remove(i);
            let address = memory.guest_address(Page(page));
            let done = match (op, <&[u8; PAGE_SIZE]>::try_from(body)) {
                (Op::Upgrade, _) => uffd.protect(address, PAGE_SIZE as u64, false),
                (op, body) => {
                    // SAFETY: the page is not mapped: a fault waits for it.
                    unsafe { memory.fill(Page(page), body.ok()) };
                    uffd.map(address, PAGE_SIZE as u64, !op.writes()).map(drop)
                }
            };
            if let Err(error) = done {
                result = Err(error.into());
            }
        })?;
        result
    }
}
