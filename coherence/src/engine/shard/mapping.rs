//! A shard's pages as this node has them: the guest view's page tables, and the frames behind them.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use fabric::NodeId;

use super::super::{EngineConfig, EngineError};
use super::effects::is_zero;
use crate::memory::DualMemory;
use crate::page::{BLOCK, Homes, PAGE_SIZE, Page, Shards};
use crate::protocol::Protocol;
use crate::stats::ShardStats;
use crate::uffd::{Mode, Uffd};

const LEN: u64 = PAGE_SIZE as u64;

/// The memory, and what watches the shard's part of it.
pub struct Mapping {
    /// Told when pages have gone from the guest view, before their frames change.
    stats: Arc<ShardStats>,
    memory: Arc<DualMemory>,
    uffd: Arc<Uffd>,
    homes: Homes,
    /// Pages of which this node is the home.
    home: Range<u64>,
    to_map: Row,
    /// Frames whose pages went away.
    garbage: Vec<Page>,
    most_garbage: usize,
}

/// Pages in a row that are to be mapped read-only together.
#[derive(Default)]
struct Row(Option<(Page, u64)>);

impl Row {
    /// Adds a page. One that does not continue the row begins another; the row that ends with that is
    /// returned.
    fn add(&mut self, page: Page, begins_range: bool) -> Row {
        match &mut self.0 {
            Some((first, count)) if first.0 + *count == page.0 && !begins_range => {
                *count += 1;
                Row(None)
            }
            row => Row(row.replace((page, 1))),
        }
    }
}

fn failed(what: &'static str, page: Page) -> impl Fn(io::Error) -> EngineError {
    move |source| EngineError::Page { what, page: page.0, source }
}

/// Whether a page could not be mapped because it has no frame.
fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

impl Mapping {
    /// Watches shard `id`'s pages of the guest view. So many frames may wait to be given back.
    ///
    /// # Errors
    /// [`EngineError::Setup`] when this host's userfaultfd cannot serve.
    pub fn new(
        config: &EngineConfig,
        shards: Shards,
        id: u16,
        memory: Arc<DualMemory>,
        most_garbage: usize,
        stats: Arc<ShardStats>,
    ) -> Result<Mapping, EngineError> {
        let uffd = Arc::new(Uffd::open().map_err(EngineError::Setup)?);
        for node in 0..config.homes.nodes() {
            let node = NodeId(node as u16);
            let mode = if node == config.node { Mode::Home } else { Mode::Remote };
            for range in shards.ranges(id, config.homes.range(node)) {
                let start = memory.guest_address(Page(range.start));
                uffd.register(start, (range.end - range.start) * LEN, mode).map_err(|e| {
                    EngineError::Setup(format!("userfaultfd cannot watch the guest's memory: {e}"))
                })?;
            }
        }
        Ok(Mapping {
            stats,
            memory,
            uffd,
            homes: config.homes.clone(),
            home: config.homes.range(config.node),
            to_map: Row::default(),
            garbage: Vec::with_capacity(most_garbage),
            most_garbage,
        })
    }

    /// Both views of the memory.
    pub fn memory(&self) -> &DualMemory {
        &self.memory
    }

    /// What watches the shard's pages.
    pub fn uffd(&self) -> &Arc<Uffd> {
        &self.uffd
    }

    /// Whose pages are whose.
    pub fn homes(&self) -> &Homes {
        &self.homes
    }

    /// Whether this node is the page's home.
    pub fn is_home(&self, page: Page) -> bool {
        self.home.contains(&page.0)
    }

    /// Maps a page and wakes who waits for it.
    pub fn map(&self, page: Page, shared: bool) -> Result<(), EngineError> {
        let address = self.memory.guest_address(page);
        let mut mapped = self.uffd.map(address, LEN, shared);
        if self.is_home(page) && mapped.as_ref().is_err_and(is_absent) {
            // Its frame was given up after the event.
            self.memory.ensure_frame(page);
            mapped = self.uffd.map(address, LEN, shared);
        }
        if mapped.map_err(failed("mapping", page))? == 0 {
            // Mapped already: set its rights and wake who waited.
            self.uffd.protect(address, LEN, shared).map_err(failed("protecting", page))?;
            self.uffd.wake(address, LEN).map_err(failed("waking the waiters", page))?;
        }
        Ok(())
    }

    /// Maps pages that were not here before, writable, and wakes who waits for them.
    pub fn map_run(&self, first: Page, count: u8) -> Result<(), EngineError> {
        let mapped = self.uffd.map(self.memory.guest_address(first), u64::from(count) * LEN, false);
        mapped.map(drop).map_err(failed("mapping a run", first))
    }

    /// Maps a page read-only, together with those that follow, by [`Mapping::map_gathered`].
    pub fn map_later(&mut self, page: Page) -> Result<(), EngineError> {
        let row = self.to_map.add(page, self.begins_range(page));
        self.map_row(row)
    }

    /// Maps the pages that were to be mapped together: a reader of one of them then finds the others.
    pub fn map_gathered(&mut self) -> Result<(), EngineError> {
        let row = std::mem::take(&mut self.to_map);
        self.map_row(row)
    }

    fn map_row(&self, row: Row) -> Result<(), EngineError> {
        let Some((mut page, mut count)) = row.0 else { return Ok(()) };
        while count > 0 {
            let address = self.memory.guest_address(page);
            let mapped = self.uffd.map(address, count * LEN, true).map_err(failed("mapping", page))? / LEN;
            if mapped < count {
                // The next was mapped already: only who waited is to be woken.
                let address = address + mapped * LEN;
                self.uffd.protect(address, LEN, true).map_err(failed("mapping", page))?;
                self.uffd.wake(address, LEN).map_err(failed("mapping", page))?;
            }
            let done = (mapped + 1).min(count);
            (page, count) = (Page(page.0 + done), count - done);
        }
        Ok(())
    }

    /// Whether the page begins a range of its own for userfaultfd, which maps no two ranges at once: another
    /// home's pages, or another region's.
    fn begins_range(&self, page: Page) -> bool {
        page.0.is_multiple_of(BLOCK) || self.homes.range(self.homes.home(page)).start == page.0
    }

    /// Lets a page that is mapped be written, and wakes who waits for that.
    pub fn unprotect(&self, page: Page) -> Result<(), EngineError> {
        let address = self.memory.guest_address(page);
        self.uffd.protect(address, LEN, false).map_err(failed("unprotecting", page))
    }

    /// Lets a page that is mapped be read only.
    pub fn protect(&self, page: Page) -> Result<(), EngineError> {
        self.pin_down(page);
        let address = self.memory.guest_address(page);
        self.uffd.protect(address, LEN, true).map_err(failed("protecting", page))
    }

    /// Unmaps a page; nobody can access it when this is done.
    pub fn unmap(&self, page: Page) -> Result<(), EngineError> {
        self.pin_down(page);
        self.probe(page)
    }

    /// Unmaps another home's page, whose next touch shows that it is used.
    pub fn probe(&self, page: Page) -> Result<(), EngineError> {
        self.memory.unmap(page, 1).map_err(failed("unmapping", page))?;
        self.stats.count_withdrawal();
        Ok(())
    }

    /// Before a home page loses rights its frame must be in the file: else the next touch would be filled by
    /// the kernel on its own, without an event.
    fn pin_down(&self, page: Page) {
        if self.is_home(page) {
            self.memory.ensure_frame(page);
        }
    }

    /// Before a Get of `most` pages from `first` on that never left this home: finds out how many of them
    /// nobody has touched, and makes sure that nobody will without an event. The order is what makes the
    /// answer true: the frames are in the file before they are unmapped, and looked at after.
    pub fn surrender(&self, first: Page, most: u8) -> Result<u8, EngineError> {
        let absent = if most == 0 { 0 } else { self.memory.absent(first, u64::from(most)) };
        if absent == 0 {
            return Ok(0);
        }
        let pages = || (first.0..first.0 + absent).map(Page);
        pages().for_each(|page| self.memory.ensure_frame(page));
        self.memory.unmap(first, absent).map_err(failed("unmapping", first))?;
        self.stats.count_withdrawal();
        // SAFETY: just unmapped, and only this shard maps its pages again or writes them.
        let zeroes = pages().take_while(|&page| is_zero(unsafe { self.memory.frame(page) })).count();
        Ok(zeroes as u8)
    }

    /// Gives up the frames of pages of this home, mapped or not.
    pub fn punch(&self, first: Page, count: u16) -> Result<(), EngineError> {
        // Its bytes go with it: before and after.
        self.stats.count_withdrawal();
        self.memory.free(first, count.into()).map_err(failed("giving up the frame", first))?;
        self.stats.count_withdrawal();
        Ok(())
    }

    /// The page's frame may be given back; whether it is time to collect such frames.
    pub fn add_garbage(&mut self, page: Page) -> bool {
        self.garbage.push(page);
        self.garbage.len() >= self.most_garbage
    }

    /// Gives back the frames of pages that went away and did not come back.
    pub fn collect_garbage(&mut self, protocol: &Protocol) -> Result<(), EngineError> {
        while let Some(page) = self.garbage.pop() {
            if protocol.is_garbage(page) {
                self.memory.free(page, 1).map_err(failed("freeing the frame", page))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of those pages, of which `begin` begins a range.
    fn rows(pages: &[u64], begin: u64) -> Vec<(u64, u64)> {
        let mut row = Row::default();
        let mut rows: Vec<Row> = pages.iter().map(|&page| row.add(Page(page), page == begin)).collect();
        rows.push(row);
        rows.into_iter().filter_map(|row| row.0).map(|(first, count)| (first.0, count)).collect()
    }

    #[test]
    fn pages_that_follow_each_other_are_mapped_together() {
        assert_eq!(rows(&[5, 6, 7, 9, 8], 100), [(5, 3), (9, 1), (8, 1)]);
        assert_eq!(rows(&[5, 5, 6], 100), [(5, 1), (5, 2)]);
        assert_eq!(rows(&[], 100), []);
    }

    #[test]
    fn a_row_of_pages_ends_where_a_range_begins() {
        assert_eq!(rows(&[5, 6, 7], 6), [(5, 1), (6, 2)]);
    }
}
