//! One request to a disk (5.2.6): a header, data, and a byte for the outcome.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk as blk;

use super::disk::Disk;
use super::{BlockConfig, MAX_CLEAR, MAX_CLEAR_SEGMENTS, SECTOR};
use crate::virtio::GuestRam;
use crate::virtio::chain::{Buffers, Chain};
use machine::config::devices::SERIAL_LEN;
use machine::control::fence::Ended;

/// Bytes of data that are between disk and guest at once.
const AT_ONCE: u64 = 256 << 10;
/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a segment to discard or to zero: sector, count, flags.
const SEGMENT: u64 = 16;
/// Flag of a segment: its storage may be given up.
const UNMAP: u32 = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// Why a request gets no success.
#[derive(Debug)]
enum Refusal {
    /// Not a thing that this device does.
    Unsupported,
    /// The request makes no sense.
    Wrong(&'static str),
    /// The host failed.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        Refusal::Failed(error)
    }
}

/// Told what was being done and what the host said, when a request fails.
pub type OnFailure = Box<dyn Fn(&str, &io::Error) + Send>;

/// Does requests; one for each thread.
pub struct Server {
    disk: Arc<dyn Disk>,
    memory: GuestRam,
    /// For the data of one request at a time.
    data: Vec<u8>,
    serial: [u8; SERIAL_LEN],
    readonly: bool,
    on_failure: OnFailure,
}

impl Server {
    /// For a disk that appears as `config` says.
    pub fn new(disk: Arc<dyn Disk>, config: &BlockConfig, memory: GuestRam, on_failure: OnFailure) -> Server {
        let mut serial = [0; SERIAL_LEN];
        let shown = config.serial.len().min(SERIAL_LEN);
        serial[..shown].copy_from_slice(&config.serial.as_bytes()[..shown]);
        Server { disk, memory, data: Vec::new(), serial, readonly: config.readonly, on_failure }
    }

    /// Does a request; how many bytes of its buffers were written, the outcome among them. `None` if the
    /// machine has ended before it was done, or the device is being reset: the guest is not to see an outcome
    /// then.
    pub fn serve(&mut self, chain: &mut Chain) -> Option<u32> {
        let Some(room) = chain.writable.len().checked_sub(1) else {
            // Nowhere to say anything.
            return Some(0);
        };
        let data = chain.writable.take(room);
        let mut header = [0; HEADER];
        let outcome = match chain.readable.take(HEADER as u64).read(&mut header) {
            HEADER => self.act(&header, &mut chain.readable, &data),
            _ => Err(Refusal::Wrong("header")),
        };
        let (status, written) = match outcome {
            Ok(written) => (blk::VIRTIO_BLK_S_OK, written),
            Err(Refusal::Unsupported) => (blk::VIRTIO_BLK_S_UNSUPP, 0),
            Err(Refusal::Wrong(what)) => {
                (self.on_failure)(what, &io::Error::other("the request makes no sense"));
                (blk::VIRTIO_BLK_S_IOERR, 0)
            }
            Err(Refusal::Failed(error)) if Ended::is(&error) => return None,
            Err(Refusal::Failed(error)) => {
                (self.on_failure)(name(kind(&header)), &error);
                (blk::VIRTIO_BLK_S_IOERR, 0)
            }
        };
        chain.writable.write(&[status as u8]);
        // The outcome is the last byte: it counts only if all bytes before it were written.
        Some(if u64::from(written) == room { written.saturating_add(1) } else { written })
    }

    /// The bytes of `data` that were written.
    fn act(&mut self, header: &[u8; HEADER], input: &mut Buffers, data: &Buffers) -> Result<u32, Refusal> {
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap_or_default());
        match kind(header) {
            blk::VIRTIO_BLK_T_IN => {
                let (offset, len) = self.range(sector, data.len())?;
                self.read(data.clone(), offset)?;
                Ok(len as u32)
            }
            blk::VIRTIO_BLK_T_OUT => {
                self.may_write()?;
                let (offset, _) = self.range(sector, input.len())?;
                self.write(input.clone(), offset)?;
                Ok(0)
            }
            blk::VIRTIO_BLK_T_FLUSH => Ok(self.disk.flush().map(|()| 0)?),
            blk::VIRTIO_BLK_T_GET_ID => Ok(data.write(&self.serial) as u32),
            kind @ (blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES) => {
                self.may_write()?;
                self.clear(kind == blk::VIRTIO_BLK_T_WRITE_ZEROES, input)?;
                Ok(0)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn read(&mut self, mut to: Buffers, mut offset: u64) -> io::Result<()> {
        while !to.is_empty() {
            let part = to.take(AT_ONCE);
            self.data.resize(part.len() as usize, 0);
            self.disk.read(&mut self.data, offset)?;
            self.memory.write(&part, &self.data);
            offset += part.len();
        }
        Ok(())
    }

    fn write(&mut self, mut from: Buffers, mut offset: u64) -> io::Result<()> {
        while !from.is_empty() {
            let part = from.take(AT_ONCE);
            self.data.resize(part.len() as usize, 0);
            self.memory.read(&part, &mut self.data);
            self.disk.write(&self.data, offset)?;
            offset += part.len();
        }
        Ok(())
    }

    fn may_write(&self) -> Result<(), Refusal> {
        if self.readonly { Err(Refusal::Wrong("write to a read-only disk")) } else { Ok(()) }
    }

    /// Offset and length in bytes, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<(u64, u64), Refusal> {
        let range = sector.checked_mul(SECTOR).and_then(|start| Some((start, start.checked_add(len)?)));
        match range {
            Some((start, end)) if end <= self.disk.len() && len.is_multiple_of(SECTOR) => Ok((start, len)),
            _ => Err(Refusal::Wrong("access beyond the disk's end or to part of a sector")),
        }
    }

    fn clear(&self, zero: bool, input: &mut Buffers) -> Result<(), Refusal> {
        let count = input.len() / SEGMENT;
        if !input.len().is_multiple_of(SEGMENT) || count == 0 || count > MAX_CLEAR_SEGMENTS.into() {
            return Err(Refusal::Wrong("list of ranges to clear"));
        }
        for _ in 0..count {
            let mut bytes = [0; SEGMENT as usize];
            input.take(SEGMENT).read(&mut bytes);
            let word =
                |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            let (sectors, flags) = (word(8), word(12));
            if flags & !UNMAP != 0 || !zero && flags != 0 {
                return Err(Refusal::Unsupported);
            }
            if sectors > MAX_CLEAR {
                return Err(Refusal::Wrong("range to clear, which is too long"));
            }
            let first = u64::from(word(4)) << 32 | u64::from(word(0));
            let (offset, len) = self.range(first, u64::from(sectors) * SECTOR)?;
            match (len, zero) {
                (0, _) => {}
                (_, true) => self.disk.write_zeroes(offset, len, flags & UNMAP != 0)?,
                (_, false) => self.disk.discard(offset, len)?,
            }
        }
        Ok(())
    }
}

/// Bytes of a request beside its header and its outcome: what it reads or writes.
pub fn data_len(chain: &Chain) -> u64 {
    chain.readable.len().saturating_sub(HEADER as u64) + chain.writable.len().saturating_sub(1)
}

fn kind(header: &[u8; HEADER]) -> u32 {
    u32::from_le_bytes([header[0], header[1], header[2], header[3]])
}

fn name(kind: u32) -> &'static str {
    match kind {
        blk::VIRTIO_BLK_T_IN => "read",
        blk::VIRTIO_BLK_T_OUT => "write",
        blk::VIRTIO_BLK_T_FLUSH => "flush",
        blk::VIRTIO_BLK_T_DISCARD => "discard",
        _ => "writing of zeroes",
    }
}
