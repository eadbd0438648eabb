//! Timer interrupts leave the guest time for its work.
//!
//! A tick's handler touches pages that all CPUs share. Where bringing a page takes long (a slow fabric, an
//! emulated host) a handler can take longer than the tick's period; the next interrupt would be due at once,
//! and the guest would do nothing but handle ticks. So after a timer interrupt's handler the next one waits
//! [`REST`] times as long as the handler took. At the speed of hardware that is some microseconds.

/// How many times a handler's duration its CPU is left alone afterwards.
const REST: u64 = 8;

/// When a vCPU's next timer interrupt may come. Times are guest TSC ticks.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the interrupt whose handler runs came.
    since: Option<u64>,
    not_before: u64,
}

impl Pace {
    /// When the interrupt of a timer set to `deadline` may come.
    pub(super) fn due(&self, deadline: u64) -> u64 {
        deadline.max(self.not_before)
    }

    /// A timer interrupt came.
    pub(super) fn interrupted(&mut self, now: u64) {
        self.since = Some(now);
    }

    /// The guest said end-of-interrupt.
    pub(super) fn finished(&mut self, now: u64) {
        if let Some(since) = self.since.take() {
            self.not_before = now + REST * now.saturating_sub(since);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quick_handler_delays_nothing_that_is_not_due_at_once() {
        let mut pace = Pace::default();
        pace.interrupted(1000);
        pace.finished(1010);
        assert_eq!(pace.due(5000), 5000);
        assert_eq!(pace.due(1000), 1090);
    }

    #[test]
    fn a_handler_longer_than_the_period_leaves_time_for_work() {
        let mut pace = Pace::default();
        pace.interrupted(1000);
        pace.finished(9000);
        assert_eq!(pace.due(5000), 73_000);
        // Another interrupt's end is not the timer's.
        pace.finished(20_000);
        assert_eq!(pace.due(5000), 73_000);
    }
}
