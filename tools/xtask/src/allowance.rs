//! A command that may use so much CPU time: on shared cores seconds of the clock say little about how much
//! was done.

use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use testbed::exec;

/// How often the command's CPU time is looked at.
const EVERY: Duration = Duration::from_millis(50);

/// What a command may use.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// CPU time of all its threads together; then it is sent `stop`.
    pub cpu: Duration,
    /// Time by the clock; then it is killed.
    pub wall: Duration,
    /// What makes it end in order.
    pub stop: Signal,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// Whether it had to be killed, because it did not end within its time by the clock.
    pub killed: bool,
    /// What it wrote to its standard error.
    pub said: String,
    /// CPU time that it used, of all its threads; to a hundredth of a second.
    pub cpu: Duration,
    /// Time by the clock that it took.
    pub wall: Duration,
}

/// Runs a command until it ends, or has used what it may. Its standard output is not read.
///
/// # Errors
/// It cannot be started, or not be looked at.
pub fn run(command: &mut Command, allowance: Allowance) -> Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let started = Instant::now();
    let mut child = exec::tether(command.stdout(Stdio::null()).stderr(Stdio::piped()))
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    let mut stderr = child.stderr.take().expect("it was asked for");
    let (whole, ended) = channel();
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        let read = stderr.read_to_end(&mut said);
        // Nobody listens any more to a command that is killed.
        let _ = whole.send(read.map(|_| said));
    });
    let (mut stopped, mut killed) = (false, false);
    let said = loop {
        match ended.recv_timeout(EVERY) {
            Ok(said) => break said.with_context(|| format!("reading what {name} says"))?,
            Err(RecvTimeoutError::Disconnected) => bail!("nobody reads what {name} says"),
            Err(RecvTimeoutError::Timeout) => (),
        }
        if !stopped && cpu_time(child.id())? >= allowance.cpu {
            stopped = true;
            // It is not reaped yet: the number is still its own.
            kill(Pid::from_raw(child.id() as i32), allowance.stop)
                .with_context(|| format!("stopping {name}"))?;
        }
        if !killed && started.elapsed() >= allowance.wall {
            killed = true;
            child.kill().with_context(|| format!("killing {name}"))?;
        }
    };
    // Dead or about to be, and still there until it is waited for.
    let cpu = cpu_time(child.id())?;
    let status = child.wait().with_context(|| format!("waiting for {name}"))?;
    let wall = started.elapsed();
    reader.join().expect("the reader does not panic");
    Ok(Ended { status, killed, said: String::from_utf8_lossy(&said).into_owned(), cpu, wall })
}

/// The CPU time that all threads of a process have used so far (proc(5), `/proc/pid/stat`).
fn cpu_time(process: u32) -> Result<Duration> {
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("this system does not say how long a tick is")?;
    let ticks = ticks(&stat).with_context(|| format!("{path} does not say how much CPU time was used"))?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Fields 14 and 15, user and system time. The second one, the name in parentheses, may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    next()?.checked_add(next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn allowance(cpu_millis: u64, wall_seconds: u64) -> Allowance {
        let (cpu, wall) = (Duration::from_millis(cpu_millis), Duration::from_secs(wall_seconds));
        Allowance { cpu, wall, stop: Signal::SIGUSR1 }
    }

    #[test]
    fn a_busy_command_is_stopped_in_order_when_it_has_used_its_cpu_time() {
        let script = "trap 'echo stopped >&2; exit 7' USR1; while :; do :; done";
        let ended = run(&mut shell(script), allowance(200, 600)).unwrap();
        assert_eq!(ended.status.code(), Some(7));
        assert_eq!(ended.said, "stopped\n");
        assert!(ended.cpu >= Duration::from_millis(200), "{ended:?}");
        assert!(ended.wall >= ended.cpu - Duration::from_millis(20), "one thread: {ended:?}");
    }

    #[test]
    fn time_asleep_is_not_cpu_time() {
        let ended = run(&mut shell("sleep 0.4; echo done >&2"), allowance(300, 600)).unwrap();
        assert!(ended.status.success() && !ended.killed && ended.said == "done\n", "{ended:?}");
        assert!(ended.wall >= Duration::from_millis(400), "{ended:?}");
    }

    #[test]
    fn a_command_that_uses_no_cpu_time_is_killed_in_the_end() {
        let ended = run(&mut shell("echo begun >&2; exec sleep 600"), allowance(1000, 1)).unwrap();
        assert!(ended.killed && !ended.status.success(), "{ended:?}");
        assert!(ended.cpu < Duration::from_millis(500), "{ended:?}");
    }

    #[test]
    fn user_and_system_time_are_found_behind_any_name() {
        let stat = "7 (a) 1 (b) R 1 7 7 0 -1 4194304 98 0 0 0 25 17 3 4 20 0 1 0 100 2310144 200";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("7 (sh) R 1"), None);
    }
}
