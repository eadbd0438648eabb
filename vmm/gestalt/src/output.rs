//! Output to a terminal, a pipe or a file that may stand still: a bounded queue with a thread of its own.
//!
//! ```text
//! push ──> queue, MAX_WAITING bytes at most ──> thread ──> sink
//!    └──> left out and counted, from the first piece that does not fit until the queue is empty
//! ```
//!
//! A sink that stands still (Ctrl-S, a full pipe, an ssh whose network is gone) stops this thread and nothing
//! else. Whoever has pushed may wait until it is written, for as long as it likes.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Sender};
use nix::sys::signal::SigSet;

/// Bytes that may wait for a sink.
pub const MAX_WAITING: usize = 64 << 20;

/// The queue's end for whoever has something to write. Clones are the same queue.
#[derive(Clone, Debug)]
pub struct Output {
    queue: Sender<Vec<u8>>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    counts: Mutex<Counts>,
    /// Nothing waits any more.
    empty: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    /// Bytes that have been pushed and not been written.
    waiting: usize,
    /// Bytes that were left out since the queue was full.
    left_out: usize,
    /// Somebody has waited in vain since the queue was last empty.
    stands: bool,
}

impl Output {
    /// Starts the thread that writes to `sink`. `gap` is told, in the place where they would stand, how many
    /// bytes were left out.
    ///
    /// # Errors
    /// What the system says.
    pub fn start<W: Write + Send + 'static>(
        mut sink: W,
        mut gap: impl FnMut(&mut W, usize) + Send + 'static,
    ) -> io::Result<Output> {
        let (queue, pieces) = channel::unbounded::<Vec<u8>>();
        let output = Output { queue, state: Arc::default() };
        let state = output.state.clone();
        thread::Builder::new().name("output".into()).spawn(move || {
            // Signals are for others, whichever thread started this one. Fails only for a wrong set.
            let _ = SigSet::all().thread_block();
            let mut open = true;
            for piece in pieces {
                // A reader that went away (`| head`) does not stop the machine.
                open = open && sink.write_all(&piece).and_then(|()| sink.flush()).is_ok();
                if let Some(bytes) = state.written(piece.len())
                    && open
                {
                    gap(&mut sink, bytes);
                }
            }
        })?;
        Ok(output)
    }

    /// Queues bytes; never waits.
    pub fn push(&self, bytes: Vec<u8>) {
        let mut counts = base::lock(&self.state.counts);
        if counts.left_out > 0 || counts.waiting + bytes.len() > MAX_WAITING {
            counts.left_out += bytes.len();
            return;
        }
        counts.waiting += bytes.len();
        // Under the lock, so that what is counted is in the queue. The thread ends only after this sender.
        let _ = self.queue.send(bytes);
    }

    /// Queues bytes and waits until they have been written, but not for a sink that stands still: `patience`
    /// at most, and not at all once somebody has waited in vain, until all has been written.
    pub fn write(&self, bytes: Vec<u8>, patience: Duration) {
        self.push(bytes);
        if !base::lock(&self.state.counts).stands && !self.settle(patience) {
            base::lock(&self.state.counts).stands = true;
        }
    }

    /// Waits until nothing is queued, `timeout` at most; says whether everything was written.
    pub fn settle(&self, timeout: Duration) -> bool {
        let counts = base::lock(&self.state.counts);
        let waited = self.state.empty.wait_timeout_while(counts, timeout, |counts| counts.waiting > 0);
        let (counts, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        counts.waiting == 0
    }
}

impl State {
    /// So many bytes have gone to the sink; how many were left out, if the queue is empty now.
    fn written(&self, bytes: usize) -> Option<usize> {
        let mut counts = base::lock(&self.counts);
        counts.waiting -= bytes;
        if counts.waiting > 0 {
            return None;
        }
        counts.stands = false;
        self.empty.notify_all();
        Some(std::mem::take(&mut counts.left_out)).filter(|left_out| *left_out > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    /// Longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(30);

    fn told(sink: &mut impl Write, bytes: usize) {
        write!(sink, "({bytes} bytes left out)").unwrap();
    }

    #[test]
    fn output_is_written_in_order_and_finished() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start(writer, told).unwrap();
        output.push(b"one ".to_vec());
        output.push(b"two".to_vec());
        assert!(output.settle(PATIENCE));
        drop(output);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[test]
    fn a_sink_that_stands_still_blocks_nobody_and_what_was_left_out_is_told_in_its_place() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start(writer, told).unwrap();
        let piece = 1 << 20;
        let fit = MAX_WAITING / piece;
        (0..fit + 3).for_each(|_| output.push(vec![b'.'; piece]));
        // It would fit, but is newer than what did not.
        output.push(b"x".to_vec());
        assert!(!output.settle(Duration::ZERO));
        let begin = Instant::now();
        (0..100_000).for_each(|_| output.write(b"line".to_vec(), Duration::from_millis(1)));
        assert!(begin.elapsed() < Duration::from_secs(20), "each of them waits: {:?}", begin.elapsed());
        let rest = thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).unwrap();
            text
        });
        assert!(output.settle(PATIENCE));
        output.write(b"y".to_vec(), PATIENCE);
        drop(output);
        let text = String::from_utf8(rest.join().unwrap()).unwrap();
        let left_out = 3 * piece + 1 + 100_000 * 4;
        assert_eq!(text.trim_start_matches('.'), format!("({left_out} bytes left out)y"));
        assert_eq!(text.len() - text.trim_start_matches('.').len(), fit * piece);
    }

    #[test]
    fn a_line_is_written_when_the_call_returns() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start(writer, told).unwrap();
        output.write(b"last words".to_vec(), PATIENCE);
        // The writer is still open: this returns what is there.
        let mut bytes = [0; 20];
        assert_eq!(reader.read(&mut bytes).unwrap(), 10);
    }

    #[test]
    fn a_reader_that_went_away_stops_nothing() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = Output::start(writer, told).unwrap();
        output.push(b"x".to_vec());
        output.push(b"y".to_vec());
        assert!(output.settle(PATIENCE));
    }
}
