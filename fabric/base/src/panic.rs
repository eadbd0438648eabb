//! The panic hook: a panic in any thread ends the process.
//!
//! A thread that is gone leaves its part of a machine standing still: a disk that answers nothing, a clock
//! that nobody corrects. So a panic ends the process, whichever thread it is in. This is done by the
//! process's panic hook and not where threads are started: so no thread can be forgotten, be it a
//! dependency's, and it makes no difference whether somebody catches the panic further up. Only a panic that
//! is carried on by `resume_unwind` passes by the hook; nobody does that here (a test of `vmm` sees to it).

use std::any::Any;
use std::panic::{PanicHookInfo, set_hook, take_hook};
use std::sync::atomic::{AtomicBool, Ordering};

/// Has `end` called by the first thread of this process that panics from now on, before it unwinds. `end`
/// gets a sentence about the panic, which the hook before this one has printed already. It may end the
/// process at once; on the main thread it must, because a process whose main thread is gone ends without
/// another word.
pub fn on_first_panic(end: impl Fn(&str) + Send + Sync + 'static) {
    let (before, first) = (take_hook(), AtomicBool::new(true));
    set_hook(Box::new(move |panic| {
        before(panic);
        if first.swap(false, Ordering::SeqCst) {
            end(&sentence(panic));
        }
    }));
}

fn sentence(panic: &PanicHookInfo) -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name");
    let place = panic.location().map_or_else(String::new, |place| format!(" at {place}"));
    let said = message(panic.payload());
    format!("a mistake in this program: its thread {name:?} panicked{place}: {said}; please report it")
}

fn message(payload: &dyn Any) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
