//! The bytes between coordinator and node: frames, the handshake, postcard.
//!
//! ```text
//! frame         u32 LE length (1..=limit), then that many bytes
//! sealed frame  the same, and 16 bytes behind it; the bytes are sealed, and bound to the length
//!
//! node        ── preamble frame: magic, u32 LE protocol number, software version ──> coordinator
//!             ── frame: first message of a Noise IK handshake ─────────────────────>   whose key is it?
//!             <── frame: GREETED and the second message, or a refusal ─────────────
//!             ── sealed Hello frame ───────────────────────────────────────────────>   no replay gets here
//!             <── sealed Answer frame: Assigned or Refused ────────────────────────
//! then both   sealed frames of one `ToCoordinator` or `FromCoordinator` each
//! ```
//!
//! The preamble and a refusal of it never change their form, so that peers of different versions can tell
//! each other so. The preamble is the handshake's prologue. A refusal that is not sealed proves nothing: it
//! is for the operator to read.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use fabric::secure::{Handshake, Opener, Pattern, Sealer, SecureChannel, SecureError, TAG};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::control::Machine;
use crate::keys::{CoordinatorKeys, NodeKey};

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
const PROTOCOL: u32 = 4;
/// The version of this build as the preamble carries it.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// First byte of an answer that refuses; its layout is the same in every version.
const REFUSED: u8 = 0;
/// First byte of a refusal that will not last: the node may ask again.
const REFUSED_FOR_NOW: u8 = 1;
/// First byte of an answer that assigns.
const ASSIGNED: u8 = 2;
/// First byte of an answer that goes on with the handshake.
const GREETED: u8 = 3;
const PATTERN: Pattern = Pattern::CallerUnknown;

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
    /// Where the machine file wants its fabric to listen, by rail; it may say nothing.
    pub fabric_listen: Vec<SocketAddr>,
}

/// Why a connection cannot go on, as a clause about the peer: `it closed the connection`.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// End of stream where a frame could begin: the peer has closed the connection, in good order.
    #[error("it closed the connection")]
    Closed,
    /// A reset, or an end of stream within a frame: the peer may live, and know nothing of it.
    #[error("its connection was cut off")]
    CutOff,
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
    /// It said no before it was known who it is.
    #[error("it refused this node: {why}")]
    Refused {
        /// Its reason.
        why: String,
        /// Whether asking again helps.
        later: bool,
    },
    /// Its handshake or one of its frames does not prove that it is who it should be.
    #[error("{0}")]
    Secure(#[from] SecureError),
    /// Its key is valid, and that of no node of this machine.
    #[error(
        "its key is of no node of this machine: see that it has this machine's key and one of its nodes' names"
    )]
    UnknownKey,
    /// It has one node's key and wants to be another.
    #[error("it has the key of node {key} and claims the place of {claimed:?}")]
    Place {
        /// Whose key it has.
        key: String,
        /// Who it says it is.
        claimed: String,
    },
    /// The socket failed.
    #[error("its connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                WireError::CutOff
            }
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
    let length = read_length(stream, limit)?;
    read_exactly(stream, length)
}

fn read_length(stream: &mut impl Read, limit: usize) -> Result<usize, WireError> {
    let length = match read_up_to(stream, 4)?[..] {
        [] => return Err(WireError::Closed),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]) as usize,
        _ => return Err(WireError::CutOff),
    };
    if length == 0 || length > limit {
        return Err(WireError::Length { length, limit });
    }
    Ok(length)
}

fn read_exactly(stream: &mut impl Read, length: usize) -> Result<Vec<u8>, WireError> {
    let payload = read_up_to(stream, length)?;
    if payload.len() < length { Err(WireError::CutOff) } else { Ok(payload) }
}

/// Fewer bytes only at the end of the stream.
fn read_up_to(stream: &mut impl Read, length: usize) -> io::Result<Vec<u8>> {
    // Grows as bytes arrive: a length alone allocates nothing.
    let mut bytes = Vec::new();
    stream.take(length as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The sending direction of a control connection.
pub struct Sender(Sealer);

/// The receiving direction.
pub struct Receiver(Opener);

/// A control connection whose handshake is done.
pub struct ControlChannel {
    /// What this side says.
    pub sender: Sender,
    /// What it hears.
    pub receiver: Receiver,
}

impl ControlChannel {
    fn new(SecureChannel { sealer, opener }: SecureChannel) -> ControlChannel {
        ControlChannel { sender: Sender(sealer), receiver: Receiver(opener) }
    }
}

impl Sender {
    /// Sends a message.
    ///
    /// # Errors
    /// What the socket says, or a message over [`MAX_FRAME`].
    pub fn write_message(
        &mut self,
        stream: &mut impl Write,
        message: &impl Serialize,
    ) -> Result<(), WireError> {
        self.write_frame(stream, &encode(message)?)
    }

    fn write_frame(&mut self, stream: &mut impl Write, payload: &[u8]) -> Result<(), WireError> {
        if payload.is_empty() || payload.len() > MAX_FRAME {
            return Err(WireError::Length { length: payload.len(), limit: MAX_FRAME });
        }
        let length = (payload.len() as u32).to_le_bytes();
        let mut frame = Vec::with_capacity(4 + payload.len() + TAG);
        frame.extend_from_slice(&length);
        frame.extend_from_slice(payload);
        let tag = self.0.seal(&length, &mut frame[4..])?;
        frame.extend_from_slice(&tag);
        stream.write_all(&frame)?;
        Ok(())
    }
}

impl Receiver {
    /// Receives a message of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`read_frame`]; [`WireError::Secure`] unless the frame is the next one that the peer sealed, and
    /// [`WireError::Malformed`] unless it is exactly one message.
    pub fn read_message<T: DeserializeOwned>(
        &mut self,
        stream: &mut impl Read,
        limit: usize,
    ) -> Result<T, WireError> {
        decode(&self.read_frame(stream, limit)?)
    }

    fn read_frame(&mut self, stream: &mut impl Read, limit: usize) -> Result<Vec<u8>, WireError> {
        let length = read_length(stream, limit)?;
        let mut payload = read_exactly(stream, length + TAG)?;
        self.0.open(&(length as u32).to_le_bytes(), &mut payload)?;
        payload.truncate(length);
        Ok(payload)
    }
}

/// The content of a frame with this message.
///
/// # Errors
/// [`WireError::Malformed`]: the message cannot be encoded.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, WireError> {
    postcard::to_allocvec(message).map_err(|error| WireError::Malformed(error.to_string()))
}

/// The message in the content of a frame.
///
/// # Errors
/// [`WireError::Malformed`] unless it is exactly one message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
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

/// The node's side of the handshake, within [`HANDSHAKE_TIME`]; the answer, and the session if the node is
/// in.
///
/// # Errors
/// What the coordinator does wrong, as a clause about it.
pub fn introduce(
    stream: &TcpStream,
    key: &NodeKey,
    hello: &Hello,
) -> Result<(Answer, ControlChannel), WireError> {
    let mut stream = Deadline::new(stream, HANDSHAKE_TIME)?;
    let preamble = preamble();
    let mut shake = Handshake::call(PATTERN, &key.private, &key.coordinator, &preamble)?;
    write_frame(&mut stream, &preamble)?;
    write_frame(&mut stream, &shake.write()?)?;
    let greeting = read_frame(&mut stream, MAX_HELLO).map_err(|error| match error {
        WireError::Length { .. } => WireError::Stranger,
        other => other,
    })?;
    let mut session = match greeting.split_first() {
        Some((&GREETED, message)) => {
            shake.read(message)?;
            ControlChannel::new(shake.finish()?)
        }
        Some((&tag @ (REFUSED | REFUSED_FOR_NOW), why)) => {
            return Err(WireError::Refused { why: printable(why), later: tag == REFUSED_FOR_NOW });
        }
        _ => return Err(WireError::Stranger),
    };
    session.sender.write_message(&mut stream, hello)?;
    let answer = session.receiver.read_frame(&mut stream, MAX_FRAME)?;
    let answer = match answer.split_first() {
        Some((&ASSIGNED, rest)) => Answer::Assigned(Box::new(decode(rest)?)),
        Some((&tag @ (REFUSED | REFUSED_FOR_NOW), why)) => {
            Answer::Refused { why: printable(why), later: tag == REFUSED_FOR_NOW }
        }
        _ => return Err(WireError::Stranger),
    };
    Ok((answer, session))
}

fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(1000).collect()
}

/// The coordinator's side of the handshake up to its answer, within [`HANDSHAKE_TIME`]. Who said the hello
/// has the key of the node that it wants to be, and said it now.
///
/// # Errors
/// What the stranger does wrong, as a clause about it. It has been told.
pub fn receive_hello(
    stream: &TcpStream,
    keys: &CoordinatorKeys,
) -> Result<(Hello, ControlChannel), WireError> {
    let mut guarded = Deadline::new(stream, HANDSHAKE_TIME)?;
    let (mut session, name) = greet(&mut guarded, keys).inspect_err(|error| {
        let why = match error {
            WireError::Version { .. } => format!(
                "the coordinator runs gestalt {} and this node another version: install one version on all hosts",
                ours()
            ),
            WireError::Secure(SecureError::Handshake) => {
                "this node's key is not that of this machine, or is for another coordinator".into()
            }
            other => format!("the coordinator did not admit this node: {other}"),
        };
        // It is as good as gone: whether it hears the reason does not matter.
        if let Ok(mut stream) = Deadline::new(stream, HANDSHAKE_TIME) {
            let _ = write_frame(&mut stream, &[&[REFUSED], why.as_bytes()].concat());
        }
    })?;
    let hello: Hello = session.receiver.read_message(&mut guarded, MAX_HELLO)?;
    if hello.name != name {
        let wrong = WireError::Place { key: name, claimed: hello.name };
        let why = format!("the coordinator did not admit this node: {wrong}");
        let _ = answer(stream, &mut session.sender, &Answer::Refused { why, later: false });
        return Err(wrong);
    }
    Ok((hello, session))
}

/// The handshake proper: the session, and whose key the node has.
fn greet(stream: &mut Deadline, keys: &CoordinatorKeys) -> Result<(ControlChannel, String), WireError> {
    let preamble = read_frame(stream, MAX_HELLO).map_err(|error| match error {
        WireError::Length { .. } => WireError::Stranger,
        other => other,
    })?;
    check_preamble(&preamble)?;
    let message = read_frame(stream, PATTERN.first())?;
    let mut shake = Handshake::answer(PATTERN, &keys.private, None, &preamble)?;
    shake.read(&message)?;
    let name = shake.peer().and_then(|key| keys.name_of(&key).map(str::to_owned));
    let name = name.ok_or(WireError::UnknownKey)?;
    write_frame(stream, &[&[GREETED][..], &shake.write()?].concat())?;
    Ok((ControlChannel::new(shake.finish()?), name))
}

/// Answers a [`Hello`].
///
/// # Errors
/// What the socket says.
pub fn answer(stream: &TcpStream, sender: &mut Sender, answer: &Answer) -> Result<(), WireError> {
    let bytes = match answer {
        Answer::Assigned(assigned) => [&[ASSIGNED][..], &encode(&**assigned)?].concat(),
        Answer::Refused { why, later } => {
            [&[if *later { REFUSED_FOR_NOW } else { REFUSED }][..], why.as_bytes()].concat()
        }
    };
    sender.write_frame(&mut Deadline::new(stream, HANDSHAKE_TIME)?, &bytes)
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
pub(super) mod tests {
    use super::*;
    use crate::control::{FromCoordinator, Stop};

    #[test]
    fn messages_survive_the_wire() {
        let stop = Stop { report: true, restart: false, grace: Duration::from_secs(1) };
        let mut bytes = Vec::new();
        let (mut near, mut far) = sessions();
        near.sender.write_message(&mut bytes, &FromCoordinator::Stop(stop)).unwrap();
        near.sender.write_message(&mut bytes, &FromCoordinator::Go).unwrap();
        let mut reader = &bytes[..];
        let mut read = || far.receiver.read_message::<FromCoordinator>(&mut reader, MAX_FRAME);
        assert_eq!(read().unwrap(), FromCoordinator::Stop(stop));
        assert_eq!(read().unwrap(), FromCoordinator::Go);
        assert!(matches!(read(), Err(WireError::Closed)));
    }

    #[test]
    fn a_changed_or_repeated_frame_is_refused() {
        let (mut near, mut far) = sessions();
        let mut frame = Vec::new();
        near.sender.write_message(&mut frame, &FromCoordinator::Go).unwrap();
        for at in 4..frame.len() {
            let mut changed = frame.clone();
            changed[at] ^= 1;
            let read = far.receiver.read_message::<FromCoordinator>(&mut &changed[..], MAX_FRAME);
            assert!(matches!(read, Err(WireError::Secure(SecureError::Record))), "{at}");
        }
        let mut read = || far.receiver.read_message::<FromCoordinator>(&mut &frame[..], MAX_FRAME);
        assert_eq!(read().unwrap(), FromCoordinator::Go);
        assert!(matches!(read(), Err(WireError::Secure(SecureError::Record))));
    }

    /// Both ends of a session.
    pub(in crate::control) fn sessions() -> (ControlChannel, ControlChannel) {
        let key = |byte| fabric::secure::PrivateKey::from_bytes([byte; 32]);
        let mut near = Handshake::call(PATTERN, &key(1), &key(2).public(), b"").unwrap();
        let mut far = Handshake::answer(PATTERN, &key(2), None, b"").unwrap();
        far.read(&near.write().unwrap()).unwrap();
        near.read(&far.write().unwrap()).unwrap();
        (ControlChannel::new(near.finish().unwrap()), ControlChannel::new(far.finish().unwrap()))
    }

    #[test]
    fn wrong_lengths_and_contents_are_refused() {
        let refused = |bytes: &[u8]| {
            read_frame(&mut &bytes[..], 64).and_then(|frame| decode::<FromCoordinator>(&frame)).unwrap_err()
        };
        assert!(matches!(refused(&[0, 0, 0, 0]), WireError::Length { length: 0, .. }));
        assert!(matches!(refused(b"GET / HTTP/1.1"), WireError::Length { limit: 64, .. }));
        assert!(matches!(refused(&[65, 0, 0, 0, 1]), WireError::Length { length: 65, .. }));
        assert!(matches!(refused(&[1, 0, 0, 0, 99]), WireError::Malformed(_)));
        assert!(matches!(refused(&[2, 0, 0, 0, 2, 2]), WireError::Malformed(_)));
        assert!(matches!(refused(&[2, 0, 0, 0, 2]), WireError::CutOff));
        assert!(matches!(refused(&[2, 0, 0, 0]), WireError::CutOff));
        assert!(matches!(refused(&[2, 0]), WireError::CutOff));
        assert!(matches!(refused(&[]), WireError::Closed));
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
