//! Threads that wait until their device's limits let them go on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::bucket::Bucket;
use super::pool::Member;
use base::lock;
use machine::config::limits::Limits;

/// How often a waiting thread checks whether its device is being stopped.
const LOOK: Duration = Duration::from_millis(20);

/// Holds a device to its limits, which may change at any time, and to its part of what several devices may
/// do.
pub struct Limiter {
    start: Instant,
    pool: Option<Member>,
    /// Whether there is anything to hold to: otherwise nobody takes a lock.
    limited: AtomicBool,
    /// Held by the one thread that waits for time to pass; the others wait for it.
    turn: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    limits: Limits,
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl State {
    fn wait(&self, now: Duration) -> Duration {
        let wait = |bucket: &Option<Bucket>| bucket.map_or(Duration::ZERO, |bucket| bucket.wait(now));
        wait(&self.requests).max(wait(&self.bytes))
    }
}

impl Default for Limiter {
    /// Without limits.
    fn default() -> Limiter {
        Limiter::new(Limits::default(), None)
    }
}

impl Limiter {
    /// Holds to `limits`, and in `pool` to its part.
    pub fn new(limits: Limits, pool: Option<Member>) -> Limiter {
        let limiter = Limiter {
            start: Instant::now(),
            pool,
            limited: AtomicBool::new(false),
            turn: Mutex::new(()),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        limiter.set(limits);
        limiter
    }

    /// From now on holds to `limits`; threads that wait go on by these.
    pub fn set(&self, limits: Limits) {
        let now = self.start.elapsed();
        let mut state = lock(&self.state);
        change(&mut state.requests, limits.iops, now);
        change(&mut state.bytes, limits.bandwidth, now);
        state.limits = limits;
        let limited = limits != Limits::default() || self.pool.is_some();
        self.limited.store(limited, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// From now on it has another share in its pool, if there is one.
    pub fn set_share(&self, share: u32) {
        if let Some(pool) = &self.pool {
            pool.set_share(share);
        }
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        lock(&self.state).limits
    }

    /// Returns when one more request, of `bytes` bytes, may be done, or at most 20 ms after `stopped` says
    /// so. `idle` is called before the thread sleeps.
    pub fn admit(&self, bytes: u64, stopped: impl Fn() -> bool, idle: impl Fn()) {
        if !self.limited.load(Ordering::Relaxed) {
            return;
        }
        let mut told = false;
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(_) => {
                idle();
                told = true;
                lock(&self.turn)
            }
        };
        let mut state = lock(&self.state);
        loop {
            let now = self.start.elapsed();
            let mut wait = state.wait(now);
            if wait.is_zero()
                && let Some(pool) = &self.pool
            {
                wait = pool.take(bytes).err().unwrap_or_default();
            }
            if wait.is_zero() || stopped() {
                let take = |bucket: &mut Option<Bucket>, amount| {
                    if let Some(bucket) = bucket {
                        bucket.take(amount, now);
                    }
                };
                take(&mut state.requests, 1);
                take(&mut state.bytes, bytes);
                return;
            }
            if !told {
                idle();
                told = true;
            }
            let waited = self.changed.wait_timeout(state, wait.min(LOOK));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Another rate for a bucket; none for no limit.
fn change(bucket: &mut Option<Bucket>, rate: Option<u64>, now: Duration) {
    match (bucket.as_mut(), rate) {
        (Some(bucket), Some(rate)) => bucket.set_rate(rate, now),
        (_, rate) => *bucket = rate.map(Bucket::new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    fn limits(iops: u64) -> Limits {
        Limits { iops: Some(iops), bandwidth: None }
    }

    #[test]
    fn without_limits_nobody_waits() {
        let limiter = Limiter::default();
        (0..1000).for_each(|_| limiter.admit(u64::MAX, || false, || panic!("it sleeps")));
        assert_eq!(limiter.limits(), Limits::default());
    }

    #[test]
    fn threads_that_wait_go_on_when_the_limit_is_lifted_or_they_are_stopped() {
        let limiter = Arc::new(Limiter::new(limits(1), None));
        let stop = Arc::new(AtomicBool::new(false));
        let (asleep, sleepers) = mpsc::channel();
        limiter.admit(0, || false, || ());
        let start = |count: usize| -> Vec<_> {
            let threads = (0..count).map(|_| {
                let (limiter, stop, asleep) = (limiter.clone(), stop.clone(), asleep.clone());
                std::thread::spawn(move || {
                    for _ in 0..1000 {
                        limiter.admit(0, || stop.load(Ordering::SeqCst), || asleep.send(()).unwrap());
                    }
                })
            });
            threads.collect()
        };
        // A thousand requests each would take hours.
        let threads = start(3);
        (0..3).for_each(|_| sleepers.recv().unwrap());
        limiter.set(Limits::default());
        threads.into_iter().for_each(|thread| thread.join().unwrap());

        limiter.set(limits(1));
        limiter.admit(0, || false, || ());
        let threads = start(2);
        (0..2).for_each(|_| sleepers.recv().unwrap());
        stop.store(true, Ordering::SeqCst);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
