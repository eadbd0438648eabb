//! Devices read and overwrite whole pages where these are: [`Engine::load`] and [`Engine::store`].
//!
//! A device's thread asks for all pages of a request at once, each shard asks for its part of them at once, and the thread
//! sleeps until the last answer is in. So long it lends its buffer: what is stored is sent from there, and what was read is
//! copied once, from where the transport has received it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use super::Engine;
use super::lent::{Lender, Lent, LentMut};
use super::shard::Request;
use crate::page::{PAGE_SIZE, Page};
use crate::protocol::Body;

/// What a device reads of a page.
pub struct Load<'a> {
    /// The page.
    pub page: Page,
    /// Where in the page that begins.
    pub offset: usize,
    /// Where it goes; not more than the page has from `offset` on.
    pub to: &'a mut [u8],
}

/// A whole page that a device writes.
pub struct Store<'a> {
    /// The page.
    pub page: Page,
    /// Its new content.
    pub from: &'a [u8; PAGE_SIZE],
}

impl Engine {
    /// Reads parts of pages that are not here; tells of each whether it was read. One that was not is here, or something is
    /// under way on its page: read it through the guest view.
    ///
    /// Not for a thread for which the engine may have to wait.
    ///
    /// # Panics
    /// If a part goes beyond its page.
    pub fn load(&self, loads: Vec<Load<'_>>) -> Vec<bool> {
        let lender = Lender::new();
        let lend = |Load { page, offset, to }| {
            assert!(offset <= PAGE_SIZE && to.len() <= PAGE_SIZE - offset, "a load beyond its page");
            // SAFETY: borrowed until this returns, and `direct` drops the lender before.
            (page, Bytes::Load { offset, to: unsafe { lender.lend_mut(to) } })
        };
        let wanted = loads.into_iter().map(lend).collect();
        self.direct(lender, wanted)
    }

    /// Overwrites pages that are not here to write; tells of each whether that was done. One that was not is here, or
    /// something is under way on it: write through the guest view. Whoever reads a page after this returns finds the new
    /// content.
    ///
    /// Not for a thread for which the engine may have to wait.
    pub fn store(&self, stores: &[Store<'_>]) -> Vec<bool> {
        let lender = Lender::new();
        // SAFETY: borrowed until this returns, and `direct` drops the lender before.
        let lend = |store: &Store| (store.page, Bytes::Store(unsafe { lender.lend(store.from) }));
        let wanted = stores.iter().map(lend).collect();
        self.direct(lender, wanted)
    }

    /// Has every shard do its part; which of the pages were read or written. What was lent is back when this returns.
    fn direct(&self, lender: Lender, wanted: Vec<(Page, Bytes)>) -> Vec<bool> {
        let done: Arc<[AtomicBool]> = wanted.iter().map(|_| AtomicBool::new(false)).collect();
        let mut parts: Vec<Vec<Wanted>> = self.doors.iter().map(|_| Vec::new()).collect();
        for (place, (page, bytes)) in wanted.into_iter().enumerate() {
            if page.0 < self.homes.pages() {
                parts[usize::from(self.shards.shard(page))].push(Wanted { page, bytes, place });
            }
        }
        for (door, pages) in self.doors.iter().zip(parts).filter(|(_, pages)| !pages.is_empty()) {
            let (left, done) = (pages.len(), done.clone());
            let job = Job { pages, done, left, since: Instant::now() };
            if door.requests.send(Request::Direct(Box::new(job))).is_ok() {
                // A full eventfd wakes as well.
                let _ = door.bell.write(1);
            }
        }
        // What this thread has won meanwhile is of no use to it before the answers are in.
        self.idle(base::thread::id() as u32);
        // Waits for all shards; an engine that ends takes its jobs with it.
        drop(lender);
        done.iter().map(|done| done.load(Relaxed)).collect()
    }
}

/// A device's bytes for a page.
enum Bytes {
    Load { offset: usize, to: LentMut },
    Store(Lent),
}

/// A page that a device wants to read or to overwrite.
struct Wanted {
    page: Page,
    bytes: Bytes,
    /// Where it is among the pages that the device asked for.
    place: usize,
}

/// What a device wants of one shard. The device waits until it is dropped.
pub struct Job {
    pages: Vec<Wanted>,
    /// Which of all pages of the device were read or written.
    done: Arc<[AtomicBool]>,
    /// Pages without an answer.
    left: usize,
    since: Instant,
}

impl Wanted {
    fn to_store(&self) -> Option<&Lent> {
        match &self.bytes {
            Bytes::Store(lent) => Some(lent),
            Bytes::Load { .. } => None,
        }
    }
}

/// A page of a job under way.
#[derive(Copy, Clone)]
struct Place {
    job: usize,
    at: usize,
}

/// A shard's jobs under way.
#[derive(Default)]
pub struct Jobs {
    jobs: Vec<Option<Box<Job>>>,
    /// Who waits for a page; one at most.
    waiting: HashMap<Page, Place>,
}

impl Jobs {
    /// Takes a job on; its number.
    pub fn begin(&mut self, job: Box<Job>) -> usize {
        match self.jobs.iter().position(Option::is_none) {
            Some(free) => {
                self.jobs[free] = Some(job);
                free
            }
            None => {
                self.jobs.push(Some(job));
                self.jobs.len() - 1
            }
        }
    }

    /// The page at place `at` of a job, and what is to be written there, if anything; `None` beyond the last.
    pub fn page(&self, job: usize, at: usize) -> Option<(Page, Option<Lent>)> {
        let wanted = self.jobs[job].as_ref()?.pages.get(at)?;
        Some((wanted.page, wanted.to_store().cloned()))
    }

    /// Until the page has its answer, it is for this place.
    pub fn expect(&mut self, page: Page, job: usize, at: usize) {
        self.waiting.insert(page, Place { job, at });
    }

    /// What is to be written to a page that waits for its answer.
    pub fn to_store(&self, page: Page) -> Option<&Lent> {
        let place = self.waiting.get(&page)?;
        self.jobs[place.job].as_ref()?.pages[place.at].to_store()
    }

    /// The answer for a page: `None` if it was not done, else what was read.
    pub fn answer(&mut self, page: Page, done: Option<Body<'_>>) {
        let Some(Place { job: number, at }) = self.waiting.remove(&page) else { return };
        if let (Some(job), Some(read)) = (&mut self.jobs[number], done) {
            let wanted = &mut job.pages[at];
            match (&mut wanted.bytes, read) {
                (Bytes::Load { offset, to }, Body::Bytes(page)) => {
                    let len = to.len();
                    to.copy_from_slice(&page[*offset..*offset + len]);
                }
                (Bytes::Load { to, .. }, Body::Zero | Body::Absent) => to.fill(0),
                (Bytes::Store(_), _) => {}
            }
            job.done[wanted.place].store(true, Relaxed);
        }
        self.end_one(number);
    }

    /// One page less is to be answered; after the last the device has its bytes back.
    pub fn end_one(&mut self, number: usize) {
        let Some(job) = &mut self.jobs[number] else { return };
        job.left -= 1;
        if job.left == 0 {
            self.jobs[number] = None;
        }
    }

    /// When the oldest job began.
    pub fn oldest(&self) -> Option<Instant> {
        self.jobs.iter().flatten().map(|job| job.since).min()
    }
}
