//! What nodes leave behind when something fails: text for its owner alone, and not without end.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::terminal;

/// Dumps that are kept of one node, over all starts of the machine; each has
/// [`MAX_FRAME`](machine::control::wire::MAX_FRAME) bytes at most.
pub const MOST: u32 = 8;

/// The nodes' dumps.
#[derive(Debug)]
pub struct Dumps {
    /// One file per node goes there; without it they go to standard error.
    folder: Option<PathBuf>,
    /// How many each node has left.
    counts: Vec<u32>,
}

impl Dumps {
    /// None yet of so many nodes.
    pub fn new(folder: Option<PathBuf>, nodes: usize) -> Dumps {
        Dumps { folder, counts: vec![0; nodes] }
    }

    /// Keeps what a node left behind, unless that was [`MOST`] times before.
    pub fn keep(&mut self, node: usize, name: &str, text: &str) {
        let count = &mut self.counts[node];
        *count = count.saturating_add(1);
        if *count > MOST {
            if *count == MOST + 1 {
                tracing::warn!("node {name} has sent {MOST} dumps: no more of it is kept");
            }
            return;
        }
        if let Some(folder) = &self.folder {
            let path = folder.join(format!("{name}.dump"));
            match write(folder, &path, text) {
                Ok(()) => return tracing::info!("what node {name} left behind is in {}", path.display()),
                Err(error) => tracing::warn!("{} cannot be written: {error}", path.display()),
            }
        }
        for line in text.lines() {
            terminal::say(&format!("[{name}] {line}"));
        }
    }
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

    #[test]
    fn dumps_are_for_their_owner_alone_even_in_a_file_that_was_for_all() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("n1.dump");
        fs::write(&old, "before\n").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        let mut dumps = Dumps::new(Some(folder.path().into()), 2);
        dumps.keep(0, "n0", "registers");
        dumps.keep(1, "n1", "trace");
        for (name, text) in [("n0.dump", "registers\n"), ("n1.dump", "before\ntrace\n")] {
            let path = folder.path().join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_node_that_sends_dumps_without_end_fills_no_disk_and_takes_none_from_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let mut dumps = Dumps::new(Some(folder.path().into()), 2);
        (0..1000).for_each(|n| dumps.keep(0, "n0", &format!("dump {n}")));
        dumps.keep(1, "n1", "dump");
        let lines = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap().lines().count();
        assert_eq!((lines("n0.dump"), lines("n1.dump")), (MOST as usize, 1));
    }
}
