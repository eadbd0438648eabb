//! The operator's terminal: raw mode that is always undone, the escape key, output that never blocks.
//!
//! In raw mode every key goes to the guest, Ctrl-C included. Ctrl-] is ours: Ctrl-] then `q` ends the
//! machine, Ctrl-] twice sends one Ctrl-] to the guest, Ctrl-] and anything else sends both.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{self, Receiver, Sender};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// What a hint says about leaving.
pub const ESCAPE_HINT: &str = "press Ctrl-] then q to end the machine";
/// The key that is ours, ASCII GS.
const ESCAPE: u8 = 0x1d;
/// Guest output that may wait for a slow terminal, in bytes; what comes after that is dropped, and said so.
const MAX_WAITING: usize = 64 << 20;
/// How much is read from the terminal at once, in bytes.
const PIECE: usize = 4096;

static RAW: AtomicBool = AtomicBool::new(false);
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

fn saved() -> MutexGuard<'static, Option<Termios>> {
    base::lock(&SAVED)
}

/// Switches standard input to raw mode if it is a terminal; says whether it did.
///
/// # Errors
/// What the terminal says.
pub fn enter_raw() -> io::Result<bool> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Ok(false);
    }
    let mut slot = saved();
    if slot.is_none() {
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        *slot = Some(before);
        RAW.store(true, Ordering::Release);
    }
    Ok(true)
}

/// Puts the terminal back as [`enter_raw`] found it; does nothing otherwise.
pub fn leave_raw() {
    if let Some(before) = saved().take() {
        // Fails if the terminal is gone, and then there is nothing to put back.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
        RAW.store(false, Ordering::Release);
    }
}

/// From now on a panic of any thread puts the terminal back and ends the process: a coordinator that has lost
/// a thread cannot be trusted with a machine, and its nodes end with it.
pub fn end_on_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        leave_raw();
        usual(panic);
        std::process::exit(101);
    }));
}

/// Leaves raw mode when dropped, so that every way out of a function does.
#[derive(Debug)]
pub struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        leave_raw();
    }
}

/// Writes a line to standard error, in one piece, whatever mode the terminal is in.
pub fn say(line: &str) {
    // With stderr closed there is nobody to tell.
    let _ = Stderr.write_all(format!("{line}\n").as_bytes());
}

/// Standard error for whole lines: a raw terminal needs a carriage return with every newline.
#[derive(Copy, Clone, Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if RAW.load(Ordering::Acquire) {
            stderr.write_all(&with_returns(bytes))?;
        } else {
            stderr.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn with_returns(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 8);
    for byte in bytes {
        if *byte == b'\n' {
            out.push(b'\r');
        }
        out.push(*byte);
    }
    out
}

/// Finds the escape key in what is typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    pending: bool,
}

impl EscapeFilter {
    /// What of `typed` is for the guest, and whether the operator wants to leave; what follows the leaving
    /// key is dropped.
    pub fn feed(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len() + 1);
        for byte in typed {
            match (std::mem::take(&mut self.pending), *byte) {
                (true, b'q' | b'Q') => return (out, true),
                (true, ESCAPE) => out.push(ESCAPE),
                (true, other) => out.extend([ESCAPE, other]),
                (false, ESCAPE) => self.pending = true,
                (false, other) => out.push(other),
            }
        }
        (out, false)
    }
}

/// Reads standard input in a thread of its own, which lives as long as the process: a blocked read cannot be
/// called off. `leave` is called when the escape key asks for it; only a terminal has one.
///
/// # Errors
/// What the system says.
pub fn read_input(typed: Sender<Vec<u8>>, leave: impl Fn() + Send + 'static) -> io::Result<()> {
    let terminal = io::stdin().is_terminal();
    thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut filter = EscapeFilter::default();
        let mut piece = [0; PIECE];
        loop {
            let length = match io::stdin().read(&mut piece) {
                // A pipe's end is the end of typing; the machine goes on.
                Ok(0) => return,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::warn!("standard input cannot be read any more: {error}");
                    return;
                }
            };
            let (bytes, left) =
                if terminal { filter.feed(&piece[..length]) } else { (piece[..length].to_vec(), false) };
            if !bytes.is_empty() && typed.send(bytes).is_err() {
                return;
            }
            if left {
                leave();
            }
        }
    })?;
    Ok(())
}

/// The guest's output on its way to standard output. A terminal that stands still (Ctrl-S, a full pipe)
/// stops this thread and nothing else.
#[derive(Debug)]
pub struct Output {
    queue: Sender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
    dropped: bool,
}

/// Tells when an [`Output`] that has been dropped has written all it had.
#[derive(Debug)]
pub struct Written(Receiver<()>);

impl Written {
    /// Waits `timeout` at most; says whether everything was written.
    pub fn wait(self, timeout: Duration) -> bool {
        self.0.recv_timeout(timeout) == Err(channel::RecvTimeoutError::Disconnected)
    }
}

impl Output {
    /// Starts the thread that writes to `sink`.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(mut sink: impl Write + Send + 'static) -> io::Result<(Output, Written)> {
        let (queue, pieces) = channel::unbounded::<Vec<u8>>();
        let (finished, done) = channel::bounded(0);
        let waiting = Arc::new(AtomicUsize::new(0));
        let counter = waiting.clone();
        thread::Builder::new().name("stdout".into()).spawn(move || {
            let mut open = true;
            for piece in pieces {
                // A reader that went away (`| head`) does not stop the machine.
                open = open && sink.write_all(&piece).and_then(|()| sink.flush()).is_ok();
                counter.fetch_sub(piece.len(), Ordering::Relaxed);
            }
            drop(finished);
        })?;
        Ok((Output { queue, waiting, dropped: false }, Written(done)))
    }

    /// Queues bytes.
    pub fn push(&mut self, bytes: Vec<u8>) {
        if self.waiting.load(Ordering::Relaxed) + bytes.len() > MAX_WAITING {
            if !std::mem::replace(&mut self.dropped, true) {
                tracing::warn!(
                    "standard output stands still: what the guest writes is dropped until it moves"
                );
            }
            return;
        }
        self.dropped = false;
        self.waiting.fetch_add(bytes.len(), Ordering::Relaxed);
        // The thread ends only after this sender.
        let _ = self.queue.send(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut filter = EscapeFilter::default();
        let mut all = Vec::new();
        for piece in pieces {
            let (bytes, leave) = filter.feed(piece);
            all.extend(bytes);
            if leave {
                return (all, true);
            }
        }
        (all, false)
    }

    #[test]
    fn the_escape_key_and_q_leave_even_in_two_pieces() {
        assert_eq!(feed(&[b"ls\n\x1dq"]), (b"ls\n".to_vec(), true));
        assert_eq!(feed(&[b"ls\n\x1d", b"qxx"]), (b"ls\n".to_vec(), true));
    }

    #[test]
    fn other_keys_reach_the_guest() {
        assert_eq!(feed(&[b"\x03q\x1b[A"]), (b"\x03q\x1b[A".to_vec(), false));
        assert_eq!(feed(&[b"\x1d\x1dq"]), (b"\x1dq".to_vec(), false));
        assert_eq!(feed(&[b"\x1dx"]), (b"\x1dx".to_vec(), false));
    }

    #[test]
    fn lines_in_raw_mode_return_the_carriage() {
        assert_eq!(with_returns(b"a\nb\n"), b"a\r\nb\r\n");
    }

    #[test]
    fn output_is_written_in_order_and_finished() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (mut output, written) = Output::start(writer).unwrap();
        output.push(b"one ".to_vec());
        output.push(b"two".to_vec());
        drop(output);
        assert!(written.wait(Duration::from_secs(5)));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one two");
    }

    #[test]
    fn a_sink_that_stands_still_blocks_nobody() {
        let (_reader, writer) = io::pipe().unwrap();
        let (mut output, written) = Output::start(writer).unwrap();
        for _ in 0..80 {
            output.push(vec![0; 1 << 20]);
        }
        assert!(output.dropped);
        drop(output);
        assert!(!written.wait(Duration::from_millis(10)));
    }

    #[test]
    fn a_reader_that_went_away_stops_nothing() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let (mut output, written) = Output::start(writer).unwrap();
        output.push(b"x".to_vec());
        output.push(b"y".to_vec());
        drop(output);
        assert!(written.wait(Duration::from_secs(5)));
    }
}
