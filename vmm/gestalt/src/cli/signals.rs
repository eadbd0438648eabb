//! Signals that ask `gestalt run` to end.

use std::io;
use std::thread;

use crossbeam::channel::Sender;
use nix::sys::signal::{SigSet, Signal};

use crate::coordinator::event::Interrupt;

fn ending() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// Keeps the signals from ending the process. Threads inherit this: call it before starting any.
///
/// # Errors
/// What the system says.
pub fn block() -> io::Result<()> {
    Ok(ending().thread_block()?)
}

/// From now on they end the process at once: nothing is left but to write to a terminal that may be slow.
/// Does something only in a thread that called [`block`].
pub fn release() {
    // Fails only for a wrong set.
    let _ = ending().thread_unblock();
}

/// Turns the blocked signals into interrupts, for as long as the process lives.
///
/// # Errors
/// What the system says.
pub fn watch(interrupts: Sender<Interrupt>) -> io::Result<()> {
    thread::Builder::new().name("signals".into()).spawn(move || {
        while let Ok(signal) = ending().wait() {
            if interrupts.send(Interrupt::Signal(signal as i32)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}
