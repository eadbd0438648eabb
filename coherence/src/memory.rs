//! Guest RAM of one node: one sparse file, mapped twice.
//!
//! The *guest view* is what KVM, devices and the loader use; userfaultfd watches it. The *engine view* never
//! faults for anybody's permission: the protocol copies pages through it. Both show the same frames.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::execution::execute;
use crate::page::{PAGE_SIZE, Page};
use crate::protocol::{Operation, Rights};

/// The two mappings and their file.
#[derive(Debug)]
pub struct DualMemory {
    file: OwnedFd,
    /// The process's, if the kernel shows them.
    page_tables: Option<File>,
    guest: NonNull<c_void>,
    engine: NonNull<c_void>,
    len: usize,
}

// SAFETY: the pointers are to mappings that live as long as the value; what threads may do with their bytes
// is each method's contract.
unsafe impl Send for DualMemory {}
// SAFETY: as above.
unsafe impl Sync for DualMemory {}

impl DualMemory {
    /// `pages` pages of guest RAM, none of them in memory yet.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(pages: u64) -> io::Result<DualMemory> {
        let len = pages as usize * PAGE_SIZE;
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let file = memfd_create(c"gestalt-guest", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, len as i64)?;
        let map = |flags| {
            let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
            unsafe {
                mmap(None, size, prot, MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | flags, &file, 0)
            }
        };
        let guest = map(MapFlags::empty())?;
        let engine = match map(MapFlags::empty()) {
            Ok(engine) => engine,
            Err(e) => {
                // SAFETY: just mapped, nobody has seen it.
                let _ = unsafe { munmap(guest, len) };
                return Err(e.into());
            }
        };
        let page_tables = File::open("/proc/self/pagemap").ok();
        let memory = DualMemory { file, page_tables, guest, engine, len };
        // Advice only: guest memory does not belong in core files, and huge pages serve what is never shared.
        for view in [memory.guest, memory.engine] {
            // SAFETY: the whole of our own mapping; neither advice changes its content.
            let _ = unsafe { madvise(view, len, MmapAdvise::MADV_DONTDUMP) };
        }
        // SAFETY: as above.
        let _ = unsafe { madvise(memory.guest, len, MmapAdvise::MADV_HUGEPAGE) };
        Ok(memory)
    }

    /// Length of each view, in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no memory; there always is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Start of the guest view, for KVM's memory slots.
    pub fn guest_view(&self) -> *mut u8 {
        self.guest.as_ptr().cast()
    }

    /// The page of the guest view that holds an address of it.
    pub fn page_at(&self, address: u64) -> Option<Page> {
        let offset = address.checked_sub(self.guest.as_ptr() as u64)?;
        (offset < self.len as u64).then_some(Page(offset / PAGE_SIZE as u64))
    }

    /// The page's address in the guest view.
    pub fn guest_address(&self, page: Page) -> u64 {
        self.guest.as_ptr() as u64 + page.offset() as u64
    }

    fn frame_ptr(&self, page: Page) -> *mut [u8; PAGE_SIZE] {
        assert!(page.offset() < self.len, "page {page:?} is beyond the guest's memory");
        // SAFETY: inside the engine view, as just checked.
        unsafe { self.engine.as_ptr().cast::<u8>().add(page.offset()).cast() }
    }

    /// The page's bytes, through the engine view.
    ///
    /// # Safety
    /// For as long as the slice lives the guest view must not have the page mapped writable, and no engine
    /// thread may write it: the page's shard has just protected or unmapped it, and is the one who reads.
    pub unsafe fn frame(&self, page: Page) -> &[u8; PAGE_SIZE] {
        // SAFETY: aligned and inside the mapping; nobody writes, by the contract above.
        unsafe { &*self.frame_ptr(page) }
    }

    /// Fills the page through the engine view; `None` with zeroes.
    ///
    /// # Safety
    /// The guest view must not have the page mapped, and only the page's shard may call this.
    pub unsafe fn fill(&self, page: Page, bytes: Option<&[u8; PAGE_SIZE]>) {
        let to = self.frame_ptr(page);
        // SAFETY: `to` is aligned and inside the mapping, and nobody else accesses it, by the contract above.
        // A raw copy, since memory that was never written has no initialised `&mut` to offer.
        unsafe {
            match bytes {
                Some(bytes) => std::ptr::copy_nonoverlapping(bytes, to, 1),
                None => std::ptr::write_bytes(to, 0, 1),
            }
        }
    }

    /// What the guest view maps of `count` pages from `first` on, as the process's page tables are now: a
    /// hint, since it may change at once. Nothing where the kernel does not tell (`/proc/PID/pagemap`, Linux
    /// 5.13 or newer).
    pub fn mapped(&self, first: Page, count: u64) -> Vec<Rights> {
        const PRESENT: u64 = 1 << 63;
        const WRITE_PROTECTED: u64 = 1 << 57;
        let mut entries = vec![0; count as usize * size_of::<u64>()];
        let at = self.guest_address(first) / PAGE_SIZE as u64 * size_of::<u64>() as u64;
        let read = self.page_tables.as_ref().map(|tables| tables.read_exact_at(&mut entries, at));
        if !matches!(read, Some(Ok(()))) {
            return vec![Rights::None; count as usize];
        }
        let rights = |entry: &[u8]| match entry.try_into().map_or(0, u64::from_le_bytes) {
            entry if entry & PRESENT == 0 => Rights::None,
            entry if entry & WRITE_PROTECTED != 0 => Rights::Shared,
            _ => Rights::Exclusive,
        };
        entries.chunks_exact(size_of::<u64>()).map(rights).collect()
    }

    /// Whether the guest view maps the page: a hint, as [`DualMemory::mapped`]'s.
    pub fn is_mapped(&self, page: Page) -> bool {
        self.mapped(page, 1).first().is_some_and(|rights| *rights != Rights::None)
    }

    /// Copies bytes of the page as they are now, whoever may be writing them; 8 aligned bytes are read at
    /// once. `false` if they go beyond the page.
    pub fn read_at(&self, page: Page, offset: usize, bytes: &mut [u8]) -> bool {
        if offset + bytes.len() > PAGE_SIZE {
            return false;
        }
        // SAFETY: inside the page, as just checked.
        let from = unsafe { self.frame_ptr(page).cast::<u8>().add(offset) };
        match <&mut [u8; 8]>::try_from(&mut *bytes) {
            Ok(word) if offset.is_multiple_of(8) => {
                // SAFETY: aligned and inside the page; others write it as a guest's CPUs do, through no Rust
                // reference.
                *word = unsafe { from.cast::<u64>().read_volatile() }.to_le_bytes();
            }
            // SAFETY: inside the page; a raw copy, which tears where the guest writes at the same time, as a
            // CPU's would.
            _ => unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) },
        }
        true
    }

    /// A copy of the page's bytes as they are now, whoever may be writing them.
    pub fn read(&self, page: Page) -> [u8; PAGE_SIZE] {
        let mut bytes = [0; PAGE_SIZE];
        self.read_to(page, &mut bytes);
        bytes
    }

    /// Copies the page's bytes as they are now, whoever may be writing them.
    pub fn read_to(&self, page: Page, to: &mut [u8; PAGE_SIZE]) {
        // SAFETY: aligned and inside the mapping; a raw copy, which tears where the guest writes at the same
        // time, as what a device reads may.
        unsafe { std::ptr::copy_nonoverlapping(self.frame_ptr(page), to, 1) };
    }

    /// Overwrites the page, whoever may be reading or writing it through the guest view, as a device would.
    pub fn overwrite(&self, page: Page, bytes: &[u8; PAGE_SIZE]) {
        // SAFETY: aligned and inside the mapping; a raw copy, which tears where the guest accesses the page
        // at the same time, as what a device writes may.
        unsafe { std::ptr::copy_nonoverlapping(bytes, self.frame_ptr(page), 1) };
    }

    /// Carries an operation out on the page through the engine view, atomically with whoever accesses it
    /// through the guest view, and tells the old bytes (0 of a store). Whether this node may read and write
    /// the page is the caller's to know.
    pub fn operate(&self, page: Page, operation: &Operation) -> u128 {
        // SAFETY: inside the mapping, which can be read and written; references to its frames are made only
        // while nobody writes them, which is their makers' contract.
        unsafe { execute(self.frame_ptr(page), operation) }
    }

    /// Makes sure that the page is in the file, so that a touch of the guest view raises a minor fault and is
    /// not filled by the kernel on its own.
    pub fn ensure_frame(&self, page: Page) {
        // SAFETY: inside the mapping; a volatile read of one byte, whose value does not matter, allocates the
        // page in a shared mapping of a memfd.
        unsafe { self.frame_ptr(page).cast::<u8>().read_volatile() };
    }

    /// How many pages from `first` on are not in the file, `most` at most.
    pub fn absent(&self, first: Page, most: u64) -> u64 {
        use nix::unistd::{Whence, lseek};
        match lseek(&self.file, first.offset() as i64, Whence::SeekData) {
            Ok(data) => (data as u64 / PAGE_SIZE as u64).saturating_sub(first.0).min(most),
            // No data from here to the end of the file.
            Err(nix::Error::ENXIO) => most,
            Err(_) => 0,
        }
    }

    /// Unmaps pages from the guest view; when this returns nobody accesses them (the kernel has told KVM and
    /// flushed the TLBs). Their frames stay.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unmap(&self, page: Page, pages: u64) -> io::Result<()> {
        assert!(page.offset() + pages as usize * PAGE_SIZE <= self.len);
        // SAFETY: inside the guest view, a shared mapping, where DONTNEED drops page-table entries only.
        let start = unsafe { self.guest.byte_add(page.offset()) };
        // SAFETY: as above.
        Ok(unsafe { madvise(start, pages as usize * PAGE_SIZE, MmapAdvise::MADV_DONTNEED) }?)
    }

    /// Gives the frames of pages back to the host. The kernel unmaps them from the guest view first, if they
    /// are mapped there; what is touched afterwards is as if it had never been.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn free(&self, page: Page, pages: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags, fallocate};
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, mode, page.offset() as i64, (pages * PAGE_SIZE as u64) as i64)?)
    }

    /// Bytes of frames that the file holds now.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        Ok(nix::sys::stat::fstat(&self.file)?.st_blocks as u64 * 512)
    }

    /// The file's descriptor.
    pub fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

impl Drop for DualMemory {
    fn drop(&mut self) {
        for view in [self.guest, self.engine] {
            // SAFETY: our own mappings, and no reference into them outlives the value.
            let _ = unsafe { munmap(view, self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_tables_tell_what_was_touched() {
        let memory = DualMemory::new(8).unwrap();
        if memory.page_tables.is_none() {
            return println!("skipped: this kernel does not show page tables");
        }
        memory.overwrite(Page(2), &[7; PAGE_SIZE]);
        assert_eq!(memory.mapped(Page(0), 8), [Rights::None; 8], "the other view is none of the guest's");
        assert_eq!(memory.read(Page(2)), [7; PAGE_SIZE]);
        // SAFETY: inside the guest view, which nobody else uses.
        unsafe { memory.guest_view().add(5 * PAGE_SIZE).write(1) };
        let mapped = memory.mapped(Page(4), 3);
        // Neighbours may have been mapped along with it.
        assert_eq!(mapped[1], Rights::Exclusive);
        memory.unmap(Page(4), 3).unwrap();
        assert_eq!(memory.mapped(Page(4), 3), [Rights::None; 3]);
    }
}
