//! A device's threads, and how they end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use machine::control::fence::Fence;
use vmm_sys_util::eventfd::EventFd;

/// The threads of one device between start and reset.
pub struct Workers {
    name: String,
    stop: Arc<AtomicBool>,
    bells: Vec<Arc<EventFd>>,
    fence: Arc<Fence>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// No threads yet; `name` is their name. They wait for `bells` or in `fence`.
    pub fn new(name: &str, bells: Vec<Arc<EventFd>>, fence: Arc<Fence>) -> Workers {
        Workers { name: name.into(), stop: Arc::default(), bells, fence, threads: Vec::new() }
    }

    /// What tells the threads to end; whoever waits must also be woken by a bell or by the fence.
    pub fn stop_flag(&self) -> &Arc<AtomicBool> {
        &self.stop
    }

    /// What wakes the threads, by queue.
    pub fn bells(&self) -> &[Arc<EventFd>] {
        &self.bells
    }

    /// Starts a thread.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn spawn(&mut self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let name = format!("{} {}", self.name, self.threads.len());
        self.threads.push(std::thread::Builder::new().name(name).spawn(work)?);
        Ok(())
    }

    /// Tells all threads to end, without waiting for them.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for bell in &self.bells {
            // Fails only when the counter is full, and then nobody sleeps.
            let _ = bell.write(1);
        }
        self.fence.wake();
    }

    /// Whether all threads have ended; then they may be started again.
    pub fn ended(&mut self) -> bool {
        if !self.threads.iter().all(JoinHandle::is_finished) {
            return false;
        }
        for thread in self.threads.drain(..) {
            // A panic there has been printed, and is a mistake in this program whatever the driver did.
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "a thread of {} panicked", self.name);
        }
        // A new flag: the old one stays as it is for whoever still looks at it.
        self.stop = Arc::default();
        true
    }
}
