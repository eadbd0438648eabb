//! Packets from the guest: each chain is a header and a packet, and goes to the host as it is.

use std::io;

use super::{Cable, HEADER, LARGEST, Port};
use crate::rate_limit::Limiter;
use crate::virtio::chain::Chain;
use crate::virtio::{GuestRam, LiveQueue};

/// Sends what the driver puts into the queue, until it is stopped.
pub fn run(queue: LiveQueue, port: &dyn Port, pair: u16, cable: &Cable, limiter: &Limiter) {
    let (signals, pause, memory) = (queue.signals().clone(), queue.pause(), queue.memory().clone());
    let gate = queue.gate();
    let mut packet = vec![0; LARGEST];
    queue.serve_or_keep(|chain| {
        pause.admitted(limiter, chain.readable.len().saturating_sub(HEADER as u64));
        // That may have taken its time.
        gate.pass().ok()?;
        if let Err(error) = send(chain, &memory, &mut packet, port, pair)
            && is_gone(&error)
        {
            cable.cut(&signals, &error);
        }
        Some(0)
    });
}

/// Sends a packet. One that the host does not take is lost, as on a wire.
fn send(chain: &Chain, memory: &GuestRam, packet: &mut [u8], port: &dyn Port, pair: u16) -> io::Result<()> {
    let fits = HEADER as u64 + 1..=packet.len() as u64;
    if !fits.contains(&chain.readable.len()) {
        return Ok(());
    }
    let len = memory.read(&chain.readable, packet);
    nix::unistd::write(port.file(pair), &packet[..len])?;
    Ok(())
}

/// Whether the host's side is gone for good. (EIO is an interface that is down, which may come up again.)
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::EBADF | libc::ENXIO))
}
