//! Lent buffers: a thread lends its bytes to other threads, and waits until it has them back.
//!
//! A [`Lender`] that is dropped waits until all is dropped that it has lent: so others reach the thread's own
//! buffer, and nothing is copied for them.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;

use crate::page::PAGE_SIZE;

/// Who lends. Dropping it waits.
pub struct Lender {
    /// What has been lent has this, too.
    lent: Option<Arc<WaitGroup>>,
    all_back: WaitGroup,
}

/// A page's bytes, which nobody writes until this is dropped.
#[derive(Clone)]
pub struct Lent {
    bytes: NonNull<[u8; PAGE_SIZE]>,
    _lent: Option<Arc<WaitGroup>>,
}

/// Bytes to be written, which nobody else has until this is dropped.
pub struct LentMut {
    bytes: NonNull<[u8]>,
    _lent: Option<Arc<WaitGroup>>,
}

impl Lender {
    /// Has lent nothing.
    pub fn new() -> Lender {
        let all_back = WaitGroup::new();
        Lender { lent: Some(Arc::new(all_back.clone())), all_back }
    }

    /// Lends bytes to be read.
    ///
    /// # Safety
    /// The bytes must be borrowed until this lender is dropped, and it must be.
    pub unsafe fn lend(&self, bytes: &[u8; PAGE_SIZE]) -> Lent {
        Lent { bytes: bytes.into(), _lent: self.lent.clone() }
    }

    /// Lends bytes to be written.
    ///
    /// # Safety
    /// As [`Lender::lend`].
    pub unsafe fn lend_mut(&self, bytes: &mut [u8]) -> LentMut {
        LentMut { bytes: bytes.into(), _lent: self.lent.clone() }
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.lent = None;
        std::mem::take(&mut self.all_back).wait();
    }
}

// SAFETY: as a `&[u8; PAGE_SIZE]`, which it is by the contract of `Lender::lend`.
unsafe impl Send for Lent {}
// SAFETY: as a `&mut [u8]`, which it is by the contract of `Lender::lend_mut`.
unsafe impl Send for LentMut {}

impl Deref for Lent {
    type Target = [u8; PAGE_SIZE];

    fn deref(&self) -> &[u8; PAGE_SIZE] {
        // SAFETY: borrowed until the lender is gone, which waits for this value.
        unsafe { self.bytes.as_ref() }
    }
}

impl Deref for LentMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { self.bytes.as_ref() }
    }
}

impl DerefMut for LentMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this is the only value that has these bytes.
        unsafe { self.bytes.as_mut() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_lender_waits_until_it_has_all_back() {
        let (mut to, from) = ([0; 3], [7; PAGE_SIZE]);
        let lender = Lender::new();
        // SAFETY: both arrays live until the lender is dropped below.
        let (mut lent_mut, lent) = unsafe { (lender.lend_mut(&mut to), lender.lend(&from)) };
        let (begin, begun) = channel::<()>();
        let borrower = thread::spawn(move || {
            let again = lent.clone();
            drop(lent);
            // Until the lender is about to wait, or waits.
            begun.recv().unwrap();
            lent_mut.copy_from_slice(&again[..3]);
        });
        begin.send(()).unwrap();
        drop(lender);
        assert_eq!(to, [7; 3]);
        borrower.join().unwrap();
    }

    #[test]
    fn who_has_lent_nothing_does_not_wait() {
        drop(Lender::new());
    }
}
