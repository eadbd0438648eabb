//! The operator's terminal: raw mode that is always undone, the escape key, lines that never block.
//!
//! In raw mode every key goes to the guest, Ctrl-C included. Ctrl-] is ours: Ctrl-] then `q` ends the
//! machine, Ctrl-] twice sends one Ctrl-] to the guest, Ctrl-] and anything else sends both.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::borrow::Cow;
use std::io::{self, IsTerminal, Read, Write};
use std::panic::{PanicHookInfo, set_hook, take_hook};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::Duration;

use crossbeam::channel::Sender;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::output::Output;

/// What a hint says about leaving.
pub const ESCAPE_HINT: &str = "press Ctrl-] then q to end the machine";
/// The key that is ours, ASCII GS.
const ESCAPE: u8 = 0x1d;
/// How long a line may take to be written before nobody waits for that any more.
const LINE: Duration = Duration::from_millis(50);
/// How long the last lines wait for a terminal that takes nothing.
const LAST_LINES: Duration = Duration::from_secs(2);
/// How much is read from the terminal at once, in bytes.
const PIECE: usize = 4096;

static RAW: AtomicBool = AtomicBool::new(false);
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);
static ERRORS: OnceLock<Output> = OnceLock::new();

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
        // At once, not when all output has been sent: a terminal that stands still would never let go. Fails if
        // it is gone, and then there is nothing to put back.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &before);
        RAW.store(false, Ordering::Release);
    }
}

/// From now on lines of this process, and what panics print, go to standard error through a queue
/// ([`Output`]): a terminal that takes nothing stops no thread that has something to say. A line has been
/// written when the call returns, or after [`LINE`] nobody waits until all has been.
///
/// # Errors
/// What the system says; then everything goes on as before.
pub fn queue_lines() -> io::Result<()> {
    let gap = |bytes| {
        let line = format!("({bytes} bytes of messages were left out here: standard error stood still)\n");
        with_returns(line.as_bytes())
    };
    let output = Output::start(io::stderr(), gap)?;
    if ERRORS.set(output).is_ok() {
        set_hook(Box::new(|panic| say_last(&panic_text(panic))));
    }
    Ok(())
}

/// Waits until all lines have been written: for a slow terminal as long as that takes, for one that stands
/// still [`LAST_LINES`].
pub fn flush_lines() -> bool {
    ERRORS.get().is_none_or(|output| output.settle(LAST_LINES))
}

/// Waits until all lines have been written, [`LAST_LINES`] at most: for whoever has no time for a slow
/// terminal.
pub fn flush_lines_soon() -> bool {
    ERRORS.get().is_none_or(|output| output.settle_within(LAST_LINES))
}

fn panic_text(panic: &PanicHookInfo) -> String {
    let thread = thread::current();
    // As far as RUST_BACKTRACE asks for one.
    let trace = Backtrace::capture();
    let trace = match trace.status() {
        BacktraceStatus::Captured => format!("\n{trace}"),
        _ => String::new(),
    };
    format!("thread '{}' {panic}{trace}", thread.name().unwrap_or("without a name"))
}

/// From now on a panic of any thread puts the terminal back and ends the process: a coordinator that has lost
/// a thread cannot be trusted with a machine, and its nodes end with it.
pub fn end_on_panic() {
    let usual = take_hook();
    set_hook(Box::new(move |panic| {
        leave_raw();
        usual(panic);
        // The exit ends the thread that writes it. Not for long: the machine is in nobody's hands.
        flush_lines_soon();
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

/// [`say`] for a line that explains the end: queued even if the queue is full.
pub fn say_last(line: &str) {
    match ERRORS.get() {
        Some(output) => output.write_last(returned(format!("{line}\n").as_bytes()).into_owned(), LINE),
        None => say(line),
    }
}

/// Standard error for whole lines: a raw terminal needs a carriage return with every newline.
#[derive(Copy, Clone, Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes_out = returned(bytes);
        match ERRORS.get() {
            Some(output) => output.write(bytes_out.into_owned(), LINE),
            None => io::stderr().lock().write_all(&bytes_out)?,
        }
        Ok(bytes.len())
    }

    /// Nothing: neither the queue nor standard error itself keeps bytes back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `bytes` as the terminal's mode needs them.
fn returned(bytes: &[u8]) -> Cow<'_, [u8]> {
    if RAW.load(Ordering::Acquire) { Cow::Owned(with_returns(bytes)) } else { Cow::Borrowed(bytes) }
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
}
