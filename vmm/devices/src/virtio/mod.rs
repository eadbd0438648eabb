//! Virtio 1.x devices over PCI ("Virtual I/O Device Version 1.3"), on the node that has the disk, the network
//! card, the randomness.
//!
//! | file | concept |
//! |---|---|
//! | this one | what a device is: [`VirtioDevice`] |
//! | [`pci_device`] | a device as a PCI function: capabilities, registers, doorbells, interrupts |
//! | [`registers`] | the common configuration registers, a pure state machine |
//! | [`queue`] | a virtqueue at work: waiting, taking requests, giving them back |
//! | [`chain`] | one request: the guest's buffers, checked |
//! | [`workers`] | a device's threads, and how they end |
//! | [`memory`] | guest RAM as devices reach it |
//! | [`block`] | disks |
//! | [`net`] | network cards |
//! | [`console`] | consoles, and channels to programs on the host |
//! | [`entropy`] | random numbers |
//! | [`balloon`] | memory that the guest does not use |
//!
//! The way of one request: the driver, on any node, puts a chain of buffers into the queue and writes the
//! doorbell -> the write reaches the device's node (the router; nobody waits for it) and rings the queue's
//! bell -> the queue's worker thread wakes, reads the ring through the *guest view* of memory, where each
//! page that this node does not hold raises a fault that the coherence engine answers, as for a vCPU -> it
//! does the I/O, for which data that are elsewhere are read and written where they are ([`memory`]), puts the
//! chain into the used ring and raises the queue's MSI-X vector -> the message goes straight to the node of
//! the CPU that it names.
//!
//! ```text
//!   status 0 ── ACKNOWLEDGE, DRIVER ── FEATURES_OK ── DRIVER_OK: activate() ── workers run
//!      ^                                                                        │
//!      └──────── workers have ended <── stop <── status := 0 ───────────────────┘
//! ```
//!
//! Vcpu threads only touch registers: they never wait for a worker, for guest memory or for I/O. A worker
//! that touches guest memory, and may wait for a page of it, holds no lock that a vCPU thread or an engine
//! takes; those of one queue share the lock of its rings ([`shared_queue`]).

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod entropy;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod memory;
pub mod net;
pub mod pci_device;
pub mod queue;
pub mod registers;
mod shared_queue;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
pub mod workers;

use std::io;

pub use memory::GuestRam;
pub use pci_device::VirtioPciDevice;
pub use queue::LiveQueue;
pub use workers::Workers;

/// An activation: the features and queues with which a driver is ready.
pub struct Activation {
    /// The features that both sides have agreed on.
    pub features: u64,
    /// The queues by number; `None` where the driver uses none.
    pub queues: Vec<Option<LiveQueue>>,
}

/// A virtio device of some kind, without its PCI function.
pub trait VirtioDevice: Send {
    /// The device's number in the standard (chapter 5).
    fn id(&self) -> u16;

    /// PCI class, subclass and programming interface.
    fn class(&self) -> u32;

    /// The features of its own that it offers; those of rings and transport come from [`VirtioPciDevice`].
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two.
    fn queues(&self) -> Vec<u16>;

    /// The guest reads the device's own registers; every byte must be filled, with 0 beyond their end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The guest writes them.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: start threads that serve the queues. Called again after each reset, once all
    /// threads of the last time have ended.
    ///
    /// # Errors
    /// What keeps the threads from starting; the driver is told that the device needs a reset.
    fn activate(&mut self, activation: Activation, workers: &mut Workers) -> io::Result<()>;
}

/// Fills `data` with the bytes of a register block from `offset` on, and with 0 beyond its end.
fn read_block(block: &[u8], offset: u64, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(index));
        *byte = at.and_then(|at| block.get(at)).copied().unwrap_or(0);
    }
}
