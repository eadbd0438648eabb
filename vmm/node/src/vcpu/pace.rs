//! Timer interrupts leave the guest time for its work, on hosts where a tick takes longer than its period.
//!
//! A tick touches pages that all CPUs share, page tables above all. On emulated hosts bringing them takes
//! longer than a tick's period, the next interrupt is due when the last has been taken, and the guest does
//! nothing but handle ticks. So there, after a timer interrupt, the next one waits `rest` times as long as
//! the last one took from when it was due to its end-of-interrupt, at most [`LONGEST`]. Halted CPUs rest as
//! well: their ticks take the pages from the others. (With rests of 2 s at most all CPUs of two nodes were
//! online after 73 s, and after 90 s if halted ones did not rest: one boot each.) Real servers have a `rest`
//! of 0: every interrupt comes at its time.

/// The longest rest, in milliseconds: Linux's RCU complains after 21 seconds.
const LONGEST: u64 = 4_000;

/// When a vCPU's next timer interrupt may come. Times are guest TSC ticks.
#[derive(Debug)]
pub(super) struct Pace {
    rest: u64,
    longest: u64,
    /// The vector of the timer interrupt that was due last, and when it came.
    came: Option<(u8, u64)>,
    not_before: u64,
}

impl Pace {
    /// That of a vCPU whose TSC runs at `khz`.
    pub(super) fn new(rest: u32, khz: u64) -> Pace {
        Pace { rest: rest.into(), longest: LONGEST * khz, came: None, not_before: 0 }
    }

    /// When the interrupt of a timer set to `deadline` may come.
    pub(super) fn due(&self, deadline: u64) -> u64 {
        deadline.max(self.not_before)
    }

    /// A timer interrupt comes.
    pub(super) fn interrupted(&mut self, vector: u8, now: u64) {
        self.came = Some((vector, now));
    }

    /// The guest said end-of-interrupt for `vector`.
    pub(super) fn finished(&mut self, vector: Option<u8>, now: u64) {
        if let Some((its, since)) = self.came
            && Some(its) == vector
        {
            self.came = None;
            self.not_before = now + (self.rest * now.saturating_sub(since)).min(self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMER: u8 = 0xec;

    /// The rest after an interrupt that took from 1000 until `end`. A millisecond has 1000 ticks.
    fn rest(rest: u32, end: u64) -> u64 {
        let mut pace = Pace::new(rest, 1000);
        pace.interrupted(TIMER, 1000);
        pace.finished(Some(TIMER), end);
        pace.due(end) - end
    }

    #[test]
    fn on_real_servers_every_interrupt_comes_at_its_time() {
        assert_eq!(rest(0, 1_000_000), 0);
    }

    #[test]
    fn an_interrupt_leaves_time_for_work_in_proportion_and_no_more_than_the_longest() {
        assert_eq!([1000, 1010, 9000, 1_000_000].map(|end| rest(8, end)), [0, 80, 64_000, 4_000_000]);
    }

    #[test]
    fn what_is_not_due_in_that_time_is_not_delayed() {
        let mut pace = Pace::new(8, 1000);
        pace.interrupted(TIMER, 1000);
        pace.finished(Some(TIMER), 1010);
        assert_eq!(pace.due(5000), 5000);
    }

    #[test]
    fn the_end_of_another_interrupt_is_not_the_timers() {
        let mut pace = Pace::new(8, 1000);
        pace.interrupted(TIMER, 1000);
        pace.finished(Some(0x30), 1500);
        assert_eq!(pace.due(1600), 1600);
        pace.finished(Some(TIMER), 2000);
        assert_eq!(pace.due(2000), 10_000);
        pace.finished(Some(TIMER), 20_000);
        assert_eq!(pace.due(2000), 10_000);
    }
}
