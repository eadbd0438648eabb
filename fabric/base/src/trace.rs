//! The trace: the last events of the node, in a bounded ring in memory.
//!
//! Every thread writes fixed-size events into one ring of the process; writing is a counter increment and
//! a few stores, never a lock, an allocation or a system call. When the node fails, [`dump`] prints the
//! last events in order. An event that is overwritten while it is being dumped may show mixed fields; the
//! trace is a witness, not an oracle.
//!
//! A crate declares its kinds of events with [`events!`](crate::events) and writes them with [`event`]:
//!
//! ```
//! use base::trace;
//!
//! base::events! {
//!     /// A page was mapped.
//!     Install = "page, rights",
//! }
//!
//! trace::event(Event::Install, 7, 1);
//! ```

use std::io::{self, Write};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};

/// Events kept: the last 64 Ki.
const CAPACITY: usize = 1 << 16;

/// A kind of event: its name, and what its two words mean.
#[derive(Debug)]
pub struct Kind {
    /// As the dump shows it.
    pub name: &'static str,
    /// What the words `a` and `b` are, separated by a comma.
    pub words: &'static str,
}

/// Declares a crate's kinds of events: an enum `Event`, whose values [`event`] takes.
#[macro_export]
macro_rules! events {
    ($($(#[$doc:meta])* $name:ident = $words:literal),+ $(,)?) => {
        /// The kinds of events that this crate writes to the trace. Each has two words, named in its text.
        #[derive(Copy, Clone, Debug, Eq, PartialEq)]
        pub enum Event { $($(#[$doc])* $name),+ }

        impl From<Event> for &'static $crate::trace::Kind {
            #[inline]
            fn from(event: Event) -> &'static $crate::trace::Kind {
                static KINDS: &[$crate::trace::Kind] =
                    &[$($crate::trace::Kind { name: stringify!($name), words: $words }),+];
                &KINDS[event as usize]
            }
        }
    };
}

struct Slot {
    /// `0` for a slot never written, else the event's number plus one.
    seq: AtomicU64,
    tsc: AtomicU64,
    /// The thread's number in the trace.
    thread: AtomicU64,
    /// A `&'static Kind`, or null in a slot never written.
    kind: AtomicPtr<Kind>,
    a: AtomicU64,
    b: AtomicU64,
}

static NEXT: AtomicU64 = AtomicU64::new(0);
static THREADS: AtomicU64 = AtomicU64::new(1);
static RING: [Slot; CAPACITY] = [const {
    Slot {
        seq: AtomicU64::new(0),
        tsc: AtomicU64::new(0),
        thread: AtomicU64::new(0),
        kind: AtomicPtr::new(ptr::null_mut()),
        a: AtomicU64::new(0),
        b: AtomicU64::new(0),
    }
}; CAPACITY];

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Relaxed);
}

/// Adds an event with its two words.
#[inline]
pub fn event(kind: impl Into<&'static Kind>, a: u64, b: u64) {
    let kind: &'static Kind = kind.into();
    let n = NEXT.fetch_add(1, Relaxed);
    let slot = &RING[n as usize % CAPACITY];
    slot.tsc.store(now(), Relaxed);
    slot.thread.store(THREAD.with(|t| *t), Relaxed);
    slot.kind.store(ptr::from_ref(kind).cast_mut(), Relaxed);
    slot.a.store(a, Relaxed);
    slot.b.store(b, Relaxed);
    slot.seq.store(n + 1, Relaxed);
}

/// The time stamp counter of this host.
#[inline]
pub fn now() -> u64 {
    // SAFETY: RDTSC has no preconditions on x86-64.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes the last `most` events to `out`, oldest first, one a line.
///
/// # Errors
/// What writing to `out` returns.
pub fn dump(out: &mut dyn Write, most: usize) -> io::Result<()> {
    let end = NEXT.load(Relaxed);
    let first = end.saturating_sub(most.min(CAPACITY) as u64);
    writeln!(out, "trace: events {first}..{end} of this node (number, tsc, thread, kind: words)")?;
    for n in first..end {
        let slot = &RING[n as usize % CAPACITY];
        if slot.seq.load(Relaxed) != n + 1 {
            continue;
        }
        // SAFETY: only `event` stores here, and only what was a `&'static Kind`; before that it is null.
        let Some(kind) = (unsafe { slot.kind.load(Relaxed).as_ref() }) else { continue };
        let (tsc, thread) = (slot.tsc.load(Relaxed), slot.thread.load(Relaxed));
        let (a, b) = (slot.a.load(Relaxed), slot.b.load(Relaxed));
        writeln!(out, "{n} {tsc} t{thread} {}: {a:#x} {b:#x} ({})", kind.name, kind.words)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::events! {
        /// Something was given.
        Give = "what, to whom",
        /// Something was taken.
        Take = "what, from whom",
    }

    #[test]
    fn dump_shows_the_last_events_in_order_by_the_names_of_their_crate() {
        for i in 0..10 {
            event([Event::Give, Event::Take][i as usize % 2], 0xabc0 + i, 1);
        }
        let mut out = Vec::new();
        dump(&mut out, CAPACITY).unwrap();
        let text = String::from_utf8(out).unwrap();
        let line = |i: u64| {
            let (name, words) = [("Give", "to whom"), ("Take", "from whom")][i as usize % 2];
            format!("{name}: {:#x} 0x1 (what, {words})", 0xabc0 + i)
        };
        let at: Vec<_> = (0..10).map(|i| text.find(&line(i)).unwrap()).collect();
        assert!(at.is_sorted());
    }
}
