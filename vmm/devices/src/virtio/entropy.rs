//! Entropy device (5.4): random bytes from the host's generator.

use std::io;

use nix::errno::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::chain::Chain;
use super::{Activation, VirtioDevice, Workers};

/// Requests that may wait; each is answered at once.
const QUEUE_SIZE: u16 = 16;
/// The most that one request gets, in bytes: what the kernel gives without being interrupted (getrandom(2)).
const MOST: usize = 256;

/// The device.
pub struct Entropy;

impl VirtioDevice for Entropy {
    fn id(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn class(&self) -> u32 {
        // Other.
        0xff_0000
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation, workers: &mut Workers) -> io::Result<()> {
        for queue in activation.queues.into_iter().flatten() {
            workers.spawn(move || queue.serve(fill))?;
        }
        Ok(())
    }
}

/// Fills the start of the request; how many bytes.
fn fill(chain: &mut Chain) -> u32 {
    let mut bytes = [0; MOST];
    let wanted = chain.writable.len().min(MOST as u64) as usize;
    match random(&mut bytes[..wanted]) {
        Ok(()) => chain.writable.write(&bytes[..wanted]) as u32,
        Err(errno) => {
            tracing::warn!("the guest gets no random bytes: {errno}");
            0
        }
    }
}

fn random(bytes: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the kernel writes at most `rest.len()` bytes to `rest`.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match Errno::result(got) {
            Ok(got) => done += got as usize,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
