//! A token bucket without a clock: how long the next request must wait.

use std::time::Duration;

/// How much may be done at once after a rest, in time at the bucket's rate. Long enough for a thread to wake
/// late, and short enough for a limit to hold over a second.
pub const BURST: Duration = Duration::from_millis(50);

/// Keeps a rate. Times are since any moment that stays the same.
///
/// It is the "virtual scheduling" form of a bucket (ITU-T I.371, Annex A): instead of tokens it keeps the
/// moment by which all that was taken is paid for. What is taken may be larger than the bucket: then the next
/// one waits longer.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    rate: u64,
    paid: Duration,
}

impl Bucket {
    /// A full bucket of `rate` units a second, at least 1.
    pub fn new(rate: u64) -> Bucket {
        Bucket { rate: rate.max(1), paid: Duration::ZERO }
    }

    /// How long until something may be taken.
    pub fn wait(&self, now: Duration) -> Duration {
        self.paid.saturating_sub(now.saturating_add(BURST))
    }

    /// Takes `amount` units.
    pub fn take(&mut self, amount: u64, now: Duration) {
        let cost = u128::from(amount) * 1_000_000_000 / u128::from(self.rate);
        // 584 years are enough.
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        self.paid = self.paid.max(now).saturating_add(cost);
    }

    /// From now on it is another rate; what is not paid for yet is paid at that.
    pub fn set_rate(&mut self, rate: u64, now: Duration) {
        let rate = rate.max(1);
        let owed = self.paid.saturating_sub(now).as_nanos();
        let owed = owed.saturating_mul(self.rate.into()) / u128::from(rate);
        self.paid = now.saturating_add(Duration::from_nanos(u64::try_from(owed).unwrap_or(u64::MAX)));
        self.rate = rate;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// What goes through until `end` if somebody always wants to take `amount`, and thinks in between.
    fn run(bucket: &mut Bucket, amount: u64, think: Duration, mut now: Duration, end: Duration) -> u64 {
        let mut done = 0;
        loop {
            now += bucket.wait(now);
            if now >= end {
                return done;
            }
            bucket.take(amount, now);
            done += amount;
            now += think;
        }
    }

    #[test]
    fn who_takes_less_than_the_rate_never_waits() {
        let mut bucket = Bucket::new(100);
        for step in 0..1000 {
            let now = Duration::from_millis(11) * step;
            assert_eq!(bucket.wait(now), Duration::ZERO);
            bucket.take(1, now);
        }
    }

    #[test]
    fn a_large_piece_goes_at_once_and_is_paid_for_afterwards() {
        let mut bucket = Bucket::new(1000);
        assert_eq!(bucket.wait(SECOND), Duration::ZERO);
        bucket.take(10_000, SECOND);
        assert_eq!(bucket.wait(SECOND), 10 * SECOND - BURST);
    }

    #[test]
    fn a_new_rate_counts_at_once() {
        let mut bucket = Bucket::new(1);
        bucket.take(100, SECOND);
        assert_eq!(bucket.wait(SECOND), 100 * SECOND - BURST);
        bucket.set_rate(1000, SECOND);
        assert_eq!(bucket.wait(SECOND), SECOND / 10 - BURST);
    }

    proptest! {
        #[test]
        fn a_rate_is_kept_whatever_the_pieces(
            rate in 10u64..1_000_000_000, pieces in 1u64..50, think in 0u64..3_000, idle in 0u64..100_000,
        ) {
            // Pieces of up to a twentieth of a second's worth.
            let amount = (rate * pieces / 1000).max(1);
            let mut bucket = Bucket::new(rate);
            let start = Duration::from_millis(idle);
            let seconds = 20;
            let done = run(&mut bucket, amount, Duration::from_micros(think), start, start + SECOND * seconds);
            let most = (rate * u64::from(seconds)) as f64;
            // A burst, and the piece that is paid for later.
            prop_assert!(done as f64 <= most * 1.01 + amount as f64, "{done} of {most}");
            // Who thinks for less than a piece's time is held back by the bucket alone.
            if think as f64 * 1e-6 < amount as f64 / rate as f64 {
                prop_assert!(done as f64 >= most * 0.99 - amount as f64, "{done} of {most}");
            }
        }

        #[test]
        fn no_numbers_overflow(rate: u64, next: u64, amount: u64, at: u64, later: u64) {
            let mut bucket = Bucket::new(rate);
            bucket.take(amount, Duration::from_nanos(at));
            bucket.set_rate(next, Duration::from_nanos(later));
            bucket.take(amount, Duration::MAX);
            prop_assert_eq!(bucket.wait(Duration::MAX), Duration::ZERO);
        }
    }
}
