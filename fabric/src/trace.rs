//! A bounded in-memory trace of what the node did last.
//!
//! Every thread writes fixed-size events into one ring of the process; writing is a counter increment and
//! four stores, never a lock, an allocation or a system call. When the node fails, [`dump`] prints the
//! last events in order. An event that is overwritten while it is being dumped may show mixed fields; the
//! trace is a witness, not an oracle.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Events kept: the last 64 Ki.
const CAPACITY: usize = 1 << 16;

struct Slot {
    /// `0` for a slot never written, else the event's number plus one.
    seq: AtomicU64,
    tsc: AtomicU64,
    /// Event kind in the high 16 bits, thread number in the low 16 of the upper half.
    head: AtomicU64,
    a: AtomicU64,
    b: AtomicU64,
}

static NEXT: AtomicU64 = AtomicU64::new(0);
static THREADS: AtomicU64 = AtomicU64::new(1);
static RING: [Slot; CAPACITY] = [const {
    Slot {
        seq: AtomicU64::new(0),
        tsc: AtomicU64::new(0),
        head: AtomicU64::new(0),
        a: AtomicU64::new(0),
        b: AtomicU64::new(0),
    }
}; CAPACITY];

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Relaxed);
}

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// The kinds of events. `a` and `b` are the kind's two words, named in its text.
        #[derive(Copy, Clone, Debug, Eq, PartialEq)]
        #[repr(u16)]
        pub enum Event { $($(#[$doc])* $name),+ }

        impl Event {
            const ALL: &'static [(&'static str, &'static str)] = &[$((stringify!($name), $text)),+];
        }
    };
}

events! {
    /// A thread of the node introduced itself.
    Thread = "role, index",
    /// A userfaultfd event was read.
    Fault = "page, flags (1 write, 2 wp, 4 minor)",
    /// A page was mapped in the guest view.
    Install = "page, rights (0 overwritten by a device, 1 shared, 2 exclusive)",
    /// A page was write-protected in the guest view.
    Downgrade = "page, 0",
    /// A page was unmapped from the guest view.
    Unmap = "page, 0",
    /// A coherence message was sent.
    Send = "page, kind << 16 | peer",
    /// A coherence message was received.
    Receive = "page, kind << 16 | peer",
    /// A demand waits until the page's hold ends.
    Defer = "page, kind << 16 | peer",
    /// A vCPU left the guest.
    Exit = "vcpu << 32 | reason, detail",
    /// An interrupt was put into a vCPU.
    Inject = "vcpu, vector",
    /// An interprocessor interrupt was sent.
    Ipi = "from vcpu, icr",
    /// An interrupt or signal arrived for a vCPU.
    Post = "vcpu, vector or 0x100 nmi, 0x200 init, 0x300 sipi",
    /// A control message was sent.
    ControlSend = "kind, peer",
    /// A control message was received.
    ControlReceive = "kind, peer",
    /// An I/O APIC pin changed.
    Pin = "pin, level",
    /// The guest TSC was stepped.
    ClockStep = "ticks, bound",
}

/// Adds an event.
#[inline]
pub fn event(kind: Event, a: u64, b: u64) {
    let n = NEXT.fetch_add(1, Relaxed);
    let slot = &RING[n as usize % CAPACITY];
    slot.tsc.store(now(), Relaxed);
    slot.head.store((kind as u64) << 16 | THREAD.with(|t| *t & 0xffff), Relaxed);
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
        let (tsc, head) = (slot.tsc.load(Relaxed), slot.head.load(Relaxed));
        let (name, words) = Event::ALL.get((head >> 16) as usize).copied().unwrap_or(("?", "?"));
        let (a, b) = (slot.a.load(Relaxed), slot.b.load(Relaxed));
        writeln!(out, "{n} {tsc} t{} {name}: {a:#x} {b:#x} ({words})", head & 0xffff)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dump_shows_the_last_events_in_order() {
        for i in 0..10 {
            event(Event::Fault, 0xabc0 + i, 1);
        }
        let mut out = Vec::new();
        dump(&mut out, CAPACITY).unwrap();
        let text = String::from_utf8(out).unwrap();
        let at: Vec<_> = (0..10).map(|i| text.find(&format!("Fault: {:#x}", 0xabc0 + i)).unwrap()).collect();
        assert!(at.is_sorted());
    }
}
