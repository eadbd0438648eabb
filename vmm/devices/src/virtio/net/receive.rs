//! Packets to the guest: read into a buffer here, then spread over as many of the driver's buffers as it
//! takes.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::transmit::is_gone;
use super::{Cable, HEADER, LARGEST, Port};
use crate::rate_limit::Limiter;
use crate::virtio::LiveQueue;
use crate::virtio::chain::Buffers;
use crate::virtio::queue::QueueError;

/// Offset of the number of buffers in the header.
const NUM_BUFFERS: usize = 10;

/// One queue and what it is filled from.
pub struct Receiver {
    queue: LiveQueue,
    port: Arc<dyn Port>,
    pair: u16,
    /// A packet may take several of the driver's buffers.
    merge: bool,
    cable: Arc<Cable>,
    limiter: Arc<Limiter>,
    packet: Vec<u8>,
    /// Bytes of a packet that is still to be delivered.
    waiting: usize,
}

impl Receiver {
    /// Fills `queue` from a pair's file.
    pub fn new(
        queue: LiveQueue,
        port: Arc<dyn Port>,
        pair: u16,
        merge: bool,
        cable: Arc<Cable>,
        limiter: Arc<Limiter>,
    ) -> Receiver {
        Receiver { queue, port, pair, merge, cable, limiter, packet: vec![0; LARGEST], waiting: 0 }
    }

    /// Works until it is stopped. A driver that breaks the rules stops the device.
    pub fn run(mut self) {
        if let Err(error) = self.work() {
            self.queue.signals().give_up(&error.to_string());
        }
    }

    fn work(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification()?;
        while !self.queue.stopped() {
            if self.waiting == 0 {
                self.waiting = self.receive();
                if self.waiting > 0 {
                    self.queue.pause().admitted(&self.limiter, (self.waiting - HEADER) as u64);
                }
            }
            if self.waiting == 0 {
                // Only packets are of interest now, and the bell when it is time to stop.
                self.sleep(!self.cable.is_cut());
            } else if self.deliver()? {
                self.waiting = 0;
            } else if !self.queue.enable_notification()? {
                self.sleep(false);
                self.queue.disable_notification()?;
            }
        }
        Ok(())
    }

    /// The next packet's bytes, 0 if there is none.
    fn receive(&mut self) -> usize {
        let file = self.port.file(self.pair).as_raw_fd();
        // SAFETY: the kernel writes at most as many bytes as the packet's buffer has.
        let got = unsafe { libc::read(file, self.packet.as_mut_ptr().cast(), self.packet.len()) };
        if got < 0 {
            let error = io::Error::last_os_error();
            if is_gone(&error) {
                self.cable.cut(self.queue.signals(), &error);
            }
        }
        // What has no header is no packet.
        usize::try_from(got).ok().filter(|got| *got > HEADER).unwrap_or(0)
    }

    /// Puts the waiting packet into the driver's buffers; `false` if there are none.
    fn deliver(&mut self) -> Result<bool, QueueError> {
        let memory = self.queue.memory().clone();
        let mut chains = Vec::new();
        let mut room = 0;
        while room < self.waiting as u64 {
            let Some(chain) = self.queue.pop(&memory)? else {
                // Nothing to put it in: it waits. Too little: it is lost, as on a card whose ring runs full.
                let some = !chains.is_empty();
                (0..chains.len()).for_each(|_| self.queue.unpop());
                return Ok(some);
            };
            let len = chain.writable.len();
            if !self.merge && len < self.waiting as u64 || len <= HEADER as u64 {
                // The packet is lost: it does not fit the buffers that the driver offers.
                self.queue.push(chain.head, 0)?;
                return Ok(true);
            }
            room += len;
            chains.push(chain);
        }
        let count = (chains.len() as u16).to_le_bytes();
        self.packet[NUM_BUFFERS..HEADER].copy_from_slice(&count);
        let mut rest = &self.packet[..self.waiting];
        for chain in &chains {
            let written = fill(&chain.writable, &mut rest);
            self.queue.give_back(chain.head, written)?;
        }
        self.queue.interrupt()?;
        Ok(true)
    }

    /// Sleeps until the bell rings or, with `packets`, one comes.
    fn sleep(&self, packets: bool) {
        let file = (self.port.file(self.pair).as_raw_fd(), libc::POLLIN);
        let seen = self.queue.sleep(if packets { std::slice::from_ref(&file) } else { &[] }, None);
        if seen.iter().any(|seen| seen & libc::POLLERR != 0) {
            self.cable.cut(self.queue.signals(), &io::Error::from_raw_os_error(libc::ENXIO));
        }
    }
}

/// Moves as much of `from` as fits; how much that was.
fn fill(to: &Buffers, from: &mut &[u8]) -> u32 {
    let written = to.write(from);
    *from = &from[written..];
    written as u32
}
