//! The messages between nodes on lane 0, and their form on the wire.
//!
//! Every message is one frame of fixed length by kind, little-endian, encoded into a buffer on the stack. A
//! frame of any other length or with a field out of range is malformed: its sender is not a correct node.
//!
//! | kind | message | bytes after the kind |
//! |---|---|---|
//! | 1 | [`NodeMsg::Interrupt`] | signal u8, vector u8, 0 u8, first u32, set u64 |
//! | 2 | [`NodeMsg::Eoi`] | vector u8 |
//! | 3 | [`NodeMsg::Access`] | op u8 (1 memory, 2 write, 4 posted), size u8, 0 u8, cpu u32, seq u32, addr u64, data u64 |
//! | 4 | [`NodeMsg::Reply`] | 0 u8, 0 u16, cpu u32, seq u32, data u64 |
//! | 5 | [`NodeMsg::ClockPing`] | 0 u8, 0 u16, seq u32, t1 u64 |
//! | 6 | [`NodeMsg::ClockPong`] | 0 u8, 0 u16, seq u32, t1 u64, t2 u64, t3 u64, offset u64 |
//! | 7 | [`NodeMsg::ClockAhead`] | 0 u8, 0 u16, 0 u32, offset u64 |
//! | 8 | [`NodeMsg::Heartbeat`] | |
//! | 9 | [`NodeMsg::Leaving`] | |

/// Longest encoded message, in bytes.
pub const MAX_LEN: usize = 40;

/// What arrives at a CPU.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Signal {
    /// An interrupt vector.
    Vector {
        /// The vector, 0..=255; the receiving local APIC refuses those below 16.
        vector: u8,
        /// Level-triggered: its EOI goes to the I/O APIC.
        level: bool,
    },
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up at page `vector`.
    Sipi {
        /// The page number.
        vector: u8,
    },
}

/// One device access.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// In memory space (MMIO); else in port space.
    pub memory: bool,
    /// The data of a write; `None`: a read. The low `size` bytes count, the others are 0.
    pub write: Option<u64>,
    /// Nobody waits: no reply. Writes only.
    pub posted: bool,
    /// Bytes: 1, 2 or 4, in memory space also 8.
    pub size: u8,
    /// The accessing CPU's number within its node.
    pub cpu: u32,
    /// The access's number, for its reply.
    pub seq: u32,
    /// Port or guest physical address.
    pub addr: u64,
}

/// A message of lane 0.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum NodeMsg {
    /// For CPUs of the receiving node.
    Interrupt {
        /// What arrives.
        signal: Signal,
        /// The CPU, by its number within the node, that bit 0 of `set` stands for.
        first: u32,
        /// Which of the 64 CPUs from `first` on.
        set: u64,
    },
    /// A level-triggered vector was finished by some CPU: for the I/O APIC, at node 0.
    Eoi {
        /// The vector.
        vector: u8,
    },
    /// An access to a device of the receiving node.
    Access(Access),
    /// The answer to an access that was not posted.
    Reply {
        /// The CPU that asked, by its number within its node.
        cpu: u32,
        /// The access's number.
        seq: u32,
        /// What was read; 0 for a write.
        data: u64,
    },
    /// A clock measurement, to node 0. Times are as in [`crate::clock::estimator::Round`].
    ClockPing {
        /// The ping's number.
        seq: u32,
        /// When it was sent.
        t1: u64,
    },
    /// Its answer.
    ClockPong {
        /// The ping's number.
        seq: u32,
        /// When the ping was sent.
        t1: u64,
        /// When it arrived.
        t2: u64,
        /// When this was sent.
        t3: u64,
        /// Node 0's guest TSC offset at that moment.
        offset: u64,
    },
    /// Node 0's clock should move forward.
    ClockAhead {
        /// To this guest TSC offset, at least.
        offset: u64,
    },
    /// I am there.
    Heartbeat,
    /// I end in good order: what is lost from now on is not a failure.
    Leaving,
}

/// A message as bytes.
#[derive(Copy, Clone, Debug)]
pub struct Encoded {
    bytes: [u8; MAX_LEN],
    len: usize,
}

impl Encoded {
    /// The frame.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn new(kind: u8) -> Encoded {
        let mut encoded = Encoded { bytes: [0; MAX_LEN], len: 1 };
        encoded.bytes[0] = kind;
        encoded
    }

    fn put(mut self, bytes: &[u8]) -> Encoded {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }
}

/// A frame that no correct node sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it sent a malformed control message ({what}): is it of another version?")]
pub struct Malformed {
    /// What is wrong.
    pub what: &'static str,
}

impl NodeMsg {
    /// The kind's number, for traces.
    pub fn kind(&self) -> u8 {
        match self {
            NodeMsg::Interrupt { .. } => 1,
            NodeMsg::Eoi { .. } => 2,
            NodeMsg::Access(_) => 3,
            NodeMsg::Reply { .. } => 4,
            NodeMsg::ClockPing { .. } => 5,
            NodeMsg::ClockPong { .. } => 6,
            NodeMsg::ClockAhead { .. } => 7,
            NodeMsg::Heartbeat => 8,
            NodeMsg::Leaving => 9,
        }
    }

    /// The wire form.
    pub fn encode(&self) -> Encoded {
        let out = Encoded::new(self.kind());
        match *self {
            NodeMsg::Interrupt { signal, first, set } => {
                let (kind, vector) = match signal {
                    Signal::Vector { vector, level: false } => (0, vector),
                    Signal::Vector { vector, level: true } => (1, vector),
                    Signal::Nmi => (2, 0),
                    Signal::Init => (3, 0),
                    Signal::Sipi { vector } => (4, vector),
                };
                out.put(&[kind, vector, 0]).put(&first.to_le_bytes()).put(&set.to_le_bytes())
            }
            NodeMsg::Eoi { vector } => out.put(&[vector]),
            NodeMsg::Access(access) => {
                let op = u8::from(access.memory)
                    | u8::from(access.write.is_some()) << 1
                    | u8::from(access.posted) << 2;
                out.put(&[op, access.size, 0])
                    .put(&access.cpu.to_le_bytes())
                    .put(&access.seq.to_le_bytes())
                    .put(&access.addr.to_le_bytes())
                    .put(&access.write.unwrap_or(0).to_le_bytes())
            }
            NodeMsg::Reply { cpu, seq, data } => {
                out.put(&[0; 3]).put(&cpu.to_le_bytes()).put(&seq.to_le_bytes()).put(&data.to_le_bytes())
            }
            NodeMsg::ClockPing { seq, t1 } => out.put(&[0; 3]).put(&seq.to_le_bytes()).put(&t1.to_le_bytes()),
            NodeMsg::ClockPong { seq, t1, t2, t3, offset } => out
                .put(&[0; 3])
                .put(&seq.to_le_bytes())
                .put(&t1.to_le_bytes())
                .put(&t2.to_le_bytes())
                .put(&t3.to_le_bytes())
                .put(&offset.to_le_bytes()),
            NodeMsg::ClockAhead { offset } => out.put(&[0; 7]).put(&offset.to_le_bytes()),
            NodeMsg::Heartbeat | NodeMsg::Leaving => out,
        }
    }

    /// The message in `frame`.
    ///
    /// # Errors
    /// [`Malformed`] for anything that [`NodeMsg::encode`] does not make.
    pub fn decode(frame: &[u8]) -> Result<NodeMsg, Malformed> {
        let (&kind, rest) = frame.split_first().ok_or(Malformed { what: "an empty frame" })?;
        let mut input = Input(rest);
        let message = match kind {
            1 => {
                let [kind, vector, zero] = input.take()?;
                let signal = match (kind, vector) {
                    (0, vector) => Signal::Vector { vector, level: false },
                    (1, vector) => Signal::Vector { vector, level: true },
                    (2, 0) => Signal::Nmi,
                    (3, 0) => Signal::Init,
                    (4, vector) => Signal::Sipi { vector },
                    _ => return Err(Malformed { what: "an unknown interrupt signal" }),
                };
                is_zero(&[zero])?;
                NodeMsg::Interrupt { signal, first: input.u32()?, set: input.u64()? }
            }
            2 => {
                let [vector] = input.take()?;
                NodeMsg::Eoi { vector }
            }
            3 => NodeMsg::Access(input.access()?),
            4 => {
                is_zero(&input.take::<3>()?)?;
                NodeMsg::Reply { cpu: input.u32()?, seq: input.u32()?, data: input.u64()? }
            }
            5 => {
                is_zero(&input.take::<3>()?)?;
                NodeMsg::ClockPing { seq: input.u32()?, t1: input.u64()? }
            }
            6 => {
                is_zero(&input.take::<3>()?)?;
                let seq = input.u32()?;
                let (t1, t2, t3) = (input.u64()?, input.u64()?, input.u64()?);
                NodeMsg::ClockPong { seq, t1, t2, t3, offset: input.u64()? }
            }
            7 => {
                is_zero(&input.take::<7>()?)?;
                NodeMsg::ClockAhead { offset: input.u64()? }
            }
            8 => NodeMsg::Heartbeat,
            9 => NodeMsg::Leaving,
            _ => return Err(Malformed { what: "an unknown kind" }),
        };
        if !input.0.is_empty() {
            return Err(Malformed { what: "too long for its kind" });
        }
        Ok(message)
    }
}

fn is_zero(reserved: &[u8]) -> Result<(), Malformed> {
    match reserved.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(Malformed { what: "a reserved byte that is not 0" }),
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed { what: "too short for its kind" })?;
        self.0 = tail;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn access(&mut self) -> Result<Access, Malformed> {
        let [op, size, zero] = self.take()?;
        is_zero(&[zero])?;
        let (memory, write, posted) = (op & 1 != 0, op & 2 != 0, op & 4 != 0);
        let (cpu, seq, addr, data) = (self.u32()?, self.u32()?, self.u64()?, self.u64()?);
        if op > 7 || posted && !write {
            return Err(Malformed { what: "an unknown device operation" });
        }
        if !matches!((memory, size), (_, 1 | 2 | 4) | (true, 8)) {
            return Err(Malformed { what: "a device access of a size that does not exist" });
        }
        if !memory && addr > 0xffff {
            return Err(Malformed { what: "a port above 65535" });
        }
        if (!write && data != 0) || (size < 8 && data >> (8 * size) != 0) {
            return Err(Malformed { what: "device data beyond the access's size" });
        }
        Ok(Access { memory, write: write.then_some(data), posted, size, cpu, seq, addr })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn signal() -> impl Strategy<Value = Signal> {
        prop_oneof![
            (any::<u8>(), any::<bool>()).prop_map(|(vector, level)| Signal::Vector { vector, level }),
            Just(Signal::Nmi),
            Just(Signal::Init),
            any::<u8>().prop_map(|vector| Signal::Sipi { vector }),
        ]
    }

    fn access() -> impl Strategy<Value = Access> {
        let size = prop_oneof![Just(1u8), Just(2), Just(4), Just(8)];
        (any::<(bool, bool, bool, u32, u32, u64, u64)>(), size).prop_map(|(words, size)| {
            let (memory, write, posted, cpu, seq, addr, data) = words;
            let size = if memory { size } else { size.min(4) };
            let data = data & u64::MAX >> (64 - 8 * u32::from(size));
            let addr = if memory { addr } else { addr & 0xffff };
            Access { memory, write: write.then_some(data), posted: posted && write, size, cpu, seq, addr }
        })
    }

    fn message() -> impl Strategy<Value = NodeMsg> {
        prop_oneof![
            (signal(), any::<(u32, u64)>()).prop_map(|(signal, (first, set))| NodeMsg::Interrupt {
                signal,
                first,
                set
            }),
            any::<u8>().prop_map(|vector| NodeMsg::Eoi { vector }),
            access().prop_map(NodeMsg::Access),
            any::<(u32, u32, u64)>().prop_map(|(cpu, seq, data)| NodeMsg::Reply { cpu, seq, data }),
            any::<(u32, u64)>().prop_map(|(seq, t1)| NodeMsg::ClockPing { seq, t1 }),
            any::<(u32, [u64; 4])>().prop_map(|(seq, [t1, t2, t3, offset])| NodeMsg::ClockPong {
                seq,
                t1,
                t2,
                t3,
                offset
            }),
            any::<u64>().prop_map(|offset| NodeMsg::ClockAhead { offset }),
            Just(NodeMsg::Heartbeat),
            Just(NodeMsg::Leaving),
        ]
    }

    proptest! {
        #[test]
        fn every_message_survives_the_wire(message in message()) {
            prop_assert_eq!(NodeMsg::decode(message.encode().as_bytes()), Ok(message));
        }

        #[test]
        fn a_message_cut_short_or_grown_is_malformed(message in message(), extra in any::<u8>()) {
            let encoded = message.encode();
            let bytes = encoded.as_bytes();
            for len in 0..bytes.len() {
                prop_assert!(NodeMsg::decode(&bytes[..len]).is_err());
            }
            prop_assert!(NodeMsg::decode(&[bytes, &[extra]].concat()).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_are_the_one_form_of_a_message(
            kind in 0u8..12, rest in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..48),
        ) {
            let frame = [&[kind], &rest[..]].concat();
            if let Ok(message) = NodeMsg::decode(&frame) {
                let encoded = message.encode();
                prop_assert_eq!(encoded.as_bytes(), &frame[..]);
            }
        }
    }
}
