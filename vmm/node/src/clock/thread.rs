//! The thread that keeps a node's clock in step with node 0's.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::GuestClock;
use super::align::{self, Action};
use super::estimator::{Bounds, Estimator, Round};

/// Rounds of the first alignment.
const FIRST_ROUNDS: u32 = 32;
/// Rounds of each later measurement: the quickest of a few bounds well.
const ROUNDS: u32 = 4;
/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_millis(250);
/// How often the difference is looked at, by the learnt rate, between measurements.
const TICK: Duration = Duration::from_millis(20);
/// Ticks between measurements: until the rate is known well, and then, when a drift in between is
/// at most 5 us.
const TICKS_PER_MEASUREMENT: (u32, u32) = (5, 25);
/// The rate is known well when its interval is narrower, in parts per billion.
const GOOD_RATE_PPB: i64 = 10_000;

/// Node 0's answer to a ping, as the control lane received it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Pong {
    /// The ping's number.
    pub seq: u32,
    /// The four times.
    pub round: Round,
    /// Node 0's guest offset when it answered.
    pub offset: u64,
}

/// How pings travel.
pub trait ClockLink: Send + Sync {
    /// Sends a ping that left at host time `t1` to node 0. A lost peer is noticed elsewhere.
    fn ping(&self, seq: u32, t1: u64);
    /// Tells node 0 that its guest offset should be at least `offset`.
    fn ahead(&self, offset: u64);
}

/// No alignment could be reached.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ClockError {
    /// No answers.
    #[error("node 0 answered none of the clock measurements within {} s", .0.as_secs_f32())]
    Silent(Duration),
    /// A clock that cannot be set, on another host than node 0's.
    #[error(
        "the guest's time stamp counter cannot be set on this host and is {seconds:.6} s from node 0's: KVM \
         runs here without hardware virtualisation; run all nodes on one such host, or on other hosts"
    )]
    Fixed {
        /// How far apart, in seconds.
        seconds: f64,
    },
    /// A clock that jumped.
    #[error(
        "the time stamp counters of this host and node 0's host jumped {seconds:.3} s apart: a host was \
         suspended, or its TSC is unstable (see `gestalt doctor` there)"
    )]
    Jumped {
        /// By how much, in seconds.
        seconds: f64,
    },
}

/// Measures and corrects one node's clock. Not for node 0, whose clock is the reference.
pub struct Aligner {
    clock: Arc<GuestClock>,
    link: Arc<dyn ClockLink>,
    pongs: Receiver<Pong>,
    estimator: Estimator,
    theirs: u64,
    seq: u32,
}

impl Aligner {
    /// One that has measured nothing yet. `pongs` brings what the control lane receives.
    pub fn new(clock: Arc<GuestClock>, link: Arc<dyn ClockLink>, pongs: Receiver<Pong>) -> Aligner {
        let estimator = Estimator::new(clock.khz());
        Aligner { clock, link, pongs, estimator, theirs: 0, seq: 0 }
    }

    /// Measures, and sets the guest's clock to node 0's, forward or back: before any vCPU runs. Returns the
    /// bound of the error in nanoseconds.
    ///
    /// # Errors
    /// [`ClockError::Silent`] if nothing was answered within `timeout`, [`ClockError::Fixed`] if this node's
    /// clock cannot be set and is not node 0's.
    pub fn align(&mut self, timeout: Duration) -> Result<u64, ClockError> {
        let deadline = Instant::now() + timeout;
        let mut answered = 0;
        while answered < FIRST_ROUNDS && Instant::now() < deadline {
            answered += u32::from(self.round(ANSWER.min(timeout)));
        }
        let bounds = self.bounds().ok_or(ClockError::Silent(timeout))?;
        self.clock.set(align::exact(bounds, self.theirs));
        let skew = align::skew(bounds, self.theirs, self.clock.offset());
        if skew.unsigned_abs() > bounds.error() {
            return Err(ClockError::Fixed { seconds: self.seconds(skew) });
        }
        Ok(self.note(bounds))
    }

    /// Looks at the difference once, measuring before if told, and corrects it.
    ///
    /// # Errors
    /// [`ClockError::Jumped`].
    pub fn correct(&mut self, measure: bool) -> Result<(), ClockError> {
        if measure {
            for _ in 0..ROUNDS {
                if !self.round(ANSWER) {
                    break;
                }
            }
        }
        let Some(bounds) = self.bounds() else { return Ok(()) };
        self.note(bounds);
        match align::decide(bounds, self.theirs, self.clock.offset(), self.clock.khz()) {
            Action::Stay => {}
            Action::Step(offset) => {
                self.clock.step_to(offset);
            }
            Action::Tell(offset) => {
                // Until the next answer shows that node 0 has stepped, this counts as done.
                self.theirs = offset;
                self.link.ahead(offset);
            }
            Action::Absurd(ticks) => {
                return Err(ClockError::Jumped {
                    seconds: ticks as f64 / (self.clock.khz() as f64 * 1000.0),
                });
            }
        }
        Ok(())
    }

    /// Starts the thread. It ends when `stop` is dropped (or says something), or after `on_error`.
    ///
    /// # Errors
    /// What the operating system says of a new thread.
    pub fn spawn(
        mut self,
        stop: Receiver<()>,
        on_error: Box<dyn FnOnce(ClockError) + Send>,
    ) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name("clock".into()).spawn(move || {
            let mut ticks = 0;
            while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(TICK) {
                let rate = self.estimator.rate(self.clock.host());
                let good = rate.high - rate.low < GOOD_RATE_PPB;
                ticks += 1;
                let period = if good { TICKS_PER_MEASUREMENT.1 } else { TICKS_PER_MEASUREMENT.0 };
                if let Err(error) = self.correct(ticks % period == 0) {
                    on_error(error);
                    return;
                }
            }
        })
    }

    fn seconds(&self, ticks: i64) -> f64 {
        ticks as f64 / (self.clock.khz() as f64 * 1000.0)
    }

    fn bounds(&self) -> Option<Bounds> {
        self.estimator.at(self.clock.host())
    }

    fn note(&self, bounds: Bounds) -> u64 {
        let bound = self.clock.nanoseconds(bounds.error());
        self.clock.note(bound, self.estimator.rate(self.clock.host()).middle());
        bound
    }

    /// One ping and its answer; `false` if none came within `wait`.
    fn round(&mut self, wait: Duration) -> bool {
        self.seq = self.seq.wrapping_add(1);
        self.link.ping(self.seq, self.clock.host());
        let deadline = Instant::now() + wait;
        while let Ok(pong) = self.pongs.recv_deadline(deadline) {
            // An answer to an earlier ping that came too late is as good a measurement.
            let used = self.estimator.add(pong.round);
            if used {
                self.theirs = pong.offset;
            }
            if pong.seq == self.seq {
                return used;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use crossbeam::channel::{self, Sender};
    use std::sync::Mutex;

    use super::super::Scale;
    use super::*;

    const KHZ: u64 = 1_000_000;

    /// A node 0 on the same host whose clock is `ahead` ticks of ours, answering inside `ping`.
    struct Node0 {
        ahead: i64,
        offset: Mutex<u64>,
        ours: Arc<GuestClock>,
        answers: Sender<Pong>,
    }

    impl ClockLink for Node0 {
        fn ping(&self, seq: u32, t1: u64) {
            let there = self.ours.host().wrapping_add_signed(self.ahead);
            let round = Round { t1, t2: there, t3: there, t4: self.ours.host() };
            self.answers.send(Pong { seq, round, offset: *self.offset.lock().unwrap() }).unwrap();
        }

        fn ahead(&self, offset: u64) {
            *self.offset.lock().unwrap() = offset;
        }
    }

    fn pair(ahead: i64, offset: u64) -> (Arc<GuestClock>, Arc<Node0>, Aligner) {
        let clock = Arc::new(GuestClock::new(KHZ, Scale::ONE));
        let (answers, pongs) = channel::unbounded();
        let node0 = Arc::new(Node0 { ahead, offset: Mutex::new(offset), ours: clock.clone(), answers });
        let aligner = Aligner::new(clock.clone(), node0.clone(), pongs);
        (clock, node0, aligner)
    }

    fn apart(clock: &GuestClock, node0: &Node0) -> i64 {
        let theirs = *node0.offset.lock().unwrap();
        theirs.wrapping_add_signed(node0.ahead).wrapping_sub(clock.offset()) as i64
    }

    #[test]
    fn the_first_alignment_takes_over_node_0s_clock_within_its_bound() {
        let (clock, node0, mut aligner) = pair(123_456_789_000, 42);
        let bound = aligner.align(Duration::from_secs(5)).unwrap();
        assert!(apart(&clock, &node0).unsigned_abs() <= clock.ticks(bound) + 2);
        assert_eq!(clock.stats().bound_ns, bound);
        assert_eq!(clock.stats().steps, 0);
    }

    #[test]
    fn a_clock_that_is_behind_steps_and_node_0_is_told_when_it_is_ahead() {
        let (clock, node0, mut aligner) = pair(-5_000_000_000, 7);
        aligner.align(Duration::from_secs(5)).unwrap();
        let behind = *node0.offset.lock().unwrap() + 50_000_000;
        *node0.offset.lock().unwrap() = behind;
        aligner.correct(true).unwrap();
        assert_eq!(clock.stats().steps, 1);
        assert!(apart(&clock, &node0).abs() < 10_000_000);

        let before = *node0.offset.lock().unwrap();
        *node0.offset.lock().unwrap() = before - 50_000_000;
        aligner.correct(true).unwrap();
        assert_eq!(clock.stats().steps, 1, "a clock that is ahead does not move");
        assert!(apart(&clock, &node0).abs() < 10_000_000);
    }

    #[test]
    fn a_clock_that_jumps_is_an_error() {
        let (_, node0, mut aligner) = pair(0, 0);
        aligner.align(Duration::from_secs(5)).unwrap();
        *node0.offset.lock().unwrap() = 60_000_000_000;
        assert!(matches!(aligner.correct(true), Err(ClockError::Jumped { seconds }) if seconds > 50.0));
    }

    #[test]
    fn a_fixed_clock_fits_to_node_0_on_the_same_host_only() {
        for (ahead, fits) in [(0, true), (1_000_000_000, false)] {
            let clock = Arc::new(GuestClock::fixed(KHZ));
            let (answers, pongs) = channel::unbounded();
            let node0 = Arc::new(Node0 { ahead, offset: Mutex::new(0), ours: clock.clone(), answers });
            let result = Aligner::new(clock, node0, pongs).align(Duration::from_secs(5));
            assert_eq!(result.is_ok(), fits, "{result:?}");
        }
    }

    #[test]
    fn silence_of_node_0_is_an_error_after_the_timeout() {
        let clock = Arc::new(GuestClock::new(KHZ, Scale::ONE));
        struct Nobody;
        impl ClockLink for Nobody {
            fn ping(&self, _: u32, _: u64) {}
            fn ahead(&self, _: u64) {}
        }
        let (_sender, pongs) = channel::unbounded();
        let mut aligner = Aligner::new(clock, Arc::new(Nobody), pongs);
        let wait = Duration::from_millis(20);
        assert_eq!(aligner.align(wait), Err(ClockError::Silent(wait)));
    }
}
