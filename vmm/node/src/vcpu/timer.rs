//! The local APIC timer's alarm: a POSIX timer that kicks its own vCPU thread.

use std::io;
use std::mem::MaybeUninit;

use super::signal;

/// A timer of the calling thread. Its signal is the kick, which [`signal::wait`] tells apart.
pub(super) struct Timer {
    id: libc::timer_t,
}

impl Timer {
    /// Makes one for the calling thread, standing still.
    pub(super) fn new() -> io::Result<Timer> {
        let mut id = MaybeUninit::<libc::timer_t>::uninit();
        // SAFETY: a zeroed sigevent is valid; the kernel reads it and writes the id.
        let result = unsafe {
            let mut event: libc::sigevent = MaybeUninit::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal::KICK;
            event.sigev_notify_thread_id = base::thread::id();
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, id.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: timer_create succeeded and so wrote the id.
        Ok(Timer { id: unsafe { id.assume_init() } })
    }

    /// Fires once, `ns` nanoseconds from now (at once for 0).
    pub(super) fn arm(&self, ns: u64) -> io::Result<()> {
        // A zero value would disarm.
        let ns = ns.max(1);
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec {
                tv_sec: (ns / 1_000_000_000) as libc::time_t,
                tv_nsec: (ns % 1_000_000_000) as libc::c_long,
            },
        };
        // SAFETY: the timer exists until drop; the kernel reads the setting.
        match unsafe { libc::timer_settime(self.id, 0, &setting, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and not used afterwards.
        unsafe { libc::timer_delete(self.id) };
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_timer_wakes_its_own_thread_and_not_before_its_time() {
        signal::install_handler().unwrap();
        std::thread::spawn(|| {
            signal::block_all().unwrap();
            let timer = Timer::new().unwrap();
            let start = Instant::now();
            timer.arm(20_000_000).unwrap();
            assert_eq!(signal::wait(Duration::from_secs(60)), signal::Woken::Timer);
            assert!(start.elapsed() >= Duration::from_millis(20));
            timer.arm(0).unwrap();
            assert_eq!(signal::wait(Duration::from_secs(60)), signal::Woken::Timer);
        })
        .join()
        .unwrap();
    }
}
