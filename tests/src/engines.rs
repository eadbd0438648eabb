//! Nodes without guests: memory and an engine each, over the in-process transport.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use coherence::engine::{Load, Store};
use coherence::page::{Homes, PAGE_SIZE, Page};
use coherence::stats::Totals;
use coherence::testing::{Builder, Cluster};

/// A fault that is not answered for this long has failed.
const STUCK: Duration = Duration::from_secs(30);

/// The nodes of one machine, and what tests do with them.
pub struct Engines(Cluster);

impl Deref for Engines {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl Engines {
    /// Nodes with so many pages each, and `shards` threads each. A page that was won is kept for `hold`.
    ///
    /// # Errors
    /// This host's userfaultfd cannot serve.
    pub fn start(pages: &[u64], shards: u16, hold: Duration) -> Result<Engines> {
        let builder = Builder::new(Homes::new(pages.iter().copied()));
        let builder =
            builder.with(|config| (config.shards, config.hold, config.stuck) = (shards, hold, STUCK));
        Ok(Engines(builder.start()?))
    }

    /// The first word of a page.
    pub fn page(&self, node: usize, page: u64) -> &AtomicU64 {
        self.word_of(node, page, 0)
    }

    /// Writes `pages` of node 0 there (page + 1); node 1 then takes a third of them over (page + 2), node 2
    /// reads another third.
    pub fn spread(&self, pages: Range<u64>) {
        for page in pages {
            self.page(0, page).store(page + 1, Ordering::SeqCst);
            match page % 3 {
                0 => self.page(1, page).store(page + 2, Ordering::SeqCst),
                1 => assert_eq!(self.page(2, page).load(Ordering::SeqCst), page + 1),
                _ => {}
            }
        }
    }

    /// Each node's counters when nothing is under way any more.
    ///
    /// # Errors
    /// Something stays under way, or an engine failed.
    pub fn at_rest(&self) -> Result<Vec<Totals>> {
        let deadline = Instant::now() + STUCK;
        loop {
            // Each shard answers between two rounds of work, so that what it had received is counted.
            let (under_way, totals) = (self.0.describe(STUCK), self.totals());
            let sum = |count: fn(&Totals) -> u64| totals.iter().map(count).sum::<u64>();
            let quiet = sum(|t| t.messages_sent) == sum(|t| t.messages_received);
            self.check()?;
            if quiet && under_way.iter().all(|line| line.contains("held")) {
                return Ok(totals);
            }
            if Instant::now() > deadline {
                bail!("the engines do not come to rest: {}", under_way.join("; "));
            }
            std::thread::yield_now();
        }
    }

    /// Nobody needs what is in `pages`, says a node.
    ///
    /// # Errors
    /// The engine has ended.
    pub fn discard(&self, node: usize, pages: Range<u64>) -> Result<()> {
        Ok(self.engine(node).discard(&[pages])?)
    }

    /// A device of a node reads pages; what it found, `None` of those that it must touch as a CPU does.
    pub fn load(&self, node: usize, pages: &[u64]) -> Vec<Option<Vec<u64>>> {
        let mut bytes = vec![0; pages.len() * PAGE_SIZE];
        let load = |(&page, to)| Load { page: Page(page), offset: 0, to };
        let read =
            self.engine(node).load(pages.iter().zip(bytes.chunks_exact_mut(PAGE_SIZE)).map(load).collect());
        let words = |page: &[u8]| -> Vec<u64> {
            page.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes)).collect()
        };
        let pages = read.iter().zip(bytes.chunks_exact(PAGE_SIZE));
        pages.map(|(read, page)| read.then(|| words(page))).collect()
    }

    /// A device of a node fills pages with a word each; whether that was done, or it must do so as a CPU
    /// does.
    pub fn store(&self, node: usize, pages: &[(u64, u64)]) -> Vec<bool> {
        let fill = |(_, word): &(u64, u64)| std::array::from_fn(|at| word.to_le_bytes()[at % 8]);
        let bytes: Vec<[u8; PAGE_SIZE]> = pages.iter().map(fill).collect();
        let store = |(&(page, _), from)| Store { page: Page(page), from };
        self.engine(node).store(&pages.iter().zip(&bytes).map(store).collect::<Vec<_>>())
    }

    /// Bytes of frames that a node has. Without what could be given back at once, after [`Engines::at_rest`].
    ///
    /// # Errors
    /// What the system says.
    pub fn resident_bytes(&self, node: usize) -> Result<u64> {
        Ok(self.memory(node).resident_bytes()?)
    }

    /// What has failed and what is under way, for the message of a failure.
    pub fn describe(&self) -> String {
        let failed = self.check().err().map(|failed| failed.to_string());
        failed.into_iter().chain(self.0.describe(Duration::from_secs(1))).collect::<Vec<_>>().join("\n")
    }
}
