//! One request: a chain of the guest's buffers, checked once and then used.

use std::collections::VecDeque;
use std::ops::Deref;

use coherence::page::PAGE_SIZE;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// What is wrong with a chain.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It does not end, or goes on where no descriptor can be.
    #[error("a chain of buffers does not end")]
    Endless,
    /// A buffer is not in RAM.
    #[error("a buffer of {len} bytes at {gpa:#x} is not in the guest's memory")]
    NotMemory {
        /// Where.
        gpa: u64,
        /// How long.
        len: u32,
    },
    /// Buffers for the device to write must follow those for it to read.
    #[error("a buffer for the device to read follows one for it to write")]
    Order,
}

/// Buffers one after the other, as if they were one.
#[derive(Clone, Default)]
pub struct Buffers<'m> {
    pieces: VecDeque<VolatileSlice<'m>>,
}

impl<'m> Buffers<'m> {
    /// One buffer.
    #[cfg(test)]
    pub fn one(piece: VolatileSlice<'m>) -> Buffers<'m> {
        Buffers { pieces: [piece].into() }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the first `len` bytes off; fewer if there are fewer.
    pub fn take(&mut self, len: u64) -> Buffers<'m> {
        let mut taken = Buffers::default();
        let mut left = len;
        while left > 0
            && let Some(piece) = self.pieces.pop_front()
        {
            // Beyond the piece's end there is nothing to split off.
            let (head, tail) = match piece.split_at(left.min(piece.len() as u64) as usize) {
                Ok((head, tail)) => (head, Some(tail).filter(|tail| !tail.is_empty())),
                Err(_) => (piece, None),
            };
            left -= head.len() as u64;
            taken.pieces.push_back(head);
            if let Some(tail) = tail {
                self.pieces.push_front(tail);
            }
        }
        taken
    }

    /// Copies to `to` as much as fits; how much that was.
    pub fn read(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            done += piece.copy_to(&mut to[done..]);
        }
        done
    }

    /// Copies from `from` as much as fits; how much that was.
    pub fn write(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let part = piece.len().min(from.len() - done);
            piece.copy_from(&from[done..done + part]);
            done += part;
        }
        done
    }

    /// The buffers, cut where pages end.
    pub fn parts(&self) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.pieces.iter().flat_map(|piece| {
            let start = piece.ptr_guard().as_ptr() as usize;
            let mut at = 0;
            std::iter::from_fn(move || {
                let room = PAGE_SIZE - (start + at) % PAGE_SIZE;
                let part =
                    piece.subslice(at, room.min(piece.len() - at)).ok().filter(|part| !part.is_empty())?;
                at += part.len();
                Some(part)
            })
        })
    }

    /// The pieces as system calls take them. Good for as long as the memory is mapped, which the borrow
    /// ensures.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |piece: &VolatileSlice| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        };
        self.pieces.iter().map(iovec).collect()
    }
}

/// A request as the driver made it.
pub struct Chain<'m> {
    /// Its number, to give it back by.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// The buffers of `descriptors` in `memory`.
    ///
    /// # Errors
    /// [`ChainError`] for what no correct driver makes.
    pub fn new<M>(
        memory: &'m GuestMemoryMmap,
        descriptors: DescriptorChain<M>,
    ) -> Result<Chain<'m>, ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut ended = false;
        // The iterator follows at most as many descriptors as the tables have.
        for descriptor in descriptors {
            ended = !descriptor.has_next();
            chain.add(memory, &descriptor)?;
        }
        if ended { Ok(chain) } else { Err(ChainError::Endless) }
    }

    fn add(&mut self, memory: &'m GuestMemoryMmap, descriptor: &Descriptor) -> Result<(), ChainError> {
        let (permissions, buffers) = match descriptor.is_write_only() {
            true => (Permissions::Write, &mut self.writable),
            false if !self.writable.pieces.is_empty() => return Err(ChainError::Order),
            false => (Permissions::Read, &mut self.readable),
        };
        let wrong = || ChainError::NotMemory { gpa: descriptor.addr().0, len: descriptor.len() };
        let slices = memory
            .get_slices(descriptor.addr(), descriptor.len() as usize, permissions)
            .map_err(|_| wrong())?;
        for slice in slices {
            buffers.pieces.push_back(slice.map_err(|_| wrong())?);
        }
        Ok(())
    }
}
