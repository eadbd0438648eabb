//! Starting the nodes that live on this host, each in a process of its own.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Receiver};
use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::event::ProcessEnd;
use crate::terminal;
use machine::keys::{KeyFile, NodeKey};

/// How long the last words of an ended process are waited for, should somebody else hold its stderr open.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// The longest line taken from a node's stderr in one piece, in bytes.
const MAX_LINE: usize = 16 << 10;

/// Starts node processes. Tests put threads in their place.
pub trait Spawner {
    /// Starts the process of node `name`, which is to join at `join` with `key`.
    ///
    /// # Errors
    /// What the system says.
    fn spawn(&mut self, name: &str, join: SocketAddr, key: &NodeKey) -> io::Result<Arc<dyn NodeProcess>>;
}

/// A running, or ended, node process.
pub trait NodeProcess: Send + Sync {
    /// Waits until it has ended. May be called again, and while another thread kills it.
    fn wait(&self) -> ProcessEnd;

    /// Its process id, for messages; not to be signalled, it may have ended.
    fn id(&self) -> u32;

    /// Ends it at once. Does nothing once it has ended.
    fn kill(&self);
}

/// Starts `gestalt node` processes.
///
/// The kernel kills them when the *thread* that started them ends, so start them from one that lives as
/// long as the machine.
#[derive(Debug)]
pub struct ProcessSpawner {
    program: PathBuf,
    arguments: Vec<String>,
}

impl ProcessSpawner {
    /// Runs `program node --join .. --name .. --key -` with `arguments` behind.
    pub fn new(program: PathBuf, arguments: Vec<String>) -> ProcessSpawner {
        ProcessSpawner { program, arguments }
    }
}

impl Spawner for ProcessSpawner {
    fn spawn(&mut self, name: &str, join: SocketAddr, key: &NodeKey) -> io::Result<Arc<dyn NodeProcess>> {
        let mut command = Command::new(&self.program);
        command
            .args(["node", "--join", &join.to_string(), "--name", name, "--key", "-"])
            .args(&self.arguments);
        // Through a pipe: neither command lines nor environments are secret.
        start(command, name, KeyFile::Node(key.clone()).text().as_bytes())
    }
}

/// Starts a process that ends with the calling thread; lines of its stderr come out of ours as `[name] line`.
/// It finds `input`, at most a page, on its standard input.
///
/// # Errors
/// What the system says.
pub fn start(mut command: Command, name: &str, input: &[u8]) -> io::Result<Arc<dyn NodeProcess>> {
    let parent = std::process::id();
    // A group of its own: Ctrl-C at the terminal is for the coordinator, which ends the nodes in order.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe system calls; it
    // touches no memory but its own copy of `parent`.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // The parent may have died before the line above.
            if std::os::unix::process::parent_id() != parent {
                return Err(io::Error::from(Errno::ESRCH));
            }
            // The coordinator blocks the signals that it waits for; nodes do not.
            nix::sys::signal::SigSet::empty().thread_set_mask()?;
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A page fits into a pipe, so this does not wait; a child that is gone already says so by its end.
        let _ = stdin.write_all(input);
    }
    let pid = Pid::from_raw(child.id() as i32);
    let (closed, last_words) = channel::bounded(0);
    if let Some(stderr) = child.stderr.take() {
        let name = name.to_string();
        thread::Builder::new().name(format!("stderr-{name}")).spawn(move || {
            relay(stderr, &name);
            drop(closed);
        })?;
    }
    Ok(Arc::new(HostProcess { pid, child: Mutex::new(child), last_words }))
}

/// A child of this process.
struct HostProcess {
    pid: Pid,
    child: Mutex<Child>,
    /// Disconnected once all of its stderr has been relayed.
    last_words: Receiver<()>,
}

impl HostProcess {
    fn child(&self) -> MutexGuard<'_, Child> {
        base::lock(&self.child)
    }
}

impl NodeProcess for HostProcess {
    fn wait(&self) -> ProcessEnd {
        // Waits without reaping and without the lock: the pid stays ours, so a kill in between cannot hit
        // a stranger. Fails with ECHILD if it has been reaped, and then `wait` below knows the status.
        while waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
        let status = self.child().wait();
        // Its messages should stand above what is said about its end.
        let _ = self.last_words.recv_timeout(LAST_WORDS);
        end_of(status)
    }

    fn id(&self) -> u32 {
        self.pid.as_raw() as u32
    }

    fn kill(&self) {
        // Fails only if it has been reaped.
        let _ = self.child().kill();
    }
}

fn end_of(status: io::Result<ExitStatus>) -> ProcessEnd {
    let status = status.unwrap_or_else(|_| ExitStatus::from_raw(0x7f00));
    match (status.signal(), status.code()) {
        (Some(signal), _) => ProcessEnd::Signal(signal),
        (None, code) => ProcessEnd::Code(code.unwrap_or(127)),
    }
}

fn relay(stderr: ChildStderr, name: &str) {
    let mut reader = BufReader::with_capacity(MAX_LINE, stderr);
    loop {
        let (used, done) = match reader.fill_buf() {
            Ok(bytes) if !bytes.is_empty() => match bytes.iter().position(|byte| *byte == b'\n') {
                Some(end) => (end + 1, true),
                // Part of a line: wait for the rest unless the buffer is full or the process has ended.
                None => (bytes.len(), false),
            },
            _ => return,
        };
        let mut line = reader.buffer()[..used].to_vec();
        reader.consume(used);
        while !done && line.last() != Some(&b'\n') && line.len() < MAX_LINE {
            match reader.fill_buf() {
                Ok(bytes) if !bytes.is_empty() => {
                    let more =
                        bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| end + 1);
                    line.extend_from_slice(&bytes[..more]);
                    reader.consume(more);
                }
                _ => break,
            }
        }
        let text = String::from_utf8_lossy(&line);
        terminal::say(&format!("[{name}] {}", text.trim_end_matches(['\n', '\r'])));
    }
}
