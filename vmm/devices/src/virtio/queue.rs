//! A virtqueue at work, owned by the thread that serves it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use machine::control::fence::{Fence, Gate};

use super::chain::{Chain, ChainError};
use super::memory::GuestRam;
use super::registers::{NO_VECTOR, QueueSetup};
use crate::pci::msix::Interrupts;
use crate::rate_limit::Limiter;

/// Bit of the ISR status register: a queue has news (4.1.4.5).
pub const ISR_QUEUE: u8 = 1;
/// Bit of the ISR status register: the device's registers have changed.
pub const ISR_CONFIG: u8 = 2;

/// A mistake of the driver, for which its queue cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A malformed request.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The rings themselves do not make sense.
    #[error("its queue is invalid ({0})")]
    Ring(virtio_queue::Error),
}

/// The signals from a device to its driver: interrupts and status bits.
#[derive(Clone)]
pub struct Signals {
    /// The device's name in messages.
    pub name: Arc<str>,
    /// Its MSI-X vectors.
    pub interrupts: Arc<Interrupts>,
    /// The ISR status register.
    pub isr: Arc<AtomicU8>,
    /// The vector of configuration changes.
    pub config_vector: Arc<AtomicU16>,
    /// Set when only a reset helps.
    pub broken: Arc<AtomicBool>,
}

impl Signals {
    /// Raises `vector` and sets a bit of the ISR status.
    pub fn raise(&self, vector: &AtomicU16, isr: u8) {
        self.isr.fetch_or(isr, Ordering::SeqCst);
        match vector.load(Ordering::Relaxed) {
            NO_VECTOR => {}
            vector => self.interrupts.raise(vector),
        }
    }

    /// Gives the device up until its driver resets it, and says why.
    pub fn give_up(&self, why: &str) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            tracing::warn!("{} stopped until its driver resets it: {why}", self.name);
            self.raise(&self.config_vector, ISR_CONFIG);
        }
    }
}

/// The context of a device's queues, the same for all of them.
#[derive(Clone)]
pub struct QueueContext {
    /// Guest memory.
    pub memory: GuestRam,
    /// The way to the driver.
    pub signals: Signals,
    /// Asked before each request.
    pub fence: Arc<Fence>,
}

/// The part of a queue that a thread needs to wait for its bell, or for something else.
pub struct Pause {
    bell: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    memory: GuestRam,
}

impl Pause {
    /// Waits until `limiter` lets a request of `bytes` bytes go. One that is stopped goes at once.
    pub fn admitted(&self, limiter: &Limiter, bytes: u64) {
        limiter.admit(bytes, || self.stop.load(Ordering::SeqCst), || self.idle());
    }

    /// Waits for the bell.
    pub fn wait(&self) {
        self.idle();
        // Interrupted by a signal at worst, and then looking for news does no harm.
        let _ = self.bell.read();
    }

    /// The thread is about to sleep: what was kept for it may go.
    pub fn idle(&self) {
        self.memory.idle();
    }
}

/// A queue that its driver uses.
pub struct LiveQueue {
    queue: Queue,
    bell: Arc<EventFd>,
    vector: Arc<AtomicU16>,
    stop: Arc<AtomicBool>,
    context: QueueContext,
}

impl LiveQueue {
    /// The queue that `setup` describes. `bell` is rung by the driver's doorbell, and with `stop`.
    ///
    /// # Errors
    /// Addresses that are not aligned or not RAM.
    pub fn new(
        setup: &QueueSetup,
        event_index: bool,
        bell: Arc<EventFd>,
        stop: Arc<AtomicBool>,
        context: QueueContext,
    ) -> Result<LiveQueue, QueueError> {
        let build = || {
            let mut queue = Queue::new(setup.max)?;
            queue.try_set_size(setup.size)?;
            queue.try_set_desc_table_address(GuestAddress(setup.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(setup.driver))?;
            queue.try_set_used_ring_address(GuestAddress(setup.device))?;
            queue.set_event_idx(event_index);
            queue.set_ready(true);
            if queue.is_valid(context.memory.map()) {
                Ok(queue)
            } else {
                Err(virtio_queue::Error::FindMemoryRegion)
            }
        };
        let queue = build().map_err(QueueError::Ring)?;
        Ok(LiveQueue { queue, bell, vector: setup.vector.clone(), stop, context })
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestRam {
        &self.context.memory
    }

    /// The way to the driver.
    pub fn signals(&self) -> &Signals {
        &self.context.signals
    }

    /// What is rung: readable when there may be news, or when it is time to stop.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// What a thread needs to wait without the queue.
    pub fn pause(&self) -> Pause {
        Pause { bell: self.bell.clone(), stop: self.stop.clone(), memory: self.context.memory.clone() }
    }

    /// Whether the thread is to end: for the device's reset, or with the machine.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.context.fence.has_ended()
    }

    /// What is asked before a write that others may see after this node.
    pub fn gate(&self) -> Gate {
        Gate::new(self.context.fence.clone(), self.stop.clone())
    }

    /// Waits for the bell; `false` if it is time to end.
    pub fn wait(&self) -> bool {
        self.idle();
        // Interrupted by a signal at worst, and then looking for news does no harm.
        let _ = self.bell.read();
        !self.stopped()
    }

    /// Sleeps until the bell rings, which is silenced then, or one of `files` is ready for the events beside
    /// it (poll(2)), or `limit` is over; what each of them is ready for.
    pub fn sleep(&self, files: &[(RawFd, i16)], limit: Option<Duration>) -> Vec<i16> {
        self.idle();
        let wanted = std::iter::once((self.bell.as_raw_fd(), libc::POLLIN)).chain(files.iter().copied());
        let mut fds: Vec<libc::pollfd> =
            wanted.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 }).collect();
        // Rounded up: a limit of less than a millisecond is to be slept as well.
        let limit = limit.map_or(-1, |limit| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX));
        // SAFETY: the kernel reads and writes as many entries as there are; a descriptor that is not open is
        // an answer.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, limit) };
        // Interrupted at worst, and then looking for news does no harm.
        if fds[0].revents != 0 {
            let _ = self.bell.read();
        }
        fds[1..].iter().map(|fd| fd.revents).collect()
    }

    /// The thread is about to sleep: what was kept for it may go.
    pub fn idle(&self) {
        self.context.memory.idle();
    }

    /// The next request; none any more once it is time to end. `memory` is what [`LiveQueue::memory`]
    /// gives, cloned. Waits as long as the others may have given this node up.
    ///
    /// # Errors
    /// A driver that breaks the rules.
    pub fn pop<'m>(&mut self, memory: &'m GuestRam) -> Result<Option<Chain<'m>>, QueueError> {
        let map = memory.map();
        if self.context.fence.pass_unless(&self.stop).is_err() {
            return Ok(None);
        }
        let next = self.queue.iter(map).map_err(QueueError::Ring)?.next();
        Ok(next.map(|descriptors| Chain::new(map, descriptors)).transpose()?)
    }

    /// Puts the last request that [`LiveQueue::pop`] gave back where it was: it will be given again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back, with `written` bytes for the driver, and interrupts if it wants that.
    ///
    /// # Errors
    /// A ring with invalid content.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.give_back(head, written)?;
        self.interrupt()
    }

    /// Gives a request back without an interrupt; [`LiveQueue::interrupt`] must follow the last of several.
    ///
    /// # Errors
    /// A ring with invalid content.
    pub fn give_back(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(self.context.memory.map(), head, written).map_err(QueueError::Ring)
    }

    /// Interrupts the driver if it wants to know of what was given back.
    ///
    /// # Errors
    /// A ring with invalid content.
    pub fn interrupt(&mut self) -> Result<(), QueueError> {
        if self.queue.needs_notification(self.context.memory.map()).map_err(QueueError::Ring)? {
            self.context.signals.raise(&self.vector, ISR_QUEUE);
        }
        Ok(())
    }

    /// Asks for a bell at the next request; `true` if one is there already.
    ///
    /// # Errors
    /// A ring with invalid content.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(self.context.memory.map()).map_err(QueueError::Ring)
    }

    /// Asks for no more bells while requests are being taken.
    ///
    /// # Errors
    /// A ring with invalid content.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(self.context.memory.map()).map_err(QueueError::Ring)
    }

    /// Serves the queue until it is stopped: `handle` does a request and says how many bytes it wrote. A
    /// driver that breaks the rules stops the device.
    pub fn serve(self, mut handle: impl FnMut(&mut Chain) -> u32) {
        self.serve_or_keep(|chain| Some(handle(chain)));
    }

    /// The same for requests that may not be done: where `handle` says `None` the request is not given back,
    /// and nothing is served any more.
    pub fn serve_or_keep(mut self, mut handle: impl FnMut(&mut Chain) -> Option<u32>) {
        if let Err(error) = self.serve_until_stopped(&mut handle) {
            self.signals().give_up(&error.to_string());
        }
    }

    fn serve_until_stopped(
        &mut self,
        handle: &mut impl FnMut(&mut Chain) -> Option<u32>,
    ) -> Result<(), QueueError> {
        let memory = self.context.memory.clone();
        // Requests may have come before the first bell.
        while !self.stopped() {
            self.disable_notification()?;
            while let Some(mut chain) = self.pop(&memory)? {
                let Some(written) = handle(&mut chain) else { return Ok(()) };
                self.push(chain.head, written)?;
                if self.stopped() {
                    return Ok(());
                }
            }
            if !self.enable_notification()? && !self.wait() {
                return Ok(());
            }
        }
        Ok(())
    }
}
