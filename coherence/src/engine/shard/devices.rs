//! Devices: reads and writes of whole pages, and discards, that a shard has under way for other threads.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crossbeam::channel::Sender;

use super::super::EngineError;
use super::super::lent::Lent;
use super::super::request::{Bytes, Job};
use super::Core;
use super::effects::body_of;
use crate::page::Page;
use crate::protocol::Body;

/// What devices and the balloon wait for.
#[derive(Default)]
pub struct Devices {
    pub jobs: Jobs,
    pub discards: Discards,
}

/// A page of a job under way.
#[derive(Copy, Clone)]
struct JobPage {
    job: usize,
    at: usize,
}

/// A shard's jobs under way.
#[derive(Default)]
pub struct Jobs {
    jobs: Vec<Option<Box<Job>>>,
    /// Who waits for a page; one at most.
    waiting: HashMap<Page, JobPage>,
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
        self.waiting.insert(page, JobPage { job, at });
    }

    /// What is to be written to a page that waits for its answer.
    pub fn to_store(&self, page: Page) -> Option<&Lent> {
        let place = self.waiting.get(&page)?;
        self.jobs[place.job].as_ref()?.pages[place.at].to_store()
    }

    /// The answer for a page: `None` if it was not done, else what was read.
    pub fn answer(&mut self, page: Page, done: Option<Body<'_>>) {
        let Some(JobPage { job: number, at }) = self.waiting.remove(&page) else { return };
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

/// Discards under way: who waits for which pages.
#[derive(Default)]
pub struct Discards {
    waiting: Vec<Discard>,
    /// When the first of these began, or pages of one were done last. They are asked for together: as long as
    /// some are done nothing is stuck.
    progress: Option<Instant>,
}

struct Discard {
    pages: Range<u64>,
    left: u64,
    done: Sender<()>,
}

impl Discards {
    /// Somebody waits until all of `pages` are done.
    pub fn begin(&mut self, pages: Range<u64>, done: Sender<()>) {
        if self.waiting.is_empty() {
            self.progress = Some(Instant::now());
        }
        self.waiting.push(Discard { left: pages.end - pages.start, pages, done });
    }

    /// Since when nothing is done of what somebody waits for.
    pub fn stands_still_since(&self) -> Option<Instant> {
        self.progress.filter(|_| !self.waiting.is_empty())
    }

    /// So many pages are done.
    pub fn done(&mut self, first: Page, count: u16) {
        let waits = |discard: &Discard| discard.pages.contains(&first.0) && discard.left > 0;
        let Some(at) = self.waiting.iter().position(waits) else { return };
        self.progress = Some(Instant::now());
        self.waiting[at].left = self.waiting[at].left.saturating_sub(count.into());
        if self.waiting[at].left == 0 {
            // Who waited may have given up.
            let _ = self.waiting.remove(at).done.send(());
        }
    }
}

impl Core {
    /// Gives up what is in `pages`, and tells `done` then.
    pub(super) fn discard(&mut self, pages: Range<u64>, done: Sender<()>) -> Result<(), EngineError> {
        let (first, count) = (Page(pages.start), pages.end - pages.start);
        self.devices.discards.begin(pages, done);
        self.protocol.discard(first, (count - 1) as u16, &mut self.effects);
        self.apply_together()
    }

    /// Asks for all pages of a device's request at once.
    pub(super) fn direct(&mut self, job: Box<Job>) -> Result<(), EngineError> {
        let job = self.devices.jobs.begin(job);
        self.together(|core| {
            let mut at = 0;
            while let Some((page, bytes)) = core.devices.jobs.page(job, at) {
                let asked = match bytes {
                    None => core.protocol.load(page, &mut core.effects),
                    Some(_) => core.protocol.store(page, &mut core.effects),
                };
                if asked {
                    core.devices.jobs.expect(page, job, at);
                    core.apply(bytes.as_deref().map_or(Body::Absent, body_of))?;
                } else {
                    core.devices.jobs.end_one(job);
                }
                at += 1;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use crossbeam::channel::unbounded;

    use super::super::super::lent::Lender;
    use super::super::super::request::Wanted;
    use super::*;
    use crate::page::PAGE_SIZE;

    #[test]
    fn who_discards_is_told_when_all_its_pages_are_done() {
        let (mut discards, (done, told)) = (Discards::default(), unbounded());
        discards.begin(4..12, done);
        let begun = discards.stands_still_since().unwrap();
        discards.done(Page(20), 8);
        assert_eq!(discards.stands_still_since(), Some(begun), "pages that nobody waits for are no progress");
        discards.done(Page(4), 5);
        assert!(discards.stands_still_since().unwrap() >= begun);
        assert!(told.is_empty());
        discards.done(Page(9), 3);
        assert_eq!(told.try_recv(), Ok(()));
        assert!(told.recv().is_err(), "nobody is left who would tell");
        assert_eq!(discards.stands_still_since(), None);
    }

    #[test]
    fn a_job_ends_with_its_last_answer_and_reads_only_what_was_wanted() {
        let (mut to, lender) = ([1; 3], Lender::new());
        let done: Arc<[AtomicBool]> = [false, false].map(AtomicBool::new).into();
        // SAFETY: the array lives until the lender is dropped below.
        let bytes = Bytes::Load { offset: 8, to: unsafe { lender.lend_mut(&mut to) } };
        let read = Wanted { page: Page(1), bytes, place: 0 };
        // SAFETY: as above; a constant is always there.
        let bytes = Bytes::Store(unsafe { lender.lend(&[2; PAGE_SIZE]) });
        let written = Wanted { page: Page(2), bytes, place: 1 };
        let pages = vec![read, written];
        let job = Box::new(Job { pages, done: done.clone(), left: 2, since: Instant::now() });
        let mut jobs = Jobs::default();
        let number = jobs.begin(job);
        jobs.expect(Page(1), number, 0);
        jobs.expect(Page(2), number, 1);
        assert!(jobs.to_store(Page(1)).is_none() && jobs.to_store(Page(2)).is_some());
        jobs.answer(Page(2), None);
        assert!(jobs.oldest().is_some());
        let mut page = [0; PAGE_SIZE];
        page[8..11].copy_from_slice(&[7, 8, 9]);
        jobs.answer(Page(1), Some(Body::Bytes(&page)));
        assert!(jobs.oldest().is_none());
        drop(lender);
        assert_eq!((to, [&done[0], &done[1]].map(|done| done.load(Relaxed))), ([7, 8, 9], [true, false]));
    }
}
