//! The trial of userfaultfd, on one page, with the calls that the coherence engine depends on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use coherence::uffd::{Mode, Uffd};

/// How long one page fault may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// What the page holds.
const MARK: u64 = 0x6765_7374_616c_7421;

/// Touches a page that is in the file but not mapped, answers the minor fault by mapping it write-protected,
/// and sees that a write then raises a write-protection fault.
///
/// # Errors
/// A clause: what did not go as it must.
pub fn continue_protected() -> Result<(), String> {
    let memory = Arc::new(DualMemory::new(1).map_err(|error| format!("memory: {error}"))?);
    let uffd = Uffd::open()?;
    let mut bytes = [0; PAGE_SIZE];
    bytes[..8].copy_from_slice(&MARK.to_ne_bytes());
    // SAFETY: nobody has mapped or touched the page yet, and there is no other thread.
    unsafe { memory.fill(Page(0), Some(&bytes)) };
    let start = memory.guest_address(Page(0));
    uffd.register(start, PAGE_SIZE as u64, Mode::Home).map_err(|error| format!("registering: {error}"))?;
    let toucher = Toucher::start(memory)?;
    let result = answer(&uffd, start);
    // Whatever happened, the other thread must not wait forever: without the watch it takes the page as it
    // is.
    drop(uffd);
    let seen = toucher.finish();
    result?;
    if seen == Some(MARK) { Ok(()) } else { Err("the page did not hold what was written to it".into()) }
}

/// Answers the read's fault, then the write's.
fn answer(uffd: &Uffd, start: u64) -> Result<(), String> {
    let length = PAGE_SIZE as u64;
    let deadline = Instant::now() + PATIENCE;
    let fault = wait(uffd, deadline)?;
    if !fault.minor {
        return Err("touching a page that is in the file raised no minor fault".into());
    }
    uffd.map(start, length, true).map_err(|error| format!("UFFDIO_CONTINUE with MODE_WP: {error}"))?;
    let fault = wait(uffd, deadline)?;
    if !fault.write_protected {
        return Err("writing to the page raised no write-protection fault".into());
    }
    uffd.protect(start, length, false).map_err(|error| format!("UFFDIO_WRITEPROTECT: {error}"))
}

fn wait(uffd: &Uffd, deadline: Instant) -> Result<coherence::uffd::Fault, String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let faults = uffd.wait(left).map_err(|error| format!("reading a fault: {error}"))?;
    faults.first().copied().ok_or_else(|| "an expected fault did not come".into())
}

/// A thread that reads the page and then writes it.
struct Toucher {
    seen: Arc<AtomicU64>,
    thread: thread::JoinHandle<()>,
}

impl Toucher {
    fn start(memory: Arc<DualMemory>) -> Result<Toucher, String> {
        let seen = Arc::new(AtomicU64::new(0));
        let out = seen.clone();
        let touch = move || {
            let page = memory.guest_view().cast::<AtomicU64>();
            // SAFETY: the guest view is one page, aligned, and lives in `memory`, which this thread holds;
            // nobody else accesses it while the thread runs.
            let value = unsafe { &*page };
            out.store(value.load(Ordering::Relaxed), Ordering::Release);
            value.store(0, Ordering::Relaxed);
        };
        let thread = thread::Builder::new().name("trial".into()).spawn(touch).map_err(|e| e.to_string())?;
        Ok(Toucher { seen, thread })
    }

    /// What was read, once the thread has ended.
    fn finish(self) -> Option<u64> {
        self.thread.join().ok()?;
        Some(self.seen.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_mapped_write_protected_where_userfaultfd_is_allowed() {
        if let Err(why) = Uffd::open() {
            eprintln!("skipped: {why}");
            return;
        }
        assert_eq!(continue_protected(), Ok(()));
    }
}
