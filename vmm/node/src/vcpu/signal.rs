//! The kick signal: blocked in vCPU threads, let through only while they are in the guest or wait for it.

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::time::Duration;

/// The signal. Not a real-time one: those are queued and counted against a limit, at which `tgkill` fails and
/// a kick would be lost; of this one a second instance merges with the first.
pub const KICK: libc::c_int = libc::SIGUSR1;

/// Why [`wait`] returned.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Somebody kicked.
    Kick,
    /// The thread's [`super::timer::Timer`] fired.
    Timer,
    /// The time was up.
    Timeout,
}

extern "C" fn ignore(_: libc::c_int) {}

/// Makes the kick harmless to threads that do not block it. Repeated calls do nothing.
///
/// # Errors
/// What `sigaction` answers.
pub fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Option<i32>> = OnceLock::new();
    let failed = INSTALLED.get_or_init(|| {
        // SAFETY: a zeroed sigaction is valid (no flags but those set here, an empty mask), and the handler
        // does nothing, which is async-signal-safe.
        let result = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = ignore as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(KICK, &action, std::ptr::null_mut())
        };
        (result != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    });
    failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
}

/// Blocks in this thread every signal but those that report its own faults, and returns the mask that
/// KVM_RUN is to use: the same without [`KICK`] (bit n - 1: signal n).
///
/// # Errors
/// What `pthread_sigmask` answers.
pub fn block_all() -> io::Result<u64> {
    let faults = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT];
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises the set, and all signal numbers exist.
    let result = unsafe {
        libc::sigfillset(set.as_mut_ptr());
        for signal in faults {
            libc::sigdelset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    let open = faults.into_iter().chain([KICK]).fold(0u64, |bits, signal| bits | 1 << (signal - 1));
    Ok(!open)
}

/// Kicks a thread of this process. A thread that has ended is left alone.
pub fn send(thread: i32) {
    // SAFETY: tgkill touches no memory. The thread, should its id have been reused, is one of this process,
    // where the signal is blocked or ignored.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, KICK) };
}

/// Waits for a kick of this thread, at most `timeout`; zero only takes what is pending. Must be blocked
/// ([`block_all`]).
pub fn wait(timeout: Duration) -> Woken {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().min(1 << 30) as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `sigemptyset` initialises the set; a zeroed siginfo is valid and written by the kernel.
    let (signal, code) = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), KICK);
        let signal = libc::sigtimedwait(set.as_ptr(), info.as_mut_ptr(), &timeout);
        (signal, info.assume_init().si_code)
    };
    match (signal, code) {
        (KICK, libc::SI_TIMER) => Woken::Timer,
        (KICK, _) => Woken::Kick,
        // EAGAIN: the time is up. EINTR cannot be: all signals with handlers are blocked.
        _ => Woken::Timeout,
    }
}

/// Takes one pending kick, if there is one; true if it was the timer's.
pub fn take_pending() -> bool {
    wait(Duration::ZERO) == Woken::Timer
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_kick_before_the_wait_is_not_lost() {
        install_handler().unwrap();
        std::thread::spawn(|| {
            block_all().unwrap();
            send(base::thread::id());
            let start = Instant::now();
            assert_eq!(wait(Duration::from_secs(60)), Woken::Kick);
            assert!(start.elapsed() < Duration::from_secs(30));
            assert_eq!(wait(Duration::ZERO), Woken::Timeout);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_kick_ends_the_wait_of_another_thread() {
        install_handler().unwrap();
        let (tell, id) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            block_all().unwrap();
            tell.send(base::thread::id()).unwrap();
            wait(Duration::from_secs(60))
        });
        send(id.recv().unwrap());
        assert_eq!(waiter.join().unwrap(), Woken::Kick);
    }

    #[test]
    fn the_mask_for_the_guest_lets_only_kicks_and_faults_through() {
        let mask = std::thread::spawn(|| block_all().unwrap()).join().unwrap();
        assert_eq!(mask & 1 << (KICK - 1), 0);
        assert_ne!(mask & 1 << (libc::SIGTERM - 1), 0);
        assert_eq!(mask & 1 << (libc::SIGSEGV - 1), 0);
    }
}
