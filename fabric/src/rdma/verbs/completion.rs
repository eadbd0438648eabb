//! Completion queues, and the channel whose descriptor says that they have something.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::check;
use super::context::{SharedContext, set_nonblocking};
use super::ffi::{self, Wc};

/// Says that a completion queue has something, through a descriptor.
pub struct Channel {
    raw: *mut ffi::CompChannel,
    context: SharedContext,
}

// SAFETY: libibverbs is thread-safe, and the pointer stays valid until drop.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    /// A new channel of a device.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(context: &SharedContext) -> io::Result<Arc<Channel>> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.library().create_comp_channel)(context.raw()) };
        if raw.is_null() {
            return Err(io::Error::last_os_error());
        }
        let channel = Channel { raw, context: context.clone() };
        set_nonblocking(channel.as_fd())?;
        Ok(Arc::new(channel))
    }

    /// Takes one event and acknowledges it; the tag of its queue, if there was one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take_event(&self) -> io::Result<Option<usize>> {
        let (mut cq, mut user) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the channel is open; the queue that it names is one of this channel, which lives until its
        // events were acknowledged.
        match check(unsafe { (self.context.library().get_cq_event)(self.raw, &mut cq, &mut user) }) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error),
        }
        // SAFETY: as above; one event.
        unsafe { (self.context.library().ack_cq_events)(cq, 1) };
        Ok(Some(user as usize))
    }
}

impl AsFd for Channel {
    /// Readable while there is an event.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is valid until drop; its descriptor is set once and open as long.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: the queues that use it held it; once.
        let code = unsafe { (self.context.library().destroy_comp_channel)(self.raw) };
        if code != 0 {
            tracing::warn!(code, "an RDMA completion channel could not be destroyed");
        }
    }
}

/// A completion queue.
pub struct Cq {
    raw: *mut ffi::Cq,
    _channel: Arc<Channel>,
    context: SharedContext,
}

// SAFETY: libibverbs is thread-safe, and the pointer stays valid until drop.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    /// A queue for `entries` completions, whose events go to `channel` under the number `tag`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(channel: &Arc<Channel>, entries: usize, tag: usize) -> io::Result<Cq> {
        let context = channel.context.clone();
        let entries = c_int::try_from(entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: context and channel are open, and live as long as the queue.
        let raw = unsafe {
            (context.library().create_cq)(context.raw(), entries, tag as *mut c_void, channel.raw, 0)
        };
        if raw.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Cq { raw, _channel: channel.clone(), context })
    }

    pub(super) fn raw(&self) -> *mut ffi::Cq {
        self.raw
    }

    /// Takes completions, oldest first; how many. Never blocks.
    ///
    /// # Errors
    /// The queue overran or the device is gone.
    pub fn poll(&self, into: &mut [Wc]) -> io::Result<usize> {
        // SAFETY: the queue lives; the library writes at most so many entries.
        let count =
            unsafe { ((*self.context.raw()).poll_cq)(self.raw, into.len() as c_int, into.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| io::Error::from_raw_os_error(nix::libc::EIO))
    }

    /// Lets the next completion that is added raise an event; with `errors_only`, the next failed one.
    ///
    /// # Errors
    /// What the device says.
    pub fn notify(&self, errors_only: bool) -> io::Result<()> {
        // SAFETY: the queue lives.
        check(unsafe { ((*self.context.raw()).req_notify_cq)(self.raw, c_int::from(errors_only)) })
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: the queue pairs that use it held it, and every event was acknowledged when it was taken;
        // once.
        let code = unsafe { (self.context.library().destroy_cq)(self.raw) };
        if code != 0 {
            tracing::warn!(code, "an RDMA completion queue could not be destroyed");
        }
    }
}
