//! The base: the few things that every crate of a node uses, whatever it is about.
//!
//! - [`trace`]: the bounded in-memory trace that is dumped when something goes wrong. It knows no event by
//!   name: each crate declares its own with [`events!`].
//! - [`thread`]: the calling thread's number and priority.
//! - [`mod@panic`]: what ends a process of which a thread panics.
//! - [`lock`]: a mutex's guard, whether or not a thread panicked under it.

pub mod panic;
pub mod thread;
pub mod trace;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The guard of `mutex`, also after a thread has panicked under it. For data that is whole between any two
/// statements that change it, so that a panic leaves nothing half done.
#[inline]
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_outlives_a_panic_under_it() {
        let mutex = Mutex::new(1);
        let panicked = std::panic::catch_unwind(|| {
            *lock(&mutex) = 2;
            let _held = lock(&mutex);
            panic!("under the lock");
        });
        assert!(panicked.is_err() && mutex.is_poisoned());
        assert_eq!(*lock(&mutex), 2);
    }
}
