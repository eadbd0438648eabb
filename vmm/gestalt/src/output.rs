//! Output to a terminal, a pipe or a file that may stand still: a bounded queue with a thread of its own.
//!
//! ```text
//! push ──> queue, MAX_WAITING bytes at most ──> thread ──> sink
//!    └──> left out and counted, from the first piece that does not fit until the queue is empty;
//!         a last line has a reserve of its own, behind what tells how much was left out
//! ```
//!
//! A sink that stands still (Ctrl-S, a full pipe, an ssh whose network is gone) stops this thread and nothing
//! else. Whoever has pushed may wait until it is written, for as long as it likes. A sink that is merely slow
//! takes a little at a time, and each time counts: only one that stands is given up.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Sender};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;

/// Bytes that may wait for a sink.
pub const MAX_WAITING: usize = 64 << 20;
/// Bytes that last lines may take beyond [`MAX_WAITING`].
const RESERVE: usize = 64 << 10;
/// Bytes that are written at once: about a second's on a serial line of 9600 baud, where a write returns only
/// when the line has taken nearly all of it.
const AT_ONCE: usize = 1 << 10;

/// The queue's end for whoever has something to write. Clones are the same queue.
#[derive(Clone, Debug)]
pub struct Output {
    queue: Sender<Piece>,
    state: Arc<State>,
}

/// What was pushed at once.
#[derive(Debug)]
struct Piece {
    /// Bytes that were left out just before it.
    left_out: usize,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    counts: Mutex<Counts>,
    /// The sink has taken something, or nothing waits any more.
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    /// Bytes that have been pushed and not been written.
    waiting: usize,
    /// How often the sink has taken something.
    taken: u64,
    /// Bytes that were left out since the queue was full.
    left_out: usize,
    /// How much was left out is being told to the sink.
    telling: bool,
    /// Somebody has waited in vain since the queue was last empty.
    stands: bool,
}

impl Counts {
    fn finished(&self) -> bool {
        self.waiting == 0 && self.left_out == 0 && !self.telling
    }
}

impl Output {
    /// Starts the thread that writes to `sink`. `gap` is told how many bytes were left out, and makes the text
    /// that stands in their place.
    ///
    /// # Errors
    /// What the system says.
    pub fn start<W: Write + AsFd + Send + 'static>(
        sink: W,
        gap: impl FnMut(usize) -> Vec<u8> + Send + 'static,
    ) -> io::Result<Output> {
        let (queue, pieces) = channel::unbounded::<Piece>();
        let output = Output { queue, state: Arc::default() };
        let mut writer = Writer { sink, gap, state: output.state.clone(), open: true };
        thread::Builder::new().name("output".into()).spawn(move || {
            // Signals are for others, whichever thread started this one. Fails only for a wrong set.
            let _ = SigSet::all().thread_block();
            pieces.into_iter().for_each(|piece| writer.piece(&piece));
        })?;
        Ok(output)
    }

    /// Queues bytes; never waits.
    pub fn push(&self, bytes: Vec<u8>) {
        self.enqueue(&mut base::lock(&self.state.counts), bytes);
    }

    /// Queues bytes and waits until they have been written, but not for a sink that stands still or is slow:
    /// `limit` at most, and not at all once somebody has waited in vain, until all has been written.
    pub fn write(&self, bytes: Vec<u8>, limit: Duration) {
        let mut counts = base::lock(&self.state.counts);
        self.enqueue(&mut counts, bytes);
        self.attend(counts, limit);
    }

    /// [`Output::write`] for a line after which no more is expected: queued even if the queue is full.
    pub fn write_last(&self, bytes: Vec<u8>, limit: Duration) {
        let mut counts = base::lock(&self.state.counts);
        if counts.waiting + bytes.len() <= MAX_WAITING + RESERVE {
            self.send(&mut counts, bytes);
        } else {
            counts.left_out += bytes.len();
        }
        self.attend(counts, limit);
    }

    /// Waits until nothing is queued, as long as the sink takes something within each `patience`; says whether
    /// everything was written.
    pub fn settle(&self, patience: Duration) -> bool {
        self.wait(base::lock(&self.state.counts), patience, Duration::MAX).finished()
    }

    /// Waits until nothing is queued, `limit` at most; says whether everything was written.
    pub fn settle_within(&self, limit: Duration) -> bool {
        self.wait(base::lock(&self.state.counts), limit, limit).finished()
    }

    fn enqueue(&self, counts: &mut Counts, bytes: Vec<u8>) {
        if counts.left_out > 0 || counts.waiting + bytes.len() > MAX_WAITING {
            counts.left_out += bytes.len();
            return;
        }
        self.send(counts, bytes);
    }

    /// Under the lock, so that what is counted is in the queue.
    fn send(&self, counts: &mut Counts, bytes: Vec<u8>) {
        counts.waiting += bytes.len();
        let left_out = std::mem::take(&mut counts.left_out);
        // The thread ends only after this sender.
        let _ = self.queue.send(Piece { left_out, bytes });
    }

    fn attend(&self, counts: MutexGuard<'_, Counts>, limit: Duration) {
        if !counts.stands {
            let mut counts = self.wait(counts, limit, limit);
            counts.stands = !counts.finished();
        }
    }

    /// Waits until all is written, or nothing has been taken for `patience`, or `limit` is over.
    fn wait<'a>(
        &'a self,
        mut counts: MutexGuard<'a, Counts>,
        patience: Duration,
        limit: Duration,
    ) -> MutexGuard<'a, Counts> {
        let mut clock = Clock::new(counts.taken, Instant::now());
        while !counts.finished() {
            let left = clock.left(counts.taken, Instant::now(), patience, limit);
            if left.is_zero() {
                break;
            }
            let waited = self.state.moved.wait_timeout(counts, left);
            (counts, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        counts
    }
}

/// How long a waiter has waited, altogether and since the sink last took something.
#[derive(Debug)]
struct Clock {
    begin: Instant,
    moved: Instant,
    taken: u64,
}

impl Clock {
    fn new(taken: u64, now: Instant) -> Clock {
        Clock { begin: now, moved: now, taken }
    }

    /// How much longer to wait if nothing moves.
    fn left(&mut self, taken: u64, now: Instant, patience: Duration, limit: Duration) -> Duration {
        if taken != self.taken {
            (self.taken, self.moved) = (taken, now);
        }
        patience.saturating_sub(now - self.moved).min(limit.saturating_sub(now - self.begin))
    }
}

/// The thread's side.
struct Writer<W, G> {
    sink: W,
    gap: G,
    state: Arc<State>,
    /// The sink may still take something.
    open: bool,
}

impl<W: Write + AsFd, G: FnMut(usize) -> Vec<u8>> Writer<W, G> {
    fn piece(&mut self, piece: &Piece) {
        if piece.left_out > 0 {
            self.tell(piece.left_out);
        }
        let left = self.put(&piece.bytes, |state, bytes| state.taken(bytes));
        if left > 0 {
            // Nobody gets it.
            self.state.taken(left);
        }
        if let Some(left_out) = self.state.last_gap() {
            self.tell(left_out);
            self.state.told();
        }
    }

    fn tell(&mut self, left_out: usize) {
        if self.open {
            let text = (self.gap)(left_out);
            self.put(&text, |state, _| state.taken(0));
        }
    }

    /// Writes a little at a time and reports each; how many bytes the sink did not take.
    fn put(&mut self, bytes: &[u8], taken: impl Fn(&State, usize)) -> usize {
        let mut rest = bytes;
        while self.open && !rest.is_empty() {
            let some = &rest[..rest.len().min(AT_ONCE)];
            let written = persist(&mut self.sink, |sink| sink.write(some))
                .and_then(|length| persist(&mut self.sink, |sink| sink.flush()).map(|()| length));
            match written {
                Ok(0) => break,
                Ok(length) => {
                    taken(&self.state, length);
                    rest = &rest[length..];
                }
                Err(error) => {
                    // A reader that went away (`| head`, a terminal that was hung up) does not stop the
                    // machine. Anything else, a full disk for one, may be over when the next piece comes.
                    let gone = [Errno::EPIPE, Errno::EBADF, Errno::EIO].map(|errno| Some(errno as i32));
                    self.open = !gone.contains(&error.raw_os_error());
                    break;
                }
            }
        }
        rest.len()
    }
}

/// Does something with a sink that may be interrupted, or not be ready: whoever shares a terminal or a pipe
/// may have made it non-blocking.
fn persist<W: AsFd, T>(sink: &mut W, mut act: impl FnMut(&mut W) -> io::Result<T>) -> io::Result<T> {
    loop {
        match act(sink) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(sink.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(_) => return Err(error),
                }
            }
            done => return done,
        }
    }
}

impl State {
    /// So many bytes wait no longer.
    fn taken(&self, bytes: usize) {
        let mut counts = base::lock(&self.counts);
        counts.waiting -= bytes;
        counts.taken += 1;
        self.moved(counts);
    }

    /// How many bytes were left out, if the queue is empty now: nobody is told that all is written before
    /// [`State::told`].
    fn last_gap(&self) -> Option<usize> {
        let mut counts = base::lock(&self.counts);
        if counts.waiting > 0 || counts.left_out == 0 {
            return None;
        }
        counts.telling = true;
        Some(std::mem::take(&mut counts.left_out))
    }

    fn told(&self) {
        let mut counts = base::lock(&self.counts);
        counts.telling = false;
        self.moved(counts);
    }

    fn moved(&self, mut counts: MutexGuard<'_, Counts>) {
        if counts.finished() {
            counts.stands = false;
        }
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    /// Longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(30);

    fn told(bytes: usize) -> Vec<u8> {
        format!("({bytes} bytes left out)").into_bytes()
    }

    /// More than a pipe takes while nobody reads.
    const LARGE: usize = 1 << 20;

    /// Fills the queue, and leaves out [`LARGE`] bytes; how many were queued.
    fn fill(output: &Output) -> usize {
        (0..MAX_WAITING / LARGE + 1).for_each(|_| output.push(vec![b'.'; LARGE]));
        MAX_WAITING
    }

    fn all(mut reader: io::PipeReader) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        })
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

    #[test]
    fn whoever_waits_for_a_slow_sink_gives_up_only_when_it_stands() {
        let (begin, second) = (Instant::now(), Duration::from_secs(1));
        let mut clock = Clock::new(0, begin);
        for n in 1..100 {
            // Half a second before the end of patience, something is taken.
            let now = begin + n * 3 * second / 2;
            assert_eq!(clock.left(u64::from(n) - 1, now, 2 * second, Duration::MAX), second / 2);
            assert_eq!(clock.left(u64::from(n), now, 2 * second, Duration::MAX), 2 * second);
        }
        let now = begin + 99 * 3 * second / 2;
        assert_eq!(clock.left(99, now + 2 * second, 2 * second, Duration::MAX), Duration::ZERO);
        // Somebody who has a limit does not wait for a slow sink either.
        assert_eq!(clock.left(100, now, 2 * second, 100 * second), Duration::ZERO);
    }

    #[test]
    fn whatever_a_slow_sink_takes_counts_though_it_has_not_taken_the_whole_piece() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start(writer, told).unwrap();
        let mut left = LARGE;
        output.push(vec![b'.'; left]);
        let mut bytes = [0; 4096];
        while left > 256 << 10 {
            reader.read_exact(&mut bytes).unwrap();
            left -= bytes.len();
            let counts = base::lock(&output.state.counts);
            // What has been read and is not yet counted is about to be.
            let missing = |counts: &mut Counts| counts.waiting > left;
            let (counts, over) = output.state.moved.wait_timeout_while(counts, PATIENCE, missing).unwrap();
            assert!(!over.timed_out(), "{left} bytes are unread, and {} wait", counts.waiting);
        }
        let rest = all(reader);
        assert!(output.settle(PATIENCE));
        output.write(b"last words".to_vec(), PATIENCE);
        drop(output);
        assert!(rest.join().unwrap().ends_with(".last words"));
    }

    #[test]
    fn a_last_line_has_room_in_a_full_queue_and_stands_behind_what_was_left_out() {
        let (reader, writer) = io::pipe().unwrap();
        let output = Output::start(writer, told).unwrap();
        let fit = fill(&output);
        output.write_last(b"last words".to_vec(), Duration::ZERO);
        // The reserve has an end as well.
        output.write_last(vec![b'z'; LARGE], Duration::ZERO);
        let rest = all(reader);
        assert!(output.settle(PATIENCE));
        drop(output);
        let text = rest.join().unwrap();
        assert_eq!(&text[fit..], format!("({LARGE} bytes left out)last words({LARGE} bytes left out)"));
    }

    #[test]
    fn a_pipe_that_does_not_block_gets_everything() {
        let (reader, writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let output = Output::start(writer, told).unwrap();
        output.push(vec![b'.'; LARGE]);
        output.push(b"x".to_vec());
        // It is full now, or will be: nobody reads.
        assert!(!output.settle(Duration::ZERO));
        let rest = all(reader);
        assert!(output.settle(PATIENCE));
        drop(output);
        let text = rest.join().unwrap();
        assert_eq!((text.len(), text.ends_with(".x")), (LARGE + 1, true));
    }

    /// A disk that is full for the first write.
    struct Full(io::PipeWriter, bool);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if std::mem::take(&mut self.1) { Err(Errno::ENOSPC.into()) } else { self.0.write(bytes) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl AsFd for Full {
        fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    #[test]
    fn a_disk_that_was_full_loses_that_piece_alone() {
        let (reader, writer) = io::pipe().unwrap();
        let output = Output::start(Full(writer, true), told).unwrap();
        output.push(b"lost".to_vec());
        output.push(b"kept".to_vec());
        assert!(output.settle(PATIENCE));
        drop(output);
        assert_eq!(all(reader).join().unwrap(), "kept");
    }

    #[test]
    fn nothing_is_finished_before_it_has_been_told_what_was_left_out() {
        let (reader, writer) = io::pipe().unwrap();
        let (begun, begins) = channel::bounded(0);
        let (go, goes) = channel::bounded::<()>(0);
        let gap = move |bytes| {
            begun.send(()).unwrap();
            goes.recv().unwrap();
            told(bytes)
        };
        let output = Output::start(writer, gap).unwrap();
        let fit = fill(&output);
        let rest = all(reader);
        begins.recv_timeout(PATIENCE).unwrap();
        assert!(!output.settle(Duration::ZERO));
        go.send(()).unwrap();
        assert!(output.settle(PATIENCE));
        drop(output);
        assert_eq!(&rest.join().unwrap()[fit..], format!("({LARGE} bytes left out)"));
    }
}
