//! The node's guest TSC, and how a step reaches its vCPUs.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use super::Scale;
use super::align::is_forward;
use crate::trace;

/// Counters of a node's clock.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct ClockStats {
    /// What is added to the scaled host TSC, modulo 2^64.
    pub offset: u64,
    /// How far this node's clock may be from node 0's, in nanoseconds; 0 at node 0.
    pub bound_ns: u64,
    /// Steps since the start.
    pub steps: u64,
    /// All of them together, in ticks.
    pub stepped_ticks: u64,
    /// Rate of node 0's host TSC against this one's, in parts per billion.
    pub rate_ppb: i64,
}

/// One node's guest TSC: what its vCPUs' RDTSC reads, and what their timers run by.
///
/// A step is published here; vCPUs in the guest are then called out (`on_step`) and take the new offset
/// before they enter again. Those that are not in the guest see it on their way in.
pub struct GuestClock {
    khz: u64,
    scale: Scale,
    fixed: bool,
    offset: AtomicU64,
    published: AtomicU64,
    bound_ns: AtomicU64,
    steps: AtomicU64,
    stepped: AtomicU64,
    rate_ppb: AtomicI64,
    on_step: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl GuestClock {
    /// A clock of `khz` (the machine's frequency) that reads 0 now.
    pub fn new(khz: u64, scale: Scale) -> GuestClock {
        let clock = GuestClock::at_offset_0(khz, scale, false);
        clock.set(0u64.wrapping_sub(clock.host()));
        clock
    }

    /// A clock that is the host's TSC and cannot be set: where KVM cannot offset the guest's
    /// ([`crate::kvm::HostCpu::tsc_offset`]). Nodes with such clocks fit together only on one host.
    pub fn fixed(khz: u64) -> GuestClock {
        GuestClock::at_offset_0(khz, Scale::ONE, true)
    }

    fn at_offset_0(khz: u64, scale: Scale, fixed: bool) -> GuestClock {
        GuestClock {
            khz: khz.clamp(1, 1 << 32),
            scale,
            fixed,
            offset: AtomicU64::new(0),
            published: AtomicU64::new(0),
            bound_ns: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            stepped: AtomicU64::new(0),
            rate_ppb: AtomicI64::new(0),
            on_step: OnceLock::new(),
        }
    }

    /// Whether this clock cannot be set or stepped.
    pub fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// The machine's TSC frequency in kHz.
    pub fn khz(&self) -> u64 {
        self.khz
    }

    /// How this node's vCPUs scale their host's TSC.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// This host's TSC in the machine's frequency.
    pub fn host(&self) -> u64 {
        self.scale.apply(trace::now())
    }

    /// What is added to [`GuestClock::host`].
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::SeqCst)
    }

    /// What the guest's RDTSC reads now.
    pub fn now(&self) -> u64 {
        self.host().wrapping_add(self.offset())
    }

    /// The host's (scaled) TSC when the offset last changed.
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::SeqCst)
    }

    /// Ticks in `ns` nanoseconds.
    pub fn ticks(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.khz) / 1_000_000) as u64
    }

    /// Nanoseconds in `ticks`, rounded up, at most `u64::MAX`.
    pub fn nanoseconds(&self, ticks: u64) -> u64 {
        let ns = (u128::from(ticks) * 1_000_000).div_ceil(self.khz.into());
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Sets the offset, forward or back: only before the first vCPU runs. A fixed clock stays as it is.
    pub fn set(&self, offset: u64) {
        if self.fixed {
            return;
        }
        self.published.store(self.host(), Ordering::SeqCst);
        self.offset.store(offset, Ordering::SeqCst);
    }

    /// Moves the offset forward to `offset` and calls the vCPUs out of the guest. `false` if that is not
    /// forward, or further than [`super::align::MAX_STEP_S`], or the clock is fixed.
    pub fn step_to(&self, offset: u64) -> bool {
        if self.fixed {
            return false;
        }
        // Order: vCPUs that see the new offset must also see when it was published.
        self.published.store(self.host(), Ordering::SeqCst);
        let forward = |old| is_forward(old, offset, self.khz).then_some(offset);
        let Ok(old) = self.offset.fetch_update(Ordering::SeqCst, Ordering::SeqCst, forward) else {
            return false;
        };
        let step = offset.wrapping_sub(old);
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.stepped.fetch_add(step, Ordering::Relaxed);
        trace::event(trace::Event::ClockStep, step, self.bound_ns.load(Ordering::Relaxed));
        if let Some(call_out) = self.on_step.get() {
            call_out();
        }
        true
    }

    /// Names what calls this node's vCPUs out of the guest. Only the first call counts.
    pub fn set_on_step(&self, call_out: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_step.set(call_out);
    }

    /// Notes how good the alignment is: the bound in nanoseconds and the rate in parts per billion.
    pub fn note(&self, bound_ns: u64, rate_ppb: i64) {
        self.bound_ns.store(bound_ns, Ordering::Relaxed);
        self.rate_ppb.store(rate_ppb, Ordering::Relaxed);
    }

    /// The counters.
    pub fn stats(&self) -> ClockStats {
        ClockStats {
            offset: self.offset(),
            bound_ns: self.bound_ns.load(Ordering::Relaxed),
            steps: self.steps.load(Ordering::Relaxed),
            stepped_ticks: self.stepped.load(Ordering::Relaxed),
            rate_ppb: self.rate_ppb.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn a_new_clock_starts_near_zero_and_runs() {
        let clock = GuestClock::new(2_000_000, Scale::ONE);
        let first = clock.now();
        assert!(first < clock.ticks(10_000_000_000));
        assert!(clock.now() > first);
    }

    #[test]
    fn only_forward_steps_are_taken_and_each_calls_the_vcpus_out() {
        let clock = GuestClock::new(2_000_000, Scale::ONE);
        let calls = Arc::new(AtomicU32::new(0));
        let counter = calls.clone();
        clock.set_on_step(Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        }));
        let offset = clock.offset();
        assert!(clock.step_to(offset.wrapping_add(1000)));
        assert!(!clock.step_to(offset));
        assert!(!clock.step_to(offset.wrapping_add(1000)));
        assert!(!clock.step_to(offset.wrapping_add(1 << 40)));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert_eq!((clock.stats().steps, clock.stats().stepped_ticks), (1, 1000));
    }

    #[test]
    fn a_fixed_clock_is_the_hosts_and_stays_so() {
        let clock = GuestClock::fixed(2_000_000);
        clock.set(5);
        assert!(!clock.step_to(7));
        assert_eq!(clock.stats(), ClockStats::default());
        assert!(clock.now() <= clock.host());
    }

    #[test]
    fn nanoseconds_are_rounded_up_so_that_no_timer_is_early() {
        let clock = GuestClock::new(3_000_000, Scale::ONE);
        assert_eq!(clock.nanoseconds(1), 1);
        assert_eq!(clock.nanoseconds(3_000_000_001), 1_000_000_001);
        assert_eq!(clock.ticks(1_000_000_000), 3_000_000_000);
    }
}
