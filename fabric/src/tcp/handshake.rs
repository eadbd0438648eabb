//! The handshake of one connection: greetings, proofs, and how many frames each side has received.
//!
//! ```text
//! initiator (higher id)                        responder
//! hello (128) + first Noise message (48) ────> checked, then the initiator's key
//! checked, then its key <───────────────────── accept (128) + second Noise message (48)
//! confirmation (24, sealed) ─────────────────> only now is the initiator known to be there: no replay gets here
//! the lane is up <──────────────────────────── confirmation (24, sealed)
//! ```
//!
//! The hello is the handshake's prologue, so what was greeted is what is proven; every field of the accept
//! must have the one value that it can have. A refusal (128 bytes) instead of an accept is a hint for the
//! operator, not proof of anything. A confirmation is the number of frames that its sender has received on
//! the lane before.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use super::hello::{GREETING, Greeting, Identity, Kind, Rejection, may_begin};
use crate::secure::{Handshake, Opener, Pattern, PrivateKey, PublicKey, Sealer, SecureChannel, TAG};
use crate::{LaneId, NodeId};

/// Bytes of a Noise message here.
const PROOF: usize = Pattern::SECOND;

/// Bytes of a confirmation.
const CONFIRMATION: usize = 8 + TAG;

/// What confirmations are bound to.
const CONFIRMS: &[u8] = b"gestalt lane";

const PATTERN: Pattern = Pattern::BothKnown;

/// This node's identity and keys, and the keys by which it knows the others.
pub(super) struct Credentials {
    pub(super) identity: Identity,
    pub(super) own: PrivateKey,
    /// By node.
    pub(super) nodes: Vec<PublicKey>,
}

/// A finished handshake.
pub(super) struct Met {
    pub(super) peer: NodeId,
    pub(super) lane: LaneId,
    pub(super) channel: SecureChannel,
    /// How many frames of the lane the peer has received before.
    pub(super) received: u64,
}

impl Met {
    /// What seals and opens frames; nothing does if they travel in the clear.
    pub(super) fn streams(self, plaintext: bool) -> (Option<Sealer>, Option<Opener>) {
        if plaintext { (None, None) } else { (Some(self.channel.sealer), Some(self.channel.opener)) }
    }
}

/// The responder's side of a handshake.
pub(super) enum Responder {
    /// Waits for the hello.
    Hello(Partial),
    /// Waits for the first Noise message of who said `hello`.
    Proof { hello: Box<[u8; GREETING]>, peer: NodeId, lane: LaneId, partial: Partial },
    /// Waits for the initiator's confirmation.
    Confirmation(Box<Proven>),
}

/// Keys are right on both sides.
pub(super) struct Proven {
    peer: NodeId,
    lane: LaneId,
    channel: SecureChannel,
    partial: Partial,
}

/// The initiator's side of a handshake, on a connection that is open.
pub(super) enum Initiator {
    /// Hello was sent: waits for the accept.
    Accept(Box<Handshake>, Partial),
    /// Waits for the second Noise message.
    Proof(Box<Handshake>, Partial),
    /// The confirmation was sent: waits for the other one.
    Confirmation(Box<Proven>),
}

impl Responder {
    pub(super) fn new() -> Responder {
        Responder::Hello(Partial::new())
    }

    /// What can be done now without waiting; the lane's keys when all is done. `received` are the frames of
    /// the lane that this node has received; it is asked once the peer is known to be there.
    pub(super) fn step(
        &mut self,
        socket: &TcpStream,
        own: &Credentials,
        received: impl FnOnce(NodeId, LaneId) -> Result<u64, String>,
    ) -> Result<Option<Met>, Rejection> {
        let stranger = Rejection::Stranger;
        if let Responder::Hello(partial) = self {
            let Some(bytes) = partial.read(socket).map_err(stranger)? else {
                let doubt = || stranger("it does not speak the fabric's protocol".into());
                return if may_begin(partial.so_far()) { Ok(None) } else { Err(doubt()) };
            };
            let hello = Greeting::decode(&bytes).map_err(stranger)?;
            let checked = own.identity.check_hello(&hello);
            // Only versions are told: who lacks the key learns nothing.
            if let Err(Rejection::Claim { .. }) = &checked {
                let refusal = own.identity.greeting(Kind::Refuse, hello.from, hello.lane).encode();
                send(socket, &refusal).map_err(stranger)?;
            }
            let (peer, lane) = checked?;
            *self = Responder::Proof { hello: Box::new(bytes), peer, lane, partial: Partial::new() };
        }
        if let Responder::Proof { hello, peer, lane, partial } = self {
            let Some(proof) = partial.read::<PROOF>(socket).map_err(stranger)? else { return Ok(None) };
            let key = own.nodes.get(peer.index());
            let made = Handshake::answer(PATTERN, &own.own, key, &hello[..]).and_then(|mut shake| {
                shake.read(&proof)?;
                let answer = shake.write()?;
                shake.finish().map(|channel| (answer, channel))
            });
            let (answer, channel) = made.map_err(|error| Rejection::Claim {
                from: *peer,
                why: format!("it says that it is {peer}: {error}"),
            })?;
            let accept = own.identity.greeting(Kind::Accept, *peer, *lane).encode();
            send(socket, &[&accept[..], &answer].concat()).map_err(stranger)?;
            let partial = Partial::new();
            let proven = Proven { peer: *peer, lane: *lane, channel, partial };
            *self = Responder::Confirmation(Box::new(proven));
        }
        let Responder::Confirmation(proven) = self else { return Ok(None) };
        let Some(theirs) = proven.hear(socket).map_err(stranger)? else { return Ok(None) };
        let ours = received(proven.peer, proven.lane).map_err(stranger)?;
        proven.say(socket, ours).map_err(stranger)?;
        Ok(self.met(theirs))
    }

    fn met(&mut self, received: u64) -> Option<Met> {
        match std::mem::replace(self, Responder::new()) {
            Responder::Confirmation(proven) => Some(proven.met(received)),
            _ => None,
        }
    }
}

impl Initiator {
    /// Says hello on a connection that was just opened.
    pub(super) fn new(
        socket: &TcpStream,
        own: &Credentials,
        peer: NodeId,
        lane: LaneId,
    ) -> Result<Initiator, Rejection> {
        let stranger = Rejection::Stranger;
        let hello = own.identity.greeting(Kind::Hello, peer, lane).encode();
        let key = own.nodes.get(peer.index()).ok_or_else(|| stranger("its key is not known".into()))?;
        let made = Handshake::call(PATTERN, &own.own, key, &hello).and_then(|mut shake| {
            let proof = shake.write()?;
            Ok((shake, proof))
        });
        let (shake, proof) = made.map_err(|error| stranger(error.to_string()))?;
        send(socket, &[&hello[..], &proof].concat()).map_err(stranger)?;
        Ok(Initiator::Accept(Box::new(shake), Partial::new()))
    }

    /// What can be done now without waiting; the lane's keys when all is done.
    pub(super) fn step(
        self,
        socket: &TcpStream,
        own: &Credentials,
        (peer, lane): (NodeId, LaneId),
        received: impl FnOnce(NodeId, LaneId) -> Result<u64, String>,
    ) -> Result<Step, Rejection> {
        let stranger = Rejection::Stranger;
        let mut state = self;
        if let Initiator::Accept(shake, mut partial) = state {
            let Some(bytes) = partial.read(socket).map_err(stranger)? else {
                return Ok(Step::Waits(Initiator::Accept(shake, partial)));
            };
            own.identity.check_answer(&Greeting::decode(&bytes).map_err(stranger)?, peer, lane)?;
            state = Initiator::Proof(shake, Partial::new());
        }
        if let Initiator::Proof(mut shake, mut partial) = state {
            let Some(proof) = partial.read::<PROOF>(socket).map_err(stranger)? else {
                return Ok(Step::Waits(Initiator::Proof(shake, partial)));
            };
            let made = shake.read(&proof).and_then(|()| shake.finish());
            let channel = made.map_err(|error| {
                stranger(format!("what answers at the address of {peer} is not {peer}: {error}"))
            })?;
            let partial = Partial::new();
            let mut proven = Box::new(Proven { peer, lane, channel, partial });
            let ours = received(peer, lane).map_err(stranger)?;
            proven.say(socket, ours).map_err(stranger)?;
            state = Initiator::Confirmation(proven);
        }
        let Initiator::Confirmation(mut proven) = state else {
            return Err(stranger("its handshake lost its way".into()));
        };
        Ok(match proven.hear(socket).map_err(stranger)? {
            Some(theirs) => Step::Met(Box::new(proven.met(theirs))),
            None => Step::Waits(Initiator::Confirmation(proven)),
        })
    }
}

/// The result of a step of the initiator.
pub(super) enum Step {
    /// The other side must say something first.
    Waits(Initiator),
    /// All is done.
    Met(Box<Met>),
}

impl Proven {
    fn say(&mut self, socket: &TcpStream, received: u64) -> Result<(), String> {
        let mut text = received.to_le_bytes();
        let tag = self.channel.sealer.seal(CONFIRMS, &mut text).map_err(|error| error.to_string())?;
        send(socket, &[&text[..], &tag].concat())
    }

    fn hear(&mut self, socket: &TcpStream) -> Result<Option<u64>, String> {
        let Some(mut bytes) = self.partial.read::<CONFIRMATION>(socket)? else { return Ok(None) };
        let text = self.channel.opener.open(CONFIRMS, &mut bytes).map_err(|error| {
            format!(
                "it did not confirm that it is {} now, as a replayed handshake cannot: {error}",
                self.peer
            )
        })?;
        let count = text.first_chunk().copied().map(u64::from_le_bytes);
        count.map(Some).ok_or_else(|| "its confirmation is too short".into())
    }

    fn met(self, received: u64) -> Met {
        Met { peer: self.peer, lane: self.lane, channel: self.channel, received }
    }
}

/// A message of a known length, at most a greeting's, of which some bytes have arrived.
pub(super) struct Partial {
    bytes: [u8; GREETING],
    have: usize,
}

impl Partial {
    fn new() -> Partial {
        Partial { bytes: [0; GREETING], have: 0 }
    }

    fn so_far(&self) -> &[u8] {
        &self.bytes[..self.have]
    }

    /// Reads what has arrived of a message of `N` bytes, never beyond it, because others follow. `Ok(None)`:
    /// not all yet.
    fn read<const N: usize>(&mut self, mut socket: &TcpStream) -> Result<Option<[u8; N]>, String> {
        while self.have < N {
            match socket.read(&mut self.bytes[self.have..N]) {
                Ok(0) => return Err("it closed the connection before the end of its handshake".into()),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("its connection failed ({error})")),
            }
        }
        Ok(self.so_far().first_chunk().copied())
    }
}

/// Sends bytes on a connection that has sent next to nothing else, so that they fit.
fn send(mut socket: &TcpStream, bytes: &[u8]) -> Result<(), String> {
    match socket.write(bytes) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err("its connection takes no greeting".into()),
        Err(error) => Err(format!("its connection failed ({error})")),
    }
}
