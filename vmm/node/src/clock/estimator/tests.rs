//! The estimator against clocks that drift and answers that are late.

use proptest::prelude::*;

use super::*;

const KHZ: u64 = 2_000_000;
const HZ: f64 = KHZ as f64 * 1000.0;

/// Two clocks over true time in seconds: ours starts at `ours` ticks, theirs at `theirs`, `ppm` faster.
struct Clocks {
    ours: f64,
    theirs: f64,
    ppm: f64,
}

impl Clocks {
    fn ours(&self, t: f64) -> u64 {
        (self.ours + t * HZ) as u64
    }

    fn theirs(&self, t: f64) -> u64 {
        (self.theirs + t * HZ * (1.0 + self.ppm / 1e6)) as u64
    }

    fn difference(&self, t: f64) -> i64 {
        self.theirs(t).wrapping_sub(self.ours(t)) as i64
    }

    /// A ping at `t` with the two delays in seconds; returns the time of the pong's arrival too.
    fn round(&self, t: f64, out: f64, back: f64) -> (Round, f64) {
        let served = t + out;
        let sent = served + 1e-6;
        let end = sent + back;
        let round =
            Round { t1: self.ours(t), t2: self.theirs(served), t3: self.theirs(sent), t4: self.ours(end) };
        (round, end)
    }
}

fn contains(bounds: Bounds, value: i64) -> bool {
    // Two ticks for the simulation's own rounding.
    bounds.low - 2 <= value && value <= bounds.high + 2
}

proptest! {
    #[test]
    fn the_truth_is_always_inside_the_bounds(
        ppm in -200.0f64..200.0,
        ours in 0.0f64..1e15,
        theirs in 0.0f64..1e15,
        delays in proptest::collection::vec((5e-6f64..2e-3, 5e-6f64..2e-3, 1e-3f64..0.3), 2..120),
    ) {
        let clocks = Clocks { ours, theirs, ppm };
        let mut estimator = Estimator::new(KHZ);
        let mut t = 1.0;
        for (out, back, gap) in delays {
            let (round, end) = clocks.round(t, out, back);
            prop_assert!(estimator.add(round));
            let bounds = estimator.at(clocks.ours(end)).unwrap();
            prop_assert!(contains(bounds, clocks.difference(end)), "{bounds:?} {}", clocks.difference(end));
            t = end + gap;
            let later = estimator.at(clocks.ours(t)).unwrap();
            prop_assert!(contains(later, clocks.difference(t)), "{later:?} {}", clocks.difference(t));
        }
        prop_assert_eq!(estimator.restarts(), 0);
    }

    #[test]
    fn any_answers_are_taken_without_panic(rounds in proptest::collection::vec(any::<[u64; 4]>(), 0..40)) {
        let mut estimator = Estimator::new(KHZ);
        for [t1, t2, t3, t4] in rounds {
            estimator.add(Round { t1, t2, t3, t4 });
            if let Some(bounds) = estimator.at(t4) {
                prop_assert!(bounds.low <= bounds.high);
                bounds.middle();
                bounds.error();
            }
        }
    }
}

#[test]
fn one_quick_round_among_slow_ones_sets_the_bound() {
    let clocks = Clocks { ours: 5e9, theirs: 9e12, ppm: 0.0 };
    let mut estimator = Estimator::new(KHZ);
    let mut t = 0.0;
    for i in 0..50 {
        let delay = if i == 20 { 10e-6 } else { 500e-6 };
        let (round, end) = clocks.round(t, delay, delay);
        estimator.add(round);
        t = end + 1e-3;
    }
    // The quick round took 20 us, and 500 ppm of the 60 ms since then may have added 30 us on each side; the
    // slow rounds alone leave 500 us.
    let error = estimator.at(clocks.ours(t)).unwrap().error() as f64 / HZ;
    assert!(error < 45e-6, "{error}");
}

#[test]
fn a_steady_drift_is_learnt_and_then_hardly_widens_the_bounds() {
    let clocks = Clocks { ours: 1e9, theirs: 7e9, ppm: 40.0 };
    let mut estimator = Estimator::new(KHZ);
    let mut t = 0.0;
    while t < 30.0 {
        let (round, end) = clocks.round(t, 20e-6, 30e-6);
        estimator.add(round);
        t = end + 0.1;
    }
    let now = clocks.ours(t);
    let rate = estimator.rate(now);
    assert!(rate.low <= 40_000 && 40_000 <= rate.high && rate.high - rate.low < 10_000, "{rate:?}");
    let error = estimator.at(now).unwrap().error() as f64 / HZ;
    assert!(error < 30e-6, "{error}");
    // The asymmetry of 10 us makes the middle wrong by 5 us, and no more than drift adds to it.
    let wrong = (estimator.at(now).unwrap().middle() - clocks.difference(t)).abs() as f64 / HZ;
    assert!(wrong < 8e-6, "{wrong}");
}

#[test]
fn a_clock_that_jumps_starts_the_estimate_anew() {
    let mut clocks = Clocks { ours: 1e9, theirs: 1e9, ppm: 0.0 };
    let mut estimator = Estimator::new(KHZ);
    estimator.add(clocks.round(0.0, 1e-5, 1e-5).0);
    clocks.theirs += HZ;
    let (round, end) = clocks.round(0.1, 1e-5, 1e-5);
    assert!(estimator.add(round));
    assert_eq!(estimator.restarts(), 1);
    assert!(contains(estimator.at(clocks.ours(end)).unwrap(), clocks.difference(end)));
}

#[test]
fn answers_that_cannot_be_are_ignored() {
    let mut estimator = Estimator::new(KHZ);
    // The peer claims to have held the ping for longer than the round took.
    assert!(!estimator.add(Round { t1: 100, t2: 0, t3: 50, t4: 120 }));
    assert!(!estimator.add(Round { t1: 100, t2: 50, t3: 40, t4: 120 }));
    assert_eq!(estimator.at(200), None);
}
