//! What the protocol asks for, carried out: the page tables of the guest view, the frames, and what leaves for
//! other nodes.

use crate::trace::{self, Event};
use fabric::NodeId;

use super::super::EngineError;
use super::super::outbox::Source;
use super::Core;
use crate::page::{BLOCK, PAGE_SIZE, Page};
use crate::protocol::{Body, Effect, Kind, Message, Rights};
use crate::stats::ShardStats;

impl Core {
    /// Carries out what the protocol asked for, in its order.
    pub(super) fn apply(&mut self, body: Body<'_>) -> Result<(), EngineError> {
        let effects = std::mem::take(&mut self.effects);
        for &effect in &effects {
            self.carry_out(effect, body)?;
        }
        self.effects = effects;
        self.effects.clear();
        self.holds.set_deferred(self.protocol.deferred());
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect, body: Body<'_>) -> Result<(), EngineError> {
        let failed = |what, page: Page| move |source| EngineError::Page { what, page: page.0, source };
        match effect {
            Effect::Send { .. } | Effect::Hold(_) | Effect::Deferred(_) | Effect::Discarded(..) => {}
            Effect::Written(_) | Effect::Loaded(..) | Effect::Stored(..) => {}
            Effect::Map(_, Rights::Shared) => {}
            // The bytes of a page that is to be sent must not change before.
            Effect::Clear(page) if !self.outbox.has(page) => {}
            Effect::Land(_) | Effect::Clear(_) => self.flush()?,
            // Nor may a page be mapped after it was to lose rights.
            Effect::Protect(_) | Effect::Unmap(..) | Effect::Probe(_) => self.map_gathered()?,
            _ => self.settle()?,
        }
        match effect {
            Effect::Send { to, message } => self.send(to, message, body)?,
            Effect::Land(page) => {
                let bytes = match body {
                    Body::Bytes(bytes) => Some(bytes),
                    Body::Zero | Body::Absent => None,
                };
                // SAFETY: the protocol lands bytes only in pages that are not mapped, and only this shard
                // writes its pages.
                unsafe { self.memory.fill(page, bytes) };
            }
            Effect::Map(page, Rights::Shared) if self.outbox.gathering => {
                trace::event(Event::Install, page.0, Rights::Shared as u64);
                self.finish_miss(page);
                let begins_range = self.begins_range(page);
                match &mut self.to_map {
                    Some((first, count)) if first.0 + *count == page.0 && !begins_range => *count += 1,
                    _ => {
                        self.map_gathered()?;
                        self.to_map = Some((page, 1));
                    }
                }
            }
            Effect::Map(page, rights) => {
                trace::event(Event::Install, page.0, rights as u64);
                let address = self.memory.guest_address(page);
                let len = PAGE_SIZE as u64;
                let shared = rights == Rights::Shared;
                let mut mapped = self.uffd.map(address, len, shared);
                if self.home.contains(&page.0) && mapped.as_ref().is_err_and(is_absent) {
                    // Its frame was given up after the event.
                    self.memory.ensure_frame(page);
                    mapped = self.uffd.map(address, len, shared);
                }
                if mapped.map_err(failed("mapping", page))? == 0 {
                    // Mapped already: set its rights and wake who waited.
                    self.uffd.protect(address, len, shared).map_err(failed("protecting", page))?;
                    self.uffd.wake(address, len).map_err(failed("waking the waiters", page))?;
                }
                self.finish_miss(page);
            }
            Effect::MapZeroes(first, count) => {
                trace::event(Event::Install, first.0, u64::from(count) << 8 | Rights::Exclusive as u64);
                for page in (first.0..first.0 + u64::from(count)).map(Page) {
                    // SAFETY: pages that were not here until now, so that they are not mapped.
                    unsafe { self.memory.fill(page, None) };
                    self.finish_miss(page);
                }
                let len = u64::from(count) * PAGE_SIZE as u64;
                self.uffd
                    .map(self.memory.guest_address(first), len, false)
                    .map_err(failed("mapping a run", first))?;
                ShardStats::add(&self.stats.run_pages, u64::from(count));
            }
            Effect::Unprotect(page) => {
                trace::event(Event::Install, page.0, Rights::Exclusive as u64);
                let address = self.memory.guest_address(page);
                self.uffd.protect(address, PAGE_SIZE as u64, false).map_err(failed("unprotecting", page))?;
                self.finish_miss(page);
            }
            Effect::Protect(page) => {
                trace::event(Event::Downgrade, page.0, 0);
                ShardStats::count(&self.stats.downgrades);
                self.pin_down(page);
                let address = self.memory.guest_address(page);
                self.uffd.protect(address, PAGE_SIZE as u64, true).map_err(failed("protecting", page))?;
            }
            Effect::Unmap(page, rights) => {
                trace::event(Event::Unmap, page.0, 0);
                if !self.protocol.is_leaving(page) {
                    self.holds.taken(page);
                }
                ShardStats::count(match rights {
                    _ if self.protocol.is_leaving(page) => &self.stats.evictions,
                    Rights::Exclusive => &self.stats.handovers,
                    _ => &self.stats.invalidations,
                });
                if let Some(first) = self.untouched.remove(page) {
                    self.recall.strike(first, page);
                }
                self.pin_down(page);
                self.stats.count_withdrawal();
                self.memory.unmap(page, 1).map_err(failed("unmapping", page))?;
            }
            Effect::Probe(page) => {
                ShardStats::count(&self.stats.probes);
                self.stats.count_withdrawal();
                self.memory.unmap(page, 1).map_err(failed("unmapping", page))?;
            }
            Effect::Free(page) => {
                self.garbage.push(page);
                if self.garbage.len() >= self.most_garbage {
                    self.collect_garbage()?;
                }
            }
            Effect::Clear(page) => {
                // SAFETY: the protocol clears only pages that are not mapped, and only this shard writes its pages.
                unsafe { self.memory.fill(page, None) };
            }
            Effect::Punch(first, count) => {
                trace::event(Event::Unmap, first.0, u64::from(count));
                for page in (first.0..first.0 + u64::from(count)).map(Page) {
                    self.untouched.remove(page);
                }
                self.stats.count_withdrawal();
                self.memory.free(first, count.into()).map_err(failed("giving up the frame", first))?;
                ShardStats::add(&self.stats.discarded, count.into());
            }
            Effect::Discarded(first, count) => self.discards.done(first, count),
            Effect::Overwrite(page) => {
                let bytes = match body {
                    Body::Bytes(bytes) => bytes,
                    Body::Zero | Body::Absent => &[0; PAGE_SIZE],
                };
                self.memory.overwrite(page, bytes);
            }
            Effect::Written(page) => trace::event(Event::Install, page.0, 0),
            Effect::Loaded(page, done) => {
                ShardStats::count(if done { &self.stats.loads } else { &self.stats.not_direct });
                self.jobs.answer(page, done.then_some(body));
            }
            Effect::Stored(page, done) => {
                ShardStats::count(if done { &self.stats.stores } else { &self.stats.not_direct });
                self.jobs.answer(page, done.then_some(Body::Absent));
            }
            Effect::Hold(page) => {
                let ahead = self.coming.remove(page);
                self.holds.hold(page, ahead, self.policy.now());
            }
            Effect::Ship(page) => self.ship(page),
            Effect::Operate { to, page, token, operation } => {
                ShardStats::count(&self.stats.operated);
                let old = Some(self.memory.operate(page, &operation).into());
                self.send(to, Message { page, kind: Kind::Operated { token, old } }, Body::Absent)?;
            }
            Effect::Operated { page, token, old } => self.operated(page, token, old.map(u128::from)),
            Effect::Deferred(page) => {
                trace::event(Event::Defer, page.0, 0);
                ShardStats::count(&self.stats.deferred);
            }
        }
        Ok(())
    }

    /// Before a home page loses rights its frame must be in the file: else the next touch would be filled by
    /// the kernel on its own, without an event.
    fn pin_down(&self, page: Page) {
        if self.home.contains(&page.0) {
            self.memory.ensure_frame(page);
        }
    }

    fn send(&mut self, to: NodeId, message: Message, body: Body<'_>) -> Result<(), EngineError> {
        ShardStats::count(&self.stats.messages_sent);
        trace::event(Event::Send, message.page.0, u64::from(message.kind.code()) << 16 | u64::from(to.0));
        let read;
        let bytes = match (message.kind, body) {
            (kind, _) if !kind.has_body() => None,
            // What does not lie still in a frame until it is sent.
            (Kind::Loaded { .. }, _) => {
                read = self.memory.read(message.page);
                Some((&read, Source::Own(&read)))
            }
            (Kind::Store, Body::Bytes(bytes)) => Some((bytes, Source::Own(bytes))),
            (Kind::Store, Body::Zero | Body::Absent) => Some((&[0; PAGE_SIZE], Source::Zero)),
            // SAFETY: the protocol sends bytes only of pages that it has unmapped or protected here, or that only
            // this shard's engine view holds.
            _ => Some((unsafe { self.memory.frame(message.page) }, Source::Frame)),
        };
        let source = match bytes {
            None => Source::Frame,
            Some((bytes, _)) if is_zero(bytes) => {
                ShardStats::count(&self.stats.zero_pages_sent);
                Source::Zero
            }
            Some((_, source)) => {
                ShardStats::count(&self.stats.pages_sent);
                source
            }
        };
        // SAFETY: as above, and what could change a page's bytes flushes before.
        Ok(unsafe { self.outbox.send(to, message, source, &self.memory, &*self.transport, self.lane) }?)
    }

    /// Maps and sends what waits for more to follow.
    pub(super) fn settle(&mut self) -> Result<(), EngineError> {
        self.map_gathered()?;
        self.flush()
    }

    /// Whether the page begins a range of its own for userfaultfd, which maps no two ranges at once: another
    /// home's pages, or another region's.
    fn begins_range(&self, page: Page) -> bool {
        page.0.is_multiple_of(BLOCK) || self.homes.range(self.homes.home(page)).start == page.0
    }

    /// Maps the pages that were to be mapped together: a reader of one of them then finds the others.
    fn map_gathered(&mut self) -> Result<(), EngineError> {
        let Some((mut page, mut count)) = self.to_map.take() else { return Ok(()) };
        let failed = |page: Page| move |source| EngineError::Page { what: "mapping", page: page.0, source };
        const LEN: u64 = PAGE_SIZE as u64;
        while count > 0 {
            let address = self.memory.guest_address(page);
            let mapped = self.uffd.map(address, count * LEN, true).map_err(failed(page))? / LEN;
            if mapped < count {
                // The next was mapped already: only who waited is to be woken.
                let address = address + mapped * LEN;
                self.uffd.protect(address, LEN, true).map_err(failed(page))?;
                self.uffd.wake(address, LEN).map_err(failed(page))?;
            }
            let done = (mapped + 1).min(count);
            (page, count) = (Page(page.0 + done), count - done);
        }
        Ok(())
    }

    /// Sends what waits for more to follow.
    fn flush(&mut self) -> Result<(), EngineError> {
        if self.outbox.is_empty() {
            return Ok(());
        }
        // SAFETY: as in `send`.
        Ok(unsafe { self.outbox.flush(&self.memory, &*self.transport, self.lane) }?)
    }

    fn finish_miss(&mut self, page: Page) {
        self.holds.mapped(page, self.policy.now());
        if let Some(i) = self.misses.iter().position(|m| m.page == page) {
            let miss = self.misses.swap_remove(i);
            let took = miss.since.elapsed();
            self.holds.came(page, took);
            self.stats.record(took);
        }
    }

    /// Gives back the frames of pages that went away and did not come back.
    pub(super) fn collect_garbage(&mut self) -> Result<(), EngineError> {
        while let Some(page) = self.garbage.pop() {
            if self.protocol.is_garbage(page) {
                self.memory.free(page, 1).map_err(|source| EngineError::Page {
                    what: "freeing the frame",
                    page: page.0,
                    source,
                })?;
            }
        }
        Ok(())
    }
}

/// Whether a page could not be mapped because it has no frame.
fn is_absent(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// A page's bytes as a body.
pub(super) fn body_of(bytes: &[u8; PAGE_SIZE]) -> Body<'_> {
    if is_zero(bytes) { Body::Zero } else { Body::Bytes(bytes) }
}

/// Whether a frame holds nothing but zeroes.
pub(super) fn is_zero(frame: &[u8; PAGE_SIZE]) -> bool {
    frame.chunks_exact(64).all(|line| line == [0; 64])
}
