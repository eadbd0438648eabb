//! The estimate of another host's clock: hard bounds of its distance to ours, from ping rounds.
//!
//! Nothing is assumed of the delays but that a message arrives after it was sent. Of the drift it is assumed
//! that it stays within [`MAX_DRIFT_PPM`] and that it changes slowly ([`WANDER_PPB_PER_S`]); a round that
//! contradicts what was known (a host that was suspended) starts the estimate again.

/// Largest difference of two servers' TSC rates, in parts per million: crystals are within 100 of nominal,
/// and stated frequencies within 250 of each other.
pub const MAX_DRIFT_PPM: i64 = 500;

/// How fast a rate changes with temperature and age, in parts per billion each second.
pub const WANDER_PPB_PER_S: i64 = 20;

/// Rounds closer together than this say nothing about the rate, in seconds.
const RATE_BASELINE_S: i64 = 2;

/// After this many seconds the baseline for the rate moves on.
const RATE_HORIZON_S: i64 = 20;

/// One ping round. Times are TSC ticks in the machine's frequency.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Ping sent, our clock.
    pub t1: u64,
    /// Ping received, their clock.
    pub t2: u64,
    /// Pong sent, their clock.
    pub t3: u64,
    /// Pong received, our clock.
    pub t4: u64,
}

/// An interval that contains a difference of clocks, in ticks.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Lowest possible.
    pub low: i64,
    /// Highest possible.
    pub high: i64,
}

impl Bounds {
    /// The value that is wrong by [`Bounds::error`] at most.
    pub fn middle(self) -> i64 {
        self.low.midpoint(self.high)
    }

    /// How far the middle may be from the truth.
    pub fn error(self) -> u64 {
        (self.high.abs_diff(self.low)).div_ceil(2)
    }

    fn intersect(self, other: Bounds) -> Option<Bounds> {
        let both = Bounds { low: self.low.max(other.low), high: self.high.min(other.high) };
        (both.low <= both.high).then_some(both)
    }
}

/// The difference "their clock minus ours", tracked.
#[derive(Clone, Debug)]
pub struct Estimator {
    hz: i64,
    /// Bounds at our time `.0`, as rounds and drift left them.
    now: Option<(u64, Bounds)>,
    /// Bounds from rounds alone, where the rate's baseline starts.
    base: Option<(u64, Bounds)>,
    /// Rate of the difference in parts per billion, at our time `rate_at`.
    rate: Bounds,
    rate_at: u64,
    restarts: u64,
}

impl Estimator {
    /// Knows nothing yet. `khz` is the machine's TSC frequency.
    pub fn new(khz: u64) -> Estimator {
        Estimator {
            hz: (khz.clamp(1, 1 << 40) * 1000) as i64,
            now: None,
            base: None,
            rate: UNKNOWN_RATE,
            rate_at: 0,
            restarts: 0,
        }
    }

    /// Takes a round in. Rounds that go back in time are ignored; `false` says so.
    pub fn add(&mut self, round: Round) -> bool {
        let Round { t1, t2, t3, t4 } = round;
        let (there, here) = (t3.wrapping_sub(t2) as i64, t4.wrapping_sub(t1) as i64);
        let seen = Bounds { low: t3.wrapping_sub(t4) as i64, high: t2.wrapping_sub(t1) as i64 };
        if there < 0 || there > here || seen.low > seen.high {
            return false;
        }
        let Some(before) = self.at(t4) else {
            self.restart(t4, seen);
            return true;
        };
        match before.intersect(seen) {
            Some(bounds) => {
                self.now = Some((t4, bounds));
                self.learn_rate(t4, seen);
            }
            None => {
                self.restarts += 1;
                self.restart(t4, seen);
            }
        }
        true
    }

    /// The bounds at our time `now`, widened by what drift may have added since the last round. `None`
    /// before the first round.
    pub fn at(&self, now: u64) -> Option<Bounds> {
        let (then, bounds) = self.now?;
        let elapsed = now.saturating_sub(then);
        let rate = self.rate_at_time(now);
        Some(Bounds {
            low: bounds.low.saturating_add(self.drift(rate.low, elapsed)).saturating_sub(1),
            high: bounds.high.saturating_add(self.drift(rate.high, elapsed)).saturating_add(1),
        })
    }

    /// The rate of the difference, in parts per billion.
    pub fn rate(&self, now: u64) -> Bounds {
        self.rate_at_time(now)
    }

    /// How often a round contradicted all that was known.
    pub fn restarts(&self) -> u64 {
        self.restarts
    }

    fn restart(&mut self, now: u64, seen: Bounds) {
        self.now = Some((now, seen));
        self.base = Some((now, seen));
        self.rate = UNKNOWN_RATE;
        self.rate_at = now;
    }

    /// A rate that held from the baseline to now moved the difference from one interval into the other.
    fn learn_rate(&mut self, now: u64, seen: Bounds) {
        let Some((then, base)) = self.base else { return };
        let elapsed = i64::try_from(now.saturating_sub(then)).unwrap_or(i64::MAX);
        if elapsed < RATE_BASELINE_S * self.hz {
            // Until the baseline is used, the tightest round near its start is the best one.
            if seen.error() < base.error() {
                self.base = Some((now, seen));
            }
            return;
        }
        let slack = WANDER_PPB_PER_S * (elapsed / self.hz + 1);
        let learnt = Bounds {
            low: self.ppb(seen.low.saturating_sub(base.high), elapsed) - slack,
            high: self.ppb(seen.high.saturating_sub(base.low), elapsed) + slack,
        };
        let rate = self.rate_at_time(now);
        self.rate = match rate.intersect(learnt) {
            Some(rate) => rate,
            None => learnt.intersect(UNKNOWN_RATE).unwrap_or(UNKNOWN_RATE),
        };
        self.rate_at = now;
        if elapsed > RATE_HORIZON_S * self.hz {
            self.base = Some((now, seen));
        }
    }

    fn rate_at_time(&self, now: u64) -> Bounds {
        let elapsed = now.saturating_sub(self.rate_at);
        let wander = (i128::from(WANDER_PPB_PER_S) * i128::from(elapsed) / i128::from(self.hz))
            .min(i128::from(MAX_DRIFT_PPM) * 2000) as i64
            + 1;
        Bounds {
            low: (self.rate.low - wander).max(UNKNOWN_RATE.low),
            high: (self.rate.high + wander).min(UNKNOWN_RATE.high),
        }
    }

    /// Ticks that `ppb` make of `elapsed` ticks, rounded away from zero.
    fn drift(&self, ppb: i64, elapsed: u64) -> i64 {
        let ticks = i128::from(ppb) * i128::from(elapsed);
        let away = if ppb < 0 { -999_999_999 } else { 999_999_999 };
        ((ticks + away) / 1_000_000_000) as i64
    }

    fn ppb(&self, ticks: i64, elapsed: i64) -> i64 {
        let limit = i128::from(MAX_DRIFT_PPM) * 1_000_000;
        (i128::from(ticks) * 1_000_000_000 / i128::from(elapsed.max(1))).clamp(-limit, limit) as i64
    }
}

const UNKNOWN_RATE: Bounds = Bounds { low: -MAX_DRIFT_PPM * 1000, high: MAX_DRIFT_PPM * 1000 };

#[cfg(test)]
mod tests;
