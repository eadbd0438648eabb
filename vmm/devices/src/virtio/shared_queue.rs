//! A queue that several threads serve, so that a request does not wait for those before it.
//!
//! ```text
//!  one thread has the turn:  pop ── none: ask for a bell, sleep ── pop ── a request: pass the turn on
//!  the others:               do their requests, give them back, wait for the turn
//! ```
//! The rings are locked only while they are looked at. Requests are given back in the order in which they are
//! done, as the standard allows (2.7.8).

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, TryLockError};

use base::lock;

use super::chain::Chain;
use super::memory::GuestRam;
use super::queue::{LiveQueue, Pause, QueueError};

/// A queue that several threads share. Clones are the same queue.
#[derive(Clone)]
pub struct SharedQueue {
    memory: GuestRam,
    rings: Arc<Mutex<LiveQueue>>,
    /// Who has it takes requests.
    turn: Arc<Mutex<()>>,
    pause: Arc<Pause>,
}

impl SharedQueue {
    /// For a queue that nobody serves yet.
    pub fn new(queue: LiveQueue) -> SharedQueue {
        SharedQueue {
            memory: queue.memory().clone(),
            pause: Arc::new(queue.pause()),
            rings: Arc::new(Mutex::new(queue)),
            turn: Arc::default(),
        }
    }

    /// Serves the queue, with all others who do, until it is stopped: `handle` does a request and says how
    /// many bytes it wrote; or `None`, and then the request is not given back and the caller serves no more.
    /// A driver that breaks the rules stops the device.
    pub fn serve(self, mut handle: impl FnMut(&mut Chain) -> Option<u32>) {
        if let Err(error) = self.serve_until_stopped(&mut handle) {
            lock(&self.rings).signals().give_up(&error.to_string());
        }
    }

    fn serve_until_stopped(
        &self,
        handle: &mut impl FnMut(&mut Chain) -> Option<u32>,
    ) -> Result<(), QueueError> {
        while let Some(mut chain) = self.next()? {
            let Some(written) = handle(&mut chain) else { return Ok(()) };
            lock(&self.rings).push(chain.head, written)?;
        }
        Ok(())
    }

    /// The next request; `None` if it is time to end.
    fn next(&self) -> Result<Option<Chain<'_>>, QueueError> {
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.pause.idle();
                lock(&self.turn)
            }
        };
        loop {
            {
                let mut rings = lock(&self.rings);
                if rings.stopped() || rings.signals().broken.load(Ordering::SeqCst) {
                    return Ok(None);
                }
                if let Some(chain) = rings.pop(&self.memory)? {
                    return Ok(Some(chain));
                }
                if rings.enable_notification()? {
                    rings.disable_notification()?;
                    continue;
                }
            }
            self.pause.wait();
            lock(&self.rings).disable_notification()?;
        }
    }

    /// What a thread that has to wait for something else needs.
    pub fn pause(&self) -> Arc<Pause> {
        self.pause.clone()
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }
}
