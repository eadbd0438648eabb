//! The local APIC's timer (SDM vol. 3, 11.5.4): when it fires next, in guest TSC ticks.
//!
//! The timer's input clock is the TSC itself: with divisor 1 the current count falls by one each tick. It
//! knows nothing of vectors or masks; [`super::lapic::Lapic`] decides what an expiry means.

/// How the timer counts: LVT timer register, bits 18..17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down from the initial count once.
    OneShot,
    /// Counts down from the initial count again and again.
    Periodic,
    /// Fires when the TSC reaches IA32_TSC_DEADLINE.
    Deadline,
}

/// The timer. All times are guest TSC ticks.
#[derive(Clone, Debug)]
pub struct Timer {
    mode: TimerMode,
    /// The divide configuration register as written: bits 3, 1, 0.
    divide: u32,
    /// The initial-count register.
    initial: u32,
    /// The next expiry, if the timer runs.
    next: Option<u64>,
}

impl Default for Timer {
    fn default() -> Self {
        Self { mode: TimerMode::OneShot, divide: 0, initial: 0, next: None }
    }
}

impl Timer {
    /// How it counts.
    pub fn mode(&self) -> TimerMode {
        self.mode
    }

    /// Changes how it counts. Going to or from deadline mode stops the timer; between the two others it goes
    /// on counting.
    pub fn set_mode(&mut self, mode: TimerMode) {
        if (self.mode == TimerMode::Deadline) != (mode == TimerMode::Deadline) {
            self.initial = 0;
            self.next = None;
        }
        self.mode = mode;
    }

    /// The initial-count register.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Starts counting down from `count` at `now`; 0 stops the timer. Ignored in deadline mode.
    pub fn set_initial(&mut self, count: u32, now: u64) {
        if self.mode != TimerMode::Deadline {
            self.initial = count;
            self.next = (count != 0).then(|| now.saturating_add(self.period()));
        }
    }

    /// The current-count register at `now`: 0 when stopped, and in deadline mode.
    pub fn current(&self, now: u64) -> u32 {
        let Some(next) = self.next.filter(|_| self.mode != TimerMode::Deadline) else { return 0 };
        let left = match next.checked_sub(now) {
            Some(left) => left,
            // An expiry that nobody has asked for yet.
            None if self.mode == TimerMode::Periodic => self.period() - (now - next) % self.period(),
            None => 0,
        };
        u32::try_from(left.div_ceil(self.divisor())).unwrap_or(u32::MAX)
    }

    /// The divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration register (bits other than 3, 1 and 0 are dropped). A running count
    /// keeps its value and goes on at the new rate.
    pub fn set_divide(&mut self, value: u32, now: u64) {
        let count = u64::from(self.current(now));
        self.divide = value & 0b1011;
        if self.mode != TimerMode::Deadline && self.next.is_some() {
            self.next = Some(now.saturating_add(count * self.divisor()));
        }
    }

    /// IA32_TSC_DEADLINE at `now`: 0 if not armed, already passed, or not in deadline mode.
    pub fn deadline(&self, now: u64) -> u64 {
        self.next.filter(|next| self.mode == TimerMode::Deadline && *next > now).unwrap_or(0)
    }

    /// Arms the timer for TSC `deadline`, which may have passed already (it then expires at once); 0 disarms.
    /// Ignored outside deadline mode.
    pub fn set_deadline(&mut self, deadline: u64) {
        if self.mode == TimerMode::Deadline {
            self.next = (deadline != 0).then_some(deadline);
        }
    }

    /// The next expiry, if the timer runs; it may have passed already.
    pub fn next(&self) -> Option<u64> {
        self.next
    }

    /// Whether the timer expired by `now`. It then stops, or in periodic mode goes on to its first expiry
    /// after `now`: periods that passed unseen count as one expiry.
    pub fn expire(&mut self, now: u64) -> bool {
        let Some(next) = self.next.filter(|next| *next <= now) else { return false };
        self.next = match self.mode {
            TimerMode::Periodic if self.initial != 0 => {
                let period = self.period();
                Some((now - now.saturating_sub(next) % period).saturating_add(period))
            }
            _ => None,
        };
        true
    }

    /// Ticks from the initial count to 0; at least 1.
    fn period(&self) -> u64 {
        (u64::from(self.initial) * self.divisor()).max(1)
    }

    /// Ticks per count, a power of two from 1 to 128: bits 3, 1, 0 are log2 - 1, modulo 8.
    fn divisor(&self) -> u64 {
        let code = (self.divide & 0b11) | (self.divide & 0b1000) >> 1;
        1 << ((code + 1) & 7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divide_register_means_what_the_manual_says() {
        let table = [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16)];
        let rest = [(0b1000, 32), (0b1001, 64), (0b1010, 128), (0b1011, 1)];
        for (value, divisor) in table.into_iter().chain(rest) {
            let mut timer = Timer::default();
            timer.set_divide(value, 0);
            timer.set_initial(10, 1000);
            assert_eq!(timer.next(), Some(1000 + 10 * divisor), "divide register {value:#b}");
        }
    }

    #[test]
    fn one_shot_counts_down_and_stops() {
        let mut timer = Timer::default();
        timer.set_divide(0b1011, 0);
        timer.set_initial(100, 50);
        assert_eq!((timer.current(50), timer.current(149), timer.current(150)), (100, 1, 0));
        assert!(!timer.expire(149));
        assert!(timer.expire(150));
        assert_eq!((timer.next(), timer.current(151), timer.initial()), (None, 0, 100));
        assert!(!timer.expire(1000));
    }

    #[test]
    fn missed_periods_count_once_and_the_phase_is_kept() {
        let mut timer = Timer::default();
        timer.set_divide(0b1011, 0);
        timer.set_mode(TimerMode::Periodic);
        timer.set_initial(100, 0);
        assert_eq!(timer.current(730), 70);
        assert!(timer.expire(730));
        assert!(!timer.expire(799));
        assert_eq!(timer.next(), Some(800));
        assert!(timer.expire(800));
        assert_eq!(timer.next(), Some(900));
    }

    #[test]
    fn a_deadline_in_the_past_expires_at_once_and_only_once() {
        let mut timer = Timer::default();
        timer.set_mode(TimerMode::Deadline);
        timer.set_deadline(5);
        assert_eq!(timer.deadline(4), 5);
        assert_eq!(timer.deadline(5), 0);
        assert!(timer.expire(900));
        assert!(!timer.expire(901));
    }

    #[test]
    fn leaving_deadline_mode_disarms_and_each_mode_ignores_the_others_register() {
        let mut timer = Timer::default();
        timer.set_deadline(100);
        assert_eq!(timer.next(), None);
        timer.set_mode(TimerMode::Deadline);
        timer.set_initial(100, 0);
        assert_eq!((timer.next(), timer.initial()), (None, 0));
        timer.set_deadline(100);
        timer.set_mode(TimerMode::OneShot);
        assert_eq!(timer.next(), None);
    }

    #[test]
    fn a_new_divisor_keeps_the_count() {
        let mut timer = Timer::default();
        timer.set_divide(0b1011, 0);
        timer.set_initial(100, 0);
        timer.set_divide(0b0000, 40);
        assert_eq!(timer.current(40), 60);
        assert_eq!(timer.next(), Some(160));
    }
}
