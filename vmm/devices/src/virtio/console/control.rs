//! The conversation of driver and device about a named port (5.3.6.2).

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::message::{DEVICE_READY, PORT, PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY, message};
use super::port::Port;
use crate::virtio::LiveQueue;
use crate::virtio::chain::Chain;
use crate::virtio::queue::QueueError;
use machine::config::devices::MAX_CHANNEL_NAME;

/// The device's part of the conversation.
pub struct Control {
    name: String,
    port: Arc<Port>,
}

impl Control {
    /// For a port of this name.
    pub fn new(name: &str, port: Arc<Port>) -> Control {
        Control { name: name.chars().take(MAX_CHANNEL_NAME).collect(), port }
    }

    /// The driver says something.
    pub fn hear(&self, chain: &mut Chain) -> u32 {
        let mut bytes = [0; 8];
        if chain.readable.read(&mut bytes) < bytes.len() {
            return 0;
        }
        let id = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let (event, value) =
            (u16::from_le_bytes([bytes[4], bytes[5]]), u16::from_le_bytes([bytes[6], bytes[7]]));
        match (event, id) {
            (DEVICE_READY, _) if value == 1 => self.port.tell([message(PORT_ADD, 0)]),
            (PORT_READY, PORT) if value == 1 => {
                let mut name = message(PORT_NAME, 1);
                name.extend(self.name.bytes());
                self.port.tell([name]);
                self.port.told();
            }
            (PORT_OPEN, PORT) => self.port.set_open(value == 1),
            _ => {}
        }
        0
    }
}

/// Tells the driver what there is to tell, until it is stopped. A driver that breaks the rules stops the
/// device.
pub fn tell(mut queue: LiveQueue, port: &Port) {
    if let Err(error) = tell_until_stopped(&mut queue, port) {
        queue.signals().give_up(&error.to_string());
    }
}

fn tell_until_stopped(queue: &mut LiveQueue, port: &Port) -> Result<(), QueueError> {
    let memory = queue.memory().clone();
    let mut news: Option<Vec<u8>> = None;
    while !queue.stopped() {
        news = news.or_else(|| port.next_news());
        let Some(message) = &news else {
            queue.sleep(&[(port.news.as_raw_fd(), libc::POLLIN)], None);
            let _ = port.news.read();
            continue;
        };
        if let Some(chain) = queue.pop(&memory)? {
            // What is longer than the driver's buffer is cut.
            let written = chain.writable.write(message) as u32;
            news = None;
            queue.push(chain.head, written)?;
        } else if !queue.enable_notification()? {
            queue.sleep(&[], None);
            queue.disable_notification()?;
        }
    }
    Ok(())
}
