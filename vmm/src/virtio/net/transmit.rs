//! Packets from the guest: each chain is a header and a packet, and goes to the host as it is.

use std::io;
use std::os::fd::AsRawFd;

use super::{Cable, HEADER, LARGEST, Port};
use crate::limits::Limiter;
use crate::virtio::LiveQueue;
use crate::virtio::chain::Chain;

/// Buffers of one system call: IOV_MAX.
const MOST_BUFFERS: usize = 1024;

/// Sends what the driver puts into the queue, until it is stopped.
pub fn run(queue: LiveQueue, port: &dyn Port, pair: u16, cable: &Cable, limiter: &Limiter) {
    let (signals, pause) = (queue.signals().clone(), queue.pause());
    queue.serve(|chain| {
        pause.admitted(limiter, chain.readable.len().saturating_sub(HEADER as u64));
        if let Err(error) = send(chain, port, pair)
            && is_gone(&error)
        {
            cable.cut(&signals, &error);
        }
        0
    });
}

/// Sends a packet. One that the host does not take is lost, as on a wire.
fn send(chain: &Chain, port: &dyn Port, pair: u16) -> io::Result<()> {
    let buffers = chain.readable.iovecs();
    let fits = HEADER as u64 + 1..=LARGEST as u64;
    if !fits.contains(&chain.readable.len()) || buffers.len() > MOST_BUFFERS {
        return Ok(());
    }
    // SAFETY: the buffers are guest memory, mapped for as long as `chain` lives; the kernel only reads them.
    let sent = unsafe { libc::writev(port.file(pair).as_raw_fd(), buffers.as_ptr(), buffers.len() as i32) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the host's side is gone for good. (EIO is an interface that is down, which may come up again.)
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::EBADF | libc::ENXIO))
}
