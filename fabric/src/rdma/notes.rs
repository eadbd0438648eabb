//! Notes: messages on the session, beside the queue pairs, that say how to connect these, and goodbye. After
//! a goodbye another hello may follow (`reconnect`).
//!
//! ```text
//! hello    0 kind=1  1 protocol  2 link layer  3 MTU  4 queue pair  8 packet number  12 LID  14 credits
//!         16 slot bytes  20 GID  36 end
//! ready    0 kind=2  1 protocol  2 end
//! goodbye  0 kind=3  1 protocol  2 messages  10 end         (integers are little-endian)
//! ```

/// The version of what passes between queue pairs and of these notes.
const PROTOCOL: u8 = 2;

/// Queue pair and packet numbers have 24 bits (IBA vol. 1, 9.2).
const BITS_24: u32 = 0xff_ffff;

/// One side's queue pair, for the other.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct Hello {
    /// `link_layer` of `struct ibv_port_attr`.
    pub(super) link_layer: u8,
    /// `enum ibv_mtu` of the port.
    pub(super) mtu: u8,
    /// The queue pair's number.
    pub(super) qpn: u32,
    /// The first packet's number.
    pub(super) psn: u32,
    /// The port's LID; 0 on Ethernet.
    pub(super) lid: u16,
    /// Credits that the other side begins with.
    pub(super) credits: u16,
    /// Bytes of the longest message.
    pub(super) slot: u32,
    /// The port's chosen GID.
    pub(super) gid: [u8; 16],
}

/// One frame on the session.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) enum Note {
    /// How to reach the sender's queue pair.
    Hello(Hello),
    /// The sender's queue pair is connected: messages may come.
    Ready,
    /// The sender leaves, or gives this connection up, after so many messages.
    Goodbye(u64),
}

/// For the fuzz targets: a note that decodes encodes to the same bytes.
#[cfg(fuzzing)]
pub fn fuzz(data: &[u8]) {
    if let Ok(note) = Note::decode(data) {
        assert_eq!(note.encode(), data);
    }
}

impl Note {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Note::Hello(hello) => {
                let mut out = vec![1, PROTOCOL, hello.link_layer, hello.mtu];
                out.extend(hello.qpn.to_le_bytes());
                out.extend(hello.psn.to_le_bytes());
                out.extend(hello.lid.to_le_bytes());
                out.extend(hello.credits.to_le_bytes());
                out.extend(hello.slot.to_le_bytes());
                out.extend(hello.gid);
                out
            }
            Note::Ready => vec![2, PROTOCOL],
            Note::Goodbye(messages) => [&[3, PROTOCOL][..], &messages.to_le_bytes()].concat(),
        }
    }

    /// Reads a note; `Err` is the end of a sentence that begins with who sent it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Note, String> {
        let malformed = || "it sent a malformed note about its RDMA connection".to_owned();
        let (&[kind, protocol], rest) = bytes.split_first_chunk::<2>().ok_or_else(malformed)?;
        if protocol != PROTOCOL {
            return Err(format!("it speaks version {protocol} of the RDMA protocol, this node {PROTOCOL}"));
        }
        match (kind, rest.len()) {
            (1, 34) => {
                let u16_at = |at: usize| u16::from_le_bytes([rest[at], rest[at + 1]]);
                let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
                let mut gid = [0; 16];
                gid.copy_from_slice(&rest[18..]);
                let hello = Hello {
                    link_layer: rest[0],
                    mtu: rest[1],
                    qpn: u32_at(2),
                    psn: u32_at(6),
                    lid: u16_at(10),
                    credits: u16_at(12),
                    slot: u32_at(14),
                    gid,
                };
                let is_valid = (1..=5).contains(&hello.mtu) && hello.qpn <= BITS_24 && hello.psn <= BITS_24;
                if is_valid { Ok(Note::Hello(hello)) } else { Err(malformed()) }
            }
            (2, 0) => Ok(Note::Ready),
            (3, 8) => {
                let messages = rest.first_chunk().ok_or_else(malformed)?;
                Ok(Note::Goodbye(u64::from_le_bytes(*messages)))
            }
            _ => Err(malformed()),
        }
    }
}

/// A packet number to begin with that nobody can guess.
pub(super) fn random_psn() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0u8) as u32 & BITS_24
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn notes_come_back(
            link_layer: u8, mtu in 1..=5u8, qpn in 0..=BITS_24, psn in 0..=BITS_24, lid: u16, credits: u16,
            slot: u32, gid: [u8; 16], messages: u64,
        ) {
            let hello = Hello { link_layer, mtu, qpn, psn, lid, credits, slot, gid };
            for note in [Note::Hello(hello), Note::Ready, Note::Goodbye(messages)] {
                prop_assert_eq!(Note::decode(&note.encode()), Ok(note));
            }
        }

        #[test]
        fn what_is_decoded_is_what_was_encoded(bytes in prop::collection::vec(0..6u8, 0..40)) {
            if let Ok(note) = Note::decode(&bytes) {
                prop_assert_eq!(note.encode(), bytes);
            }
        }
    }

    #[test]
    fn another_protocol_is_named() {
        assert!(Note::decode(&[2, 9]).unwrap_err().contains("version 9"));
    }
}
