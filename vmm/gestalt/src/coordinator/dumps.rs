//! The dumps that nodes send when something fails, kept in files for their owner alone or written to standard
//! error, and only so many of each node.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};

use crate::terminal;

/// Dumps that are kept of one node, over all starts of the machine; each has
/// [`MAX_FRAME`](machine::control::wire::MAX_FRAME) bytes at most.
pub const MOST: u32 = 8;

/// The nodes' dumps, on their way to a thread that writes them: a disk that stands still keeps nobody from
/// ending the machine.
#[derive(Debug)]
pub struct Dumps {
    /// How many each node has left.
    counts: Vec<u32>,
    queue: Sender<(String, String)>,
    /// Disconnected once all has been written.
    written: Receiver<()>,
}

impl Dumps {
    /// None yet of so many nodes. One file per node goes to `folder`; without it they go to standard error.
    ///
    /// # Errors
    /// What the system says to the thread.
    pub fn new(folder: Option<PathBuf>, nodes: usize) -> io::Result<Dumps> {
        let (queue, dumps) = channel::unbounded::<(String, String)>();
        let (finished, written) = channel::bounded(0);
        thread::Builder::new().name("dumps".into()).spawn(move || {
            for (name, text) in dumps {
                put(folder.as_deref(), &name, &text);
            }
            drop(finished);
        })?;
        Ok(Dumps { counts: vec![0; nodes], queue, written })
    }

    /// Keeps what a node left behind, unless that was [`MOST`] times before.
    pub fn keep(&mut self, node: usize, name: &str, text: String) {
        let count = &mut self.counts[node];
        *count = count.saturating_add(1);
        if *count > MOST {
            if *count == MOST + 1 {
                tracing::warn!("node {name} has sent {MOST} dumps: no more of it is kept");
            }
            return;
        }
        // The thread ends only after this sender.
        let _ = self.queue.send((name.into(), text));
    }

    /// Waits until all has been written, `timeout` at most; says whether it was.
    pub fn finish(self, timeout: Duration) -> bool {
        drop(self.queue);
        self.written.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected)
    }
}

fn put(folder: Option<&Path>, name: &str, text: &str) {
    if let Some(folder) = folder {
        let path = folder.join(format!("{name}.dump"));
        match write(folder, &path, text) {
            Ok(()) => return tracing::info!("what node {name} left behind is in {}", path.display()),
            Err(error) => tracing::warn!("{} cannot be written: {error}", path.display()),
        }
    }
    // In one piece: whoever waits for it waits once.
    let lines: Vec<_> = text.lines().map(|line| format!("[{name}] {line}")).collect();
    terminal::say(&lines.join("\n"));
}

/// Registers and memory of the guest are its owner's affair: the file is for this user alone.
fn write(folder: &Path, path: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file: File = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    // One that was there may have been for others as well.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(text.as_bytes())?;
    file.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn dumps_are_for_their_owner_alone_even_in_a_file_that_was_for_all() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("n1.dump");
        fs::write(&old, "before\n").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        let mut dumps = Dumps::new(Some(folder.path().into()), 2).unwrap();
        dumps.keep(0, "n0", "registers".into());
        dumps.keep(1, "n1", "trace".into());
        assert!(dumps.finish(PATIENCE));
        for (name, text) in [("n0.dump", "registers\n"), ("n1.dump", "before\ntrace\n")] {
            let path = folder.path().join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_node_that_sends_dumps_without_end_fills_no_disk_and_takes_none_from_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut dumps = Dumps::new(Some(folder.path().into()), 2).unwrap();
        (0..1000).for_each(|n| dumps.keep(0, "n0", format!("dump {n}")));
        dumps.keep(1, "n1", "dump".into());
        assert!(dumps.finish(PATIENCE));
        let lines = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap().lines().count();
        assert_eq!((lines("n0.dump"), lines("n1.dump")), (MOST as usize, 1));
    }
}
