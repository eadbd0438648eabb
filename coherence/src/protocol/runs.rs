//! Runs of untouched pages: memory that nobody ever touched is granted many pages at a time, since a node
//! that touches the first mostly goes on with the next.

use fabric::NodeId;

use super::{Effect, MAX_RUN, Miss, Protocol, Rights, Transient};
use crate::page::{BLOCK, Page};

/// How many streams of misses are followed at a time.
const STREAMS: usize = 8;

/// How long runs are.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
pub struct RunPolicy {
    /// Pages that a miss without a history asks for beside its own.
    pub first: u8,
    /// The most, after misses that followed each other; at most [`MAX_RUN`].
    pub most: u8,
}

impl RunPolicy {
    /// No runs.
    pub const NONE: RunPolicy = RunPolicy { first: 0, most: 0 };
}

impl Default for RunPolicy {
    fn default() -> Self {
        RunPolicy { first: 7, most: MAX_RUN }
    }
}

/// A sequence of misses that follow each other.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Stream {
    /// Where the next miss of the sequence would be.
    next: Page,
    run: u8,
}

/// The last sequences seen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Streams {
    policy: RunPolicy,
    streams: [Stream; STREAMS],
    oldest: usize,
}

impl Streams {
    pub(super) fn new(policy: RunPolicy) -> Streams {
        let most = policy.most.min(MAX_RUN);
        let policy = RunPolicy { first: policy.first.min(most), most };
        Streams { policy, streams: [Stream::default(); STREAMS], oldest: 0 }
    }

    /// How many pages to ask for with a miss here: the first guess, doubled each time the guess was right.
    fn ask(&mut self, page: Page) -> u8 {
        if self.policy.first == self.policy.most {
            return self.policy.most;
        }
        let known = self.streams.iter().position(|s| s.run > 0 && s.next == page);
        let (slot, run) = match known {
            Some(slot) => (slot, (self.streams[slot].run * 2 + 1).min(self.policy.most)),
            None => {
                self.oldest = (self.oldest + 1) % STREAMS;
                (self.oldest, self.policy.first)
            }
        };
        self.streams[slot] = Stream { next: Page(page.0 + 1 + u64::from(run)), run };
        run
    }
}

impl Protocol {
    /// The miss whose run holds the page, if one is under way.
    pub(super) fn covering_miss(&self, page: Page) -> Option<(Page, &Miss)> {
        match self.transient.at_or_before(page)? {
            (first, Transient::Miss(miss)) if page.0 - first.0 <= u64::from(miss.run) => Some((first, miss)),
            _ => None,
        }
    }

    /// If a miss under way asked for the page too, notes the fault there.
    pub(super) fn wait_for_run(&mut self, page: Page, want: Rights) -> bool {
        let Some((first, _)) = self.covering_miss(page) else { return false };
        let Some(Transient::Miss(miss)) = self.transient.get_mut(first) else { return false };
        let bit = 1 << (page.0 - first.0 - 1);
        miss.run_faults |= bit;
        if want == Rights::Exclusive {
            miss.run_writes |= bit;
        }
        true
    }

    /// How many pages to ask for beside this one: all of them at the same home, in the same block, not here
    /// and with nothing under way.
    pub(super) fn run_to_ask(&mut self, page: Page, home: NodeId) -> u8 {
        let ask = self.streams.ask(page);
        let block_end = (page.0 / BLOCK + 1) * BLOCK;
        let taken_from = self.transient.after(page).map_or(u64::MAX, |p| p.0);
        let end =
            (page.0 + 1 + u64::from(ask)).min(self.homes.range(home).end).min(block_end).min(taken_from);
        (page.0 + 1..end).take_while(|&p| self.rights(Page(p)) == Rights::None).count() as u8
    }

    /// The home's answer brought this many pages that follow.
    pub(super) fn take_run(&mut self, page: Page, run: u8, out: &mut Vec<Effect>) {
        for page in (page.0 + 1..=page.0 + u64::from(run)).map(Page) {
            self.set_local(page, Rights::Exclusive, false);
        }
        if let Some(Transient::Miss(miss)) = self.transient.get_mut(page) {
            let brought = u64::MAX >> (64 - u32::from(run));
            miss.run_faults &= !brought;
        }
        out.push(Effect::MapZeroes(Page(page.0 + 1), run));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_grows_while_misses_follow_each_other_and_starts_small_elsewhere() {
        let mut streams = Streams::new(RunPolicy { first: 3, most: 20 });
        assert_eq!(streams.ask(Page(100)), 3);
        assert_eq!(streams.ask(Page(500)), 3);
        assert_eq!(streams.ask(Page(104)), 7);
        assert_eq!(streams.ask(Page(112)), 15);
        assert_eq!(streams.ask(Page(128)), 20);
        assert_eq!(streams.ask(Page(504)), 7);
        assert_eq!(streams.ask(Page(600)), 3);
    }
}
