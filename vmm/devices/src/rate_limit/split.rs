//! The split of a rate that devices have in common, without a clock.
//!
//! It is a hierarchical token bucket (Devera's HTB, of Linux's traffic control) of two levels. Each device
//! has a bucket that fills at its part of the rate, and all of them together have one that fills at the whole
//! rate:
//!
//! ```text
//!   request of a device ── is there room in its own bucket? ── yes ──> it goes, paid from its own and the common one
//!                            │ no
//!                            └── in the common one? ── yes ──> it goes, paid from the common one: others left that
//!                                  └── no ──> it waits
//! ```
//!
//! What a device is guaranteed is never lent in advance: who was idle, or came late, goes by its own bucket
//! at once, and those who borrowed wait until the common one has recovered. A device's part is its share
//! among the shares of all devices that have asked for something within [`IDLE`], so that what idle ones do
//! not need is split by shares too; what one that is not idle leaves goes to whoever comes first.

use std::time::Duration;

use super::bucket::Bucket;

/// After so long without a request a device leaves its part to the others.
pub const IDLE: Duration = Duration::from_millis(100);

/// Buckets count in thousandths, so that a small part of a low rate is what it should be.
const FINE: u64 = 1000;

/// A rate and the devices that split it.
#[derive(Debug)]
pub struct Split {
    rate: u64,
    common: Bucket,
    parts: Vec<Part>,
    /// Shares of those that are not idle, as the buckets' rates are set.
    active: u64,
}

#[derive(Debug)]
struct Part {
    id: u64,
    share: u32,
    own: Bucket,
    /// When it last asked for something.
    asked: Option<Duration>,
}

impl Split {
    /// `rate` units a second, and nobody who wants them.
    pub fn new(rate: u64) -> Split {
        let rate = rate.saturating_mul(FINE);
        Split { rate, common: Bucket::new(rate), parts: Vec::new(), active: 0 }
    }

    /// One more device.
    pub fn join(&mut self, id: u64, share: u32) {
        self.parts.push(Part { id, share, own: Bucket::new(self.rate), asked: None });
    }

    /// A device has gone.
    pub fn leave(&mut self, id: u64) {
        self.parts.retain(|part| part.id != id);
    }

    /// Another share for a device.
    pub fn set_share(&mut self, id: u64, share: u32) {
        if let Some(part) = self.part(id) {
            part.share = share;
            // Whatever the sum is now, rates must be set.
            self.active = 0;
        }
    }

    /// A device wants something: how long until it may take it, as long as the others do what they do.
    pub fn wait(&mut self, id: u64, now: Duration) -> Duration {
        let Some(part) = self.part(id) else { return Duration::ZERO };
        part.asked = Some(now);
        self.set_rates(now);
        let common = self.common.wait(now);
        self.part(id).map_or(common, |part| part.own.wait(now).min(common))
    }

    /// A device that need not wait takes `amount` units.
    pub fn take(&mut self, id: u64, amount: u64, now: Duration) {
        let amount = amount.saturating_mul(FINE);
        self.common.take(amount, now);
        if let Some(part) = self.part(id).filter(|part| part.own.wait(now).is_zero()) {
            part.own.take(amount, now);
        }
    }

    /// Gives each device its part of the rate, if others are idle than before.
    fn set_rates(&mut self, now: Duration) {
        let active = |part: &&Part| part.asked.is_some_and(|asked| now.saturating_sub(asked) < IDLE);
        let shares: u64 = self.parts.iter().filter(active).map(|part| u64::from(part.share)).sum();
        if shares == 0 || shares == self.active {
            return;
        }
        self.active = shares;
        for part in &mut self.parts {
            let rate = u128::from(self.rate) * u128::from(part.share) / u128::from(shares);
            // An idle one's share may be larger than all the others'.
            part.own.set_rate(u64::try_from(rate).map_or(self.rate, |rate| rate.min(self.rate)), now);
        }
    }

    fn part(&mut self, id: u64) -> Option<&mut Part> {
        self.parts.iter_mut().find(|part| part.id == id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: Duration = Duration::from_micros(200);

    /// A device that always wants the next piece so long after the last one went.
    struct Wants {
        piece: u64,
        think: Duration,
        /// When it wants something.
        during: std::ops::Range<u64>,
        next: Duration,
        done: u64,
    }

    fn always(piece: u64) -> Wants {
        Wants { piece, think: Duration::ZERO, during: 0..u64::MAX, next: Duration::ZERO, done: 0 }
    }

    /// Lets devices, which are called by their place, take what they may from second `from` to second `to`;
    /// what they took each second.
    fn run(split: &mut Split, devices: &mut [Wants], from: u64, to: u64) -> Vec<f64> {
        let mut now = Duration::from_secs(from);
        devices.iter_mut().for_each(|device| device.done = 0);
        while now < Duration::from_secs(to) {
            for (id, device) in (0..).zip(devices.iter_mut()) {
                while device.during.contains(&now.as_secs())
                    && now >= device.next
                    && split.wait(id, now).is_zero()
                {
                    split.take(id, device.piece, now);
                    device.done += device.piece;
                    device.next = now + device.think;
                }
            }
            now += STEP;
        }
        devices.iter().map(|device| device.done as f64 / (to - from) as f64).collect()
    }

    fn split(rate: u64, shares: &[u32]) -> Split {
        let mut split = Split::new(rate);
        (0..).zip(shares).for_each(|(id, share)| split.join(id, *share));
        split
    }

    fn near(seen: &[f64], wanted: &[f64]) {
        let off = seen.iter().zip(wanted).any(|(seen, wanted)| (seen - wanted).abs() > wanted * 0.03);
        assert!(!off && seen.len() == wanted.len(), "{seen:?} is not {wanted:?}");
    }

    #[test]
    fn devices_that_want_all_get_their_shares_whatever_their_pieces() {
        let mut split = split(10_000, &[3, 1]);
        let mut devices = [always(5), always(40)];
        run(&mut split, &mut devices, 0, 1);
        near(&run(&mut split, &mut devices, 1, 11), &[7500.0, 2500.0]);
    }

    #[test]
    fn what_idle_devices_leave_is_split_by_shares_until_they_come_back() {
        let mut split = split(12_000, &[3, 2, 1]);
        let mut devices = [always(10), always(10), always(10)];
        devices[0].during = 10..20;
        run(&mut split, &mut devices, 0, 1);
        near(&run(&mut split, &mut devices, 1, 10), &[0.0, 8000.0, 4000.0]);
        near(&run(&mut split, &mut devices, 10, 20), &[6000.0, 4000.0, 2000.0]);
        run(&mut split, &mut devices, 20, 21);
        near(&run(&mut split, &mut devices, 21, 31), &[0.0, 8000.0, 4000.0]);
        split.leave(1);
        devices[1].during = 0..0;
        near(&run(&mut split, &mut devices, 31, 41), &[0.0, 0.0, 12_000.0]);
    }

    #[test]
    fn what_a_device_leaves_of_its_part_goes_to_others_and_it_never_waits() {
        let mut split = split(10_000, &[3, 1]);
        let mut devices = [always(10), always(10)];
        // 1000 a second of the 7500 that are its part.
        devices[0].think = Duration::from_millis(10);
        run(&mut split, &mut devices, 0, 1);
        near(&run(&mut split, &mut devices, 1, 11), &[1000.0, 9000.0]);
        assert_eq!(split.wait(0, Duration::from_secs(11)), Duration::ZERO);
    }

    #[test]
    fn a_new_share_counts_at_once() {
        let mut split = split(10_000, &[3, 1]);
        let mut devices = [always(10), always(10)];
        run(&mut split, &mut devices, 0, 2);
        split.set_share(1, 3);
        near(&run(&mut split, &mut devices, 2, 12), &[5000.0, 5000.0]);
        split.set_share(0, 1);
        near(&run(&mut split, &mut devices, 12, 22), &[2500.0, 7500.0]);
    }

    #[test]
    fn small_parts_of_low_rates_are_what_they_should_be() {
        let mut split = split(7, &[2, 1]);
        let mut devices = [always(1), always(1)];
        run(&mut split, &mut devices, 0, 20);
        near(&run(&mut split, &mut devices, 20, 320), &[14.0 / 3.0, 7.0 / 3.0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn the_whole_rate_is_used_and_nobody_gets_less_than_its_part(
            shares in proptest::collection::vec(1u32..20, 1..6),
            pieces in proptest::collection::vec(1u64..200, 6),
            thinks in proptest::collection::vec(0u64..40, 6),
        ) {
            let rate = 20_000;
            let mut split = split(rate, &shares);
            let mut devices: Vec<_> = pieces.iter().take(shares.len()).map(|piece| always(*piece)).collect();
            for (device, think) in devices.iter_mut().zip(&thinks) {
                device.think = Duration::from_millis(*think);
            }
            run(&mut split, &mut devices, 0, 1);
            let done = run(&mut split, &mut devices, 1, 6);
            let total: f64 = done.iter().sum();
            let (rate, all) = (rate as f64, f64::from(shares.iter().sum::<u32>()));
            prop_assert!(total < rate * 1.03, "{total} of {rate}: {done:?}");
            let mut enough = true;
            for ((done, device), share) in done.iter().zip(&devices).zip(&shares) {
                // As fast as it can go by itself.
                let think = device.think.max(STEP).as_secs_f64();
                let able = if device.think.is_zero() { f64::MAX } else { device.piece as f64 / (think + STEP.as_secs_f64()) };
                let part = (rate * f64::from(*share) / all).min(able);
                prop_assert!(*done > part * 0.95 - 50.0, "{done} of {part}, {able} possible");
                enough &= *done > able * 0.9;
            }
            prop_assert!(enough || total > rate * 0.95, "{total} of {rate}: {done:?}");
        }

        #[test]
        fn no_numbers_overflow(rate: u64, share: u32, other: u32, amount: u64, at: u64) {
            let mut split = split(rate, &[share, other]);
            let at = Duration::from_nanos(at);
            split.wait(0, at);
            split.take(0, amount, at);
            split.set_share(0, other);
            split.wait(1, Duration::MAX);
            split.take(1, amount, Duration::MAX);
            split.leave(0);
            prop_assert_eq!(split.wait(0, at), Duration::ZERO);
        }
    }
}
