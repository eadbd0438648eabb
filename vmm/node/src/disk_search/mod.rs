//! The search of a disk for the kernel that it boots, in a child process that can do nothing else.
//!
//! What is on a disk is the guest's word: file systems, a boot loader's script, compressed images. It is read
//! by a process of its own, which may read one descriptor, write one pipe and use so much memory and time;
//! whatever it is made to do, it cannot do more. Its answer is checked like a peer's.
//!
//! ```text
//!  node, or gestalt inspect                          child: gestalt disk-search
//!  opens the image, read-only
//!  spawn ── image as standard input ───────────────> confines itself (`child.rs`)
//!                                                    firmware::disk::find_on or survey
//!  Answer <── pipe: head, then kernel and initrd ─── ends
//!  into files in memory, lengths checked
//! ```

mod child;
mod wire;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use firmware::disk::limits::{LARGEST_INITRDS, LARGEST_KERNEL};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

pub use child::run as child;
use wire::{Head, LARGEST_HEAD, LARGEST_SURVEY};

/// How long a child may take in all; its CPU time is limited besides.
const LIMIT: Duration = Duration::from_secs(120);

/// The hidden command of `gestalt` that is the child, followed by the image's name and, for a survey only,
/// [`SURVEY`].
pub const COMMAND: &str = "disk-search";
/// Asks the child for what is on the disk instead of what it boots.
pub const SURVEY: &str = "--survey";

/// What a disk boots, as files that can be opened as long as this value lives.
#[derive(Debug)]
pub struct Found {
    /// Where it was found, for messages.
    pub origin: String,
    /// The kernel.
    pub kernel: Extracted,
    /// The initial ramdisk, if there is one.
    pub initrd: Option<Extracted>,
    /// The command line.
    pub cmdline: String,
    /// What a person should know of the choice.
    pub notes: Vec<String>,
}

/// A file in memory.
#[derive(Debug)]
pub struct Extracted(File);

impl Extracted {
    /// A file in memory with this many bytes of `from`.
    fn copy(from: &mut impl Read, bytes: u64) -> anyhow::Result<Extracted> {
        let mut file = File::from(memfd_create(c"gestalt-boot", MFdFlags::MFD_CLOEXEC)?);
        let copied = io::copy(&mut from.take(bytes), &mut file)?;
        ensure!(copied == bytes, "its search ended early");
        Ok(Extracted(file))
    }

    /// A file in memory of these bytes.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub fn of(bytes: &[u8]) -> anyhow::Result<Extracted> {
        Extracted::copy(&mut &bytes[..], bytes.len() as u64)
    }

    /// A path that this process can open.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// Finds what the disk at `path` boots, in a child process.
///
/// # Errors
/// The image cannot be opened, nothing on it can be booted, or the child did what it may not; a sentence
/// each.
pub fn find(path: &Path) -> anyhow::Result<Found> {
    let mut answer = Answer::of(path, &[])?;
    let result = answer.found();
    answer.finish(path, result)
}

/// What is on the disk at `path`, as the JSON of [`firmware::disk::Survey`], by a child process.
///
/// # Errors
/// The image cannot be opened, or the child did what it may not; a sentence each.
pub fn survey(path: &Path) -> anyhow::Result<String> {
    let mut answer = Answer::of(path, &[SURVEY])?;
    let result = answer.survey();
    answer.finish(path, result)
}

/// A child's answer on its way.
struct Answer {
    child: Child,
    pipe: Deadlined,
}

impl Answer {
    fn of(path: &Path, more: &[&str]) -> anyhow::Result<Answer> {
        let shown = path.display();
        let image = File::open(path).with_context(|| format!("the disk {shown} cannot be opened"))?;
        let kind = image.metadata()?.file_type();
        ensure!(
            kind.is_file() || std::os::unix::fs::FileTypeExt::is_block_device(&kind),
            "the disk {shown} is neither a file nor a block device: name an image or a device such as /dev/sdb"
        );
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).args(more).arg(path).env_clear().current_dir("/");
        command.stdin(image).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("the process that looks into disks cannot be started")?;
        let pipe = OwnedFd::from(child.stdout.take().context("it has no pipe")?);
        Ok(Answer { child, pipe: Deadlined { pipe: pipe.into(), deadline: Instant::now() + LIMIT } })
    }

    fn head(&mut self) -> anyhow::Result<Head> {
        let mut len = [0; 4];
        self.pipe.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        ensure!(len <= LARGEST_HEAD, "its search answered {len} bytes");
        let mut bytes = vec![0; len];
        self.pipe.read_exact(&mut bytes)?;
        Ok(postcard::from_bytes::<Head>(&bytes)?.printable())
    }

    fn found(&mut self) -> anyhow::Result<Result<Found, String>> {
        match self.head()? {
            Head::Refused(why) => Ok(Err(why)),
            Head::Survey { .. } => bail!("its search answered another question"),
            Head::Found { origin, cmdline, notes, kernel, initrd } => {
                ensure!(
                    kernel <= LARGEST_KERNEL && initrd <= LARGEST_INITRDS,
                    "its search answered too much"
                );
                let kernel = Extracted::copy(&mut self.pipe, kernel)?;
                let initrd = (initrd > 0).then(|| Extracted::copy(&mut self.pipe, initrd)).transpose()?;
                Ok(Ok(Found { origin, kernel, initrd, cmdline, notes }))
            }
        }
    }

    fn survey(&mut self) -> anyhow::Result<Result<String, String>> {
        match self.head()? {
            Head::Refused(why) => Ok(Err(why)),
            Head::Found { .. } => bail!("its search answered another question"),
            Head::Survey { bytes } => {
                ensure!(bytes <= LARGEST_SURVEY, "its search answered too much");
                let mut text = String::new();
                (&mut self.pipe).take(bytes).read_to_string(&mut text)?;
                Ok(Ok(text))
            }
        }
    }

    /// The answer, once the child has ended as it should; what it refused, and what became of it, are errors.
    fn finish<T>(mut self, path: &Path, answer: anyhow::Result<Result<T, String>>) -> anyhow::Result<T> {
        let shown = path.display();
        if let Err(error) = &answer
            && error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
        {
            let _ = self.child.kill();
            let _ = self.child.wait();
            bail!(
                "looking into the disk {shown} took longer than {} s: name a kernel with --kernel FILE",
                LIMIT.as_secs()
            );
        }
        // It has answered, or its pipe has ended: what it still does is of no interest.
        if answer.is_ok() {
            let _ = self.child.kill();
        }
        let status = self.child.wait()?;
        match answer {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(why)) => bail!("{why}"),
            Err(error) => {
                let how = match status.signal() {
                    Some(libc::SIGSYS) => "it was made to do what no search does".to_owned(),
                    Some(libc::SIGXCPU | libc::SIGKILL) => "it took more CPU time than any disk needs".into(),
                    Some(signal) => format!("signal {signal}"),
                    None => format!("{error:#}"),
                };
                bail!(
                    "the search of the disk {shown} was ended ({how}): it is damaged, or meant to do harm; name a kernel with \
                     --kernel FILE"
                )
            }
        }
    }
}

/// A pipe that is read until a deadline.
struct Deadlined {
    pipe: File,
    deadline: Instant,
}

impl Read for Deadlined {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        let mut wait = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        if poll(&mut wait, timeout)? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.pipe.read(to)
    }
}

/// Writes all of the child's answer.
fn answer(pipe: &mut impl Write, head: &Head, bodies: &[&[u8]]) -> io::Result<()> {
    let bytes = postcard::to_allocvec(head).map_err(io::Error::other)?;
    pipe.write_all(&(bytes.len() as u32).to_le_bytes())?;
    pipe.write_all(&bytes)?;
    bodies.iter().try_for_each(|body| pipe.write_all(body))?;
    pipe.flush()
}
