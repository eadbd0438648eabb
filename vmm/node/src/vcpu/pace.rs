//! Timer interrupts leave the guest time for its work, on hosts where a tick's handler takes longer than its period.
//!
//! A tick's handler touches pages that all CPUs share. On emulated hosts bringing them takes longer than a tick, the next
//! interrupt is due when the handler ends, and the guest does nothing but handle ticks. So there, after a timer interrupt's
//! handler, the next one waits `rest` times as long as the handler took, at most [`LONGEST`]. Real servers have a `rest`
//! of 0: every interrupt comes at its time. A halted CPU never rests.

/// The longest rest, in milliseconds: well below a second, in which Linux's RCU wants to see each CPU some times.
const LONGEST: u64 = 200;

/// When a vCPU's next timer interrupt may come. Times are guest TSC ticks.
#[derive(Debug)]
pub(super) struct Pace {
    rest: u64,
    longest: u64,
    /// The vector of the timer interrupt whose handler runs, and since when.
    handler: Option<(u8, u64)>,
    not_before: u64,
}

impl Pace {
    /// That of a vCPU whose TSC runs at `khz`.
    pub(super) fn new(rest: u32, khz: u64) -> Pace {
        Pace { rest: rest.into(), longest: LONGEST * khz, handler: None, not_before: 0 }
    }

    /// When the interrupt of a timer set to `deadline` may come.
    pub(super) fn due(&self, deadline: u64) -> u64 {
        deadline.max(self.not_before)
    }

    /// The guest takes a timer interrupt: its handler begins.
    pub(super) fn began(&mut self, vector: u8, now: u64) {
        self.handler = Some((vector, now));
    }

    /// The guest said end-of-interrupt for `vector`.
    pub(super) fn finished(&mut self, vector: Option<u8>, now: u64) {
        if let Some((its, since)) = self.handler
            && Some(its) == vector
        {
            self.handler = None;
            self.not_before = now + (self.rest * now.saturating_sub(since)).min(self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMER: u8 = 0xec;

    /// The rest after a handler that ran from 1000 until `end`. A millisecond has 1000 ticks.
    fn rest(rest: u32, end: u64) -> u64 {
        let mut pace = Pace::new(rest, 1000);
        pace.began(TIMER, 1000);
        pace.finished(Some(TIMER), end);
        pace.due(end) - end
    }

    #[test]
    fn on_real_servers_every_interrupt_comes_at_its_time() {
        assert_eq!(rest(0, 1_000_000), 0);
    }

    #[test]
    fn a_handler_leaves_time_for_work_in_proportion_and_no_more_than_the_longest() {
        assert_eq!([1000, 1010, 9000, 1_000_000].map(|end| rest(8, end)), [0, 80, 64_000, 200_000]);
    }

    #[test]
    fn what_is_not_due_in_that_time_is_not_delayed() {
        let mut pace = Pace::new(8, 1000);
        pace.began(TIMER, 1000);
        pace.finished(Some(TIMER), 1010);
        assert_eq!(pace.due(5000), 5000);
    }

    #[test]
    fn the_end_of_another_interrupt_is_not_the_timers() {
        let mut pace = Pace::new(8, 1000);
        pace.began(TIMER, 1000);
        pace.finished(Some(0x30), 1500);
        assert_eq!(pace.due(1600), 1600);
        pace.finished(Some(TIMER), 2000);
        assert_eq!(pace.due(2000), 10_000);
        pace.finished(Some(TIMER), 20_000);
        assert_eq!(pace.due(2000), 10_000);
    }
}
