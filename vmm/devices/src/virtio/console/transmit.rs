//! Bytes from the guest.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::port::Port;
use crate::virtio::LiveQueue;
use crate::virtio::chain::Chain;
use crate::virtio::queue::QueueError;

/// Bytes that are written to the socket at once.
const PIECE: u64 = 4096;
/// A channel's reader that takes nothing for so long is disconnected.
const PATIENCE: Duration = Duration::from_secs(10);

/// Writes what the driver puts into the queue to whoever is connected, until it is stopped. A driver that
/// breaks the rules stops the device.
pub fn run(mut queue: LiveQueue, port: &Port, console: bool) {
    if let Err(error) = work(&mut queue, port, console) {
        queue.signals().give_up(&error.to_string());
    }
}

fn work(queue: &mut LiveQueue, port: &Port, console: bool) -> Result<(), QueueError> {
    let memory = queue.memory().clone();
    while !queue.stopped() {
        queue.disable_notification()?;
        while let Some(mut chain) = queue.pop(&memory)? {
            write(queue, port, console, &mut chain);
            queue.push(chain.head, 0)?;
            if queue.stopped() {
                return Ok(());
            }
        }
        if !queue.enable_notification()? && !queue.wait() {
            return Ok(());
        }
    }
    Ok(())
}

fn write(queue: &LiveQueue, port: &Port, console: bool, chain: &mut Chain) {
    let mut piece = [0; PIECE as usize];
    while !chain.readable.is_empty() && !queue.stopped() {
        let len = chain.readable.take(PIECE).read(&mut piece);
        if !write_piece(queue, port, console, &piece[..len]) {
            return;
        }
    }
}

/// Whether the next piece may be taken as well.
fn write_piece(queue: &LiveQueue, port: &Port, console: bool, mut bytes: &[u8]) -> bool {
    if console && port.keep(bytes) {
        return true;
    }
    let Some(stream) = port.connected() else { return false };
    let mut deadline = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        match port.write(&stream, bytes) {
            Err(_) => return false,
            // The rest is lost: who holds a console up holds the guest up.
            Ok(len) if console && len < bytes.len() => return false,
            Ok(0) if Instant::now() >= deadline => {
                let name = &queue.signals().name;
                tracing::warn!("{name}: whoever is connected reads nothing, and is disconnected");
                port.disconnect(&stream);
                return false;
            }
            Ok(0) => {
                if !wait_for_room(queue, &stream, deadline) {
                    return false;
                }
            }
            Ok(len) => {
                bytes = &bytes[len..];
                deadline = Instant::now() + PATIENCE;
            }
        }
    }
    true
}

/// Waits until the stream takes more, or the deadline; `false` if it is time to end.
fn wait_for_room(queue: &LiveQueue, stream: &UnixStream, deadline: Instant) -> bool {
    // Requests are looked for in any case when this one is done.
    queue.sleep(
        &[(stream.as_raw_fd(), libc::POLLOUT)],
        Some(deadline.saturating_duration_since(Instant::now())),
    );
    !queue.stopped()
}
