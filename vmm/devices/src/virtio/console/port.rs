//! The host's end of a port: a Unix socket to which one program at a time connects.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use vmm_sys_util::eventfd::EventFd;

/// What a console keeps for who connects later, in bytes.
pub const BACKLOG: usize = 64 << 10;
/// Messages to the driver that wait for its buffers, at most: one that gives none loses the rest.
const MOST_NEWS: usize = 64;
/// Programs that may wait to be connected.
const CONNECTING: i32 = 16;

/// Why a port cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Somebody else has the socket.
    #[error("the socket {0} is in use by another machine or program: name another one")]
    InUse(String),
    /// Something else is there.
    #[error("{0} exists and is no socket: remove it, or name another one")]
    NotSocket(String),
    /// It cannot be made.
    #[error("the socket {path} cannot be made: {source}")]
    Bind {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// The host's end of a port. It outlives the driver's sessions, so that a reset does not end a connection.
pub struct Port {
    listener: UnixListener,
    path: Option<PathBuf>,
    state: Mutex<State>,
    /// Rung when there is something new for the thread that receives.
    pub changed: EventFd,
    /// Rung when there is something to tell the driver.
    pub news: EventFd,
}

#[derive(Default)]
struct State {
    connected: Option<Arc<UnixStream>>,
    backlog: VecDeque<u8>,
    /// The driver says that somebody in the guest uses the port.
    open: bool,
    /// Messages for the driver.
    news: VecDeque<Vec<u8>>,
    /// The driver has been told of the port and wants to know when it opens and closes.
    told: bool,
}

/// A socket that listens at `path`, for this user alone from the first moment on: on Linux a socket's file
/// gets the mode that the socket has when it is bound (`unix_bind` in net/unix/af_unix.c). The process's
/// umask is all threads' and stays.
fn listen(path: &Path) -> nix::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&socket, Mode::from_bits_truncate(0o600))?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&socket, Backlog::new(CONNECTING)?)?;
    Ok(socket.into())
}

impl Port {
    /// Listens at `path`, for this user alone. A socket that a program left behind is replaced.
    ///
    /// # Errors
    /// [`PortError`].
    pub fn bind(path: &Path) -> Result<Port, PortError> {
        let shown = path.display().to_string();
        let failed = |source| PortError::Bind { path: shown.clone(), source };
        if let Ok(found) = fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                return Err(PortError::NotSocket(shown));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(PortError::InUse(shown));
            }
            fs::remove_file(path).map_err(failed)?;
        }
        let listener = listen(path).map_err(|errno| failed(errno.into()))?;
        let mut port = Port::listening(listener).map_err(failed)?;
        port.path = Some(path.into());
        Ok(port)
    }

    /// A port at whose other end is who connects to `listener`.
    ///
    /// # Errors
    /// What the system says.
    pub fn listening(listener: UnixListener) -> io::Result<Port> {
        listener.set_nonblocking(true)?;
        let bell = || EventFd::new(libc::EFD_NONBLOCK);
        Ok(Port { listener, path: None, state: Mutex::default(), changed: bell()?, news: bell()? })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        base::lock(&self.state)
    }

    /// What new connections come from.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Who is connected.
    pub fn connected(&self) -> Option<Arc<UnixStream>> {
        self.lock().connected.clone()
    }

    /// A driver begins again; `open` if it needs not say that the port is used.
    pub fn begin(&self, open: bool) {
        let mut state = self.lock();
        (state.open, state.told) = (open, false);
        state.news.clear();
    }

    /// Whether somebody in the guest uses the port.
    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    /// The driver says whether somebody in the guest uses the port.
    pub fn set_open(&self, open: bool) {
        self.lock().open = open;
        ring(&self.changed);
    }

    /// Takes a new connection if nobody is connected; whoever else comes waits. Says whether there is one
    /// now.
    pub fn accept(&self) -> bool {
        let mut state = self.lock();
        if state.connected.is_some() {
            return true;
        }
        let Ok((mut stream, _)) = self.listener.accept() else { return false };
        if stream.set_nonblocking(true).is_err() {
            return false;
        }
        let backlog = std::mem::take(&mut state.backlog);
        let (older, newer) = backlog.as_slices();
        // A new socket takes at least so much, or it is lost.
        let _ = stream.write(older).and_then(|_| stream.write(newer));
        state.connected = Some(Arc::new(stream));
        self.tell_open(&mut state, true);
        true
    }

    /// Ends a connection, if it still is the one.
    pub fn disconnect(&self, stream: &Arc<UnixStream>) {
        let mut state = self.lock();
        if state.connected.as_ref().is_some_and(|connected| Arc::ptr_eq(connected, stream)) {
            // It is closed when whoever still uses it has seen this.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            state.connected = None;
            self.tell_open(&mut state, false);
            drop(state);
            ring(&self.changed);
        }
    }

    /// Reads what has come, without waiting: 0 if nothing has, or if that was the connection's end.
    pub fn read(&self, stream: &Arc<UnixStream>, to: &mut [u8]) -> usize {
        match (&**stream).read(to) {
            Ok(0) => self.disconnect(stream),
            Ok(len) => return len,
            Err(error) if waits(&error) => {}
            Err(_) => self.disconnect(stream),
        }
        0
    }

    /// Writes what is taken at once; how much that is.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn write(&self, stream: &Arc<UnixStream>, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the kernel reads at most `bytes.len()` bytes of `bytes`.
        let sent =
            unsafe { libc::send(stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) => Ok(sent),
            Err(_) => match io::Error::last_os_error() {
                error if waits(&error) => Ok(0),
                error => {
                    self.disconnect(stream);
                    Err(error)
                }
            },
        }
    }

    /// Keeps the last bytes for who connects; `false` if somebody is connected already.
    pub fn keep(&self, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        if state.connected.is_some() {
            return false;
        }
        let last = &bytes[bytes.len().saturating_sub(BACKLOG)..];
        let beyond = (state.backlog.len() + last.len()).saturating_sub(BACKLOG);
        state.backlog.drain(..beyond);
        state.backlog.extend(last);
        true
    }

    /// Messages for the driver: first of all that the port is there, which it then has been told.
    pub fn tell(&self, messages: impl IntoIterator<Item = Vec<u8>>) {
        self.tell_all(&mut self.lock(), messages);
    }

    /// From now on the driver is told when somebody connects or disconnects.
    pub fn told(&self) {
        let mut state = self.lock();
        state.told = true;
        let connected = state.connected.is_some();
        self.tell_open(&mut state, connected);
    }

    fn tell_open(&self, state: &mut State, open: bool) {
        if state.told {
            self.tell_all(state, [super::message::opened(open)]);
        }
    }

    fn tell_all(&self, state: &mut State, messages: impl IntoIterator<Item = Vec<u8>>) {
        let room = MOST_NEWS.saturating_sub(state.news.len());
        state.news.extend(messages.into_iter().take(room));
        ring(&self.news);
    }

    /// The oldest message for the driver.
    pub fn next_news(&self) -> Option<Vec<u8>> {
        self.lock().news.pop_front()
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

fn ring(bell: &EventFd) {
    // Fails only when it has been rung so often that nobody sleeps.
    let _ = bell.write(1);
}

/// Whether it is only that the other side is not ready.
fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_socket_is_for_its_user_alone_and_files_of_other_threads_keep_their_modes() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = folder.path().join(name);
            fs::File::create(&path).unwrap();
            mode(&path)
        };
        let usual = file("before");
        std::thread::scope(|scope| {
            let ports = scope.spawn(|| {
                for number in 0..300 {
                    let path = folder.path().join(format!("{number}.sock"));
                    let _port = Port::bind(&path).unwrap();
                    assert_eq!(mode(&path), 0o600);
                    UnixStream::connect(&path).unwrap();
                }
            });
            for number in 0.. {
                assert_eq!(file(&format!("{number}")), usual, "file {number}");
                if ports.is_finished() {
                    return ports.join().unwrap();
                }
            }
        });
    }
}
