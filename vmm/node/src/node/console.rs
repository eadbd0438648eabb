//! The console at a node, between COM1 and the coordinator's terminal: output in batches, input as the guest
//! has room for it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

/// Output waits this long for more, so that a line is one message.
const GATHER: Duration = Duration::from_millis(2);
/// And this much is sent at once at most.
const BATCH: usize = 4096;
/// So many bytes wait at most; what the guest writes beyond is left out, and said to be.
const WAITING: usize = 256 << 10;
/// How often it is said of a guest that never stops.
const TELL: Duration = Duration::from_secs(5);

/// Where COM1 writes. It never waits: a CPU of the guest's does the writing.
pub struct ConsoleOut {
    bytes: Sender<u8>,
    left_out: Arc<AtomicU64>,
}

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            match self.bytes.try_send(byte) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => drop(self.left_out.fetch_add(1, Ordering::Relaxed)),
                Err(TrySendError::Disconnected(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the thread that gathers output and hands it to `sink`, which may take its time; it ends when the
/// writer is dropped.
///
/// # Errors
/// What the operating system says of a new thread.
pub fn output(mut sink: impl FnMut(Vec<u8>) + Send + 'static) -> io::Result<(ConsoleOut, JoinHandle<()>)> {
    let (sender, bytes) = bounded(WAITING);
    let left_out = Arc::new(AtomicU64::new(0));
    let count = left_out.clone();
    let thread = std::thread::Builder::new().name("console".into()).spawn(move || {
        let mut told = Instant::now();
        while let Ok(first) = bytes.recv() {
            let mut batch = vec![first];
            // The size first: a byte that is received must be kept.
            while batch.len() < BATCH
                && let Ok(byte) = bytes.recv_timeout(GATHER)
            {
                batch.push(byte);
            }
            // Best behind what was kept; but a guest that never stops is told of as well.
            if bytes.is_empty() || told.elapsed() > TELL {
                told = Instant::now();
                match count.swap(0, Ordering::Relaxed) {
                    0 => {}
                    left_out => batch.extend(notice(left_out).bytes()),
                }
            }
            sink(batch);
        }
    })?;
    Ok((ConsoleOut { bytes: sender, left_out }, thread))
}

fn notice(left_out: u64) -> String {
    format!(
        "\r\n[gestalt: {left_out} bytes of the guest's output were left out: the terminal is too slow]\r\n"
    )
}

/// A message for the input thread.
pub enum Input {
    /// Somebody typed.
    Typed(Vec<u8>),
    /// The guest has read what was there.
    Room,
}

/// Feeds input to the guest until the channel closes. `offer` returns how many bytes the port took.
pub fn feed(inputs: &Receiver<Input>, mut offer: impl FnMut(&[u8]) -> usize) {
    let mut waiting = VecDeque::new();
    for input in inputs {
        if let Input::Typed(bytes) = input {
            waiting.extend(bytes);
        }
        let taken = offer(waiting.make_contiguous());
        waiting.drain(..taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam::channel::unbounded;

    #[test]
    fn output_arrives_whole_and_in_order() {
        let (sender, batches) = unbounded();
        let (mut out, thread) = output(move |batch| sender.send(batch).unwrap()).unwrap();
        let text: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        out.write_all(&text).unwrap();
        drop(out);
        thread.join().unwrap();
        assert_eq!(batches.iter().flatten().collect::<Vec<_>>(), text);
    }

    #[test]
    fn a_guest_that_writes_without_end_fills_a_bounded_queue_and_what_is_left_out_is_counted() {
        let (go, held) = bounded::<()>(0);
        let (sender, batches) = unbounded();
        let (mut out, thread) = output(move |batch| {
            // The terminal stands still until the guest has written all.
            let _ = held.recv();
            sender.send(batch).unwrap();
        })
        .unwrap();
        let all = 4 * WAITING;
        out.write_all(&vec![b'x'; all]).unwrap();
        drop((out, go));
        thread.join().unwrap();
        let text = String::from_utf8(batches.iter().flatten().collect()).unwrap();
        let kept = text.bytes().filter(|byte| *byte == b'x').count();
        assert!((WAITING..=WAITING + 2 * BATCH).contains(&kept), "{kept}");
        assert!(text.contains(&notice((all - kept) as u64)));
    }

    #[test]
    fn input_that_does_not_fit_is_offered_again_when_there_is_room() {
        let (sender, inputs) = unbounded();
        sender.send(Input::Typed(b"hello".to_vec())).unwrap();
        sender.send(Input::Typed(b" you".to_vec())).unwrap();
        (0..4).for_each(|_| sender.send(Input::Room).unwrap());
        drop(sender);
        let mut got = Vec::new();
        feed(&inputs, |bytes| {
            let n = bytes.len().min(2);
            got.extend_from_slice(&bytes[..n]);
            n
        });
        assert_eq!(got, b"hello you");
    }
}
