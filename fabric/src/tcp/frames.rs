//! Frames in a byte stream: cut in place, and opened if they are sealed.

use crate::MAX_FRAME;
use crate::secure::{Opener, SecureError, TAG};

/// Bytes in front of each frame: its length, little-endian.
pub(super) const HEADER: usize = 4;

/// Set in the header of what is no frame but the peer's count of frames received; only lanes that retain
/// frames have it.
pub(super) const ACKNOWLEDGES: u32 = 1 << 31;

/// The longest frame with its header and its seal.
const MAX_WIRE: usize = HEADER + MAX_FRAME + TAG;

/// Bytes of one connection's receive buffer: room for a partial frame of any length and three whole ones
/// of the longest kind. Only the pages that are really used cost memory, and a connection with little
/// traffic always uses the first ones.
const CAPACITY: usize = 256 * 1024;

/// The header of a frame of `len` bytes.
pub(super) fn header(len: usize) -> [u8; HEADER] {
    debug_assert!((1..=MAX_FRAME).contains(&len));
    (len as u32).to_le_bytes()
}

/// A violation of the framing. As text, the end of a sentence that begins with who sent it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum BadFrame {
    /// A length of zero, or more than [`MAX_FRAME`].
    #[error("it sent a frame of {0} bytes, which no node does")]
    Length(u32),
    /// A frame that was not sealed by the peer for this place.
    #[error("{0}")]
    Seal(SecureError),
}

/// The bytes of one connection that have arrived and are not delivered yet: `bytes[start..end]`.
pub(super) struct FrameBuffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    /// Opens the frames, if they are sealed.
    opener: Option<Opener>,
    /// Whether acknowledgements may come.
    acknowledges: bool,
    /// The last one.
    acknowledged: Option<u64>,
}

impl FrameBuffer {
    /// Frames are sealed if there is an `opener`; acknowledgements may come between them if `acknowledges`.
    pub(super) fn new(opener: Option<Opener>, acknowledges: bool) -> FrameBuffer {
        let bytes = vec![0; CAPACITY].into_boxed_slice();
        FrameBuffer { bytes, start: 0, end: 0, opener, acknowledges, acknowledged: None }
    }

    /// Begins again with a new connection.
    pub(super) fn restart(&mut self, opener: Option<Opener>) {
        (self.start, self.end, self.opener, self.acknowledged) = (0, 0, opener, None);
    }

    /// Whether acknowledgements may come.
    pub(super) fn acknowledges(&self) -> bool {
        self.acknowledges
    }

    /// How many frames the peer has received, if it has said so since the last call.
    pub(super) fn take_acknowledged(&mut self) -> Option<u64> {
        self.acknowledged.take()
    }

    /// Where to put what arrives next; never empty. [`FrameBuffer::filled`] says how much came.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// `n` bytes were put into [`FrameBuffer::space`].
    pub(super) fn filled(&mut self, n: usize) {
        assert!(n <= self.bytes.len() - self.end, "more bytes than there was space");
        self.end += n;
    }

    /// Whether part of a frame has arrived and the rest has not.
    pub(super) fn has_partial_frame(&self) -> bool {
        self.start != self.end
    }

    /// Gives every whole frame to `sink`, in order, and returns how many there were. Call it after each
    /// [`FrameBuffer::filled`]: it also makes the space for the next.
    ///
    /// # Errors
    /// [`BadFrame`]: the frames before it were delivered, and the rest of the stream has no meaning.
    pub(super) fn deliver(&mut self, mut sink: impl FnMut(&[u8])) -> Result<usize, BadFrame> {
        let mut frames = 0;
        let seal = if self.opener.is_some() { TAG } else { 0 };
        while let Some(header) = self.bytes[self.start..self.end].first_chunk::<HEADER>().copied() {
            let word = u32::from_le_bytes(header);
            let acknowledges = self.acknowledges && word == ACKNOWLEDGES | size_of::<u64>() as u32;
            let len = if acknowledges { word & !ACKNOWLEDGES } else { word };
            if len == 0 || len as usize > MAX_FRAME {
                return Err(BadFrame::Length(len));
            }
            let (at, whole) = (self.start + HEADER, HEADER + len as usize + seal);
            if self.end - self.start < whole {
                break;
            }
            // Advanced first, so that a sink that panics and is caught does not see the frame twice.
            self.start += whole;
            let body = &mut self.bytes[at..self.start];
            let body = match &mut self.opener {
                None => body,
                Some(opener) => opener.open(&header, body).map_err(BadFrame::Seal)?,
            };
            if acknowledges {
                self.acknowledged = body.first_chunk().copied().map(u64::from_le_bytes);
                continue;
            }
            sink(body);
            frames += 1;
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.end < MAX_WIRE {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        Ok(frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `stream` in pieces of at most `chunks` bytes (cyclic), as a socket would, and returns the
    /// frames.
    fn split(stream: &[u8], chunks: &[usize]) -> Result<Vec<Vec<u8>>, BadFrame> {
        let (mut buffer, mut out, mut rest) = (FrameBuffer::new(None, false), Vec::new(), stream);
        for chunk in chunks.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let space = buffer.space();
            assert!(!space.is_empty(), "a receive into no space would look like the end of the stream");
            let n = rest.len().min(*chunk).min(space.len());
            space[..n].copy_from_slice(&rest[..n]);
            rest = &rest[n..];
            buffer.filled(n);
            let before = out.len();
            let frames = buffer.deliver(|frame| out.push(frame.to_vec()))?;
            assert_eq!(frames, out.len() - before);
        }
        assert!(!buffer.has_partial_frame());
        Ok(out)
    }

    fn stream(frames: &[Vec<u8>]) -> Vec<u8> {
        frames.iter().flat_map(|f| header(f.len()).into_iter().chain(f.iter().copied())).collect()
    }

    /// Frame lengths with the interesting ones over-represented.
    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![4 => 1..64usize, 2 => 4000..4200usize, 1 => 1..=MAX_FRAME, 1 => Just(MAX_FRAME), 1 => Just(1)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_chunking_of_the_stream_yields_the_same_frames(
            lengths in prop::collection::vec(length(), 1..40),
            chunks in prop::collection::vec(prop_oneof![1..8usize, 1..70_000usize, Just(usize::MAX)], 1..20),
        ) {
            let frames: Vec<Vec<u8>> =
                lengths.iter().enumerate().map(|(i, n)| (0..*n).map(|j| (i * 31 + j) as u8).collect()).collect();
            // All of the smallest pieces would make the slow way through a megabyte, one byte at a time.
            let chunks: Vec<usize> = chunks.iter().copied().chain([3000]).collect();
            prop_assert_eq!(split(&stream(&frames), &chunks).unwrap(), frames);
        }

        #[test]
        fn a_bad_length_is_found_after_the_frames_before_it(
            before in prop::collection::vec(length(), 0..5),
            bad in prop_oneof![Just(0u32), Just(MAX_FRAME as u32 + 1), MAX_FRAME as u32 + 1..=u32::MAX],
            chunk in 1..5000usize,
        ) {
            let frames: Vec<Vec<u8>> = before.iter().map(|n| vec![7; *n]).collect();
            let mut bytes = stream(&frames);
            bytes.extend(bad.to_le_bytes());
            bytes.extend([1; 100]);
            prop_assert_eq!(split(&bytes, &[chunk]), Err(BadFrame::Length(bad)));
        }
    }

    #[test]
    fn single_bytes_yield_whole_frames() {
        let frames = vec![vec![1], vec![2; 300], vec![3; 5]];
        assert_eq!(split(&stream(&frames), &[1]).unwrap(), frames);
    }
}
