//! The failover's mailbox: lanes whose connections are over.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::{FabricError, LaneId, NodeId};

/// What the lanes tell the failover. Its descriptor is readable while there is something.
pub(super) struct Mailbox {
    broken: Mutex<Vec<(NodeId, LaneId)>>,
    wake: EventFd,
    stop: AtomicBool,
}

impl Mailbox {
    pub(super) fn new() -> Result<Mailbox, FabricError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|error| FabricError::Io { what: "creating an eventfd", source: error.into() })?;
        Ok(Mailbox { broken: Mutex::default(), wake, stop: AtomicBool::new(false) })
    }

    /// The connection of a lane is over.
    pub(super) fn broken(&self, peer: NodeId, lane: LaneId) {
        base::lock(&self.broken).push((peer, lane));
        self.ring();
    }

    /// The transport is gone: there is nothing to keep.
    pub(super) fn stop(&self) {
        self.stop.store(true, Relaxed);
        self.ring();
    }

    fn ring(&self) {
        // Fails only if it has been rung 2^64 times and not been heard.
        let _ = self.wake.write(1);
    }

    /// Whether the transport is gone.
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// The lanes that were reported since the last time.
    pub(super) fn take(&self) -> Vec<(NodeId, LaneId)> {
        // Fails only if it was not rung.
        let _ = self.wake.read();
        std::mem::take(&mut base::lock(&self.broken))
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
