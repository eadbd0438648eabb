//! Data to and from buffers of which some pages are on other nodes.
//!
//! Such a page is not brought here: the engine reads it where it is, or writes it at its home if it is
//! overwritten whole, and all of a request are on their way at once. What is mapped here, as the page tables
//! say, is copied as any memory; so is what the engine leaves to us.

use coherence::engine::{Engine, Load, Store};
use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use coherence::protocol::Rights;
use vm_memory::VolatileSlice;

use super::GuestRam;
use crate::virtio::chain::Buffers;

/// Part of a buffer within one page.
struct Part<'m> {
    slice: VolatileSlice<'m>,
    /// Where it is among the bytes of all parts.
    at: usize,
    page: Page,
    /// Where it is in its page.
    offset: usize,
    /// What this node may do with the page.
    here: Rights,
}

impl GuestRam {
    /// Copies buffers to `to` as far as they fit; how many bytes that were.
    pub fn read(&self, buffers: &Buffers, to: &mut [u8]) -> usize {
        let Some((memory, engine)) = self.remote() else { return buffers.read(to) };
        let parts = parts(memory, buffers, to.len());
        let (mut remote, mut rest) = (Vec::new(), &mut *to);
        for part in &parts {
            let (bytes, more) = rest.split_at_mut(part.slice.len());
            rest = more;
            if part.here == Rights::None {
                remote.push(Load { page: part.page, offset: part.offset, to: bytes });
            }
        }
        let read = if remote.is_empty() { Vec::new() } else { engine.load(remote) };
        let mut read = read.into_iter();
        for part in &parts {
            if part.here != Rights::None || read.next() != Some(true) {
                part.slice.copy_to(&mut to[part.at..part.at + part.slice.len()]);
            }
        }
        parts.last().map_or(0, |part| part.at + part.slice.len())
    }

    /// Copies from `from` to buffers as far as it fits; how many bytes that were.
    pub fn write(&self, buffers: &Buffers, from: &[u8]) -> usize {
        let Some((memory, engine)) = self.remote() else { return buffers.write(from) };
        let parts = parts(memory, buffers, from.len());
        let bytes_of = |part: &Part| &from[part.at..part.at + part.slice.len()];
        // A page that is overwritten whole.
        let store = |part: &Part| {
            let from = bytes_of(part).try_into().ok().filter(|_| part.here != Rights::Exclusive)?;
            Some(Store { page: part.page, from })
        };
        let remote: Vec<Store> = parts.iter().filter_map(store).collect();
        let written = if remote.is_empty() { Vec::new() } else { engine.store(&remote) };
        let mut written = written.into_iter();
        for part in &parts {
            if store(part).is_none() || written.next() != Some(true) {
                part.slice.copy_from(bytes_of(part));
            }
        }
        parts.last().map_or(0, |part| part.at + part.slice.len())
    }

    /// The memory and what reaches other nodes, if there are others.
    fn remote(&self) -> Option<(&DualMemory, &Engine)> {
        let coherent = self.coherent.as_ref().filter(|coherent| coherent.shared)?;
        Some((&coherent.memory, &coherent.engine))
    }
}

/// The first `most` bytes of buffers, page by page.
fn parts<'m>(memory: &DualMemory, buffers: &Buffers<'m>, most: usize) -> Vec<Part<'m>> {
    let mut parts: Vec<Part> = Vec::new();
    let mut at = 0;
    for slice in buffers.parts() {
        let Ok(slice) = slice.subslice(0, slice.len().min(most - at)) else { break };
        let address = slice.ptr_guard().as_ptr() as u64;
        // Buffers are in guest memory.
        let Some(page) = memory.page_at(address) else { break };
        if slice.is_empty() {
            break;
        }
        let offset = address as usize % PAGE_SIZE;
        let len = slice.len();
        parts.push(Part { slice, at, page, offset, here: Rights::None });
        at += len;
    }
    // One look at the page tables for pages in a row.
    for row in parts.chunk_by_mut(|one, next| one.page.0 + 1 == next.page.0) {
        let here = memory.mapped(row[0].page, row.len() as u64);
        row.iter_mut().zip(here).for_each(|(part, here)| part.here = here);
    }
    parts
}
