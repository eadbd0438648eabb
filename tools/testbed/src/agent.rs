//! The agent: starts jobs on a host and passes their input and output on.
//!
//! On an emulated host it is the `testbed` binary itself, on the other end of a virtio-serial port. For jobs
//! on this machine the same code runs on a thread, on the other end of a socket pair
//! ([`crate::host::Host::local`]).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::proto::{self, Message, Spawn};

/// How long output may still trickle in after a job's own end, from children that it left running.
const LATE_OUTPUT: Duration = Duration::from_secs(2);

type Writer = Arc<Mutex<Box<dyn Write + Send>>>;

/// A running job as the reader of requests knows it.
struct Job {
    /// Input goes through a thread of its own, so that a job that does not read stalls nobody else.
    input: Sender<Vec<u8>>,
    group: Pid,
}

/// Serves one testbed until it asks for shutdown or its stream ends; then kills the jobs that are left.
///
/// # Errors
/// The stream breaks or carries garbage.
pub fn serve(mut reader: impl Read, writer: impl Write + Send + 'static) -> io::Result<()> {
    let writer: Writer = Arc::new(Mutex::new(Box::new(writer)));
    let jobs: Arc<Mutex<HashMap<u32, Job>>> = Arc::default();
    send(&writer, 0, &Message::Hello);
    let end = loop {
        let (id, message) = match proto::read(&mut reader) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
            Err(error) => break Err(error),
        };
        match message {
            Message::Spawn(spawn) => {
                if let Err(error) = start(id, &spawn, &writer, &jobs) {
                    let program = spawn.argv.first().map_or("", String::as_str);
                    send(&writer, id, &Message::Failed(format!("cannot start `{program}`: {error}")));
                }
            }
            // A job may be gone by the time that input or a signal for it arrives.
            Message::Stdin(bytes) => with(&jobs, id, |job| drop(job.input.send(bytes))),
            Message::StdinEnd => with(&jobs, id, |job| job.input = channel().0),
            Message::Signal(number) => with(&jobs, id, |job| {
                if let Ok(signal) = Signal::try_from(number) {
                    let _ = killpg(job.group, signal);
                }
            }),
            Message::Shutdown => break Ok(()),
            _ => break Err(io::Error::new(io::ErrorKind::InvalidData, "a message that only agents send")),
        }
    };
    for job in jobs.lock().expect("no holder panics").values() {
        let _ = killpg(job.group, Signal::SIGKILL);
    }
    end
}

fn with(jobs: &Mutex<HashMap<u32, Job>>, id: u32, act: impl FnOnce(&mut Job)) {
    if let Some(job) = jobs.lock().expect("no holder panics").get_mut(&id) {
        act(job);
    }
}

/// Sends to the testbed. If it is gone, the reader of requests notices and ends everything.
fn send(writer: &Writer, job: u32, message: &Message) {
    let _ = proto::write(&mut *writer.lock().expect("no holder panics"), job, message);
}

fn start(id: u32, spawn: &Spawn, writer: &Writer, jobs: &Arc<Mutex<HashMap<u32, Job>>>) -> io::Result<()> {
    let (program, args) = spawn
        .argv
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
    let mut command = Command::new(program);
    command.args(args).envs(spawn.env.iter().cloned());
    let (mut child, input, outputs) = match spawn.terminal {
        None => on_pipes(&mut command)?,
        Some(size) => on_terminal(&mut command, size)?,
    };
    let (finished, pumps) = channel::<()>();
    for (output, is_error) in outputs {
        let (writer, finished) = (writer.clone(), finished.clone());
        std::thread::spawn(move || {
            pump(output, |bytes| {
                let message = if is_error { Message::Stderr(bytes) } else { Message::Stdout(bytes) };
                send(&writer, id, &message);
            });
            drop(finished);
        });
    }
    drop(finished);
    let (sender, receiver) = channel::<Vec<u8>>();
    std::thread::spawn(move || {
        let mut input = input;
        for bytes in receiver {
            if input.write_all(&bytes).is_err() {
                break;
            }
        }
        input.end();
    });
    let group = Pid::from_raw(child.id() as i32);
    jobs.lock().expect("no holder panics").insert(id, Job { input: sender, group });
    let (writer, jobs) = (writer.clone(), jobs.clone());
    std::thread::spawn(move || {
        let code = child.wait().map_or(-1, exit_code);
        // All output first: the channel closes when the pumps are through. But a grandchild that keeps the
        // pipe open must not hold the answer back.
        let _ = pumps.recv_timeout(LATE_OUTPUT);
        jobs.lock().expect("no holder panics").remove(&id);
        send(&writer, id, &Message::Exit(code));
    });
    Ok(())
}

/// Where a job's input goes.
enum Input {
    Pipe(Option<ChildStdin>),
    Terminal(File),
}

impl Write for Input {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(Some(pipe)) => pipe.write(bytes),
            Self::Pipe(None) => Err(io::ErrorKind::BrokenPipe.into()),
            Self::Terminal(terminal) => terminal.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Input {
    /// Tells the job that nothing more comes: a closed pipe, or the terminal's end-of-file character.
    fn end(&mut self) {
        match self {
            Self::Pipe(pipe) => drop(pipe.take()),
            Self::Terminal(terminal) => drop(terminal.write_all(&[4])),
        }
    }
}

type Output = (Box<dyn Read + Send>, bool);

fn on_pipes(command: &mut Command) -> io::Result<(Child, Input, Vec<Output>)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn_in_session(command, false)?;
    let input = Input::Pipe(child.stdin.take());
    let mut outputs: Vec<Output> = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        outputs.push((Box::new(stdout), false));
    }
    if let Some(stderr) = child.stderr.take() {
        outputs.push((Box::new(stderr), true));
    }
    Ok((child, input, outputs))
}

fn on_terminal(
    command: &mut Command,
    (rows, columns): (u16, u16),
) -> io::Result<(Child, Input, Vec<Output>)> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pair = openpty(Some(&size), None)?;
    let copy = |fd: &OwnedFd| fd.try_clone();
    command.stdin(copy(&pair.slave)?).stdout(copy(&pair.slave)?).stderr(pair.slave);
    let child = spawn_in_session(command, true)?;
    let master = File::from(pair.master);
    let output: Output = (Box::new(master.try_clone()?), false);
    Ok((child, Input::Terminal(master), vec![output]))
}

/// Starts the job in a session, and so a process group, of its own.
fn spawn_in_session(command: &mut Command, controlling_terminal: bool) -> io::Result<Child> {
    // SAFETY: setsid, ioctl and building an io::Error from a code are async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            if controlling_terminal && libc::ioctl(io::stdin().as_raw_fd(), libc::TIOCSCTTY, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    crate::exec::tether(command).spawn()
}

/// Passes on what `output` yields until it ends. A terminal ends with EIO.
fn pump(mut output: impl Read, mut pass: impl FnMut(Vec<u8>)) {
    let mut buffer = vec![0; proto::MAX_PAYLOAD];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => pass(buffer[..count].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The code that a shell would report.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
