//! Guest RAM as devices reach it: the node's guest view, and what is elsewhere.

mod far;

use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};

use anyhow::Context;
use coherence::engine::Engine;
use coherence::memory::DualMemory;
use firmware::Layout;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::chain::Buffers;

/// Guest RAM by guest physical address. Clones are the same memory.
///
/// A page that this node does not hold raises a fault when it is touched, and the toucher waits until the coherence
/// engine has brought it. So never touch it from an engine's thread, or with a lock held that one may need. The bytes
/// may change at any time: read once what is checked and used. Data go by [`GuestRam::read`] and [`GuestRam::write`],
/// which ask for all pages that are not here at once and leave them where they are.
///
/// Never hand it to anything that may keep a reference to its frames while they are being read or written (direct I/O,
/// registered buffers, files of many file systems): another node takes a page without asking who pinned its frame. A
/// TAP interface copies.
#[derive(Clone)]
pub struct GuestRam {
    map: Arc<GuestMemoryMmap>,
    /// What the map points into.
    memory: Option<Arc<DualMemory>>,
    /// What reaches pages on other nodes, once it runs and if there are others.
    engine: Arc<OnceLock<Weak<Engine>>>,
}

impl GuestRam {
    /// The guest view of `memory`, laid out as `layout` says.
    ///
    /// # Errors
    /// A layout that does not fit the memory.
    pub fn new(memory: &Arc<DualMemory>, layout: &Layout) -> anyhow::Result<GuestRam> {
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
        Ok(GuestRam { map: Arc::new(map), memory: Some(memory.clone()), engine: Arc::default() })
    }

    /// Memory that is not coherent with anything, for tests.
    pub fn plain(map: GuestMemoryMmap) -> GuestRam {
        GuestRam { map: Arc::new(map), memory: None, engine: Arc::default() }
    }

    /// From now on `engine` reaches what is on other nodes.
    pub fn connect(&self, engine: &Arc<Engine>) {
        // Connected once.
        let _ = self.engine.set(Arc::downgrade(engine));
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
