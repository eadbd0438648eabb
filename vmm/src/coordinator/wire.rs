//! The bytes between coordinator and node: frames, the handshake, postcard.
//!
//! ```text
//! frame     u32 LE length (1..=limit), then that many bytes
//!
//! node        ── preamble frame: magic, u32 LE protocol number, software version ──> coordinator
//!             ── Hello frame ──────────────────────────────────────────────────────>
//!             <── Answer frame: Assigned or Refused ──────────────────────────────
//! then both   frames of one `ToCoordinator` or `FromCoordinator` each
//! ```
//!
//! The preamble and a refusal of it never change their form, so that peers of different versions can tell
//! each other so.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::node_api::Machine;

/// The longest frame of an established connection, in bytes.
pub const MAX_FRAME: usize = 16 << 20;
/// The longest frame of a handshake that a stranger may make us read, in bytes. An answer may be longer.
pub const MAX_HELLO: usize = 4096;
/// How long a handshake may take, from the first byte to the last.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Both directions of a connection carry something at least this often.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

const MAGIC: &[u8; 8] = b"gestalt\0";
/// The protocol of this build; raised by every change of a message.
const PROTOCOL: u32 = 1;
/// The version of this build as the preamble carries it.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// First byte of an answer that refuses; its layout is the same in every version.
const REFUSED: u8 = 0;
/// First byte of a refusal that will not last: the node may ask again.
const REFUSED_FOR_NOW: u8 = 1;
/// First byte of an answer that assigns.
const ASSIGNED: u8 = 2;

/// A node introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which node of the machine it wants to be.
    pub name: String,
    /// Its host's name, for messages.
    pub host: String,
    /// Its host's kernel release, for reports.
    pub kernel: String,
    /// Whether its CPUs are themselves emulated or offer no VMX/SVM: reports say so.
    pub emulated: bool,
}

/// The coordinator's answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The node is in.
    Assigned(Box<Assigned>),
    /// It is not.
    Refused {
        /// A sentence.
        why: String,
        /// Whether it is worth asking again shortly.
        later: bool,
    },
}

/// What an accepted node is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// Its index.
    pub node: u16,
    /// The machine.
    pub machine: Machine,
    /// Where the machine file wants its fabric to listen.
    pub fabric_listen: Option<SocketAddr>,
}

/// Why a connection cannot go on, as a clause about the peer: `it closed the connection`.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// End of stream between frames.
    #[error("it closed the connection")]
    Closed,
    /// Nothing came within the connection's read timeout.
    #[error("it was silent for {0:.1?}")]
    Silent(Duration),
    /// A frame of length zero or over the limit: not our protocol.
    #[error("it sent a frame of {length} bytes where 1 to {limit} are possible")]
    Length {
        /// What the length field says.
        length: usize,
        /// The limit here.
        limit: usize,
    },
    /// The frame's content is not a message.
    #[error("it sent a message that makes no sense ({0})")]
    Malformed(String),
    /// It speaks something else altogether.
    #[error("it does not speak Gestalt's control protocol")]
    Stranger,
    /// It is of another version.
    #[error("it runs gestalt {theirs} and this is gestalt {}: install one version on all hosts", ours())]
    Version {
        /// The peer's version.
        theirs: String,
    },
    /// The socket failed.
    #[error("its connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted => WireError::Closed,
            _ => WireError::Io(error),
        }
    }
}

fn ours() -> String {
    format!("{VERSION} (protocol {PROTOCOL})")
}

/// Writes one frame with one system call.
///
/// # Errors
/// What the socket says; a frame over [`MAX_FRAME`] is refused.
pub fn write_frame(stream: &mut impl Write, payload: &[u8]) -> Result<(), WireError> {
    if payload.is_empty() || payload.len() > MAX_FRAME {
        return Err(WireError::Length { length: payload.len(), limit: MAX_FRAME });
    }
    let mut frame = Vec::with_capacity(4 + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame)?;
    Ok(())
}

/// Reads one frame of at most `limit` bytes.
///
/// # Errors
/// End of stream, a length out of range, or what the socket says. A read timeout comes out as
/// [`WireError::Io`] of kind `WouldBlock`.
pub fn read_frame(stream: &mut impl Read, limit: usize) -> Result<Vec<u8>, WireError> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length == 0 || length > limit {
        return Err(WireError::Length { length, limit });
    }
    // Grows as bytes arrive: a length alone allocates nothing.
    let mut payload = Vec::new();
    stream.take(length as u64).read_to_end(&mut payload)?;
    if payload.len() < length {
        return Err(WireError::Closed);
    }
    Ok(payload)
}

/// Sends a message.
///
/// # Errors
/// What the socket says, or a message over [`MAX_FRAME`].
pub fn write_message(stream: &mut impl Write, message: &impl Serialize) -> Result<(), WireError> {
    write_frame(stream, &encode(message)?)
}

/// Receives a message.
///
/// # Errors
/// As [`read_frame`], and [`WireError::Malformed`] unless the frame is exactly one message.
pub fn read_message<T: DeserializeOwned>(stream: &mut impl Read, limit: usize) -> Result<T, WireError> {
    decode(&read_frame(stream, limit)?)
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>, WireError> {
    postcard::to_allocvec(message).map_err(|error| WireError::Malformed(error.to_string()))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(WireError::Malformed(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(WireError::Malformed(error.to_string())),
    }
}

fn preamble() -> Vec<u8> {
    [&MAGIC[..], &PROTOCOL.to_le_bytes(), VERSION.as_bytes()].concat()
}

fn check_preamble(bytes: &[u8]) -> Result<(), WireError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(WireError::Stranger)?;
    let (protocol, version) = rest.split_first_chunk::<4>().ok_or(WireError::Stranger)?;
    let protocol = u32::from_le_bytes(*protocol);
    if protocol == PROTOCOL && version == VERSION.as_bytes() {
        return Ok(());
    }
    let printable: String =
        String::from_utf8_lossy(version).chars().filter(|c| c.is_ascii_graphic()).take(32).collect();
    Err(WireError::Version { theirs: format!("{printable} (protocol {protocol})") })
}

/// The node's side of the handshake, within [`HANDSHAKE_TIME`].
///
/// # Errors
/// What the coordinator does wrong, as a clause about it.
pub fn introduce(stream: &TcpStream, hello: &Hello) -> Result<Answer, WireError> {
    let mut stream = Deadline::new(stream, HANDSHAKE_TIME)?;
    write_frame(&mut stream, &preamble())?;
    write_message(&mut stream, hello)?;
    let answer = read_frame(&mut stream, MAX_FRAME).map_err(|error| match error {
        WireError::Length { .. } => WireError::Stranger,
        other => other,
    })?;
    match answer.split_first() {
        Some((&ASSIGNED, rest)) => Ok(Answer::Assigned(Box::new(decode(rest)?))),
        Some((&tag @ (REFUSED | REFUSED_FOR_NOW), why)) => Ok(Answer::Refused {
            why: String::from_utf8_lossy(why).chars().filter(|c| !c.is_control()).take(1000).collect(),
            later: tag == REFUSED_FOR_NOW,
        }),
        _ => Err(WireError::Stranger),
    }
}

/// The coordinator's side of the handshake up to its answer, within [`HANDSHAKE_TIME`].
///
/// # Errors
/// What the stranger does wrong, as a clause about it. It has been told.
pub fn receive_hello(stream: &TcpStream) -> Result<Hello, WireError> {
    let mut guarded = Deadline::new(stream, HANDSHAKE_TIME)?;
    let hello = hello(&mut guarded);
    if let Err(error) = &hello {
        let why = match error {
            WireError::Version { .. } => format!(
                "the coordinator runs gestalt {} and this node another version: install one version on all hosts",
                ours()
            ),
            other => format!("the coordinator did not understand this node: {other}"),
        };
        // It is as good as gone: whether it hears the reason does not matter.
        let _ = answer(stream, &Answer::Refused { why, later: false });
    }
    hello
}

fn hello(stream: &mut Deadline) -> Result<Hello, WireError> {
    let preamble = read_frame(stream, MAX_HELLO).map_err(|error| match error {
        WireError::Length { .. } => WireError::Stranger,
        other => other,
    })?;
    check_preamble(&preamble)?;
    read_message(stream, MAX_HELLO)
}

/// Answers a [`Hello`].
///
/// # Errors
/// What the socket says.
pub fn answer(stream: &TcpStream, answer: &Answer) -> Result<(), WireError> {
    let bytes = match answer {
        Answer::Assigned(assigned) => [&[ASSIGNED][..], &encode(&**assigned)?].concat(),
        Answer::Refused { why, later } => {
            [&[if *later { REFUSED_FOR_NOW } else { REFUSED }][..], why.as_bytes()].concat()
        }
    };
    write_frame(&mut Deadline::new(stream, HANDSHAKE_TIME)?, &bytes)
}

/// A stream whose reads and writes together end at one moment, however slowly the peer drips.
struct Deadline<'a> {
    stream: &'a TcpStream,
    allowed: Duration,
    end: Instant,
}

impl<'a> Deadline<'a> {
    fn new(stream: &'a TcpStream, allowed: Duration) -> Result<Self, WireError> {
        stream.set_nodelay(true)?;
        Ok(Deadline { stream, allowed, end: Instant::now() + allowed })
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        match self.end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(self.late()),
            left => Ok(Some(left)),
        }
    }

    fn late(&self) -> io::Error {
        io::Error::new(io::ErrorKind::TimedOut, format!("its handshake took more than {:?}", self.allowed))
    }

    fn explain(&self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::WouldBlock { self.late() } else { error }
    }
}

impl Read for Deadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.read(buffer).map_err(|error| self.explain(error))
    }
}

impl Write for Deadline<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.write(buffer).map_err(|error| self.explain(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node_api::{FromCoordinator, Stop};

    #[test]
    fn messages_survive_the_wire() {
        let stop = Stop { report: true, restart: false, grace: Duration::from_secs(1) };
        let mut bytes = Vec::new();
        write_message(&mut bytes, &FromCoordinator::Stop(stop)).unwrap();
        write_message(&mut bytes, &FromCoordinator::Go).unwrap();
        let mut reader = &bytes[..];
        assert_eq!(
            read_message::<FromCoordinator>(&mut reader, MAX_FRAME).unwrap(),
            FromCoordinator::Stop(stop)
        );
        assert_eq!(read_message::<FromCoordinator>(&mut reader, MAX_FRAME).unwrap(), FromCoordinator::Go);
        assert!(matches!(read_message::<FromCoordinator>(&mut reader, MAX_FRAME), Err(WireError::Closed)));
    }

    #[test]
    fn wrong_lengths_and_contents_are_refused() {
        let refused = |bytes: &[u8]| read_message::<FromCoordinator>(&mut &bytes[..], 64).unwrap_err();
        assert!(matches!(refused(&[0, 0, 0, 0]), WireError::Length { length: 0, .. }));
        assert!(matches!(refused(b"GET / HTTP/1.1"), WireError::Length { limit: 64, .. }));
        assert!(matches!(refused(&[65, 0, 0, 0, 1]), WireError::Length { length: 65, .. }));
        assert!(matches!(refused(&[1, 0, 0, 0, 99]), WireError::Malformed(_)));
        assert!(matches!(refused(&[2, 0, 0, 0, 2, 2]), WireError::Malformed(_)));
        assert!(matches!(refused(&[2, 0, 0, 0, 2]), WireError::Closed));
        assert!(matches!(refused(&[2, 0]), WireError::Closed));
    }

    #[test]
    fn other_versions_are_told_apart_from_strangers() {
        assert!(check_preamble(&preamble()).is_ok());
        assert!(matches!(check_preamble(b"SSH-2.0-OpenSSH"), Err(WireError::Stranger)));
        assert!(matches!(check_preamble(b"gestalt\0\x01"), Err(WireError::Stranger)));
        let other = [&MAGIC[..], &PROTOCOL.to_le_bytes(), b"9.9.9"].concat();
        let said = check_preamble(&other).unwrap_err().to_string();
        assert!(said.contains("9.9.9") && said.contains(VERSION), "{said}");
        let other = [&MAGIC[..], &7u32.to_le_bytes(), VERSION.as_bytes()].concat();
        let said = check_preamble(&other).unwrap_err().to_string();
        assert!(said.contains("protocol 7"), "{said}");
    }
}
