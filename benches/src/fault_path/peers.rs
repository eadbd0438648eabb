//! Nodes as processes, and as threads of this one.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::mpsc;

use anyhow::{Context, Result, bail};
use fabric::sim::SimTransport;

use super::command::{Command, Reply};
use super::worker::Worker;

/// The argument with which the bench starts itself as a node.
pub const NODE: &str = "--node";

/// A node of a cell.
pub enum Peer {
    /// In the calling thread.
    Here(Box<Worker>),
    /// A thread.
    Thread(mpsc::Sender<Command>, mpsc::Receiver<Reply>, Option<std::thread::JoinHandle<()>>),
    /// A process.
    Process(Box<Process>),
}

/// A process that obeys.
pub struct Process {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Peer {
    /// A thread.
    pub fn thread(transport: SimTransport) -> Peer {
        let (commands, inbox) = mpsc::channel::<Command>();
        let (outbox, replies) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut worker = Worker::new(Some(transport));
            for command in inbox {
                let quit = matches!(command, Command::Quit);
                if outbox.send(worker.obey(command)).is_err() || quit {
                    break;
                }
            }
        });
        Peer::Thread(commands, replies, Some(thread))
    }

    /// A process of this program.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn process() -> Result<Peer> {
        let mut child = std::process::Command::new(std::env::current_exe()?)
            .arg(NODE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start this program again")?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (to, from) = to.zip(from).context("a pipe is missing")?;
        Ok(Peer::Process(Box::new(Process { child, to, from: BufReader::new(from) })))
    }

    /// Tells the node something without waiting for its answer, which [`Peer::finish`] gets. Not for a node
    /// in the calling thread.
    ///
    /// # Errors
    /// The node is gone.
    pub fn begin(&mut self, command: &Command) -> Result<()> {
        match self {
            Peer::Here(_) => bail!("a node in this thread cannot work while this thread does"),
            Peer::Thread(commands, ..) => Ok(commands.send(command.clone())?),
            Peer::Process(process) => {
                let line = serde_json::to_string(command)? + "\n";
                process.to.write_all(line.as_bytes()).context("a node's process is gone")?;
                Ok(process.to.flush()?)
            }
        }
    }

    /// The answer to what was begun.
    ///
    /// # Errors
    /// What the node says, or it is gone.
    pub fn finish(&mut self) -> Result<Reply> {
        let reply = match self {
            Peer::Here(_) => bail!("nothing was begun"),
            Peer::Thread(_, replies, _) => replies.recv().context("a node's thread is gone")?,
            Peer::Process(process) => {
                let mut line = String::new();
                process.from.read_line(&mut line)?;
                serde_json::from_str(&line).context("a node's process is gone")?
            }
        };
        checked(reply)
    }

    /// Tells the node something and waits for its answer.
    ///
    /// # Errors
    /// What the node says, or it is gone.
    pub fn call(&mut self, command: Command) -> Result<Reply> {
        if let Peer::Here(worker) = self {
            return checked(worker.obey(command));
        }
        self.begin(&command)?;
        self.finish()
    }
}

fn checked(reply: Reply) -> Result<Reply> {
    match reply {
        Reply::Failed(why) => bail!("{why}"),
        reply => Ok(reply),
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        match self {
            Peer::Here(_) => {}
            Peer::Thread(commands, _, thread) => {
                let _ = commands.send(Command::Quit);
                if let Some(thread) = thread.take() {
                    let _ = thread.join();
                }
            }
            Peer::Process(process) => {
                let _ = process.child.kill();
                let _ = process.child.wait();
            }
        }
    }
}

/// What the program does when it is started as a node: obeys until its standard input ends.
///
/// # Errors
/// The other end of its standard output is gone.
pub fn obey() -> Result<()> {
    let mut worker = Worker::new(None);
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let reply = match serde_json::from_str(&line?) {
            Ok(command) => worker.obey(command),
            Err(error) => Reply::Failed(format!("not a command: {error}")),
        };
        serde_json::to_writer(&mut out, &reply)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(())
}
