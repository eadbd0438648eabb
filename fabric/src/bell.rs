//! The bell that wakes the thread which works on a lane.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::FabricError;

/// A flag with a descriptor that is readable while it is set.
pub(crate) struct Bell {
    rung: AtomicBool,
    fd: EventFd,
}

impl Bell {
    pub(crate) fn new() -> Result<Bell, FabricError> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|error| FabricError::Io { what: "creating an eventfd", source: error.into() })?;
        Ok(Bell { rung: AtomicBool::new(false), fd })
    }

    pub(crate) fn ring(&self) {
        if !self.rung.swap(true, SeqCst) {
            // It fails only when the counter is full, and then the descriptor is readable.
            let _ = self.fd.write(1);
        }
    }

    pub(crate) fn is_rung(&self) -> bool {
        self.rung.load(SeqCst)
    }

    /// Clears it. Look afterwards at what it may have been rung for: a ring during this call may leave no
    /// trace.
    pub(crate) fn hear(&self) {
        if self.is_rung() {
            let _ = self.fd.read();
            self.rung.store(false, SeqCst);
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
