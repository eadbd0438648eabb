//! Giving up content that nobody needs: [`Engine::discard`], for the balloon.

use std::ops::Range;

use crossbeam::channel::unbounded;

use super::Engine;
use super::request::Request;
use crate::page::{BLOCK, Page};

/// Pages were not discarded: the engine has ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory that the guest does not need could not be given up: the coherence engine has ended")]
pub struct DiscardError;

impl Engine {
    /// Nobody needs what is in `pages`, ranges in order that do not overlap: gives up their frames, at their
    /// homes and wherever copies are, and returns when that is done, at every node. They are zero then,
    /// except those that somebody used meanwhile.
    ///
    /// One call works at a time. It waits until all is done, however long that takes: pages that are given up
    /// after somebody was told that they are not would lose what is written meanwhile. An engine that gets no
    /// answer ends ([`EngineConfig::stuck`](super::EngineConfig::stuck)). Not for a thread for which the
    /// engine may have to wait.
    ///
    /// # Errors
    /// [`DiscardError`]; some of the pages may have been given up, or be so later, even by other nodes: none
    /// of them may be used again.
    pub fn discard(&self, pages: &[Range<u64>]) -> Result<(), DiscardError> {
        let _turn = base::lock(&self.discarding);
        let (done, answers) = unbounded();
        let (mut parts, mut asked) = (0, 0);
        for range in pages {
            let mut rest = range.start.max(asked)..range.end.min(self.homes.pages());
            while !rest.is_empty() {
                let end = self.homes.range(self.homes.home(Page(rest.start))).end;
                let end = rest.end.min(end).min((rest.start / BLOCK + 1) * BLOCK);
                let shard = &self.handles[usize::from(self.shards.shard(Page(rest.start)))];
                if !shard.ask(Request::Discard(rest.start..end, done.clone())) {
                    return Err(DiscardError);
                }
                (parts, asked, rest.start) = (parts + 1, end, end);
            }
        }
        drop(done);
        (0..parts).try_for_each(|_| answers.recv().map_err(|_| DiscardError))
    }
}
