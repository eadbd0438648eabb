//! Bytes to the guest, and new connections.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use super::port::Port;
use crate::virtio::LiveQueue;
use crate::virtio::queue::QueueError;

/// Bytes that are taken from the socket at once.
const PIECE: usize = 4096;

/// The queue to the guest and what it is filled from.
pub struct Receiver {
    queue: LiveQueue,
    port: Arc<Port>,
    bytes: Vec<u8>,
}

impl Receiver {
    /// Fills `queue` from `port`.
    pub fn new(queue: LiveQueue, port: Arc<Port>) -> Receiver {
        Receiver { queue, port, bytes: Vec::new() }
    }

    /// Works until it is stopped. A driver that breaks the rules stops the device.
    pub fn run(mut self) {
        if let Err(error) = self.work() {
            self.queue.signals().give_up(&error.to_string());
        }
    }

    fn work(&mut self) -> Result<(), QueueError> {
        while !self.queue.stopped() {
            // Who connects while nobody in the guest listens waits in the socket's queue.
            let open = self.port.is_open();
            let connected = if open && self.port.accept() { self.port.connected() } else { None };
            if self.bytes.is_empty()
                && let Some(stream) = &connected
            {
                self.bytes.resize(PIECE, 0);
                let len = self.port.read(stream, &mut self.bytes);
                self.bytes.truncate(len);
            }
            if !self.bytes.is_empty() && self.deliver()? {
                continue;
            }
            if !self.bytes.is_empty() {
                // The driver's next buffer rings the bell.
                if !self.queue.enable_notification()? {
                    self.sleep(None);
                    self.queue.disable_notification()?;
                }
                continue;
            }
            let listener = open.then(|| self.port.listener().as_raw_fd());
            self.sleep(connected.map(|stream| stream.as_raw_fd()).or(listener));
        }
        Ok(())
    }

    /// Sleeps until the bell rings, the port changes or there is something to read.
    fn sleep(&self, file: Option<RawFd>) {
        let files = std::iter::once(self.port.changed.as_raw_fd()).chain(file);
        self.queue.sleep(&files.map(|fd| (fd, libc::POLLIN)).collect::<Vec<_>>(), None);
        let _ = self.port.changed.read();
    }

    /// Puts the next bytes into a buffer of the driver's; `false` if there is none.
    fn deliver(&mut self) -> Result<bool, QueueError> {
        let memory = self.queue.memory().clone();
        let Some(chain) = self.queue.pop(&memory)? else { return Ok(false) };
        let written = chain.writable.write(&self.bytes);
        self.bytes.drain(..written);
        self.queue.push(chain.head, written as u32)?;
        Ok(true)
    }
}
