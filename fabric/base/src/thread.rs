//! The calling thread's number and priority.

use nix::libc;

/// The kernel's number of the calling thread, as `/proc` and `tgkill` know it.
pub fn id() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// Lets the calling thread run before ordinary ones: `SCHED_FIFO` at its lowest priority, or failing that a
/// better nice value. For threads that mostly sleep and on which vCPUs, here or on other nodes, wait; on a
/// host whose CPUs are all busy they would otherwise get their turn only after a time slice. Without the
/// right to do so everything works, slower. Returns whether it could.
pub fn make_urgent() -> bool {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: the call reads `param`, which outlives it; 0 is the calling thread. RESET_ON_FORK keeps threads
    // and processes that it may start ordinary.
    let rt = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &param) };
    // SAFETY: takes numbers only; on Linux 0 is the calling thread.
    rt == 0 || unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) } == 0
}
