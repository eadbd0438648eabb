//! The CPU and the priority of a thread that is measured.

use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The CPUs that this process may use.
pub fn cpus() -> Vec<usize> {
    match sched_getaffinity(Pid::from_raw(0)) {
        Ok(set) => (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)).collect(),
        Err(_) => vec![0],
    }
}

/// The CPU's model, as Linux calls it: ratios depend on it too.
pub fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let number = |name| field(name).unwrap_or_else(|| "?".into());
    let name = field("model name").unwrap_or_else(|| "an unknown CPU".into());
    format!(
        "{name}, family {} model {} stepping {}",
        number("cpu family"),
        number("model"),
        number("stepping")
    )
}

/// The CPUs of node `node` among `all`: each node has its own while there are enough, else they take turns.
pub fn share(all: &[usize], node: usize, nodes: usize) -> Vec<usize> {
    match all.len() / nodes.max(1) {
        0 => vec![all[node % all.len()]],
        each => all[node * each..(node + 1) * each].to_vec(),
    }
}

/// Keeps the calling thread, and those that it starts, on these CPUs. A host that refuses measures worse.
pub fn pin(cpus: &[usize]) {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        let _ = set.set(cpu);
    }
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// Lets the calling thread run before the engine's threads (`Some`: `SCHED_FIFO` with that priority; they
/// have 1), or like any other (`None`). Whether the host allowed it.
///
/// A thread that polls without end and the thread whose fault it answers would share a CPU on a small host;
/// this way the one that was woken gets it at once, as if it had one of its own.
pub fn realtime(priority: Option<i32>) -> bool {
    let policy = if priority.is_some() { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let param = libc::sched_param { sched_priority: priority.unwrap_or(0) };
    // SAFETY: the call reads `param`, which outlives it; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, policy, &param) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_share_cpus_only_if_there_are_too_few() {
        let all = [0, 1, 2, 3];
        assert_eq!(share(&all, 1, 2), [2, 3]);
        assert_eq!(share(&all, 2, 4), [2]);
        assert_eq!(share(&all, 8, 9), [0]);
    }
}
