//! Devices read and overwrite whole pages where these are: [`Engine::load`] and [`Engine::store`].
//!
//! A device's thread asks for all pages of a request at once, each shard asks for its part of them at once, and the thread
//! sleeps until the last answer is in.

use std::collections::HashMap;
use std::time::Instant;

use crossbeam::channel::{Sender, unbounded};

use super::Engine;
use super::shard::Request;
use crate::page::{PAGE_SIZE, Page};
use crate::protocol::Body;

impl Engine {
    /// Reads pages that are not here, into as many times 4096 `bytes`; tells of each page whether it was read. One that was
    /// not is here, or something is under way on it: touch it through the guest view.
    ///
    /// Not for a thread for which the engine may have to wait.
    ///
    /// # Panics
    /// If `bytes` is not as long as the pages.
    pub fn load(&self, pages: &[Page], bytes: &mut [u8]) -> Vec<bool> {
        assert_eq!(bytes.len(), pages.len() * PAGE_SIZE);
        let mut read = vec![false; pages.len()];
        self.direct(pages, None, |at, page| {
            read[at] = true;
            bytes[at * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(page);
        });
        read
    }

    /// Overwrites pages that are not here to write with `bytes`, 4096 for each; tells of each page whether that was done.
    /// One that was not is here, or something is under way on it: write through the guest view. Whoever reads a page
    /// after this returns finds the new content.
    ///
    /// Not for a thread for which the engine may have to wait.
    ///
    /// # Panics
    /// If `bytes` is not as long as the pages.
    pub fn store(&self, pages: &[Page], bytes: &[u8]) -> Vec<bool> {
        assert_eq!(bytes.len(), pages.len() * PAGE_SIZE);
        let mut written = vec![false; pages.len()];
        self.direct(pages, Some(bytes), |at, _| written[at] = true);
        written
    }

    /// Has every shard do its part; `done` is told each place in `pages` that was done, and what was read there.
    fn direct(&self, pages: &[Page], bytes: Option<&[u8]>, mut done: impl FnMut(usize, &[u8])) {
        let (reply, answers) = unbounded();
        let mut parts = 0;
        for (shard, door) in (0..).zip(&self.doors) {
            let mine =
                |at: &usize| pages[*at].0 < self.homes.pages() && self.shards.shard(pages[*at]) == shard;
            let places: Vec<usize> = (0..pages.len()).filter(mine).collect();
            if places.is_empty() {
                continue;
            }
            let job = Job::new(pages, places, bytes, reply.clone());
            if door.requests.send(Request::Direct(Box::new(job))).is_ok() {
                // A full eventfd wakes as well.
                let _ = door.bell.write(1);
                parts += 1;
            }
        }
        drop(reply);
        // What this thread has won meanwhile is of no use to it before the answers are in.
        self.idle(base::thread::id() as u32);
        for _ in 0..parts {
            // An engine that ends takes its jobs with it.
            let Ok(job) = answers.recv() else { return };
            for (i, &at) in job.places.iter().enumerate().filter(|(i, _)| job.done[*i]) {
                done(at, &job.bytes[i * PAGE_SIZE..][..PAGE_SIZE]);
            }
        }
    }
}

/// What a device wants of one shard.
pub struct Job {
    pages: Vec<Page>,
    /// Where these are among the pages that the device asked for.
    places: Vec<usize>,
    /// 4096 for each page: what is to be written, or what was read.
    bytes: Vec<u8>,
    store: bool,
    /// Which pages were read or written.
    done: Vec<bool>,
    /// Pages without an answer.
    left: usize,
    since: Instant,
    reply: Sender<Box<Job>>,
}

impl Job {
    fn new(all: &[Page], places: Vec<usize>, bytes: Option<&[u8]>, reply: Sender<Box<Job>>) -> Job {
        let len = places.len();
        let mut own = Vec::with_capacity(len * PAGE_SIZE);
        match bytes {
            Some(bytes) => places.iter().for_each(|at| own.extend(&bytes[at * PAGE_SIZE..][..PAGE_SIZE])),
            None => own.resize(len * PAGE_SIZE, 0),
        }
        Job {
            pages: places.iter().map(|&at| all[at]).collect(),
            places,
            bytes: own,
            store: bytes.is_some(),
            done: vec![false; len],
            left: len,
            since: Instant::now(),
            reply,
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
    pub fn page(&self, job: usize, at: usize) -> Option<(Page, Option<[u8; PAGE_SIZE]>)> {
        let job = self.jobs[job].as_ref()?;
        let bytes = job.bytes.get(at * PAGE_SIZE..(at + 1) * PAGE_SIZE)?;
        Some((*job.pages.get(at)?, if job.store { bytes.try_into().ok() } else { None }))
    }

    /// Until the page has its answer, it is for this place.
    pub fn expect(&mut self, page: Page, job: usize, at: usize) {
        self.waiting.insert(page, Place { job, at });
    }

    /// The answer for a page: `None` if it was not done, else what was read.
    pub fn answer(&mut self, page: Page, done: Option<Body<'_>>) {
        let Some(Place { job: number, at }) = self.waiting.remove(&page) else { return };
        if let Some(job) = &mut self.jobs[number] {
            job.done[at] = done.is_some();
            let bytes = &mut job.bytes[at * PAGE_SIZE..][..PAGE_SIZE];
            match done {
                Some(Body::Bytes(read)) if !job.store => bytes.copy_from_slice(read),
                // As it was made.
                _ => {}
            }
        }
        self.end_one(number);
    }

    /// One page less is to be answered; the last takes the job back to who waits.
    pub fn end_one(&mut self, number: usize) {
        let Some(job) = &mut self.jobs[number] else { return };
        job.left -= 1;
        if job.left == 0
            && let Some(job) = self.jobs[number].take()
        {
            let reply = job.reply.clone();
            // Who waited may be gone.
            let _ = reply.send(job);
        }
    }

    /// When the oldest job began.
    pub fn oldest(&self) -> Option<Instant> {
        self.jobs.iter().flatten().map(|job| job.since).min()
    }
}
