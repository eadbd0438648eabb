//! The side of `gestalt device`: finds the machine and asks it.

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::server::ANSWER;
use super::{Answer, Request, encode, place, read};

/// How long the request may take to be written.
const TALK: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No machine of this user runs here.
    #[error("no machine of this user runs on this host: `gestalt run` starts one")]
    None,
    /// There are several.
    #[error("several machines run here: say which one with --machine: {0}")]
    Several(String),
    /// The machine that was named does not.
    #[error("there is no machine called {name} here ({source}): {known}")]
    Unknown {
        /// Its name.
        name: String,
        /// Which there are.
        known: String,
        /// What the system says.
        source: io::Error,
    },
    /// It went away.
    #[error("the machine {name} gave no answer: it has ended, or is about to ({source})")]
    Lost {
        /// Its name.
        name: String,
        /// What the system says.
        source: io::Error,
    },
}

/// Asks the machine `machine`, or the only one that runs, whose socket is in `folder`.
///
/// # Errors
/// [`ClientError`], a sentence each.
pub fn ask(folder: &Path, machine: Option<&str>, request: &Request) -> Result<Answer, ClientError> {
    let (name, stream) = connect(folder, machine)?;
    talk(&stream, request).map_err(|source| ClientError::Lost { name, source })
}

fn connect(folder: &Path, machine: Option<&str>) -> Result<(String, UnixStream), ClientError> {
    let open = |name: &str| UnixStream::connect(place::socket(folder, name));
    let mut running: Vec<_> = place::machines(folder)
        .into_iter()
        .filter_map(|name| Some((open(&name).ok()?, name)))
        .map(|(stream, name)| (name, stream))
        .collect();
    let names: Vec<_> = running.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(", ");
    match machine {
        None if running.len() > 1 => Err(ClientError::Several(names)),
        None => running.pop().ok_or(ClientError::None),
        Some(wanted) => match running.into_iter().find(|(name, _)| name == wanted) {
            Some(found) => Ok(found),
            None => {
                let known = if names.is_empty() { "none runs".into() } else { format!("there is {names}") };
                let source = open(wanted).err().unwrap_or_else(|| io::ErrorKind::NotFound.into());
                Err(ClientError::Unknown { name: wanted.into(), known, source })
            }
        },
    }
}

fn talk(mut stream: &UnixStream, request: &Request) -> io::Result<Answer> {
    stream.set_write_timeout(Some(TALK))?;
    stream.set_read_timeout(Some(ANSWER + TALK))?;
    stream.write_all(&encode(request)?)?;
    read(BufReader::new(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_does_not_run_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let ask = |machine| ask(folder.path(), machine, &Request::List).unwrap_err().to_string();
        assert!(ask(None).contains("gestalt run"));
        assert!(ask(Some("a")).contains("called a"));
        // Left behind.
        std::fs::write(place::socket(folder.path(), "a"), "").unwrap();
        assert!(ask(None).contains("gestalt run"));
        let open = |name| std::os::unix::net::UnixListener::bind(place::socket(folder.path(), name)).unwrap();
        let _listeners = ["b", "c"].map(open);
        let said = ask(None);
        assert!(said.contains("b, c") && said.contains("--machine"), "{said}");
        assert!(ask(Some("a")).contains("there is b, c"));
    }
}
