//! The mailbox of a vCPU: what others leave there, and the kick that makes it look.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

use super::signal;
use crate::node_msg::Signal;

const INIT: u32 = 1 << 9;
const SIPI: u32 = 1 << 8;

/// INIT and SIPI that a vCPU found in its mailbox. INIT comes first.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Startup {
    /// INIT.
    pub init: bool,
    /// Start-up, at this page.
    pub sipi: Option<u8>,
}

/// One vCPU's mailbox. Anybody posts, without waiting; only the vCPU's thread takes.
///
/// `awake` says that the thread is sure to look before it enters the guest or sleeps: nobody kicks it then.
/// The order on both sides makes a kick certain whenever it is needed: a poster sets its bits and *then*
/// swaps `awake`; the thread clears `awake` and *then* takes the bits.
#[derive(Debug)]
pub struct Mailbox {
    edge: [AtomicU32; 8],
    level: [AtomicU32; 8],
    nmi: AtomicBool,
    startup: AtomicU32,
    awake: AtomicBool,
    thread: AtomicI32,
}

impl Default for Mailbox {
    /// Empty, of a thread that has not started yet and will look when it does.
    fn default() -> Mailbox {
        Mailbox {
            edge: Default::default(),
            level: Default::default(),
            nmi: AtomicBool::new(false),
            startup: AtomicU32::new(0),
            awake: AtomicBool::new(true),
            thread: AtomicI32::new(0),
        }
    }
}

impl Mailbox {
    /// Leaves `signal` and makes the vCPU look.
    pub fn post(&self, signal: Signal) {
        match signal {
            Signal::Vector { vector, level } => {
                let words = if level { &self.level } else { &self.edge };
                words[usize::from(vector >> 5)].fetch_or(1 << (vector & 31), Ordering::SeqCst);
            }
            Signal::Nmi => self.nmi.store(true, Ordering::SeqCst),
            // An INIT undoes a start-up that has not been taken.
            Signal::Init => self.startup.store(INIT, Ordering::SeqCst),
            Signal::Sipi { vector } => {
                let add = |old: u32| Some(old & INIT | SIPI | u32::from(vector));
                // Cannot fail: the closure always has a value.
                let _ = self.startup.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add);
            }
        }
        self.kick();
    }

    /// Makes the vCPU's thread look, unless it is about to anyway.
    pub fn kick(&self) {
        if !self.awake.swap(true, Ordering::SeqCst) {
            let thread = self.thread.load(Ordering::SeqCst);
            if thread != 0 {
                signal::send(thread);
            }
        }
    }

    /// The calling thread is the vCPU's from now on.
    pub fn adopt(&self) {
        self.thread.store(base::thread::id(), Ordering::SeqCst);
    }

    /// Whether `thread` is the vCPU's.
    pub fn is_of(&self, thread: u32) -> bool {
        thread != 0 && self.thread.load(Ordering::SeqCst) as u32 == thread
    }

    /// The vCPU's thread ends: nobody signals it any more.
    pub fn abandon(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// From now on posters kick. To be called before the bits are taken.
    pub fn doze(&self) {
        self.awake.store(false, Ordering::SeqCst);
    }

    /// The thread is back; posters need not kick. `true` if somebody kicked in between, so that a signal is
    /// pending or about to be.
    pub fn wake(&self) -> bool {
        self.awake.swap(true, Ordering::SeqCst)
    }

    /// Takes INIT and SIPI.
    pub fn take_startup(&self) -> Startup {
        if self.startup.load(Ordering::SeqCst) == 0 {
            return Startup::default();
        }
        let word = self.startup.swap(0, Ordering::SeqCst);
        Startup { init: word & INIT != 0, sipi: (word & SIPI != 0).then_some(word as u8) }
    }

    /// Takes the NMI.
    pub fn take_nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst) && self.nmi.swap(false, Ordering::SeqCst)
    }

    /// Takes the vectors, each with whether it is level-triggered.
    pub fn take_vectors(&self, mut accept: impl FnMut(u8, bool)) {
        for (words, level) in [(&self.edge, false), (&self.level, true)] {
            for (index, word) in words.iter().enumerate() {
                if word.load(Ordering::SeqCst) == 0 {
                    continue;
                }
                let mut bits = word.swap(0, Ordering::SeqCst);
                while bits != 0 {
                    accept((index as u32 * 32 + bits.trailing_zeros()) as u8, level);
                    bits &= bits - 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    fn vectors(mailbox: &Mailbox) -> Vec<(u8, bool)> {
        let mut taken = Vec::new();
        mailbox.take_vectors(|vector, level| taken.push((vector, level)));
        taken
    }

    #[test]
    fn what_is_posted_is_taken_once() {
        let mailbox = Mailbox::default();
        for (vector, level) in [(0x30, false), (0xff, true), (0x30, false), (0x10, false)] {
            mailbox.post(Signal::Vector { vector, level });
        }
        mailbox.post(Signal::Nmi);
        assert_eq!(vectors(&mailbox), [(0x10, false), (0x30, false), (0xff, true)]);
        assert_eq!(vectors(&mailbox), []);
        assert!(mailbox.take_nmi());
        assert!(!mailbox.take_nmi());
    }

    #[test]
    fn init_undoes_an_earlier_sipi_and_keeps_a_later_one() {
        let mailbox = Mailbox::default();
        mailbox.post(Signal::Sipi { vector: 8 });
        mailbox.post(Signal::Init);
        assert_eq!(mailbox.take_startup(), Startup { init: true, sipi: None });
        mailbox.post(Signal::Init);
        mailbox.post(Signal::Sipi { vector: 9 });
        mailbox.post(Signal::Sipi { vector: 9 });
        assert_eq!(mailbox.take_startup(), Startup { init: true, sipi: Some(9) });
        mailbox.post(Signal::Sipi { vector: 0 });
        assert_eq!(mailbox.take_startup(), Startup { init: false, sipi: Some(0) });
        assert_eq!(mailbox.take_startup(), Startup::default());
    }

    #[test]
    fn a_thread_that_waits_gets_every_post_and_none_is_lost() {
        signal::install_handler().unwrap();
        let mailbox = Arc::new(Mailbox::default());
        let seen = mailbox.clone();
        const ROUNDS: u32 = 2000;
        let taker = std::thread::spawn(move || {
            signal::block_all().unwrap();
            seen.adopt();
            let mut next = 0;
            while next < ROUNDS {
                seen.doze();
                let before = next;
                seen.take_vectors(|vector, _| {
                    assert_eq!(u32::from(vector), 32 + next % 200);
                    next += 1;
                });
                if next == before {
                    // A lost kick would end here, after a minute, instead of hanging.
                    assert_ne!(signal::wait(Duration::from_secs(60)), signal::Woken::Timeout);
                }
                seen.wake();
            }
        });
        for round in 0..ROUNDS {
            let vector = (32 + round % 200) as u8;
            mailbox.post(Signal::Vector { vector, level: false });
            // The next one only once this one was taken: each needs a kick of its own.
            let word = &mailbox.edge[usize::from(vector >> 5)];
            while word.load(Ordering::SeqCst) != 0 && !taker.is_finished() {
                std::thread::yield_now();
            }
        }
        taker.join().unwrap();
    }
}
