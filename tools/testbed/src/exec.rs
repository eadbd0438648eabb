//! Child processes that cannot outlive this one.
//!
//! Every child gets `PR_SET_PDEATHSIG`, so that it dies even when this process is killed with SIGKILL and no
//! destructor runs. The kernel sends that signal when the *thread* that forked ends, not the process:
//! children that live long are therefore forked by one thread that never ends ([`spawn_tethered`]).

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result, bail};

use crate::progress::Step;

/// Lines of a failed command's output that its error carries.
const ERROR_LINES: usize = 20;

/// Makes the kernel kill the child with SIGKILL when the forking thread ends.
pub fn tether(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    // SAFETY: prctl, getppid and building an io::Error from a code are async-signal-safe and allocate
    // nothing.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before prctl: then no signal will ever come.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        })
    }
}

type SpawnJob = Box<dyn FnOnce() + Send>;

/// Starts a long-lived child that dies with this process, whatever thread asks for it.
///
/// # Errors
/// Those of `Command::spawn`.
pub fn spawn_tethered(mut command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<Mutex<Sender<SpawnJob>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (sender, jobs) = channel::<SpawnJob>();
        std::thread::Builder::new()
            .name("child-keeper".into())
            .spawn(move || jobs.into_iter().for_each(|job| job()))
            .expect("a thread can be started");
        Mutex::new(sender)
    });
    let (reply, answer) = channel();
    tether(&mut command);
    let job: SpawnJob = Box::new(move || drop(reply.send(command.spawn())));
    keeper.lock().expect("no holder panics").send(job).expect("the keeper never ends");
    answer.recv().expect("the keeper answers every job")
}

/// Runs a command to its end, shows its lines on `step`, and returns what it printed (stdout and stderr
/// together).
///
/// # Errors
/// The command cannot be started, or fails: then the error carries its last lines.
pub fn run(command: &mut Command, step: Option<&Step>) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (reader, writer) = io::pipe().context("making a pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = tether(command)
        .spawn()
        .with_context(|| format!("cannot start `{name}`: is the package that has it installed?"))?;
    // The Command holds the pipe's writing ends: without this the reader below would never see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = String::new();
    let mut last = VecDeque::new();
    let mut lines = BufReader::new(reader);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if let Some(step) = step {
            step.note(text);
        }
        if last.len() == ERROR_LINES {
            last.pop_front();
        }
        last.push_back(text.to_owned());
        output.push_str(text);
        output.push('\n');
        line.clear();
    }
    let status = child.wait()?;
    if !status.success() {
        let said = last.into_iter().map(|line| format!("\n  {line}")).collect::<String>();
        bail!("`{}` failed ({}); it said last:{said}", shown(command), describe(status));
    }
    Ok(output)
}

/// The command as a person would type it, for messages.
pub fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended in an unknown way".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_a_command_is_returned() {
        assert_eq!(run(Command::new("sh").args(["-c", "echo a; echo b >&2"]), None).unwrap(), "a\nb\n");
    }

    #[test]
    fn a_failure_carries_the_last_words() {
        let error = run(Command::new("sh").args(["-c", "echo the reason; exit 3"]), None).unwrap_err();
        let text = format!("{error}");
        assert!(text.contains("the reason") && text.contains("exit code 3"), "{text}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("no-such-program-here"), None).unwrap_err();
        assert!(format!("{error}").contains("no-such-program-here"));
    }

    /// Set in the process that [`a_tethered_child_dies_with_a_killed_parent`] kills.
    const VICTIM: &str = "GESTALT_TEST_VICTIM";

    #[test]
    fn a_tethered_child_dies_with_a_killed_parent() {
        if std::env::var_os(VICTIM).is_some() {
            let mut command = Command::new("sleep");
            command.arg("600").stdout(Stdio::null());
            println!("child {}", spawn_tethered(command).unwrap().id());
            std::thread::sleep(std::time::Duration::from_secs(600));
        }
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", "exec::tests::a_tethered_child_dies_with_a_killed_parent", "--nocapture"]);
        let mut victim =
            victim.env(VICTIM, "1").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let child =
            lines.map_while(Result::ok).find_map(|line| line.split("child ").nth(1)?.parse::<i32>().ok());
        // SAFETY: pidfd_open takes two numbers and returns a descriptor that nobody else owns.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.expect("the victim tells"), 0) };
        assert!(pidfd >= 0, "{}", io::Error::last_os_error());
        victim.kill().unwrap();
        victim.wait().unwrap();
        let mut ended = libc::pollfd { fd: pidfd as i32, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd is passed, and it lives until the call returns.
        assert_eq!(unsafe { libc::poll(&mut ended, 1, 30_000) }, 1, "the child still runs");
        // SAFETY: the descriptor is ours and not used again.
        unsafe { libc::close(pidfd as i32) };
    }

    #[test]
    fn a_tethered_child_outlives_the_thread_that_asked_for_it() {
        let mut child = std::thread::spawn(|| {
            let mut command = Command::new("cat");
            command.stdin(Stdio::piped()).stdout(Stdio::null());
            spawn_tethered(command).unwrap()
        })
        .join()
        .unwrap();
        // `cat` ends by itself, with code 0, only if it was alive to see its input close.
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
