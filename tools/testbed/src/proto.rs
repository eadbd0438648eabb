//! The protocol of the testbed and the agent on a host, over one byte stream.
//!
//! A frame is a header of 9 bytes, then the payload:
//!
//! ```text
//! u32 LE  payload length, at most MAX_PAYLOAD
//! u32 LE  job, chosen by the testbed; 0 where no job is meant
//! u8      kind
//! ```

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Largest payload in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// Agent: I am here.
    Hello,
    /// Testbed: start this.
    Spawn(Spawn),
    /// Testbed: bytes for the job's standard input.
    Stdin(Vec<u8>),
    /// Testbed: the job's standard input ends.
    StdinEnd,
    /// Testbed: send this signal to the job's process group.
    Signal(i32),
    /// Testbed: end the host.
    Shutdown,
    /// Agent: the job wrote this to its standard output (or terminal).
    Stdout(Vec<u8>),
    /// Agent: the job wrote this to its standard error.
    Stderr(Vec<u8>),
    /// Agent: the job ended; code as a shell reports it (128 + signal when killed).
    Exit(i32),
    /// Agent: the job could not be started.
    Failed(String),
}

/// A job to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawn {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the environment.
    pub env: Vec<(String, String)>,
    /// Give it a terminal of (rows, columns) instead of pipes.
    pub terminal: Option<(u16, u16)>,
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Self::Hello => 0,
            Self::Spawn(_) => 1,
            Self::Stdin(_) => 2,
            Self::StdinEnd => 3,
            Self::Signal(_) => 4,
            Self::Shutdown => 5,
            Self::Stdout(_) => 6,
            Self::Stderr(_) => 7,
            Self::Exit(_) => 8,
            Self::Failed(_) => 9,
        }
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the agent's stream is broken: {what}"))
}

/// Writes one message.
///
/// # Errors
/// Those of the stream, or a payload above [`MAX_PAYLOAD`].
pub fn write(stream: &mut impl Write, job: u32, message: &Message) -> io::Result<()> {
    let json;
    let number;
    let payload: &[u8] = match message {
        Message::Hello | Message::StdinEnd | Message::Shutdown => &[],
        Message::Spawn(spawn) => {
            json = serde_json::to_vec(spawn)?;
            &json
        }
        Message::Stdin(bytes) | Message::Stdout(bytes) | Message::Stderr(bytes) => bytes,
        Message::Signal(value) | Message::Exit(value) => {
            number = value.to_le_bytes();
            &number
        }
        Message::Failed(text) => text.as_bytes(),
    };
    if payload.len() > MAX_PAYLOAD {
        return Err(bad("a payload is too long"));
    }
    let mut frame = Vec::with_capacity(9 + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&job.to_le_bytes());
    frame.push(message.kind());
    frame.extend_from_slice(payload);
    stream.write_all(&frame)
}

/// Reads one message: the job it is about, and what it says.
///
/// # Errors
/// Those of the stream (`UnexpectedEof` when it ended), or a malformed frame.
pub fn read(stream: &mut impl Read) -> io::Result<(u32, Message)> {
    let mut header = [0; 9];
    stream.read_exact(&mut header)?;
    let [l0, l1, l2, l3, j0, j1, j2, j3, kind] = header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let job = u32::from_le_bytes([j0, j1, j2, j3]);
    if length > MAX_PAYLOAD {
        return Err(bad("a payload is too long"));
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    let number = || -> io::Result<i32> {
        let bytes = payload[..].try_into().map_err(|_| bad("a number has the wrong length"))?;
        Ok(i32::from_le_bytes(bytes))
    };
    let message = match kind {
        0 => Message::Hello,
        1 => Message::Spawn(serde_json::from_slice(&payload)?),
        2 => Message::Stdin(payload),
        3 => Message::StdinEnd,
        4 => Message::Signal(number()?),
        5 => Message::Shutdown,
        6 => Message::Stdout(payload),
        7 => Message::Stderr(payload),
        8 => Message::Exit(number()?),
        9 => Message::Failed(String::from_utf8_lossy(&payload).into_owned()),
        _ => return Err(bad("an unknown kind of message")),
    };
    Ok((job, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_arrives_as_it_was_sent() {
        let spawn = Spawn {
            argv: vec!["sh".into(), "-c".into(), "true".into()],
            env: vec![("A".into(), "b".into())],
            terminal: Some((24, 80)),
        };
        let all = [
            Message::Hello,
            Message::Spawn(spawn),
            Message::Stdin(vec![0, 1, 255]),
            Message::StdinEnd,
            Message::Signal(9),
            Message::Shutdown,
            Message::Stdout(vec![]),
            Message::Stderr(vec![7; MAX_PAYLOAD]),
            Message::Exit(-1),
            Message::Failed("why".into()),
        ];
        let mut stream = Vec::new();
        for (job, message) in (0..).zip(&all) {
            write(&mut stream, job, message).unwrap();
        }
        let mut reader = &stream[..];
        for (job, message) in (0..).zip(all) {
            assert_eq!(read(&mut reader).unwrap(), (job, message));
        }
        assert!(reader.is_empty());
    }

    #[test]
    fn malformed_frames_are_errors() {
        let frame = |length: u32, kind: u8, payload: &[u8]| {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend([0, 0, 0, 0, kind]);
            bytes.extend(payload);
            bytes
        };
        for bytes in
            [frame(0, 77, b""), frame(u32::MAX, 6, b""), frame(1, 8, b"x"), frame(2, 1, b"{}x"), vec![1, 2]]
        {
            assert!(read(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
