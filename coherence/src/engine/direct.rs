//! Direct access: devices read and overwrite whole pages without bringing them to their node, by
//! [`Engine::load`] and [`Engine::store`].
//!
//! A device's thread asks for all pages of a request at once, each shard asks for its part of them at once,
//! and the thread sleeps until the last answer is in. So long it lends its buffer: what is stored is sent
//! from there, and what was read is copied once, from where the transport has received it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use super::Engine;
use super::lent::Lender;
use super::request::{Bytes, Job, Request, Wanted};
use crate::page::{PAGE_SIZE, Page};

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
    /// Reads parts of pages that are not here; tells of each whether it was read. One that was not is here,
    /// or something is under way on its page: read it through the guest view.
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

    /// Overwrites pages that are not here to write; tells of each whether that was done. One that was not is
    /// here, or something is under way on it: write through the guest view. Whoever reads a page after this
    /// returns finds the new content.
    ///
    /// Not for a thread for which the engine may have to wait.
    pub fn store(&self, stores: &[Store<'_>]) -> Vec<bool> {
        let lender = Lender::new();
        // SAFETY: borrowed until this returns, and `direct` drops the lender before.
        let lend = |store: &Store| (store.page, Bytes::Store(unsafe { lender.lend(store.from) }));
        let wanted = stores.iter().map(lend).collect();
        self.direct(lender, wanted)
    }

    /// Has every shard do its part; which of the pages were read or written. What was lent is back when this
    /// returns.
    fn direct(&self, lender: Lender, wanted: Vec<(Page, Bytes)>) -> Vec<bool> {
        let done: Arc<[AtomicBool]> = wanted.iter().map(|_| AtomicBool::new(false)).collect();
        let mut parts: Vec<Vec<Wanted>> = self.handles.iter().map(|_| Vec::new()).collect();
        for (place, (page, bytes)) in wanted.into_iter().enumerate() {
            if page.0 < self.homes.pages() {
                parts[usize::from(self.shards.shard(page))].push(Wanted { page, bytes, place });
            }
        }
        for (shard, pages) in self.handles.iter().zip(parts).filter(|(_, pages)| !pages.is_empty()) {
            let (left, done) = (pages.len(), done.clone());
            let job = Job { pages, done, left, since: Instant::now() };
            // A shard that has ended drops its job, and so says that nothing was done.
            shard.ask(Request::Direct(Box::new(job)));
        }
        // What this thread has won meanwhile is of no use to it before the answers are in.
        self.idle(base::thread::id() as u32);
        // Waits for all shards; an engine that ends takes its jobs with it.
        drop(lender);
        done.iter().map(|done| done.load(Relaxed)).collect()
    }
}
