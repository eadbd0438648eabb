//! The side of `gestalt run`: listens for operators and passes what they want to the coordinator.

use std::fs::{self, Permissions};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, Sender};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Uid;

use super::{Answer, Request, encode, place, read};

/// How long an operator may take to say what is wanted, or to hear the answer.
const TALK: Duration = Duration::from_secs(5);
/// How long the coordinator may take over an answer; it gives up earlier.
pub const ANSWER: Duration = Duration::from_secs(90);
/// Operators that are heard at the same time.
const MOST: usize = 16;

/// What somebody wants, and where the answer goes.
#[derive(Debug)]
pub struct Asked {
    /// What.
    pub request: Request,
    /// Dropped without an answer: the machine has ended.
    pub reply: Sender<Answer>,
}

/// The socket, for as long as the machine runs.
#[derive(Debug)]
pub struct Server {
    folder: PathBuf,
    path: PathBuf,
    inode: u64,
}

impl Server {
    /// Listens for operators of the machine `machine` in `folder`; what they want goes to `asked`.
    ///
    /// # Errors
    /// The folder is not fit, another machine of that name runs, or the system says no.
    pub fn start(folder: &Path, machine: &str, asked: Sender<Asked>) -> io::Result<Server> {
        place::make(folder)?;
        let path = place::socket(folder, machine);
        let _lock = place::lock(folder)?;
        if UnixStream::connect(&path).is_ok() {
            return Err(io::Error::other(format!(
                "another machine called {machine} runs: give this one a name of its own with --name"
            )));
        }
        // Left behind by a machine that did not end in order, if it is there.
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let inode = fs::symlink_metadata(&path)?.ino();
        let talking = Arc::new(());
        // It ends with the process: nothing else can wake it.
        thread::Builder::new().name("operators".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if Arc::strong_count(&talking) > MOST {
                    continue;
                }
                let (asked, ticket) = (asked.clone(), talking.clone());
                // Without a thread there is no answer, which the operator sees.
                let _ = thread::Builder::new().name("operator".into()).spawn(move || {
                    if let Err(error) = serve(&stream, &asked) {
                        tracing::debug!("an operator was not served: {error}");
                    }
                    drop(ticket);
                });
            }
        })?;
        Ok(Server { folder: folder.into(), path, inode })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // At worst the next machine of that name does it.
        let Ok(_lock) = place::lock(&self.folder) else { return };
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// One request, and its answer.
fn serve(stream: &UnixStream, asked: &Sender<Asked>) -> io::Result<()> {
    let user = getsockopt(stream, sockopt::PeerCredentials)?.uid();
    if user != Uid::effective().as_raw() && user != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.set_read_timeout(Some(TALK))?;
    stream.set_write_timeout(Some(TALK))?;
    let answer = match read(BufReader::new(stream)) {
        Ok(request) => ask(request, asked),
        Err(error) => Some(Answer::Refused(format!("this is not a request: {error}"))),
    };
    match answer {
        Some(answer) => (&*stream).write_all(&encode(&answer)?),
        None => Ok(()),
    }
}

/// The coordinator's answer; `None` if the machine has ended.
fn ask(request: Request, asked: &Sender<Asked>) -> Option<Answer> {
    let (reply, answer): (_, Receiver<Answer>) = channel::bounded(1);
    asked.send(Asked { request, reply }).ok()?;
    answer.recv_timeout(ANSWER).ok()
}

#[cfg(test)]
mod tests {
    use super::super::client;
    use super::*;
    use std::io::Read;

    #[test]
    fn what_an_operator_wants_reaches_the_coordinator_and_the_answer_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("gestalt");
        let (asked, requests) = channel::unbounded::<Asked>();
        let server = Server::start(&folder, "m", asked.clone()).unwrap();
        let coordinator = thread::spawn(move || {
            for (number, asked) in (1..3).zip(requests.iter()) {
                assert_eq!(asked.request, Request::List);
                asked.reply.send(Answer::Done(format!("answer {number}"))).unwrap();
            }
        });
        for number in 1..3 {
            let answer = client::ask(&folder, Some("m"), &Request::List).unwrap();
            assert_eq!(answer, Answer::Done(format!("answer {number}")));
        }
        coordinator.join().unwrap();
        let said = client::ask(&folder, None, &Request::List).unwrap_err().to_string();
        assert!(said.contains("ended"), "{said}");

        let again = Server::start(&folder, "m", asked.clone()).unwrap_err().to_string();
        assert!(again.contains("--name"), "{again}");
        let path = place::socket(&folder, "m");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_request_is_answered_with_why() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("gestalt");
        let (asked, _requests) = channel::unbounded();
        let _server = Server::start(&folder, "m", asked).unwrap();
        let mut stream = UnixStream::connect(place::socket(&folder, "m")).unwrap();
        stream.write_all(b"hello\n").unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.contains("not a request"), "{said}");
    }
}
