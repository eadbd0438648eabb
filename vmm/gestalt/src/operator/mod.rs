//! The operator's words to a running machine: `gestalt device`.
//!
//! ```text
//!  gestalt device ── client ══ Unix socket ══ server ── requests ──> coordinator ── orders ──> nodes
//!                                                    <── answer ───              <── done ───
//! ```
//!
//! | file | concept |
//! |---|---|
//! | this one | requests and answers, each a line of JSON |
//! | [`place`] | where the socket of a machine is |
//! | [`server`] | the side of `gestalt run` |
//! | [`client`] | the side of the command |
//!
//! One connection carries one request and its answer. Only the user that runs the machine, and root, is
//! heard.

pub mod client;
pub mod place;
pub mod server;

use std::io::{self, BufRead};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use machine::config::devices::DeviceRequest;
use machine::config::limits::Limits;
use machine::control::GivenUp;

/// Longest request or answer, in bytes.
pub const MAX_LINE: u64 = 1 << 20;

/// A request of an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// All devices.
    List,
    /// A new device.
    Add {
        /// Which.
        device: Box<DeviceRequest>,
    },
    /// A device shall go.
    Remove {
        /// Its name.
        name: String,
    },
    /// A device gets other limits, a balloon another size.
    Set {
        /// Its name.
        name: String,
        /// Such as `iops=500` or `size=512M`.
        settings: Vec<String>,
    },
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// It was done: a sentence.
    Done(String),
    /// It was not: why, and what to do, in a sentence.
    Refused(String),
    /// The devices.
    Devices(Vec<DeviceState>),
}

/// A device as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Its name.
    pub name: String,
    /// What kind of device it is: `disk`, `net`, ...
    pub kind: String,
    /// The name of its node.
    pub node: String,
    /// Its place on the PCI bus as the guest shows it, such as `0000:01:03.0`.
    pub address: String,
    /// What is behind it: a file, an interface.
    pub backend: String,
    /// By what the guest can tell it: a disk's serial number, a card's address.
    pub identity: String,
    /// What it may do each second.
    pub limits: Limits,
    /// Its share of what the devices of its node may do, unless it is the usual one.
    pub share: Option<u32>,
    /// For a balloon.
    pub balloon: Option<BalloonState>,
    /// `present`, `coming` or `leaving`.
    pub state: String,
}

/// A balloon as it is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// Bytes that it is to take from the guest.
    pub size: u64,
    /// What the guest has given up; `None` while its node does not say.
    pub given_up: Option<GivenUp>,
}

/// A line of JSON as bytes.
///
/// # Errors
/// A value that JSON cannot hold, such as a path that is not text.
pub fn encode(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Reads one line, of at most [`MAX_LINE`] bytes, and what it says.
///
/// # Errors
/// What the stream says; no line, one that is too long, or one that says something else.
pub fn read<T: DeserializeOwned>(stream: impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    stream.take(MAX_LINE).read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is not a line of text, or too long a one",
        ));
    }
    serde_json::from_slice(&line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machine::config::devices::parse_disk;
    use proptest::prelude::*;

    #[test]
    fn requests_are_read_as_they_were_written() {
        let device = Box::new(parse_disk("a,node=n1,name=x,iops=5").unwrap());
        let set = Request::Set { name: "x".into(), settings: vec!["iops=9".into()] };
        for request in [Request::List, Request::Add { device }, Request::Remove { name: "\n\"".into() }, set]
        {
            let line = encode(&request).unwrap();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(read::<Request>(&line[..]).unwrap(), request);
        }
    }

    #[test]
    fn what_is_no_whole_line_is_refused() {
        for line in [&b""[..], b"\"list\"", b"{\n", b"\"list\" x\n", b"{\"set\":{}}\n"] {
            assert!(read::<Request>(line).is_err(), "{}", String::from_utf8_lossy(line));
        }
        let endless = vec![b'['; MAX_LINE as usize + 1];
        assert!(read::<Request>(&endless[..]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_an_error(bytes: Vec<u8>) {
            if let Ok(request) = read::<Request>(&bytes[..]) {
                prop_assert_eq!(read::<Request>(&encode(&request).unwrap()[..]).unwrap(), request);
            }
        }
    }
}
