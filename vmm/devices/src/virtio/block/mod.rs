//! Block device (5.2): a disk.
//!
//! | file | concept |
//! |---|---|
//! | this one | the device: features, registers, the threads of each queue |
//! | [`disk`] | what is behind it: a file or block device of the host |
//! | [`durable`] | no success after a flush that failed |
//! | [`fenced`] | no write after the machine has ended, or while others may have given the node up |
//! | [`qcow2`] | the same, in QEMU's format |
//! | [`request`] | one request: what it wants, and what becomes of it |
//!
//! The driver has a queue for each CPU as long as there are enough, so that CPUs, on whatever node, neither
//! wait for each other's requests nor share the pages of a ring. Each queue has several threads
//! ([`super::shared_queue`]), so that its requests do not wait for each other either: for the storage, or for
//! pages on other nodes.

pub mod disk;
pub mod durable;
pub mod fenced;
pub mod qcow2;
pub mod request;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use self::disk::{Access, Disk, MemoryDisk, RawDisk};
pub use self::durable::Durable;
pub use self::fenced::Fenced;
pub use self::qcow2::{Qcow2Disk, is_qcow2, open};
use self::request::Server;
use super::shared_queue::SharedQueue;
use super::{Activation, GuestRam, VirtioDevice, Workers, read_block};
use crate::rate_limit::Limiter;
use machine::config::devices::MAX_DISK_QUEUES;

/// Bytes of the unit in which virtio counts.
pub const SECTOR: u64 = 512;
/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// The most that one discard or write-zeroes may cover, in sectors (1 GiB): it should not block a queue for
/// long.
const MAX_CLEAR: u32 = 1 << 21;
/// Segments of one discard or write-zeroes request.
const MAX_CLEAR_SEGMENTS: u32 = 16;
/// Threads of a disk, and of each queue at least: as many requests are under way.
const THREADS: usize = 16;
const LEAST_THREADS: usize = 2;
/// Failures that are logged, for each disk.
const LOGGED: u64 = 20;

/// How the disk appears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// For messages.
    pub name: String,
    /// What the guest reads as its serial number; at most
    /// [`SERIAL_LEN`](machine::config::devices::SERIAL_LEN) bytes are shown.
    pub serial: String,
    /// The guest may not write.
    pub readonly: bool,
    /// Queues, `1..=MAX_DISK_QUEUES`.
    pub queues: u16,
}

/// The device.
pub struct Block {
    disk: Arc<dyn Disk>,
    config: BlockConfig,
    limiter: Arc<Limiter>,
    failures: Arc<AtomicU64>,
}

impl Block {
    /// `disk` as the guest shall see it. Its writes pass the node's fence.
    pub fn new(disk: Arc<dyn Disk>, mut config: BlockConfig) -> Block {
        config.queues = config.queues.clamp(1, MAX_DISK_QUEUES);
        Block { disk, config, limiter: Arc::default(), failures: Arc::default() }
    }

    /// The same, held to what `limiter` allows.
    pub fn limited(self, limiter: Arc<Limiter>) -> Block {
        Block { limiter, ..self }
    }

    fn registers(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(self.disk.len() / SECTOR).to_le_bytes());
        // seg_max: a chain also holds the header and the status.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: 4 KiB physical blocks, as 2^3 logical ones, for good alignment.
        put(24, &[3]);
        put(34, &self.config.queues.to_le_bytes());
        put(36, &MAX_CLEAR.to_le_bytes());
        put(40, &MAX_CLEAR_SEGMENTS.to_le_bytes());
        put(44, &(4096 / SECTOR as u32).to_le_bytes());
        put(48, &MAX_CLEAR.to_le_bytes());
        put(52, &MAX_CLEAR_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        bytes
    }

    fn server(&self, disk: Arc<dyn Disk>, memory: GuestRam) -> Server {
        let (name, failures) = (self.config.name.clone(), self.failures.clone());
        let on_failure = move |what: &str, error: &io::Error| {
            let count = failures.fetch_add(1, Ordering::Relaxed);
            if count < LOGGED {
                tracing::warn!("{name}: the guest's {what} failed: {error}");
            } else if count == LOGGED {
                tracing::warn!("{name}: further failures are not reported");
            }
        };
        Server::new(disk, &self.config, memory, Box::new(on_failure))
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        // Mass storage, SCSI: what other virtio disks say.
        0x01_0000
    }

    fn features(&self) -> u64 {
        let mut features = bit(blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(blk::VIRTIO_BLK_F_TOPOLOGY)
            | bit(blk::VIRTIO_BLK_F_FLUSH)
            | bit(blk::VIRTIO_BLK_F_MQ);
        if self.config.readonly {
            features |= bit(blk::VIRTIO_BLK_F_RO);
        } else {
            features |= bit(blk::VIRTIO_BLK_F_DISCARD) | bit(blk::VIRTIO_BLK_F_WRITE_ZEROES);
        }
        features
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.config.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_block(&self.registers(), offset, data);
    }

    fn activate(&mut self, activation: Activation, workers: &mut Workers) -> io::Result<()> {
        let threads = (THREADS / usize::from(self.config.queues)).max(LEAST_THREADS);
        for queue in activation.queues.into_iter().flatten() {
            let disk: Arc<dyn Disk> = Arc::new(Fenced::new(self.disk.clone(), queue.gate()));
            let shared = SharedQueue::new(queue);
            for _ in 0..threads {
                let (shared, limiter, pause) = (shared.clone(), self.limiter.clone(), shared.pause());
                let mut server = self.server(disk.clone(), shared.memory().clone());
                workers.spawn(move || {
                    shared.serve(|chain| {
                        pause.admitted(&limiter, request::data_len(chain));
                        server.serve(chain)
                    });
                })?;
            }
        }
        Ok(())
    }
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

#[cfg(test)]
mod tests;
