//! Protection domains, and registered memory cut into slots.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::context::SharedContext;
use super::ffi::{self, ACCESS_LOCAL_WRITE};

/// A protection domain.
pub struct Pd {
    raw: *mut ffi::Pd,
    context: SharedContext,
}

// SAFETY: libibverbs is thread-safe, and the pointer stays valid until drop.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    /// A new domain of a device.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(context: &SharedContext) -> io::Result<Arc<Pd>> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.library().alloc_pd)(context.raw()) };
        if raw.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Arc::new(Pd { raw, context: context.clone() }))
    }

    /// The device it belongs to.
    pub fn context(&self) -> &SharedContext {
        &self.context
    }

    pub(super) fn raw(&self) -> *mut ffi::Pd {
        self.raw
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: whatever was made of it held it; once.
        let code = unsafe { (self.context.library().dealloc_pd)(self.raw) };
        if code != 0 {
            tracing::warn!(code, "an RDMA protection domain could not be freed");
        }
    }
}

/// Memory that the device may read, and write at this host's request only, in slots of one size.
///
/// A slot belongs to the device from the moment at which a work request with it is posted until that
/// request's completion was polled, and to its user otherwise: [`super::send`] and [`super::receive`] hand
/// slots out so. Nobody else's host can address them: no remote access is granted.
pub struct Slots {
    memory: NonNull<u8>,
    slot: usize,
    count: usize,
    mr: *mut ffi::Mr,
    pd: Arc<Pd>,
}

// SAFETY: plain memory; `send` and `receive` see to it that a slot has one user.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

impl Slots {
    /// `count` slots of `slot` bytes each, zeroed.
    ///
    /// # Errors
    /// No memory, or none that may be locked (`ENOMEM`).
    pub fn new(pd: &Arc<Pd>, slot: usize, count: usize) -> io::Result<Slots> {
        let length = slot * count;
        let size = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping of its own.
        let memory =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        // SAFETY: the mapping from above, which stays until the registration is gone.
        let mr =
            unsafe { (pd.context.library().reg_mr)(pd.raw, memory.as_ptr(), length, ACCESS_LOCAL_WRITE) };
        if mr.is_null() {
            let error = io::Error::last_os_error();
            // SAFETY: nobody knows of the mapping.
            let _ = unsafe { munmap(memory, length) };
            return Err(error);
        }
        Ok(Slots { memory: memory.cast(), slot, count, mr, pd: pd.clone() })
    }

    /// Bytes of a slot.
    pub(super) fn slot(&self) -> usize {
        self.slot
    }

    /// How many slots there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The first `len` bytes of slot `index` for a work request.
    pub(super) fn sge(&self, index: usize, len: usize) -> ffi::Sge {
        assert!(index < self.count && len <= self.slot, "a slot of this memory");
        // SAFETY: the registration lives as long as `self`.
        let lkey = unsafe { (*self.mr).lkey };
        ffi::Sge { addr: self.memory.as_ptr() as u64 + (index * self.slot) as u64, length: len as u32, lkey }
    }

    /// The first `len` bytes of slot `index`.
    ///
    /// # Safety
    /// The slot is the caller's, and nobody writes to it as long as the bytes are borrowed.
    pub(super) unsafe fn read(&self, index: usize, len: usize) -> &[u8] {
        assert!(index < self.count && len <= self.slot, "a slot of this memory");
        // SAFETY: inside the mapping; the caller's promise.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(index * self.slot), len) }
    }

    /// Copies `bytes` into slot `index` from offset `at`.
    ///
    /// # Safety
    /// The slot is the caller's, and nobody else touches it meanwhile.
    pub(super) unsafe fn write(&self, index: usize, at: usize, bytes: &[u8]) {
        assert!(index < self.count && at + bytes.len() <= self.slot, "a slot of this memory");
        // SAFETY: inside the mapping; the caller's promise; `bytes` is a Rust slice and so no part of the
        // slot.
        unsafe {
            let to = self.memory.as_ptr().add(index * self.slot + at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: once; every queue pair that was given slots of it holds it, so they are gone.
        let code = unsafe { (self.pd.context.library().dereg_mr)(self.mr) };
        if code != 0 {
            // The device may still use it: better to leak it.
            tracing::warn!(code, "RDMA memory could not be deregistered");
            return;
        }
        // SAFETY: the device knows of it no more, and borrows of slots have ended with `self`.
        let _ = unsafe { munmap(self.memory.cast(), self.slot * self.count) };
    }
}
