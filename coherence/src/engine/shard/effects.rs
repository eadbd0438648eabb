//! The protocol's effects, carried out: on the page tables of the guest view, on the frames, and as messages
//! to other nodes.

use crate::trace::{self, Event};
use fabric::NodeId;

use super::super::EngineError;
use super::super::outbox::{Outgoing, Source};
use super::Core;
use crate::page::{PAGE_SIZE, Page};
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

    /// Does `work`, of which messages for one node leave together, and neighbours are mapped together.
    pub(super) fn together<T>(
        &mut self,
        work: impl FnOnce(&mut Core) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let gathering = self.outbox.gather(true);
        let done = work(self);
        self.outbox.gather(gathering);
        let done = done?;
        self.settle()?;
        Ok(done)
    }

    /// Carries out what the protocol asked for, together.
    pub(super) fn apply_together(&mut self) -> Result<(), EngineError> {
        self.together(|core| core.apply(Body::Absent))
    }

    fn carry_out(&mut self, effect: Effect, body: Body<'_>) -> Result<(), EngineError> {
        match effect {
            Effect::Send { .. } | Effect::Hold(_) | Effect::Deferred(_) | Effect::Discarded(..) => {}
            Effect::Written(_) | Effect::Loaded(..) | Effect::Stored(..) => {}
            Effect::Map(_, Rights::Shared) => {}
            // The bytes of a page that is to be sent must not change before.
            Effect::Clear(page) if !self.outbox.has(page) => {}
            Effect::Land(_) | Effect::Clear(_) => self.flush()?,
            // Nor may a page be mapped after it was to lose rights.
            Effect::Protect(_) | Effect::Unmap(..) | Effect::Probe(_) => self.mapping.map_gathered()?,
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
                unsafe { self.mapping.memory().fill(page, bytes) };
            }
            Effect::Map(page, Rights::Shared) if self.outbox.is_gathering() => {
                trace::event(Event::Install, page.0, Rights::Shared as u64);
                self.finish_miss(page);
                self.mapping.map_later(page)?;
            }
            Effect::Map(page, rights) => {
                trace::event(Event::Install, page.0, rights as u64);
                self.mapping.map(page, rights == Rights::Shared)?;
                self.finish_miss(page);
            }
            Effect::MapZeroes(first, count) => {
                trace::event(Event::Install, first.0, u64::from(count) << 8 | Rights::Exclusive as u64);
                for page in (first.0..first.0 + u64::from(count)).map(Page) {
                    // SAFETY: pages that were not here until now, so that they are not mapped.
                    unsafe { self.mapping.memory().fill(page, None) };
                    self.finish_miss(page);
                }
                self.mapping.map_run(first, count)?;
                ShardStats::add(&self.stats.run_pages, u64::from(count));
            }
            Effect::Unprotect(page) => {
                trace::event(Event::Install, page.0, Rights::Exclusive as u64);
                self.mapping.unprotect(page)?;
                self.finish_miss(page);
            }
            Effect::Protect(page) => {
                trace::event(Event::Downgrade, page.0, 0);
                ShardStats::count(&self.stats.downgrades);
                self.mapping.protect(page)?;
            }
            Effect::Unmap(page, rights) => {
                trace::event(Event::Unmap, page.0, 0);
                ShardStats::count(match rights {
                    _ if self.protocol.is_leaving(page) => &self.stats.evictions,
                    Rights::Exclusive => &self.stats.handovers,
                    _ => &self.stats.invalidations,
                });
                self.prefetch.left(page);
                self.mapping.unmap(page)?;
            }
            Effect::Probe(page) => {
                ShardStats::count(&self.stats.probes);
                self.mapping.probe(page)?;
            }
            Effect::Free(page) => {
                if self.mapping.add_garbage(page) {
                    self.collect_garbage()?;
                }
            }
            Effect::Clear(page) => {
                // SAFETY: the protocol clears only pages that are not mapped, and only this shard writes its
                // pages.
                unsafe { self.mapping.memory().fill(page, None) };
            }
            Effect::Punch(first, count) => {
                trace::event(Event::Unmap, first.0, u64::from(count));
                for page in (first.0..first.0 + u64::from(count)).map(Page) {
                    self.prefetch.forget(page);
                }
                self.mapping.punch(first, count)?;
                ShardStats::add(&self.stats.discarded, count.into());
            }
            Effect::Discarded(first, count) => self.devices.discards.done(first, count),
            Effect::Overwrite(page) => {
                let bytes = match body {
                    Body::Bytes(bytes) => bytes,
                    Body::Zero | Body::Absent => &[0; PAGE_SIZE],
                };
                self.mapping.memory().overwrite(page, bytes);
            }
            Effect::Written(page) => trace::event(Event::Install, page.0, 0),
            Effect::Loaded(page, done) => {
                ShardStats::count(if done { &self.stats.loads } else { &self.stats.not_direct });
                if done && matches!(body, Body::Bytes(_)) {
                    ShardStats::count(&self.stats.copied);
                }
                self.devices.jobs.answer(page, done.then_some(body));
            }
            Effect::Stored(page, done) => {
                ShardStats::count(if done { &self.stats.stores } else { &self.stats.not_direct });
                self.devices.jobs.answer(page, done.then_some(Body::Absent));
            }
            Effect::Hold(page) => {
                // The page was mapped just before for who waited, unless it came ahead of its need.
                self.holds.hold(page, self.prefetch.is_untouched(page), self.holds.now());
            }
            Effect::Ship(page) => self.ship(page),
            Effect::Operate { to, page, token, operation } => {
                ShardStats::count(&self.stats.operated);
                let old = Some(self.mapping.memory().operate(page, &operation).into());
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

    fn send(&mut self, to: NodeId, message: Message, body: Body<'_>) -> Result<(), EngineError> {
        ShardStats::count(&self.stats.messages_sent);
        trace::event(Event::Send, message.page.0, u64::from(message.kind.code()) << 16 | u64::from(to.0));
        let (source, zero) = match (message.kind, body) {
            // What does not lie still in a frame until it is sent.
            (Kind::Loaded { body: true }, _) => {
                ShardStats::count(&self.stats.copied);
                (self.outbox.copy(message.page, self.mapping.memory()), false)
            }
            (Kind::Store, Body::Bytes(_)) => {
                let bytes = self.devices.jobs.to_store(message.page).expect("what is stored is a device's");
                (Source::Lent(bytes.clone()), false)
            }
            (Kind::Store, Body::Zero | Body::Absent) => (Source::Frame, true),
            _ => (Source::Frame, false),
        };
        let mut outgoing = Outgoing { to, message, source, zero };
        // SAFETY: the protocol sends frames only of pages that it has unmapped or protected here, or that
        // only this shard's engine view holds.
        outgoing.zero |= unsafe { outgoing.body(self.mapping.memory()) }.is_some_and(is_zero);
        if message.kind.has_body() {
            let sent = if outgoing.zero { &self.stats.zero_pages_sent } else { &self.stats.pages_sent };
            ShardStats::count(sent);
        }
        // SAFETY: as above, and what could change a page's bytes flushes before.
        Ok(unsafe { self.outbox.send(outgoing, self.mapping.memory()) }?)
    }

    /// Maps and sends what waits for more to follow.
    pub(super) fn settle(&mut self) -> Result<(), EngineError> {
        self.mapping.map_gathered()?;
        self.flush()
    }

    /// Sends what waits for more to follow.
    fn flush(&mut self) -> Result<(), EngineError> {
        if self.outbox.is_empty() {
            return Ok(());
        }
        // SAFETY: as in `send`.
        Ok(unsafe { self.outbox.flush(self.mapping.memory()) }?)
    }

    /// Gives back the frames of pages that went away and did not come back.
    pub(super) fn collect_garbage(&mut self) -> Result<(), EngineError> {
        self.mapping.collect_garbage(&self.protocol)
    }
}

/// A page's bytes as a body.
pub(super) fn body_of(bytes: &[u8; PAGE_SIZE]) -> Body<'_> {
    if is_zero(bytes) { Body::Zero } else { Body::Bytes(bytes) }
}

/// Whether a frame holds nothing but zeroes.
pub(super) fn is_zero(frame: &[u8; PAGE_SIZE]) -> bool {
    frame.chunks_exact(64).all(|line| line == [0; 64])
}
