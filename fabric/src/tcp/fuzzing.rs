//! The fuzz targets' bodies: each panics if something does not hold that should.

use std::sync::LazyLock;
use std::time::Duration;

use super::connecting::{Connecting, Connection};
use super::frames::{ACKNOWLEDGES, BadFrame, FrameBuffer, HEADER};
use super::handshake::{Credentials, Met, Responder};
use super::hello::{GREETING, Greeting, Identity, Kind, Rejection};
use super::transport::TcpTransport;
use crate::fuzzing::{pair, pour};
use crate::secure::{KEY, Opener, PrivateKey, PublicKey, Sealer, SecureChannel, SecureError};
use crate::{FabricError, MAX_FRAME, NodeId, Transport};

/// What decodes encodes to the same bytes.
pub fn greeting(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<GREETING>()
        && let Ok(greeting) = Greeting::decode(bytes)
        && greeting.protocol == credentials().identity.greeting(Kind::Hello, NodeId(1), 0).protocol
    {
        assert_eq!(greeting.encode(), *bytes);
    }
}

/// The stream `data[1..]`, in pieces of `data[0] + 1` bytes, gives the frames that are in it.
pub fn frames(data: &[u8]) {
    let Some((&size, stream)) = data.split_first() else { return };
    for acknowledges in [false, true] {
        let (expected, verdict) = whole(stream, acknowledges);
        let mut buffer = FrameBuffer::new(None, acknowledges);
        let (mut got, mut end) = (Vec::new(), None);
        for piece in stream.chunks(usize::from(size) + 1) {
            buffer.space()[..piece.len()].copy_from_slice(piece);
            buffer.filled(piece.len());
            if let Err(bad) = buffer.deliver(|frame| got.push(frame.to_vec())) {
                end = Some(bad);
                break;
            }
        }
        assert_eq!((got, end), (expected, verdict));
    }
}

/// The frames of a stream that is there as a whole, and what ends it.
fn whole(mut stream: &[u8], acknowledges: bool) -> (Vec<Vec<u8>>, Option<BadFrame>) {
    let mut frames = Vec::new();
    while let Some((header, rest)) = stream.split_first_chunk::<HEADER>() {
        let word = u32::from_le_bytes(*header);
        let skip = acknowledges && word == ACKNOWLEDGES + 8;
        let len = if skip { 8 } else { word as usize };
        if len == 0 || len > MAX_FRAME {
            return (frames, Some(BadFrame::Length(word)));
        }
        let Some((frame, rest)) = rest.split_at_checked(len) else { break };
        if !skip {
            frames.push(frame.to_vec());
        }
        stream = rest;
    }
    (frames, None)
}

fn key(node: u8) -> PrivateKey {
    PrivateKey::from_bytes([node + 1; 32])
}

fn credentials() -> Credentials {
    let identity = Identity {
        machine: [7; 16],
        node: NodeId(0),
        nodes: 2,
        lanes: 1,
        version: "fuzz".into(),
        plaintext: false,
    };
    static PUBLIC: LazyLock<Vec<PublicKey>> = LazyLock::new(|| vec![key(0).public(), key(1).public()]);
    Credentials { identity, own: key(0), nodes: PUBLIC.clone() }
}

/// A stranger's bytes at the listener: never a lane. With an odd first byte a valid hello comes before them.
pub fn handshake(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else { return };
    let own = credentials();
    let (near, far) = pair();
    let mut said = Vec::new();
    if first & 1 == 1 {
        let caller = Identity { node: NodeId(1), ..own.identity.clone() };
        said.extend(caller.greeting(Kind::Hello, NodeId(0), 0).encode());
    }
    said.extend(rest);
    pour(&near, &said);
    let mut called = Responder::new();
    // Each step gets further, waits for what is there already, or ends.
    for _ in 0..8 {
        match called.step(&far, &own, |_, _| Ok(0)) {
            Ok(Some(_)) => panic!("a stranger got a lane"),
            Ok(None) => {}
            Err(Rejection::Stranger(why) | Rejection::Claim { why, .. }) => return assert!(!why.is_empty()),
        }
    }
    panic!("the end of the connection was not noticed");
}

/// A peer that has proven itself sends what `data` says: a byte of what, a byte of how much, and the bytes.
pub fn session(data: &[u8]) {
    let Some((&first, mut rest)) = data.split_first() else { return };
    let plaintext = first & 1 == 1;
    let (near, far) = pair();
    // As after a handshake, which would cost most of the time.
    let streams =
        || Ok::<_, SecureError>((Sealer::new([1; KEY])?, Sealer::new([2; KEY])?, Opener::new([1; KEY])?));
    let (mut theirs, sealer, opener) = streams().expect("any key will do");
    let met = Met { peer: NodeId(1), lane: 0, channel: SecureChannel { sealer, opener }, received: 0 };
    far.set_nonblocking(true).expect("it is a socket");
    let connections = vec![vec![None, Some(Connection { socket: far, met, rail: 0 })]];
    let connecting = Connecting::new(Vec::new(), credentials(), Vec::new(), Duration::from_secs(3));
    let transport =
        TcpTransport::new(NodeId(0), plaintext, connections, connecting).expect("descriptors are left");
    let (mut wire, mut expected, mut valid) = (Vec::new(), Vec::new(), true);
    let mut last = Vec::new();
    while let Some((&[what, len], more)) = rest.split_first_chunk() {
        let (bytes, more) = more.split_at(usize::from(len).min(more.len()));
        rest = more;
        match what % 4 {
            // A valid frame; beyond the first that is not, nothing is promised.
            0 | 1 if !bytes.is_empty() => {
                last = sealed(&mut theirs, plaintext, bytes);
                wire.extend(&last);
                expected.extend(valid.then(|| bytes.to_vec()));
            }
            // The last one again: fine in plaintext, where nothing notices.
            2 => {
                wire.extend(&last);
                valid &= last.is_empty();
            }
            _ => {
                wire.extend(bytes);
                valid &= bytes.is_empty();
            }
        }
    }
    pour(&near, &wire);
    let mut receiver = transport.take_receiver(0).expect("it was not taken");
    let mut got = Vec::new();
    for _ in 0..wire.len() + 8 {
        match receiver.poll(&mut |_, frame| got.push(frame.to_vec())) {
            Ok(_) => {}
            Err(FabricError::PeerLost { peer, why }) => {
                assert_eq!(peer, NodeId(1));
                assert!(!why.is_empty());
                assert!(got.starts_with(&expected), "valid frames are delivered");
                assert!(plaintext || got == expected, "and nothing else, if they are sealed");
                assert!(transport.send(NodeId(1), 0, &[b"x"]).is_err());
                return;
            }
            Err(other) => panic!("{other}"),
        }
    }
    panic!("the end of the connection was not noticed");
}

fn sealed(sealer: &mut Sealer, plaintext: bool, text: &[u8]) -> Vec<u8> {
    let header = (text.len() as u32).to_le_bytes();
    let mut wire = [&header[..], text].concat();
    if !plaintext {
        let tag = sealer.seal(&header, &mut wire[HEADER..]).expect("it is short");
        wire.extend(tag);
    }
    wire
}
