//! The alignment of a node's clock with node 0's: what to do about their distance. Pure.

use super::estimator::Bounds;

/// Steps of running clocks beyond this many seconds are a fault of some host's clock, not drift.
pub const MAX_STEP_S: u64 = 1;

/// Differences below this many nanoseconds are left alone.
pub const MIN_STEP_NS: u64 = 500;

/// What is to be done.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: near enough.
    Stay,
    /// This node is behind: move its offset forward to this value.
    Step(u64),
    /// This node is ahead, by what is surely more than drift: node 0 must move its offset forward to this.
    Tell(u64),
    /// The clocks are further apart than [`MAX_STEP_S`]: by this many ticks, negative when this node is
    /// ahead.
    Absurd(i64),
}

/// Offsets that make this node's guest TSC equal node 0's.
///
/// `host` bounds "node 0's host TSC minus ours", `theirs` and `ours` are the guest offsets (modulo 2^64),
/// `khz` the machine's frequency.
pub fn decide(host: Bounds, theirs: u64, ours: u64, khz: u64) -> Action {
    let skew = skew(host, theirs, ours);
    let least = (khz * MIN_STEP_NS / 1_000_000).max(host.error() / 2);
    if skew.unsigned_abs() > khz * 1000 * MAX_STEP_S {
        Action::Absurd(skew)
    } else if skew.unsigned_abs() <= least {
        Action::Stay
    } else if skew > 0 {
        Action::Step(ours.wrapping_add_signed(skew))
    } else {
        Action::Tell(theirs.wrapping_add_signed(-skew))
    }
}

/// Node 0's guest TSC minus ours, most likely.
pub fn skew(host: Bounds, theirs: u64, ours: u64) -> i64 {
    (host.middle() as u64).wrapping_add(theirs).wrapping_sub(ours) as i64
}

/// The offset that makes ours equal node 0's now, wherever it was: only for a clock that nobody has read yet.
pub fn exact(host: Bounds, theirs: u64) -> u64 {
    theirs.wrapping_add_signed(host.middle())
}

/// Whether `to` lies ahead of `from` by at most [`MAX_STEP_S`], offsets being modulo 2^64.
pub fn is_forward(from: u64, to: u64, khz: u64) -> bool {
    let step = to.wrapping_sub(from) as i64;
    step > 0 && step.unsigned_abs() <= khz * 1000 * MAX_STEP_S
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::estimator::{Estimator, Round};
    use super::*;

    const KHZ: u64 = 2_000_000;

    fn exactly(difference: i64) -> Bounds {
        Bounds { low: difference, high: difference }
    }

    #[test]
    fn a_node_that_is_behind_steps_and_one_that_is_ahead_tells_node_0() {
        assert_eq!(decide(exactly(5_000), 100, 100, KHZ), Action::Step(5_100));
        assert_eq!(decide(exactly(-5_000), 100, 100, KHZ), Action::Tell(5_100));
        assert_eq!(decide(exactly(900), 100, 100, KHZ), Action::Stay);
    }

    #[test]
    fn what_lies_within_half_the_uncertainty_is_left_alone() {
        let host = Bounds { low: -8_000, high: 16_000 };
        assert_eq!(decide(host, 0, 0, KHZ), Action::Stay);
        assert_eq!(decide(host, 4_000, 0, KHZ), Action::Step(8_000));
    }

    #[test]
    fn clocks_seconds_apart_are_a_fault() {
        assert_eq!(decide(exactly(3_000_000_000), 0, 0, KHZ), Action::Absurd(3_000_000_000));
        assert!(!is_forward(0, 3_000_000_000, KHZ));
        assert!(!is_forward(5, 5, KHZ));
        assert!(is_forward(u64::MAX, 4, KHZ));
    }

    proptest! {
        /// A cluster of drifting hosts over 20 simulated seconds: no guest clock ever goes back, and after
        /// the first rounds any two are within the delays of each other.
        #[test]
        fn clocks_of_a_cluster_stay_together_and_never_go_back(
            ppm in proptest::collection::vec(-50.0f64..50.0, 2..5),
            seeds in proptest::collection::vec((10e-6f64..60e-6, 10e-6f64..60e-6), 50),
        ) {
            let hz = KHZ as f64 * 1000.0;
            let host = |node: usize, t: f64| ((1 + node) as f64 * 1e11 + t * hz * (1.0 + ppm[node] / 1e6)) as u64;
            let nodes = ppm.len();
            let mut offsets = vec![0u64.wrapping_sub(host(0, 0.0)); nodes];
            let mut estimators: Vec<_> = (0..nodes).map(|_| Estimator::new(KHZ)).collect();
            let mut last = vec![0u64; nodes];
            let mut t = 0.0;
            for round in 0..1000 {
                for node in 1..nodes {
                    let (out, back) = seeds[(round * 7 + node) % seeds.len()];
                    let end = t + out + back;
                    let (t2, t3) = (host(0, t + out), host(0, t + out));
                    estimators[node].add(Round { t1: host(node, t), t2, t3, t4: host(node, end) });
                    let theirs = offsets[0];
                    let bounds = estimators[node].at(host(node, end)).unwrap();
                    if round == 0 {
                        offsets[node] = exact(bounds, theirs);
                        continue;
                    }
                    match decide(bounds, theirs, offsets[node], KHZ) {
                        Action::Stay => {}
                        Action::Step(to) => {
                            prop_assert!(is_forward(offsets[node], to, KHZ));
                            offsets[node] = to;
                        }
                        Action::Tell(to) => {
                            prop_assert!(is_forward(offsets[0], to, KHZ));
                            offsets[0] = to;
                        }
                        Action::Absurd(by) => prop_assert!(false, "{by}"),
                    }
                }
                t += 0.02;
                let now: Vec<u64> = (0..nodes).map(|n| host(n, t).wrapping_add(offsets[n])).collect();
                for node in 0..nodes {
                    if round > 0 {
                        prop_assert!(now[node] > last[node]);
                    }
                    let apart = (now[node].wrapping_sub(now[0]) as i64).unsigned_abs() as f64 / hz;
                    // Half of the worst asymmetry (25 us), half of the worst bound (30 us plus drift while
                    // the rate is still unknown: 500 ppm for 20 ms), and the step still on its way.
                    prop_assert!(apart < 100e-6, "{apart}");
                }
                last = now;
            }
        }
    }
}
