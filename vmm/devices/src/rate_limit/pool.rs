//! The pool of a rate that the disks of a node share, or its network cards in one direction.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::split::Split;
use machine::config::limits::Limits;

/// Rates that several devices split by their shares.
pub struct Pool {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    next: u64,
    requests: Option<Split>,
    bytes: Option<Split>,
}

impl State {
    fn splits(&mut self) -> impl Iterator<Item = &mut Split> {
        self.requests.iter_mut().chain(&mut self.bytes)
    }
}

impl Pool {
    /// What may be done each second; `None` if there is no limit to that.
    pub fn new(rates: Limits) -> Option<Arc<Pool>> {
        if rates == Limits::default() {
            return None;
        }
        let (requests, bytes) = (rates.iops.map(Split::new), rates.bandwidth.map(Split::new));
        Some(Arc::new(Pool { start: Instant::now(), state: Mutex::new(State { next: 0, requests, bytes }) }))
    }

    /// A device with this share comes.
    pub fn join(self: &Arc<Pool>, share: u32) -> Member {
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        state.splits().for_each(|split| split.join(id, share));
        drop(state);
        Member { pool: self.clone(), id }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a thread that panicked left behind is a number.
        base::lock(&self.state)
    }
}

/// A device's part in a pool, until it is dropped.
pub struct Member {
    pool: Arc<Pool>,
    id: u64,
}

impl Member {
    /// Takes a request of `bytes` bytes off what the device may do.
    ///
    /// # Errors
    /// It cannot be done yet: how long to wait before trying again. Others may be idle then, or no more.
    pub fn take(&self, bytes: u64) -> Result<(), Duration> {
        let mut state = self.pool.lock();
        let now = self.pool.start.elapsed();
        let wait = state.splits().map(|split| split.wait(self.id, now)).max().unwrap_or_default();
        if !wait.is_zero() {
            return Err(wait);
        }
        let take = |split: &mut Option<Split>, amount| {
            if let Some(split) = split {
                split.take(self.id, amount, now);
            }
        };
        let state = &mut *state;
        take(&mut state.requests, 1);
        take(&mut state.bytes, bytes);
        Ok(())
    }

    /// Gives the device another share.
    pub fn set_share(&self, share: u32) {
        self.pool.lock().splits().for_each(|split| split.set_share(self.id, share));
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.pool.lock().splits().for_each(|split| split.leave(self.id));
    }
}
