//! Network device (5.1): a network card.
//!
//! | file | concept |
//! |---|---|
//! | this one | the device: features, registers, what its threads are |
//! | [`tap`] | what is behind it: a TAP interface of the host |
//! | [`receive`] | packets to the guest |
//! | [`transmit`] | packets from the guest |
//! | [`control`] | how many queues the driver uses |
//!
//! A pair of queues has two threads. Checksums and segmentation are left to whoever can do them best: the
//! header before each packet says what is still to be done, and the host's kernel understands it.

pub mod control;
pub mod receive;
pub mod tap;
pub mod transmit;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as net;

pub use self::tap::Tap;
use super::queue::{ISR_CONFIG, Signals};
use super::{Activation, VirtioDevice, Workers, read_block};
use crate::rate_limit::Limiter;
use machine::config::devices::MAX_QUEUE_PAIRS;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Bytes of the header before each packet (5.1.6).
pub const HEADER: usize = 12;
/// The largest packet with its header: a segment of 64 KiB that nobody has cut yet, and its Ethernet header.
const LARGEST: usize = HEADER + 14 + 4 + 65536;

/// What packets come from and go to. Its files are not to block.
pub trait Port: Send + Sync {
    /// The file that the queue pair reads packets from and writes them to, each with its header.
    fn file(&self, pair: u16) -> BorrowedFd<'_>;

    /// Packets may come with checksums to be done, and as large segments of TCP over IPv4 and IPv6.
    ///
    /// # Errors
    /// What the host says.
    fn set_offloads(&self, checksum: bool, tcp4: bool, tcp6: bool) -> io::Result<()>;

    /// Whether packets come to this pair.
    ///
    /// # Errors
    /// What the host says.
    fn attach(&self, pair: u16, attached: bool) -> io::Result<()>;
}

/// Whether the cable is in: cleared for good when the host's side is gone.
#[derive(Default)]
pub struct Cable {
    cut: AtomicBool,
}

impl Cable {
    /// The host's side is gone: say so, once, and tell the driver.
    pub fn cut(&self, signals: &Signals, why: &io::Error) {
        if !self.cut.swap(true, Ordering::SeqCst) {
            tracing::warn!("{}: the host's side is gone, its link is down: {why}", signals.name);
            signals.raise(&signals.config_vector, ISR_CONFIG);
        }
    }

    /// Whether the host's side is gone.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }
}

/// The device.
pub struct Net {
    port: Arc<dyn Port>,
    pairs: u16,
    mac: [u8; 6],
    cable: Arc<Cable>,
    receive: Arc<Limiter>,
    transmit: Arc<Limiter>,
}

impl Net {
    /// A card with `pairs` (`1..=MAX_QUEUE_PAIRS`) pairs of queues.
    pub fn new(port: Arc<dyn Port>, pairs: u16, mac: [u8; 6]) -> Net {
        Net {
            port,
            pairs: pairs.clamp(1, MAX_QUEUE_PAIRS),
            mac,
            cable: Arc::default(),
            receive: Arc::default(),
            transmit: Arc::default(),
        }
    }

    /// The same, held to what the limiters allow in each direction.
    pub fn limited(self, receive: Arc<Limiter>, transmit: Arc<Limiter>) -> Net {
        Net { receive, transmit, ..self }
    }

    fn registers(&self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[..6].copy_from_slice(&self.mac);
        bytes[6] = u8::from(!self.cable.is_cut()) * net::VIRTIO_NET_S_LINK_UP as u8;
        bytes[8..].copy_from_slice(&self.pairs.to_le_bytes());
        bytes
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        // Network, Ethernet.
        0x02_0000
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            net::VIRTIO_NET_F_CSUM,
            net::VIRTIO_NET_F_GUEST_CSUM,
            net::VIRTIO_NET_F_MAC,
            net::VIRTIO_NET_F_GUEST_TSO4,
            net::VIRTIO_NET_F_GUEST_TSO6,
            net::VIRTIO_NET_F_HOST_TSO4,
            net::VIRTIO_NET_F_HOST_TSO6,
            net::VIRTIO_NET_F_MRG_RXBUF,
            net::VIRTIO_NET_F_STATUS,
        ];
        if self.pairs > 1 {
            bits.extend([net::VIRTIO_NET_F_CTRL_VQ, net::VIRTIO_NET_F_MQ]);
        }
        bits.into_iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> Vec<u16> {
        let mut queues = vec![QUEUE_SIZE; 2 * usize::from(self.pairs)];
        if self.pairs > 1 {
            queues.push(CONTROL_SIZE);
        }
        queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_block(&self.registers(), offset, data);
    }

    fn activate(&mut self, activation: Activation, workers: &mut Workers) -> io::Result<()> {
        let has = |bit: u32| activation.features & 1 << bit != 0;
        let (tcp4, tcp6) = (has(net::VIRTIO_NET_F_GUEST_TSO4), has(net::VIRTIO_NET_F_GUEST_TSO6));
        if let Err(error) = self.port.set_offloads(has(net::VIRTIO_NET_F_GUEST_CSUM), tcp4, tcp6)
            && let Some(queue) = activation.queues.iter().flatten().next()
        {
            self.cable.cut(queue.signals(), &error);
        }
        // The driver begins with one pair (5.1.5.1.2).
        for pair in 1..self.pairs {
            self.port.attach(pair, false)?;
        }
        let merge = has(net::VIRTIO_NET_F_MRG_RXBUF);
        // Without several pairs the control queue would follow the first one.
        let used = if has(net::VIRTIO_NET_F_MQ) { self.pairs } else { 1 };
        let mut queues = activation.queues.into_iter();
        for pair in 0..used {
            let (port, cable) = (self.port.clone(), self.cable.clone());
            if let Some(queue) = queues.next().flatten() {
                let (port, cable) = (port.clone(), cable.clone());
                let limiter = self.receive.clone();
                workers
                    .spawn(move || receive::Receiver::new(queue, port, pair, merge, cable, limiter).run())?;
            }
            if let Some(queue) = queues.next().flatten() {
                let limiter = self.transmit.clone();
                workers.spawn(move || transmit::run(queue, &*port, pair, &cable, &limiter))?;
            }
        }
        if has(net::VIRTIO_NET_F_CTRL_VQ)
            && let Some(queue) = queues.next().flatten()
        {
            let (port, pairs) = (self.port.clone(), used);
            workers.spawn(move || queue.serve(|chain| control::serve(chain, &*port, pairs)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
