//! A host that jobs run on: an emulated one, or this machine itself.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::agent;
use crate::proto::{self, MAX_PAYLOAD, Message, Spawn};

/// How long a host may take to accept a message.
const WRITE_LIMIT: Duration = Duration::from_secs(60);

/// What a job said, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of its standard output, or of its terminal.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It ended, with this code (128 + signal when killed). Nothing follows.
    Exit(i32),
}

/// How long one file may take to or from a host that has the stage's files as copies: it may be a slow serial
/// line.
const COPY_LIMIT: Duration = Duration::from_secs(600);

/// The testbed's end of an agent's stream.
struct AgentConnection {
    /// The host's name.
    name: String,
    stream: UnixStream,
    write_lock: Mutex<()>,
    jobs: Mutex<HashMap<u32, Sender<Message>>>,
    next_job: AtomicU32,
}

impl AgentConnection {
    fn send(&self, job: u32, message: &Message) -> io::Result<()> {
        let _one_at_a_time = self.write_lock.lock().expect("no holder panics");
        proto::write(&mut &self.stream, job, message)
    }

    /// Passes messages to their jobs until the stream ends; then every job's channel closes.
    fn dispatch(&self) {
        while let Ok((job, message)) = proto::read(&mut &self.stream) {
            let mut jobs = self.jobs.lock().expect("no holder panics");
            let last = matches!(message, Message::Exit(_) | Message::Failed(_));
            if let Some(sender) = jobs.get(&job) {
                // A job whose handle was dropped has nobody to tell.
                let _ = sender.send(message);
            }
            if last {
                jobs.remove(&job);
            }
        }
        self.jobs.lock().expect("no holder panics").clear();
    }

    fn spawn(self: &Arc<Self>, spawn: Spawn) -> Result<Job> {
        let id = self.next_job.fetch_add(1, Ordering::Relaxed);
        let (sender, messages) = channel();
        self.jobs.lock().expect("no holder panics").insert(id, sender);
        self.send(id, &Message::Spawn(spawn))
            .with_context(|| format!("{} is gone: no job can be started on it", self.name))?;
        Ok(Job { id, link: self.clone(), messages })
    }

    /// Runs a shell script with `input` as its standard input: [`Host::run`].
    fn run(
        self: &Arc<Self>,
        script: &str,
        input: &[u8],
        limit: Duration,
        mut see: impl FnMut(&Event),
    ) -> Result<i32> {
        let job = self.spawn(shell(script))?;
        job.input().send(input)?;
        job.close_input();
        let deadline = Instant::now() + limit;
        loop {
            let Some(event) = job.next_until(deadline)? else {
                job.signal(libc::SIGKILL);
                bail!("{}: not finished within {limit:?}, killed: {script}", self.name);
            };
            see(&event);
            if let Event::Exit(code) = event {
                return Ok(code);
            }
        }
    }

    /// Runs a shell script that must succeed: [`Host::output`].
    fn output(self: &Arc<Self>, script: &str, input: &[u8], limit: Duration) -> Result<Vec<u8>> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let code = self.run(script, input, limit, |event| match event {
            Event::Stdout(bytes) => stdout.extend(bytes),
            Event::Stderr(bytes) => stderr.extend(bytes),
            Event::Exit(_) => {}
        })?;
        if code != 0 {
            let said = String::from_utf8_lossy(&stderr);
            bail!("{}: exit code {code} of: {script}\n{}", self.name, said.trim_end());
        }
        Ok(stdout)
    }
}

/// A host that runs jobs.
pub struct Host {
    dir: PathBuf,
    bin: PathBuf,
    /// The stage as this machine sees it; `None` if the host has copies of its files instead.
    shared: Option<PathBuf>,
    link: Arc<AgentConnection>,
    hello: Receiver<Message>,
}

impl Host {
    /// Talks to an agent over `stream`. `dir` is where the host sees the stage ([`crate::stage::Stage`]),
    /// `bin` where it has the stage's programs. `shared` is the stage on this machine, or `None` if the host
    /// has copies of what was on it.
    ///
    /// # Errors
    /// None in practice.
    pub(crate) fn attach(
        name: String,
        dir: PathBuf,
        bin: PathBuf,
        shared: Option<PathBuf>,
        stream: UnixStream,
    ) -> Result<Self> {
        // A host that stopped reading must not stop us too.
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        let link = Arc::new(AgentConnection {
            name,
            stream,
            write_lock: Mutex::new(()),
            jobs: Mutex::default(),
            next_job: AtomicU32::new(1),
        });
        let (sender, hello) = channel();
        link.jobs.lock().expect("no holder panics").insert(0, sender);
        let reader = link.clone();
        std::thread::Builder::new().name(format!("{}-reader", link.name)).spawn(move || reader.dispatch())?;
        Ok(Self { dir, bin, shared, link, hello })
    }

    /// This machine itself as a host, with the stage at `dir`.
    ///
    /// # Errors
    /// No socket pair can be made.
    pub fn local(dir: &Path) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
        let writer = theirs.try_clone()?;
        std::thread::Builder::new().name("local-agent".into()).spawn(move || {
            if let Err(error) = agent::serve(theirs, writer) {
                eprintln!("the local agent stopped: {error}");
            }
        })?;
        let host =
            Self::attach("this machine".into(), dir.to_owned(), dir.join("bin"), Some(dir.to_owned()), ours)?;
        host.wait_ready(Duration::from_secs(10))?;
        Ok(host)
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// It does not within `limit`, or its stream ends.
    pub(crate) fn wait_ready(&self, limit: Duration) -> Result<()> {
        match self.hello.recv_timeout(limit) {
            Ok(Message::Hello) => Ok(()),
            Ok(other) => bail!("{}: its agent said {other:?} first", self.name()),
            Err(RecvTimeoutError::Timeout) => bail!("{} did not start within {limit:?}", self.name()),
            Err(RecvTimeoutError::Disconnected) => bail!("{} ended while it started", self.name()),
        }
    }

    /// The host's name, for messages.
    pub fn name(&self) -> &str {
        &self.link.name
    }

    /// The directory of the programs under test.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// Where jobs on this host find the stage: `guest/`, `share/`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts a job.
    ///
    /// # Errors
    /// The host is gone.
    pub fn spawn(&self, spawn: Spawn) -> Result<Job> {
        self.link.spawn(spawn)
    }

    /// Runs a shell script to its end and returns its exit code; `see` gets its output as it comes.
    ///
    /// # Errors
    /// The host is gone, or `limit` passes: then the script is killed.
    pub fn run(&self, script: &str, limit: Duration, see: impl FnMut(&Event)) -> Result<i32> {
        self.link.run(script, b"", limit, see)
    }

    /// Runs a shell script that must succeed and returns its standard output.
    ///
    /// # Errors
    /// Those of [`Host::run`], or an exit code other than 0: then the error carries the standard error.
    pub fn output(&self, script: &str, limit: Duration) -> Result<String> {
        let said = self.link.output(script, b"", limit)?;
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// A file of the stage, by its place on it, as this host has it.
    pub fn file(&self, place: &str) -> HostFile {
        HostFile {
            shared: self.shared.as_ref().map(|stage| stage.join(place)),
            path: self.dir.join(place),
            link: self.link.clone(),
        }
    }

    /// What this host's kernel and processes are doing, for the error of a test that hangs. Never fails: what
    /// cannot be found out is said instead.
    pub fn diagnosis(&self) -> String {
        const SCRIPT: &str = "uptime; ps -eLo pid,tid,psr,stat,pcpu,wchan:24,comm --sort=-pcpu | head -40; \
            for task in $(pgrep gestalt); do for thread in /proc/$task/task/*; do \
            echo \"$thread $(cat $thread/comm)\"; cat $thread/stack; done; done; dmesg | tail -15";
        let said = self.output(SCRIPT, Duration::from_secs(30)).unwrap_or_else(|error| format!("{error:#}"));
        format!("--- {} now\n{}", self.name(), said.trim_end())
    }

    /// Asks the agent to end, and with it an emulated host.
    pub(crate) fn ask_shutdown(&self) {
        // If it cannot be asked it is gone already.
        let _ = self.link.send(0, &Message::Shutdown);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.ask_shutdown();
    }
}

/// A file of the stage as one host has it.
pub struct HostFile {
    /// Where this machine sees the same file, if it does.
    shared: Option<PathBuf>,
    path: PathBuf,
    link: Arc<AgentConnection>,
}

impl HostFile {
    /// Where the host has it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes it, if only to the host's copy.
    ///
    /// # Errors
    /// The host is gone, or there is no room.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        if let Some(shared) = &self.shared {
            return std::fs::write(shared, bytes).with_context(|| format!("writing {}", shared.display()));
        }
        let script = format!("cat >'{}'", self.path.display());
        self.link.output(&script, bytes, COPY_LIMIT).map(drop)
    }

    /// What it holds; nothing if there is no such file.
    ///
    /// # Errors
    /// The host is gone.
    pub fn read(&self) -> Result<Vec<u8>> {
        if let Some(shared) = &self.shared {
            return Ok(std::fs::read(shared).unwrap_or_default());
        }
        let script = format!("[ ! -e '{0}' ] || cat '{0}'", self.path.display());
        self.link.output(&script, b"", COPY_LIMIT)
    }
}

/// A shell script as a job on pipes.
pub fn shell(script: &str) -> Spawn {
    Spawn { argv: vec!["/bin/sh".into(), "-c".into(), script.into()], ..Spawn::default() }
}

/// A job on a host. Dropped while it runs, it is killed.
pub struct Job {
    id: u32,
    link: Arc<AgentConnection>,
    messages: Receiver<Message>,
}

impl Job {
    /// The next event, or `None` when `deadline` passes first.
    ///
    /// # Errors
    /// The job could not be started, or the host is gone.
    pub fn next_until(&self, deadline: Instant) -> Result<Option<Event>> {
        match self.messages.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Message::Stdout(bytes)) => Ok(Some(Event::Stdout(bytes))),
            Ok(Message::Stderr(bytes)) => Ok(Some(Event::Stderr(bytes))),
            Ok(Message::Exit(code)) => Ok(Some(Event::Exit(code))),
            Ok(Message::Failed(why)) => bail!("{}: {why}", self.link.name),
            Ok(other) => bail!("{}: its agent sent {other:?} for a job", self.link.name),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("{} ended under a running job", self.link.name),
        }
    }

    /// A handle for a thread that feeds the job's input.
    pub fn input(&self) -> Input {
        Input { id: self.id, link: self.link.clone() }
    }

    /// Ends the job's standard input.
    pub fn close_input(&self) {
        self.input().end();
    }

    /// Sends a signal to the job's process group.
    pub fn signal(&self, signal: i32) {
        let _ = self.link.send(self.id, &Message::Signal(signal));
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Unknown to the agent when the job has ended: then it does nothing.
        self.signal(libc::SIGKILL);
    }
}

/// Writes to a job's standard input.
pub struct Input {
    id: u32,
    link: Arc<AgentConnection>,
}

impl Input {
    /// Sends bytes.
    ///
    /// # Errors
    /// The host is gone.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        bytes
            .chunks(MAX_PAYLOAD)
            .try_for_each(|chunk| self.link.send(self.id, &Message::Stdin(chunk.to_vec())))
    }

    /// Ends the job's standard input.
    pub fn end(&self) {
        // A host that is gone shows in next_until.
        let _ = self.link.send(self.id, &Message::StdinEnd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn host() -> Host {
        Host::local(Path::new("/")).unwrap()
    }

    #[test]
    fn output_and_exit_code_of_a_script_arrive() {
        let mut events = Vec::new();
        let code = host().run("echo out; echo err >&2; exit 3", LIMIT, |event| events.push(event.clone()));
        assert_eq!(code.unwrap(), 3);
        assert!(events.contains(&Event::Stdout(b"out\n".to_vec())));
        assert!(events.contains(&Event::Stderr(b"err\n".to_vec())));
        assert_eq!(events.last(), Some(&Event::Exit(3)));
    }

    #[test]
    fn large_output_arrives_whole() {
        let text = host().output("seq 1 200000", LIMIT).unwrap();
        assert_eq!(text.lines().count(), 200_000);
        assert!(text.ends_with("\n200000\n"));
    }

    #[test]
    fn a_script_that_takes_too_long_is_killed() {
        let host = host();
        let error = host.run("sleep 1000", Duration::from_millis(100), |_| {}).unwrap_err();
        assert!(error.to_string().contains("not finished"), "{error}");
    }

    #[test]
    fn a_file_is_written_and_read_whether_the_stage_is_shared_or_copied() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::local(dir.path()).unwrap();
        for shared in [host.shared.clone(), None] {
            let file = HostFile { shared: shared.map(|stage| stage.join("a")), ..host.file("a") };
            let bytes: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
            file.write(&bytes).unwrap();
            assert!(file.read().unwrap() == bytes);
            std::fs::remove_file(file.path()).unwrap();
            assert_eq!(file.read().unwrap(), b"");
        }
    }

    #[test]
    fn jobs_run_side_by_side_and_read_their_own_input() {
        let host = host();
        let jobs: Vec<Job> = (0..3).map(|_| host.spawn(shell("read x; echo got $x")).unwrap()).collect();
        for (n, job) in jobs.iter().enumerate().rev() {
            job.input().send(format!("{n}\n").as_bytes()).unwrap();
            let event = job.next_until(Instant::now() + LIMIT).unwrap();
            assert_eq!(event, Some(Event::Stdout(format!("got {n}\n").into_bytes())));
        }
    }

    #[test]
    fn a_job_may_have_a_terminal_of_a_given_size() {
        let host = host();
        let job =
            host.spawn(Spawn { terminal: Some((33, 77)), ..shell("tty >/dev/null && stty size") }).unwrap();
        let mut text = Vec::new();
        loop {
            match job.next_until(Instant::now() + LIMIT).unwrap().expect("an event in time") {
                Event::Stdout(bytes) => text.extend(bytes),
                Event::Stderr(_) => unreachable!("a terminal has one stream"),
                Event::Exit(code) => break assert_eq!(code, 0),
            }
        }
        assert_eq!(String::from_utf8_lossy(&text).trim(), "33 77");
    }

    #[test]
    fn a_program_that_does_not_exist_is_an_error() {
        let host = host();
        let job = host.spawn(Spawn { argv: vec!["/no/such/program".into()], ..Spawn::default() }).unwrap();
        let error = job.next_until(Instant::now() + LIMIT).unwrap_err();
        assert!(error.to_string().contains("/no/such/program"), "{error}");
    }

    #[test]
    fn a_dropped_job_is_killed() {
        let host = host();
        let (mut reader, writer) = io::pipe().unwrap();
        // The job inherits nothing of ours, so it opens the pipe by name: it closes when the job is dead.
        let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&writer));
        let job = host.spawn(shell(&format!("exec >{path}; echo x; exec sleep 1000"))).unwrap();
        let mut byte = [0; 2];
        io::Read::read_exact(&mut reader, &mut byte).unwrap();
        drop((job, writer));
        assert_eq!(io::Read::read(&mut reader, &mut byte).unwrap(), 0);
    }
}
