//! COM1, the console: a 16550A (vm-superio's), whose interrupt line must be an **edge**-triggered pin.

use super::{BusDevice, offsets};
use std::convert::Infallible;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_superio::Trigger;
use vm_superio::serial::{Error, Serial, SerialEvents};

/// Offset of the modem control register, whose bit 4 is loopback.
const MODEM_CONTROL: u64 = 4;
const LOOPBACK: u8 = 1 << 4;

/// Calls the node's closure for each interrupt.
struct Line(Box<dyn Fn() + Send>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)();
        Ok(())
    }
}

/// Tells the node when there is room for input again.
struct Room {
    /// An [`Com1::enqueue`] took less than it was given, and the call for it is owed.
    owed: AtomicBool,
    call: Box<dyn Fn() + Send>,
}

impl Room {
    fn pay(&self) {
        if self.owed.swap(false, Ordering::Relaxed) {
            (self.call)();
        }
    }
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.pay();
    }
}

/// The serial port at 0x3f8, eight ports.
///
/// Output goes to `W` byte by byte, each flushed; batching is `W`'s affair. Output that `W` refuses is
/// counted and dropped, because the guest cannot be stopped for it.
pub struct Com1<W: Write + Send> {
    uart: Serial<Line, Room, W>,
    lost: u64,
}

impl<W: Write + Send> Com1<W> {
    /// `interrupt` must pulse the port's line. `room` is called, once for each [`Com1::enqueue`] that took
    /// less than it was given, when the guest has read what was there. Both are called with the device's lock
    /// held: they must not touch this device, so `room` should only wake whoever feeds the input.
    pub fn new(interrupt: impl Fn() + Send + 'static, room: impl Fn() + Send + 'static, out: W) -> Self {
        let room = Room { owed: AtomicBool::new(false), call: Box::new(room) };
        Self { uart: Serial::with_events(Line(Box::new(interrupt)), room, out), lost: 0 }
    }

    /// Gives the guest input. Returns how many bytes were taken; keep the rest until `room` is called, then
    /// offer it again.
    #[must_use = "bytes that were not taken must be offered again"]
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        let taken = match self.uart.enqueue_raw_bytes(input) {
            Ok(taken) => taken,
            Err(Error::FullFifo | Error::IOError(_)) => 0,
            Err(Error::Trigger(never)) => match never {},
        };
        if taken < input.len() {
            self.uart.events().owed.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Output bytes that `W` refused so far.
    pub fn lost_output(&self) -> u64 {
        self.lost
    }

    /// Where the output goes.
    pub fn output(&self) -> &W {
        self.uart.writer()
    }
}

impl<W: Write + Send> BusDevice for Com1<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(offsets(offset)) {
            *byte = u8::try_from(offset).map_or(0xff, |offset| self.uart.read(offset));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (value, offset) in data.iter().zip(offsets(offset)) {
            let Ok(register) = u8::try_from(offset) else { return };
            match self.uart.write(register, *value) {
                Ok(()) => {}
                Err(Error::IOError(_) | Error::FullFifo) => self.lost += 1,
                Err(Error::Trigger(never)) => match never {},
            }
            if offset == MODEM_CONTROL && value & LOOPBACK == 0 {
                // In loopback no input is taken, though there may be room.
                self.uart.events().pay();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_ID: u64 = 2;
    const LINE_STATUS: u64 = 5;

    struct Counters {
        interrupts: Arc<AtomicUsize>,
        rooms: Arc<AtomicUsize>,
    }

    fn com1<W: Write + Send>(out: W) -> (Com1<W>, Counters) {
        let counters = Counters { interrupts: Arc::default(), rooms: Arc::default() };
        let (interrupts, rooms) = (counters.interrupts.clone(), counters.rooms.clone());
        let count = |counter: Arc<AtomicUsize>| {
            move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        };
        (Com1::new(count(interrupts), count(rooms), out), counters)
    }

    fn read(com1: &mut Com1<impl Write + Send>, offset: u64) -> u8 {
        let mut data = [0];
        com1.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn what_the_guest_sends_comes_out_and_the_transmitter_interrupts() {
        let (mut com1, counters) = com1(Vec::new());
        com1.write(DATA, b"a");
        assert_eq!(counters.interrupts.load(Ordering::Relaxed), 0);
        com1.write(INTERRUPT_ENABLE, &[2]);
        assert_eq!(counters.interrupts.load(Ordering::Relaxed), 1);
        assert_eq!(read(&mut com1, INTERRUPT_ID) & 0xf, 2);
        com1.write(DATA, b"b");
        assert_eq!(counters.interrupts.load(Ordering::Relaxed), 2);
        assert_eq!(com1.output(), b"ab");
    }

    #[test]
    fn no_input_byte_is_lost_however_long_the_input() {
        let (mut com1, counters) = com1(io::sink());
        com1.write(INTERRUPT_ENABLE, &[1]);
        let input: Vec<u8> = (0..=255).collect();
        let (mut offered, mut received) = (0, Vec::new());
        while received.len() < input.len() {
            let rooms = counters.rooms.load(Ordering::Relaxed);
            let interrupts = counters.interrupts.load(Ordering::Relaxed);
            let taken = com1.enqueue(&input[offered..]);
            assert!(taken > 0, "there was room");
            offered += taken;
            assert!(counters.interrupts.load(Ordering::Relaxed) > interrupts);
            assert_eq!(read(&mut com1, INTERRUPT_ID) & 0xf, 4);
            while read(&mut com1, LINE_STATUS) & 1 != 0 {
                received.push(read(&mut com1, DATA));
            }
            let owed = usize::from(offered < input.len());
            assert_eq!(counters.rooms.load(Ordering::Relaxed), rooms + owed);
        }
        assert_eq!(received, input);
    }

    #[test]
    fn a_full_fifo_takes_nothing_and_calls_once_when_it_is_read_out() {
        let (mut com1, counters) = com1(io::sink());
        let taken = com1.enqueue(&[7; 100]);
        assert!(taken < 100);
        assert_eq!(com1.enqueue(&[8]), 0);
        for _ in 0..taken {
            assert_eq!(counters.rooms.load(Ordering::Relaxed), 0);
            assert_eq!(read(&mut com1, DATA), 7);
        }
        assert_eq!(counters.rooms.load(Ordering::Relaxed), 1);
        read(&mut com1, DATA);
        assert_eq!(counters.rooms.load(Ordering::Relaxed), 1, "nothing is owed");
    }

    #[test]
    fn input_refused_in_loopback_is_asked_for_when_it_ends() {
        let (mut com1, counters) = com1(io::sink());
        com1.write(MODEM_CONTROL, &[LOOPBACK]);
        assert_eq!(com1.enqueue(b"x"), 0);
        com1.write(MODEM_CONTROL, &[0]);
        assert_eq!(counters.rooms.load(Ordering::Relaxed), 1);
        assert_eq!(com1.enqueue(b"x"), 1);
    }

    /// An output whose reader is gone.
    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_that_nobody_takes_is_counted_and_the_guest_goes_on() {
        let (mut com1, counters) = com1(Broken);
        com1.write(INTERRUPT_ENABLE, &[2]);
        read(&mut com1, INTERRUPT_ID);
        com1.write(DATA, b"a");
        assert_eq!(com1.lost_output(), 1);
        assert_eq!(counters.interrupts.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn wide_accesses_reach_neighbouring_registers() {
        let (mut com1, _counters) = com1(io::sink());
        com1.write(6, &[0, 0x5a]);
        let mut data = [0; 2];
        com1.read(6, &mut data);
        assert_eq!(data[1], 0x5a, "the scratch register");
        let mut far = [0];
        com1.read(u64::MAX, &mut far);
        assert_eq!(far, [0xff]);
        com1.write(0x1_0000, &[1]);
    }
}
