//! Sending again over another rail: frames that are kept until the peer acknowledges them, and when to
//! acknowledge those that came.
//!
//! ```text
//!  first             unsent                  next      numbers of frames, from 0 at the lane's beginning
//!    ├── sent, not ────┼── not sent yet ───────┤
//!    │   acknowledged  │                       │
//! ```
//!
//! The bytes of pages change once they are sent, so a frame is copied here, and goes to the rail from here.
//! Only lanes with more than one rail do so: those of TCP ([`crate::tcp`]), and those of transports that are
//! rails of one ([`crate::rails`]). `docs/decisions/two-failovers.md` says why there are two.

use std::collections::VecDeque;

/// A lane acknowledges at least every so many frames, and every so many bytes.
const ACKNOWLEDGE_FRAMES: u64 = 64;
const ACKNOWLEDGE_BYTES: u64 = 128 * 1024;

/// Bytes before each frame that is kept: its length.
const HEADER: usize = 4;

/// The frames of one lane to one peer, from the first that the peer is not known to have.
#[derive(Default)]
pub(crate) struct Retained {
    /// Each frame with its header.
    bytes: VecDeque<u8>,
    /// The number of the first frame in `bytes`.
    first: u64,
    /// The number of the first frame that the present connection has not been given, and where it begins.
    unsent: (u64, usize),
    /// The number of the next frame.
    next: u64,
}

/// An acknowledgement of frames that were never sent. As text, the end of a sentence that begins with who
/// sent it.
#[derive(Copy, Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("it says that it has frames which were never sent to it")]
pub(crate) struct NeverSent;

/// Frames that were received and not acknowledged yet.
#[derive(Copy, Clone, Debug, Default)]
pub(crate) struct Unacknowledged {
    frames: u64,
    bytes: u64,
}

impl Unacknowledged {
    /// Adds frames; whether they are all to be acknowledged now, after which there are none.
    pub(crate) fn add(&mut self, frames: u64, bytes: u64) -> bool {
        (self.frames, self.bytes) = (self.frames + frames, self.bytes + bytes);
        let now = self.frames >= ACKNOWLEDGE_FRAMES || self.bytes >= ACKNOWLEDGE_BYTES;
        if now {
            *self = Unacknowledged::default();
        }
        now
    }
}

impl Retained {
    /// Appends a frame of `len` bytes.
    pub(crate) fn push(&mut self, len: usize, parts: &[&[u8]]) {
        self.bytes.extend((len as u32).to_le_bytes());
        parts.iter().for_each(|part| self.bytes.extend(*part));
        self.next += 1;
    }

    /// Bytes that are kept.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The frame that the connection is to be given next, in two parts.
    pub(crate) fn unsent(&self) -> Option<[&[u8]; 2]> {
        let (number, at) = self.unsent;
        let len = HEADER + self.length_at(at)?;
        debug_assert!(number < self.next);
        let (front, back) = self.bytes.as_slices();
        Some(match at.checked_sub(front.len()) {
            Some(at) => [&[], &back[at + HEADER..at + len]],
            None => {
                let here = len.min(front.len() - at);
                let (a, b) = (&front[at..at + here], &back[..len - here]);
                // The header may lie across both.
                match a.get(HEADER..) {
                    Some(body) => [body, b],
                    None => [&[], &b[HEADER - a.len()..]],
                }
            }
        })
    }

    /// It has been given [`Retained::unsent`].
    pub(crate) fn sent(&mut self) {
        if let Some(len) = self.length_at(self.unsent.1) {
            self.unsent = (self.unsent.0 + 1, self.unsent.1 + HEADER + len);
        }
    }

    /// The peer has the first `count` frames of the lane: they are forgotten.
    pub(crate) fn acknowledge(&mut self, count: u64) -> Result<(), NeverSent> {
        if count > self.unsent.0 {
            return Err(NeverSent);
        }
        // Acknowledgements of an earlier connection may come late.
        while self.first < count {
            let whole = HEADER + self.length_at(0).ok_or(NeverSent)?;
            self.bytes.drain(..whole);
            self.first += 1;
            self.unsent.1 -= whole;
        }
        Ok(())
    }

    /// A new connection begins, to a peer that has the first `count` frames: the others are to be sent again.
    pub(crate) fn rewind(&mut self, count: u64) -> Result<(), NeverSent> {
        if count < self.first {
            return Err(NeverSent);
        }
        self.acknowledge(count)?;
        self.unsent = (self.first, 0);
        Ok(())
    }

    fn length_at(&self, at: usize) -> Option<usize> {
        let mut length = [0; HEADER];
        for (byte, at) in length.iter_mut().zip(at..) {
            *byte = *self.bytes.get(at)?;
        }
        Some(u32::from_le_bytes(length) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(retained: &mut Retained) -> Option<Vec<u8>> {
        let frame = retained.unsent()?.concat();
        retained.sent();
        Some(frame)
    }

    #[test]
    fn frames_come_in_order_and_again_after_a_rewind_from_the_first_that_is_missing() {
        let mut retained = Retained::default();
        for i in 0..5u8 {
            retained.push(3, &[&[i], &[i, i]]);
        }
        for i in 0..4 {
            assert_eq!(take(&mut retained), Some(vec![i; 3]));
        }
        retained.acknowledge(2).unwrap();
        retained.rewind(3).unwrap();
        assert_eq!(take(&mut retained), Some(vec![3; 3]));
        assert_eq!(take(&mut retained), Some(vec![4; 3]));
        assert_eq!(take(&mut retained), None);
        retained.acknowledge(5).unwrap();
        assert_eq!(retained.len(), 0);
    }

    #[test]
    fn what_was_never_sent_or_is_gone_cannot_be_acknowledged_or_asked_for() {
        let mut retained = Retained::default();
        retained.push(1, &[&[1]]);
        assert_eq!(retained.acknowledge(1), Err(NeverSent), "not given to the connection yet");
        take(&mut retained);
        assert_eq!(retained.rewind(2), Err(NeverSent));
        retained.acknowledge(1).unwrap();
        assert_eq!(retained.acknowledge(0), Ok(()), "a late one says nothing new");
        assert_eq!(retained.rewind(0), Err(NeverSent), "it said before that it has it");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a list of frames: whatever the order of events, exactly the frames from the peer's count
        /// on come.
        #[test]
        fn a_peer_gets_every_frame_once_whatever_happens(
            events in prop::collection::vec((0u8..5, 1usize..40), 1..200),
        ) {
            let (mut retained, mut sent, mut got, mut acknowledged) = (Retained::default(), 0u64, Vec::new(), 0u64);
            for (event, size) in events {
                match event {
                    0 | 1 => {
                        retained.push(size, &[&vec![sent as u8; size]]);
                        sent += 1;
                    }
                    2 => got.extend(take(&mut retained)),
                    3 => {
                        // Everything or something of what it has.
                        acknowledged = acknowledged.max((got.len() as u64).saturating_sub(size as u64 % 3));
                        retained.acknowledge(acknowledged).unwrap();
                    }
                    _ => {
                        // The last of what was given to the connection is lost with it.
                        got.truncate(got.len().saturating_sub(size % 4).max(acknowledged as usize));
                        retained.rewind(got.len() as u64).unwrap();
                        acknowledged = got.len() as u64;
                    }
                }
            }
            while let Some(frame) = take(&mut retained) {
                got.push(frame);
            }
            prop_assert_eq!(got.len() as u64, sent);
            prop_assert!(got.iter().zip(0u64..).all(|(frame, i)| frame.iter().all(|byte| *byte == i as u8)));
        }
    }
}
