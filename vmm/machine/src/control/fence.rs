//! The fence: whether this node may still write to what others may use after it, such as a disk's file.
//!
//! ```text
//!            the coordinator has heard what this node said at s            end(): Stop, or the coordinator is lost
//!  closed ──────────────────────────────────────────────────────> open until s + lease ─────────────────────────> ended
//!    ^                                                                │                                             for good
//!    └──────────────────────── s + lease is over ─────────────────────┘
//! ```
//! A node that stands still (SIGSTOP, a suspended host) is given up by the others after [`Machine::silence`],
//! and a new machine may use its disks. When it goes on, its threads know nothing of that; the clock does. So
//! it is a *lease*: each heartbeat carries the time at which it was sent, by this node's clock, and the
//! coordinator sends it back. The coordinator has then heard this node at that time or later, and gives it up
//! no earlier than a silence after it. What was under way when the node stood still brings back an old time,
//! and extends nothing.
//!
//! The lease is shorter than the silence: peers heard this node's last heartbeat up to half a second before,
//! and clocks do not run alike. Between asking the fence and the write itself a thread can still be stopped,
//! for one write; and a host that is itself a virtual machine may have a clock that stands still with it.
//! Only the storage can refuse such a write.
//!
//! [`Machine::silence`]: super::Machine::silence

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Nothing is written any more: the machine has ended for this node, or the device for which the caller works
/// is being reset.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing is written any more, because the machine has ended or the device is being reset")]
pub struct Ended;

impl From<Ended> for io::Error {
    fn from(ended: Ended) -> io::Error {
        io::Error::other(ended)
    }
}

impl Ended {
    /// Whether this is why a write was not made.
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Ended>())
    }
}

/// Value of [`Fence::until`] that lets nobody pass any more.
const ENDED: u64 = 0;

/// The fence of a node.
#[derive(Debug)]
pub struct Fence {
    /// Nanoseconds by [`now`]; [`ENDED`], or `u64::MAX` for no end.
    until: AtomicU64,
    lease: Duration,
    /// Who waits.
    waiting: Mutex<()>,
    changed: Condvar,
}

/// Nanoseconds of a clock that goes on while this process or its host stands still.
pub fn now() -> u64 {
    // The clock exists since Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| Duration::from(time).as_nanos() as u64).max(1)
}

/// How long a node may write after what the coordinator has heard, if others give it up after `silence`.
pub fn lease(silence: Duration) -> Duration {
    silence * 3 / 4
}

impl Fence {
    /// One that is open until it is told that the machine has ended: for devices without a coordinator.
    pub fn open() -> Fence {
        Fence {
            until: AtomicU64::new(u64::MAX),
            lease: Duration::MAX,
            waiting: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// One of a node that others give up when they have heard nothing of it for `silence`; they have just
    /// heard it.
    pub fn leased(silence: Duration) -> Fence {
        let fence = Fence { until: AtomicU64::new(1), lease: lease(silence), ..Fence::open() };
        fence.renew(now());
        fence
    }

    /// The coordinator has heard what this node said at `said`, by [`now`].
    pub fn renew(&self, said: u64) {
        let until = said.saturating_add(u64::try_from(self.lease.as_nanos()).unwrap_or(u64::MAX));
        let later = |old| (old != ENDED && old < until).then_some(until);
        if self.until.fetch_update(Ordering::SeqCst, Ordering::SeqCst, later).is_ok() {
            self.wake();
        }
    }

    /// Nobody passes any more.
    pub fn end(&self) {
        self.until.store(ENDED, Ordering::SeqCst);
        self.wake();
    }

    /// Whether nobody passes any more.
    pub fn has_ended(&self) -> bool {
        self.until.load(Ordering::SeqCst) == ENDED
    }

    /// Lets the caller write once, now: waits as long as the others may have given this node up.
    ///
    /// # Errors
    /// [`Ended`].
    pub fn pass(&self) -> Result<(), Ended> {
        self.pass_unless(&AtomicBool::new(false))
    }

    /// The same for whoever is told by `stop` to end; who sets that calls [`Fence::wake`].
    ///
    /// # Errors
    /// [`Ended`].
    pub fn pass_unless(&self, stop: &AtomicBool) -> Result<(), Ended> {
        // The common case: no lock.
        match self.until.load(Ordering::SeqCst) {
            ENDED => Err(Ended),
            until if now() < until => Ok(()),
            _ => self.wait(stop),
        }
    }

    fn wait(&self, stop: &AtomicBool) -> Result<(), Ended> {
        let mut waiting = base::lock(&self.waiting);
        loop {
            match self.until.load(Ordering::SeqCst) {
                ENDED => return Err(Ended),
                _ if stop.load(Ordering::SeqCst) => return Err(Ended),
                until if now() < until => return Ok(()),
                _ => waiting = self.changed.wait(waiting).unwrap_or_else(|poisoned| poisoned.into_inner()),
            }
        }
    }

    /// Has all who wait look again.
    pub fn wake(&self) {
        // Who has looked and does not wait yet has the lock.
        drop(base::lock(&self.waiting));
        self.changed.notify_all();
    }
}

/// The fence as the threads of a device ask it: whoever waits there ends with the device's use, too.
#[derive(Clone, Debug)]
pub struct Gate {
    fence: Arc<Fence>,
    stop: Arc<AtomicBool>,
}

impl Gate {
    /// For threads that `stop` tells to end; who sets it calls [`Fence::wake`].
    pub fn new(fence: Arc<Fence>, stop: Arc<AtomicBool>) -> Gate {
        Gate { fence, stop }
    }

    /// Lets the caller write once, now: waits as long as the others may have given this node up.
    ///
    /// # Errors
    /// [`Ended`].
    pub fn pass(&self) -> Result<(), Ended> {
        self.fence.pass_unless(&self.stop)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const SILENCE: Duration = Duration::from_secs(40);

    #[test]
    fn a_lease_counts_from_what_the_coordinator_has_heard_and_not_from_when_that_is_known() {
        let fence = Fence::leased(SILENCE);
        assert_eq!(fence.pass(), Ok(()));
        // As after SIGSTOP for a minute: what comes now was said before.
        let minute = 60_000_000_000;
        let fence = Arc::new(Fence { until: AtomicU64::new(1), ..Fence::leased(SILENCE) });
        let before = now().saturating_sub(minute);
        fence.renew(before);
        let (tell, told) = channel();
        let writer = {
            let fence = fence.clone();
            thread::spawn(move || {
                tell.send("asks").unwrap();
                fence.pass().unwrap();
                tell.send("writes").unwrap();
            })
        };
        assert_eq!(told.recv().unwrap(), "asks");
        fence.renew(before + 1000);
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err(), "an old time extends nothing");
        fence.renew(now());
        assert_eq!(told.recv_timeout(Duration::from_secs(30)).unwrap(), "writes");
        writer.join().unwrap();
    }

    #[test]
    fn the_lease_is_over_before_anybody_gives_the_node_up() {
        let fence = Fence::leased(Duration::from_secs(3));
        let heartbeat = super::super::wire::HEARTBEAT;
        assert!(fence.lease + heartbeat < Duration::from_secs(3));
        assert!(fence.lease > 4 * heartbeat, "heartbeats renew it in time");
    }

    #[test]
    fn the_end_is_for_ever_and_lets_go_who_waits() {
        let fence = Arc::new(Fence { until: AtomicU64::new(1), ..Fence::leased(SILENCE) });
        let waiting = fence.clone();
        let writer = thread::spawn(move || waiting.pass());
        fence.end();
        assert_eq!(writer.join().unwrap(), Err(Ended));
        fence.renew(now());
        assert_eq!(fence.pass(), Err(Ended));
        let error = io::Error::from(Ended);
        assert!(Ended::is(&error) && !Ended::is(&io::Error::other("else")));
    }
}
