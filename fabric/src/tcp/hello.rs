//! Greetings: one of fixed size each way at the beginning of a connection, in the clear.
//!
//! The connecting node says who it is, whom and which lane it wants, which run of which machine it belongs
//! to, and which software it is. The other node answers with the same fields from its side. The places of
//! the magic, the protocol, the machine id and the version are the same in all protocol versions, so that
//! two nodes of different versions can tell their operators so.
//!
//! ```text
//! offset  0 magic   8 protocol  12 kind  16 machine id  32 from  34 to  36 lane  38 lanes  40 nodes
//!        42 version length  44 version (ASCII)  108 cover (1 sealed, 2 plaintext)  110 zeros  128 end
//!        (integers are little-endian)
//! ```
//!
//! A greeting claims; what proves it follows in `handshake`. Until then a greeting may cost its own
//! connection and nothing else, whatever it says.

use crate::{LaneId, NodeId};

/// Bytes of a greeting.
pub(super) const GREETING: usize = 128;

/// The longest version text, in bytes.
pub(super) const MAX_VERSION: usize = 64;

/// Where a greeting says how frames travel.
const COVER: usize = 108;

const MAGIC: [u8; 8] = *b"GESTALTF";

/// The version of the fabric's wire format: the greeting and the framing.
const PROTOCOL: u32 = 2;

/// What a greeting is for.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// The connecting node's request.
    Hello = 1,
    /// The answer: frames may follow.
    Accept = 2,
    /// The answer to a node of the same machine but of another version: nothing follows.
    Refuse = 3,
}

/// One side's greeting.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Greeting {
    pub(super) kind: Kind,
    pub(super) protocol: u32,
    pub(super) machine: [u8; 16],
    pub(super) from: NodeId,
    pub(super) to: NodeId,
    pub(super) lane: LaneId,
    pub(super) lanes: u16,
    pub(super) nodes: u16,
    pub(super) version: String,
    /// Whether frames are to travel in the clear.
    pub(super) plaintext: bool,
}

/// What every greeting of this node has in common.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) machine: [u8; 16],
    pub(super) node: NodeId,
    pub(super) nodes: u16,
    pub(super) lanes: u16,
    pub(super) version: String,
    pub(super) plaintext: bool,
}

/// Why a greeting was not accepted, as the end of a sentence.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Rejection {
    /// It is no business of this node: the connection is closed and everything goes on.
    Stranger(String),
    /// The same of one that says it is a node of this machine, but with other software or without the key.
    Claim {
        /// Who it says it is; it may be no node at all.
        from: NodeId,
        /// What is wrong.
        why: String,
    },
}

impl Identity {
    /// This node's greeting to `peer` for `lane`.
    pub(super) fn greeting(&self, kind: Kind, peer: NodeId, lane: LaneId) -> Greeting {
        Greeting {
            kind,
            protocol: PROTOCOL,
            machine: self.machine,
            from: self.node,
            to: peer,
            lane,
            lanes: self.lanes,
            nodes: self.nodes,
            version: self.version.clone(),
            plaintext: self.plaintext,
        }
    }

    /// Checks a connecting node's hello: who it is, and for which lane.
    pub(super) fn check_hello(&self, hello: &Greeting) -> Result<(NodeId, LaneId), Rejection> {
        if hello.kind != Kind::Hello {
            return Err(Rejection::Stranger(format!("it began with {:?} instead of a hello", hello.kind)));
        }
        self.check_common(hello)?;
        if hello.from <= self.node || hello.from.0 >= self.nodes {
            let (nodes, from) = (self.nodes, hello.from);
            return Err(Rejection::Stranger(format!(
                "it says it is {from}, which does not connect to {} of {nodes} nodes",
                self.node
            )));
        }
        if hello.lane >= self.lanes {
            return Err(Rejection::Stranger(format!("it asks for lane {} of {}", hello.lane, self.lanes)));
        }
        Ok((hello.from, hello.lane))
    }

    /// Checks the answer of `peer` to this node's hello for `lane`.
    pub(super) fn check_answer(
        &self,
        answer: &Greeting,
        peer: NodeId,
        lane: LaneId,
    ) -> Result<(), Rejection> {
        self.check_common(answer)?;
        if answer.kind != Kind::Accept || answer.from != peer || answer.lane != lane {
            return Err(Rejection::Stranger(format!(
                "what answered {:?} there is {} on lane {}",
                answer.kind, answer.from, answer.lane
            )));
        }
        Ok(())
    }

    fn check_common(&self, theirs: &Greeting) -> Result<(), Rejection> {
        if theirs.machine != self.machine {
            return Err(Rejection::Stranger(
                "it belongs to another machine or another run of this one".into(),
            ));
        }
        if theirs.protocol != PROTOCOL || theirs.version != self.version {
            let why = format!(
                "{} runs version {} (fabric protocol {}), this is {} with version {} (fabric protocol \
                 {PROTOCOL}): install the same version on every node",
                theirs.from, theirs.version, theirs.protocol, self.node, self.version
            );
            return Err(Rejection::Claim { from: theirs.from, why });
        }
        if theirs.to != self.node || theirs.nodes != self.nodes || theirs.lanes != self.lanes {
            return Err(Rejection::Stranger(format!(
                "it wants {} of {} nodes with {} lanes, this is {} of {} nodes with {} lanes",
                theirs.to, theirs.nodes, theirs.lanes, self.node, self.nodes, self.lanes
            )));
        }
        if theirs.plaintext != self.plaintext {
            let cover = |plaintext| if plaintext { "in the clear" } else { "sealed" };
            return Err(Rejection::Stranger(format!(
                "it wants frames {}, this node wants them {}",
                cover(theirs.plaintext),
                cover(self.plaintext)
            )));
        }
        Ok(())
    }
}

/// Whether `bytes` can be the beginning of a greeting.
pub(super) fn may_begin(bytes: &[u8]) -> bool {
    let n = bytes.len().min(MAGIC.len());
    bytes[..n] == MAGIC[..n]
}

/// Whether `version` can be sent: 1 to [`MAX_VERSION`] visible ASCII characters.
pub(super) fn is_version(version: &[u8]) -> bool {
    (1..=MAX_VERSION).contains(&version.len()) && version.iter().all(u8::is_ascii_graphic)
}

impl Greeting {
    pub(super) fn encode(&self) -> [u8; GREETING] {
        let mut out = [0; GREETING];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&self.protocol.to_le_bytes());
        put(&(self.kind as u32).to_le_bytes());
        put(&self.machine);
        for short in [self.from.0, self.to.0, self.lane, self.lanes, self.nodes, self.version.len() as u16] {
            put(&short.to_le_bytes());
        }
        put(self.version.as_bytes());
        out[COVER] = if self.plaintext { 2 } else { 1 };
        out
    }

    /// Reads a greeting; `Err` is the end of a sentence that begins with who sent it.
    pub(super) fn decode(bytes: &[u8; GREETING]) -> Result<Greeting, String> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        if !may_begin(bytes) {
            return Err("it does not speak the fabric's protocol".into());
        }
        let protocol = u32_at(8);
        let kind = match u32_at(12) {
            1 => Kind::Hello,
            2 => Kind::Accept,
            3 => Kind::Refuse,
            other => return Err(format!("it sent a greeting of unknown kind {other}")),
        };
        let mut machine = [0; 16];
        machine.copy_from_slice(&bytes[16..32]);
        let (version, rest) = bytes[44..]
            .split_at_checked(usize::from(u16_at(42)))
            .filter(|(version, _)| is_version(version))
            .ok_or("it sent a greeting with a malformed version")?;
        let cover = u16_at(COVER);
        if protocol == PROTOCOL {
            let (fill, end) = (&rest[..rest.len() - (GREETING - COVER)], &bytes[COVER + 2..]);
            if fill.iter().chain(end).any(|byte| *byte != 0) {
                return Err("it sent a greeting with bytes after its end".into());
            }
            if !(1..=2).contains(&cover) {
                return Err(format!("it wants frames in an unknown way, {cover}"));
            }
        }
        Ok(Greeting {
            kind,
            protocol,
            machine,
            from: NodeId(u16_at(32)),
            to: NodeId(u16_at(34)),
            lane: u16_at(36),
            lanes: u16_at(38),
            nodes: u16_at(40),
            version: version.iter().map(|byte| char::from(*byte)).collect(),
            plaintext: cover == 2,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity(node: u16) -> Identity {
        Identity {
            machine: [7; 16],
            node: NodeId(node),
            nodes: 3,
            lanes: 4,
            version: "0.1.0".into(),
            plaintext: false,
        }
    }

    #[test]
    fn a_hello_and_its_answer_are_accepted() {
        let hello = Greeting::decode(&identity(2).greeting(Kind::Hello, NodeId(1), 3).encode()).unwrap();
        assert_eq!(hello, identity(2).greeting(Kind::Hello, NodeId(1), 3));
        assert_eq!(identity(1).check_hello(&hello), Ok((NodeId(2), 3)));
        let answer = identity(1).greeting(Kind::Accept, NodeId(2), 3);
        assert_eq!(identity(2).check_answer(&answer, NodeId(1), 3), Ok(()));
    }

    #[test]
    fn each_wrong_field_is_refused() {
        let good = identity(2).greeting(Kind::Hello, NodeId(1), 3);
        let wrong: [fn(&mut Greeting); 10] = [
            |h| h.kind = Kind::Accept,
            |h| h.machine[15] ^= 1,
            |h| h.from = NodeId(3),
            |h| h.from = NodeId(1),
            |h| h.from = NodeId(0),
            |h| h.to = NodeId(0),
            |h| h.lane = 4,
            |h| h.lanes = 5,
            |h| h.nodes = 4,
            |h| h.plaintext = true,
        ];
        for change in wrong {
            let mut hello = good.clone();
            change(&mut hello);
            assert!(
                matches!(identity(1).check_hello(&hello), Err(Rejection::Stranger(_))),
                "accepted {hello:?}"
            );
        }
    }

    #[test]
    fn another_version_is_named_with_this_one() {
        let mut hello = identity(2).greeting(Kind::Hello, NodeId(1), 3);
        hello.version = "0.2.0".into();
        let Err(Rejection::Claim { why, .. }) = identity(1).check_hello(&hello) else { panic!("accepted") };
        assert!(why.contains("0.2.0") && why.contains("0.1.0"), "{why}");
    }

    #[test]
    fn another_machine_learns_nothing_of_the_version() {
        let mut hello = identity(2).greeting(Kind::Hello, NodeId(1), 3);
        (hello.version, hello.machine) = ("0.2.0".into(), [8; 16]);
        assert!(matches!(identity(1).check_hello(&hello), Err(Rejection::Stranger(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_decoded_is_what_was_encoded(
            tail in prop::array::uniform32(any::<u8>()), kind in 0u32..5, len in 0u16..70, begin in any::<bool>(),
            cover in 0u8..4,
        ) {
            let mut bytes = [0; GREETING];
            if begin { bytes[..8].copy_from_slice(&MAGIC); }
            bytes[8] = 2;
            bytes[COVER] = cover;
            bytes[12..16].copy_from_slice(&kind.to_le_bytes());
            bytes[16..48].copy_from_slice(&tail);
            bytes[42..44].copy_from_slice(&len.to_le_bytes());
            bytes[44..44 + usize::from(len.min(64))].fill(b'v');
            if let Ok(greeting) = Greeting::decode(&bytes) {
                prop_assert_eq!(greeting.encode(), bytes);
            } else {
                let fine = begin && (1..4).contains(&kind) && (4..=64).contains(&len) && (1..3).contains(&cover);
                prop_assert!(!fine);
            }
        }
    }
}
