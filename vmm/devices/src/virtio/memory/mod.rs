//! Guest RAM as devices reach it: the node's guest view, and what is elsewhere.
//!
//! | file | concept |
//! |---|---|
//! | this one | addresses, and what devices tell the engine |
//! | [`remote`] | data that are on other nodes |

mod remote;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context;
use coherence::engine::Engine;
use coherence::memory::DualMemory;
use coherence::page::PAGE_SIZE;
use firmware::Layout;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::chain::Buffers;

/// Guest RAM by guest physical address. Clones are the same memory.
///
/// A page that this node does not hold raises a fault when it is touched, and the toucher waits until the
/// coherence engine has brought it. So never touch it from an engine's thread, or with a lock held that one
/// may need. The bytes may change at any time: read once what is checked and used. Data go by
/// [`GuestRam::read`] and [`GuestRam::write`], which ask for all pages that are not here at once and leave
/// them where they are.
///
/// Never hand it to anything that may keep a reference to its frames while they are being read or written
/// (direct I/O, registered buffers, files of many file systems): another node takes a page without asking who
/// pinned its frame. A TAP interface copies.
#[derive(Clone)]
pub struct GuestRam {
    map: Arc<GuestMemoryMmap>,
    /// `None`: the map's memory is this process's own, in tests.
    coherent: Option<Coherent>,
    /// Fails as if the engine had ended.
    #[cfg(test)]
    gives_nothing_up: bool,
}

/// What the map points into, and what keeps that coherent.
#[derive(Clone)]
struct Coherent {
    memory: Arc<DualMemory>,
    engine: Arc<Engine>,
    /// Whether there are other nodes that pages can be on.
    shared: bool,
}

impl GuestRam {
    /// The guest view of `memory`, laid out as `layout` says and kept coherent by `engine`.
    ///
    /// # Errors
    /// A layout that does not fit the memory.
    pub fn new(memory: &Arc<DualMemory>, engine: &Arc<Engine>, layout: &Layout) -> anyhow::Result<GuestRam> {
        let regions = layout.ram_ranges().iter().map(|range| {
            anyhow::ensure!(range.offset + range.len <= memory.len() as u64, "guest RAM beyond its memory");
            let host = memory.guest_view().wrapping_add(range.offset as usize);
            // SAFETY: inside the guest view, as just checked, which the value keeps mapped.
            let region = unsafe { MmapRegionBuilder::new(range.len as usize).with_raw_mmap_pointer(host) };
            let region = region
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()?;
            GuestRegionMmap::new(region, GuestAddress(range.gpa))
                .context("a RAM range at the end of the address space")
        });
        let map = GuestMemoryMmap::from_regions(regions.collect::<anyhow::Result<Vec<_>>>()?)?;
        let (memory, engine, shared) = (memory.clone(), engine.clone(), layout.nodes() > 1);
        let coherent = Some(Coherent { memory, engine, shared });
        Ok(GuestRam {
            map: Arc::new(map),
            coherent,
            #[cfg(test)]
            gives_nothing_up: false,
        })
    }

    /// Memory that is not coherent with anything, for tests.
    pub fn plain(map: GuestMemoryMmap) -> GuestRam {
        GuestRam {
            map: Arc::new(map),
            coherent: None,
            #[cfg(test)]
            gives_nothing_up: false,
        }
    }

    /// The same memory, none of which can be given up.
    #[cfg(test)]
    pub fn that_gives_nothing_up(self) -> GuestRam {
        GuestRam { gives_nothing_up: true, ..self }
    }

    /// The same memory, of which all data are brought here by page faults.
    #[cfg(test)]
    pub fn without_direct_access(mut self) -> GuestRam {
        self.coherent.iter_mut().for_each(|coherent| coherent.shared = false);
        self
    }

    /// Says that the calling thread is about to sleep: pages that are kept for it may go.
    pub fn idle(&self) {
        if let Some(coherent) = &self.coherent {
            coherent.engine.idle(base::thread::id() as u32);
        }
    }

    /// Gives up the content of whole pages, by guest physical address and in order: they are zero when this
    /// returns, and cost no node a frame. What is not memory is left out.
    ///
    /// # Errors
    /// The engine has ended. Pages may still be given up later: none of them may be used again.
    pub fn discard(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        let whole = |range: &Range<u64>| (range.start | range.end).is_multiple_of(PAGE_SIZE as u64);
        debug_assert!(ranges.iter().all(whole), "{ranges:x?} are not whole pages");
        debug_assert!(ranges.is_sorted_by(|one, next| one.end <= next.start), "{ranges:x?} are not in order");
        let mut parts = ranges.iter().flat_map(|range| {
            self.map.iter().filter_map(move |region| {
                let first = region.start_addr().0;
                let part = range.start.max(first)..range.end.min(first + region.len());
                let host =
                    region.get_host_address(MemoryRegionAddress(part.start.checked_sub(first)?)).ok()?;
                (!part.is_empty()).then_some((part, host as u64))
            })
        });
        #[cfg(test)]
        if self.gives_nothing_up {
            return Err(io::Error::other("the engine has ended"));
        }
        let Some(Coherent { memory, engine, .. }) = &self.coherent else {
            let zero = |(part, _): (Range<u64>, u64)| {
                self.map.write_slice(&vec![0; (part.end - part.start) as usize], GuestAddress(part.start))
            };
            return parts.try_for_each(zero).map_err(io::Error::other);
        };
        let pages = parts.filter_map(|(part, host)| {
            let first = memory.page_at(host)?.0;
            Some(first..first + (part.end - part.start) / PAGE_SIZE as u64)
        });
        engine.discard(&pages.collect::<Vec<_>>()).map_err(io::Error::other)
    }

    /// Where buffers of it are, by guest physical address.
    pub fn addresses(&self, buffers: &Buffers) -> Vec<Range<u64>> {
        let address = |buffer: &libc::iovec| {
            let host = buffer.iov_base as u64;
            self.map.iter().find_map(|region| {
                let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
                let offset = host.checked_sub(start).filter(|offset| *offset < region.len())?;
                let gpa = region.start_addr().0 + offset;
                Some(gpa..gpa + buffer.iov_len as u64)
            })
        };
        buffers.iovecs().iter().filter_map(address).collect()
    }

    /// By address.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }
}
