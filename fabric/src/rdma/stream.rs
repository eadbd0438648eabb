//! The stream of a lane: frames as bytes, bytes as messages, and back.
//!
//! What is sent to one peer on one lane is one stream of bytes: each frame's length (`u32`, little-endian,
//! `1..=MAX_FRAME`, and a byte more on one of several rails), then its bytes, as over TCP. A message carries
//! the next piece of it, usually one or a few whole frames, which are delivered from where the adapter put
//! them; only a frame that was cut is copied together.

use crate::MAX_FRAME;
use crate::transport::ENVELOPE;

/// Bytes in front of each frame.
pub(super) const HEADER: usize = 4;

/// The header of a frame of `len` bytes.
pub(super) fn header(len: usize) -> [u8; HEADER] {
    debug_assert!((1..=MAX_FRAME + ENVELOPE).contains(&len));
    (len as u32).to_le_bytes()
}

/// A length that no node sends: zero, or more than [`MAX_FRAME`] and [`ENVELOPE`].
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(super) struct BadLength(pub(super) u32);

/// What one peer's messages make on one lane.
#[derive(Default)]
pub(super) struct Reader {
    /// A frame of which the end has not arrived, with as much of its header as there is.
    begun: Vec<u8>,
}

impl Reader {
    /// Gives the frames that `message` completes to `sink`, in order; how many.
    ///
    /// # Errors
    /// [`BadLength`] at a header that cannot be; the frames before it were delivered, and the rest of the
    /// stream has no meaning.
    pub(super) fn deliver(
        &mut self,
        message: &[u8],
        mut sink: impl FnMut(&[u8]),
    ) -> Result<usize, BadLength> {
        let (mut rest, mut frames) = (message, 0);
        if !self.begun.is_empty() {
            self.take(HEADER, &mut rest);
            let Some(len) = length(&self.begun)? else { return Ok(0) };
            self.take(HEADER + len, &mut rest);
            if self.begun.len() < HEADER + len {
                return Ok(0);
            }
            sink(&self.begun[HEADER..]);
            frames += 1;
            self.begun.clear();
        }
        while let Some(len) = length(rest)? {
            let Some((frame, after)) = rest[HEADER..].split_at_checked(len) else { break };
            sink(frame);
            frames += 1;
            rest = after;
        }
        self.begun.extend_from_slice(rest);
        Ok(frames)
    }

    /// Moves bytes from `rest` until `begun` has `want`.
    fn take(&mut self, want: usize, rest: &mut &[u8]) {
        let (taken, left) = rest.split_at(rest.len().min(want.saturating_sub(self.begun.len())));
        self.begun.extend_from_slice(taken);
        *rest = left;
    }
}

/// The length in a frame's header, once the header is whole.
fn length(bytes: &[u8]) -> Result<Option<usize>, BadLength> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    match u32::from_le_bytes(*header) {
        len if len == 0 || len as usize > MAX_FRAME + ENVELOPE => Err(BadLength(len)),
        len => Ok(Some(len as usize)),
    }
}

/// The stream `data[1..]`, in messages of `data[0] + 1` bytes, gives the frames that are in it as a whole.
#[cfg(fuzzing)]
pub fn fuzz(data: &[u8]) {
    let Some((&size, stream)) = data.split_first() else { return };
    let frames = |size: usize| {
        let (mut reader, mut frames) = (Reader::default(), Vec::new());
        let read = stream
            .chunks(size)
            .try_for_each(|message| reader.deliver(message, |frame| frames.push(frame.to_vec())).map(drop));
        (frames, read)
    };
    assert_eq!(frames(usize::from(size) + 1), frames(stream.len().max(1)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Cuts `stream` into messages of at most `sizes` bytes (cyclic) and reads them.
    fn read(stream: &[u8], sizes: &[usize]) -> Result<Vec<Vec<u8>>, BadLength> {
        let (mut reader, mut out, mut rest) = (Reader::default(), Vec::new(), stream);
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (message, after) = rest.split_at(rest.len().min(*size));
            rest = after;
            let before = out.len();
            let frames = reader.deliver(message, |frame| out.push(frame.to_vec()))?;
            assert_eq!(frames, out.len() - before);
        }
        assert!(reader.begun.is_empty());
        Ok(out)
    }

    fn stream(frames: &[Vec<u8>]) -> Vec<u8> {
        frames.iter().flat_map(|f| header(f.len()).into_iter().chain(f.iter().copied())).collect()
    }

    fn length() -> impl Strategy<Value = usize> {
        prop_oneof![4 => 1..64usize, 2 => 4000..4400usize, 1 => 1..=MAX_FRAME, 1 => Just(MAX_FRAME), 1 => Just(1)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_cutting_of_the_stream_yields_the_same_frames(
            lengths in prop::collection::vec(length(), 1..20),
            sizes in prop::collection::vec(prop_oneof![1..8usize, 1..5000usize, Just(usize::MAX)], 1..10),
        ) {
            let frames: Vec<Vec<u8>> =
                lengths.iter().enumerate().map(|(i, n)| (0..*n).map(|j| (i * 31 + j) as u8).collect()).collect();
            let sizes: Vec<usize> = sizes.iter().copied().chain([3000]).collect();
            prop_assert_eq!(read(&stream(&frames), &sizes).unwrap(), frames);
        }

        #[test]
        fn a_bad_length_is_found_wherever_it_is_cut(
            before in prop::collection::vec(length(), 0..5),
            bad in prop_oneof![Just(0u32), Just(MAX_FRAME as u32 + 2), MAX_FRAME as u32 + 2..=u32::MAX],
            size in 1..5000usize,
        ) {
            let frames: Vec<Vec<u8>> = before.iter().map(|n| vec![7; *n]).collect();
            let mut bytes = stream(&frames);
            bytes.extend(bad.to_le_bytes());
            bytes.extend([1; 100]);
            prop_assert_eq!(read(&bytes, &[size]), Err(BadLength(bad)));
        }
    }
}
