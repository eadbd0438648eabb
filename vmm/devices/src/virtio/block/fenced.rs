//! A disk that is not written after its machine has ended: [`machine::control::fence`] is asked before each
//! write.

use std::io;
use std::sync::Arc;

use machine::control::fence::Gate;

use super::disk::Disk;

/// Bytes that are made zero after one question: a host may have to write them. The largest cluster of a qcow2
/// image, which is only given back as a whole.
const PIECE: u64 = 2 << 20;

/// A disk behind its node's fence, as one use of the device has it.
pub struct Fenced {
    disk: Arc<dyn Disk>,
    gate: Gate,
}

impl Fenced {
    /// A disk that is written only where `gate` lets it be.
    pub fn new(disk: Arc<dyn Disk>, gate: Gate) -> Fenced {
        Fenced { disk, gate }
    }
}

impl Disk for Fenced {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read(to, offset)
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.gate.pass()?;
        self.disk.write(from, offset)
    }

    /// Some formats write what they have kept until now.
    fn flush(&self) -> io::Result<()> {
        self.gate.pass()?;
        self.disk.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.gate.pass()?;
        self.disk.discard(offset, len)
    }

    fn write_zeroes(&self, mut offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            self.gate.pass()?;
            let next = end.min((offset / PIECE + 1) * PIECE);
            self.disk.write_zeroes(offset, next - offset, unmap)?;
            offset = next;
        }
        Ok(())
    }
}
