//! The counters of a node's memory, and how long its faults take.

use std::sync::Mutex;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::time::Duration;

use hdrhistogram::Histogram;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Live counters of one shard; only its thread writes them.
        #[derive(Debug)]
        pub struct ShardStats {
            $($(#[$doc])* pub $name: AtomicU64,)+
            withdrawals: AtomicU64,
            latency: Mutex<Histogram<u64>>,
        }

        /// Totals over a node's shards.
        #[derive(Clone, Debug)]
        pub struct Totals {
            $($(#[$doc])* pub $name: u64,)+
            /// Nanoseconds from reading a fault to mapping its page, for faults that needed another node.
            pub latency: Histogram<u64>,
        }

        impl Default for ShardStats {
            fn default() -> Self {
                ShardStats { $($name: AtomicU64::new(0),)+ withdrawals: AtomicU64::new(0), latency: Mutex::new(histogram()) }
            }
        }

        impl Totals {
            /// The counters by name.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),+]
            }

            /// Adds up the shards.
            pub fn of<'a>(shards: impl IntoIterator<Item = &'a ShardStats>) -> Totals {
                let mut totals = Totals { $($name: 0,)+ latency: histogram() };
                for shard in shards {
                    $(totals.$name += shard.$name.load(Relaxed);)+
                    if let Ok(latency) = shard.latency.lock() {
                        // Same bounds: adding cannot fail.
                        let _ = totals.latency.add(&*latency);
                    }
                }
                totals
            }
        }
    };
}

counters! {
    /// userfaultfd events read.
    events,
    /// Of these, those of threads that had been called out of their wait for the same page.
    resumed_waits,
    /// Faults answered here, without another node.
    local_faults,
    /// Read faults that needed another node.
    remote_read_faults,
    /// Write faults that needed another node, upgrades included.
    remote_write_faults,
    /// Of these, writes to a page that was here to read.
    upgrades,
    /// Copies given up because another node writes.
    invalidations,
    /// Pages handed to another node that wants to write, as their owner.
    handovers,
    /// Pages made read-only because another node reads.
    downgrades,
    /// Copies given back to their homes to make room.
    evictions,
    /// Copies unmapped to see whether they are used.
    probes,
    /// Demands that waited until a page had been held long enough.
    deferred,
    /// Pages sent with their 4096 bytes.
    pages_sent,
    /// Pages sent as "all zero".
    zero_pages_sent,
    /// Pages asked for because they followed a miss before.
    prefetches,
    /// Of these, which were touched.
    prefetches_used,
    /// Untouched pages that came along with another page.
    run_pages,
    /// Pages of this home whose frames were given up because nobody needs their content.
    discarded,
    /// Pages that devices read where they were.
    loads,
    /// Pages that devices overwrote at their homes.
    stores,
    /// Copies of pages that were made for devices beside those that landed in frames: at home before they
    /// were sent to a device that reads them, and into the device's buffer.
    copied,
    /// Pages that devices had to touch because something was under way on them.
    not_direct,
    /// Operations that vCPUs of this node had carried out where the page is.
    operations,
    /// Of these, which were done.
    operations_done,
    /// Of these, which were not.
    operations_refused,
    /// Operations carried out here for vCPUs of other nodes.
    operated,
    /// Coherence messages sent.
    messages_sent,
    /// Coherence messages received.
    messages_received,
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 100_000_000_000, 2).expect("the bounds are valid")
}

impl ShardStats {
    /// Adds one to a counter that only this thread writes.
    pub fn count(counter: &AtomicU64) {
        ShardStats::add(counter, 1);
    }

    /// Adds to a counter that only this thread writes.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Relaxed) + n, Relaxed);
    }

    /// Pages have gone from the guest view; until the next call after that their frames are as they were.
    /// Only the shard's thread calls this.
    pub fn count_withdrawal(&self) {
        // Order: whoever reads what is in the frames later has seen this.
        self.withdrawals.fetch_add(1, SeqCst);
    }

    /// How often pages went from the guest view.
    pub fn withdrawals(&self) -> u64 {
        self.withdrawals.load(SeqCst)
    }

    /// Notes how long a fault took.
    pub fn record(&self, latency: Duration) {
        if let Ok(mut histogram) = self.latency.lock() {
            histogram.saturating_record(latency.as_nanos() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_add_shards_up() {
        let (a, b) = (ShardStats::default(), ShardStats::default());
        ShardStats::count(&a.events);
        ShardStats::count(&b.events);
        a.record(Duration::from_micros(10));
        b.record(Duration::from_micros(30));
        let totals = Totals::of([&a, &b]);
        assert_eq!((totals.events, totals.latency.len()), (2, 2));
        assert!(totals.latency.max() >= 29_000);
    }
}
