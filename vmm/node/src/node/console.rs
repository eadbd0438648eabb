//! Between COM1 and the coordinator's terminal: output in batches, input as the guest has room for it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};

/// Output waits this long for more, so that a line is one message.
const GATHER: Duration = Duration::from_millis(2);
/// And this much is sent at once at most.
const BATCH: usize = 4096;

/// Where COM1 writes.
pub struct ConsoleOut(Sender<u8>);

impl Write for ConsoleOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.0.send(byte).map_err(|_| io::ErrorKind::BrokenPipe)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the thread that gathers output and hands it to `sink`; it ends when the writer is dropped.
///
/// # Errors
/// What the operating system says of a new thread.
pub fn output(mut sink: impl FnMut(Vec<u8>) + Send + 'static) -> io::Result<(ConsoleOut, JoinHandle<()>)> {
    let (sender, bytes) = unbounded();
    let thread = std::thread::Builder::new().name("console".into()).spawn(move || {
        while let Ok(first) = bytes.recv() {
            let mut batch = vec![first];
            // The size first: a byte that is received must be kept.
            while batch.len() < BATCH
                && let Ok(byte) = bytes.recv_timeout(GATHER)
            {
                batch.push(byte);
            }
            sink(batch);
        }
    })?;
    Ok((ConsoleOut(sender), thread))
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
