//! The child: confines itself, looks into the disk, answers, ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use devices::virtio::block::{Qcow2Disk, is_qcow2};
use firmware::disk::source::Source;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::answer;
use super::wire::Head;

/// Address space: the largest kernel and initrds, each once more while it is put together, and room for
/// tables.
const ADDRESS_SPACE: u64 = 5 << 30;
/// CPU time in seconds.
const CPU_SECONDS: u64 = 60;

/// System calls that a search may make once it has begun; with anything else it is killed.
const ALLOWED: &[libc::c_long] = &[
    // The image and the answer.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_lseek,
    libc::SYS_fstat,
    // What std asks a descriptor with: there is no path that could be opened.
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fcntl,
    // An image that is let go gives its lock back.
    libc::SYS_flock,
    // The allocator.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Locks, the seeds of hash tables, time.
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    // A panic's message and its way out.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Looks into the disk on standard input, named `path`, and answers on standard output; `survey` asks for
/// what is on it instead of what it boots. The process's exit code.
pub fn run(path: &Path, survey: bool) -> u8 {
    let stdout = io::stdout();
    let mut pipe = io::BufWriter::with_capacity(1 << 20, stdout.lock());
    let (head, bodies) = look(path, survey).unwrap_or_else(|why| (Head::Refused(why), Vec::new()));
    let bodies: Vec<&[u8]> = bodies.iter().map(Vec::as_slice).collect();
    u8::from(answer(&mut pipe, &head, &bodies).and_then(|()| pipe.flush()).is_err())
}

fn look(path: &Path, survey: bool) -> Result<(Head, Vec<Vec<u8>>), String> {
    let image =
        io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(|error| error.to_string())?;
    confine().map_err(|why| format!("the process that looks into disks cannot confine itself: {why}"))?;
    let disk: Arc<dyn Source> = match is_qcow2(path) {
        true => Arc::new(Qcow2Disk::peek(image, path).map_err(|error| error.to_string())?),
        false => Arc::new(image),
    };
    if survey {
        let text = serde_json::to_vec(&firmware::disk::survey(disk)).map_err(|error| error.to_string())?;
        return Ok((Head::Survey { bytes: text.len() as u64 }, vec![text]));
    }
    let found = firmware::disk::find_on(disk, path).map_err(|error| error.to_string())?;
    let (kernel, initrd) = (found.kernel.len() as u64, found.initrd.len() as u64);
    let head =
        Head::Found { origin: found.origin, cmdline: found.cmdline, notes: found.notes, kernel, initrd };
    Ok((head, vec![found.kernel, found.initrd]))
}

/// Gives up everything that a search does not need. Namespaces are taken where the host lets a process have
/// them; the filter of system calls does not depend on them.
fn confine() -> Result<(), String> {
    let failed = |what: &str, error: nix::Error| format!("{what}: {error}");
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| failed("parent-death signal", error))?;
    prctl::set_no_new_privs().map_err(|error| failed("no new privileges", error))?;
    prctl::set_dumpable(false).map_err(|error| failed("dumpable", error))?;
    for (resource, limit) in [
        (Resource::RLIMIT_AS, ADDRESS_SPACE),
        (Resource::RLIMIT_CPU, CPU_SECONDS),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NOFILE, 16),
        (Resource::RLIMIT_CORE, 0),
    ] {
        setrlimit(resource, limit, limit).map_err(|error| failed("resource limits", error))?;
    }
    let user = CloneFlags::CLONE_NEWUSER;
    let others = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    // In a user namespace of its own, without a mapping, it is nobody. Not every host allows that.
    let _ = unshare(user | others).or_else(|_| unshare(others));
    let rules: BTreeMap<i64, Vec<_>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64);
    let program: Result<BpfProgram, _> = filter.and_then(TryInto::try_into);
    let program = program.map_err(|error| format!("system call filter: {error}"))?;
    seccompiler::apply_filter(&program).map_err(|error| format!("system call filter: {error}"))
}
