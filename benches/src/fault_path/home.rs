//! Memory at its home that no other node ever asked for: beside plain memory of this host, which is what it
//! should cost. No userfaultfd event may come of it.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::Instant;

use anyhow::{Result, ensure};
use coherence::page::{Homes, PAGE_SIZE};
use coherence::testing::Builder;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::place;
use crate::report::Row;

/// Pages touched: 256 MiB.
const PAGES: u64 = 65_536;
const BYTES: usize = PAGES as usize * PAGE_SIZE;
/// Accesses in no order, after the first touch.
const ACCESSES: usize = 2_000_000;
/// The most that a ratio may be.
const GOAL: f64 = 1.0 / 0.97;

/// Nanoseconds for first touches of all pages, and for accesses in no order.
#[derive(Copy, Clone)]
struct Times {
    first: f64,
    later: f64,
}

impl Times {
    const WORST: Times = Times { first: f64::MAX, later: f64::MAX };

    fn best(self, other: Times) -> Times {
        Times { first: self.first.min(other.first), later: self.later.min(other.later) }
    }
}

/// Measures; the best of several rounds counts. Says also whether the host gives huge pages to shared memory.
///
/// # Errors
/// An event came, or the host refused something.
pub fn measure(rounds: usize) -> Result<(Vec<Row>, String)> {
    let (mut ours, mut file, mut plain) = (Times::WORST, Times::WORST, Times::WORST);
    // Alone on one CPU: what else the host does would be in one time and not in the other.
    let cpus = place::cpus();
    place::pin(&cpus[..1]);
    place::realtime(Some(2));
    for _ in 0..rounds {
        ours = ours.best(guest_memory()?);
        file = file.best(Mapping::file()?.times());
        plain = plain.best(Mapping::anonymous()?.times());
    }
    let shared =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let setting = shared.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned();
    // Without huge pages for shared memory only a plain file is comparable.
    let huge = ["advise", "always", "within_size", "force"].contains(&setting.as_str());
    let row = |what: &str, ours: f64, floor: f64, count: f64, goal| Row {
        op: what.into(),
        transport: "none".into(),
        polling: "none".into(),
        ours_us: ours / count / 1000.0,
        floor_us: floor / count / 1000.0,
        ratio: ours / floor,
        goal,
        ours_p99_us: None,
    };
    let (pages, accesses) = (PAGES as f64, ACCESSES as f64);
    let anonymous = huge.then_some(GOAL);
    let rows = vec![
        row("home, first touch, to memfd", ours.first, file.first, pages, Some(GOAL)),
        row("home, any access, to memfd", ours.later, file.later, accesses, Some(GOAL)),
        row("home, first touch, to anonymous", ours.first, plain.first, pages, None),
        row("home, any access, to anonymous", ours.later, plain.later, accesses, anonymous),
    ];
    Ok((rows, setting))
}

/// The home's memory with an engine that watches it, and another node that could ask for it.
fn guest_memory() -> Result<Times> {
    let nodes = Builder::new(Homes::new([PAGES, 512])).start()?;
    let times = work(nodes.memory(0).guest_view());
    let events = nodes.engine(0).totals().events;
    ensure!(events == 0, "memory at home that nobody asked for raised {events} events");
    Ok(times)
}

/// Plain memory of the same length.
struct Mapping(NonNull<c_void>);

impl Mapping {
    fn file() -> Result<Mapping> {
        let file = memfd_create(c"plain", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, BYTES as i64)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        Mapping::advised(unsafe { mmap(None, Mapping::len(), Mapping::PROT, flags, &file, 0) }?)
    }

    fn anonymous() -> Result<Mapping> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: as above.
        Mapping::advised(unsafe { mmap_anonymous(None, Mapping::len(), Mapping::PROT, flags) }?)
    }

    const PROT: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

    fn len() -> NonZeroUsize {
        const { NonZeroUsize::new(BYTES).unwrap() }
    }

    fn advised(start: NonNull<c_void>) -> Result<Mapping> {
        // SAFETY: the whole of our own mapping; the advice changes no content.
        unsafe { madvise(start, BYTES, MmapAdvise::MADV_HUGEPAGE) }?;
        Ok(Mapping(start))
    }

    fn times(&self) -> Times {
        work(self.0.as_ptr().cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and nobody has a reference into it.
        let _ = unsafe { munmap(self.0, BYTES) };
    }
}

/// Touches `BYTES` bytes from `start` on, which nobody has touched before.
fn work(start: *mut u8) -> Times {
    let word = |page: usize, line: usize| {
        // SAFETY: inside the memory, aligned; only this thread touches it.
        unsafe { start.add(page * PAGE_SIZE + line * 64).cast::<u64>() }
    };
    let begin = Instant::now();
    for page in 0..PAGES as usize {
        // SAFETY: as above.
        unsafe { word(page, 0).write_volatile(page as u64) };
    }
    let first = begin.elapsed().as_nanos() as f64;
    let begin = Instant::now();
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..ACCESSES {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let at = word(x as usize % PAGES as usize, (x >> 32) as usize % 64);
        // SAFETY: as above.
        unsafe { at.write_volatile(at.read_volatile() + 1) };
    }
    Times { first, later: begin.elapsed().as_nanos() as f64 }
}
