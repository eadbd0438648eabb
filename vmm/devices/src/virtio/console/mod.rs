//! Console device (5.3): a second console for the guest, or a named channel between a program in the guest
//! and one on the node's host, such as a guest agent. At the host's end is a Unix socket, for one program at
//! a time.
//!
//! | file | concept |
//! |---|---|
//! | this one | the device: features, registers, what its threads are |
//! | [`port`] | the host's end: the socket, who is connected |
//! | [`receive`] | bytes to the guest |
//! | [`transmit`] | bytes from the guest |
//! | [`control`] | the conversation about a named port |
//! | `message` | its messages |
//!
//! Nobody can make the guest or the node wait forever, whoever does not read:
//!
//! | | console | channel |
//! |---|---|---|
//! | nobody is connected | the last 64 KiB are kept for who comes | bytes are lost; the guest sees a closed port |
//! | who is connected does not read | what its socket does not take is lost | waits, and after 10 s disconnects them |
//! | the guest does not read | the socket fills up | the socket fills up |

pub mod control;
mod message;
pub mod port;
pub mod receive;
pub mod transmit;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use self::control::{Control, tell};
pub use self::port::{Port, PortError};
use super::{Activation, VirtioDevice, Workers, read_block};

/// Feature (5.3.3): there are named ports, and queues to speak of them.
const MULTIPORT: u64 = 1 << 1;
/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 64;
/// Queues of a console, and of a channel: port 0's, the control queues, and port 1's, each first to the guest
/// (5.3.2).
const CONSOLE_QUEUES: usize = 2;
const CHANNEL_QUEUES: usize = 6;

/// The device, with one port.
pub struct Console {
    port: Arc<Port>,
    /// The name of the channel; `None`: a console.
    name: Option<String>,
}

impl Console {
    /// A console at whose other end is `port`.
    pub fn terminal(port: Port) -> Console {
        Console { port: Arc::new(port), name: None }
    }

    /// A channel of this name (at most [`MAX_CHANNEL_NAME`](machine::config::devices::MAX_CHANNEL_NAME)
    /// bytes), at whose other end is `port`.
    pub fn channel(port: Port, name: &str) -> Console {
        Console { port: Arc::new(port), name: Some(name.into()) }
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn class(&self) -> u32 {
        // Communication, other.
        0x07_8000
    }

    fn features(&self) -> u64 {
        if self.name.is_some() { MULTIPORT } else { 0 }
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; if self.name.is_some() { CHANNEL_QUEUES } else { CONSOLE_QUEUES }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Columns and rows, which are not known; ports, of which number 0 is for a console.
        let mut bytes = [0; 12];
        bytes[4] = if self.name.is_some() { 2 } else { 1 };
        read_block(&bytes, offset, data);
    }

    fn activate(&mut self, activation: Activation, workers: &mut Workers) -> io::Result<()> {
        let mut queues = activation.queues.into_iter();
        let mut pair = || (queues.next().flatten(), queues.next().flatten());
        let named = activation.features & MULTIPORT != 0;
        self.port.begin(self.name.is_none());
        let (receive, transmit) = match &self.name {
            None => pair(),
            // A driver that knows no named ports has no use for a channel.
            Some(_) if !named => return Ok(()),
            Some(name) => {
                let _port0 = pair();
                let (to_driver, from_driver) = pair();
                let control = Arc::new(Control::new(name, self.port.clone()));
                if let Some(queue) = to_driver {
                    let port = self.port.clone();
                    workers.spawn(move || tell(queue, &port))?;
                }
                if let Some(queue) = from_driver {
                    workers.spawn(move || queue.serve(|chain| control.hear(chain)))?;
                }
                pair()
            }
        };
        if let Some(queue) = receive {
            let port = self.port.clone();
            workers.spawn(move || receive::Receiver::new(queue, port).run())?;
        }
        if let Some(queue) = transmit {
            let (port, console) = (self.port.clone(), self.name.is_none());
            workers.spawn(move || transmit::run(queue, &port, console))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
