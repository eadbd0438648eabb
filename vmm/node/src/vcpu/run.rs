//! The loop of one vCPU's thread.
//!
//! ```text
//!   attend ─> follow clock ─> ship ─> drain mailbox ─> expire timer ─> asleep? wait
//!     ^                                                                  │ no
//!     │                                                  inject ─> arm timer ─> KVM_RUN ─> handle exit
//!     └────────────────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::registers::{PowerOn, Start};
use super::report::{self, LastExits, VcpuFailure};
use super::table::{Slot, State, Table, Wish, count};
use super::timer::Timer;
use super::{Environment, VcpuConfig, signal};
use crate::kvm::{Exit, KvmError, Vcpu};
use crate::trace;
use devices::irq::lapic::Lapic;

/// Longest uninterrupted sleep. Wake-ups are not lost; this only bounds what a mistake would cost.
pub(super) const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long a vCPU waits for the others to leave the guest before it takes on a stepped clock. A thread that
/// has been kicked and has not left by then is not running guest code: it is waiting for a host CPU, or for a
/// page that KVM's emulator needs, and KVM sees the pending kick before it goes on.
const STEP_WAIT_NS: u64 = 200_000;
/// Exits that completing one instruction may make: string I/O in pieces, an access split over two pages.
const MAX_COMPLETIONS: usize = 4096;

/// What is known of the thread's kick signal after a turn of the loop.
#[derive(Copy, Clone)]
enum Signalled {
    /// It has been taken.
    Taken,
    /// It is pending.
    Pending,
    /// It is pending, or about to be, if the mailbox says that somebody kicked.
    Unknown,
}

/// Why the loop ends.
pub(super) enum End {
    Stopped,
    Failed { why: String },
}

impl From<KvmError> for End {
    fn from(error: KvmError) -> End {
        End::Failed { why: error.to_string() }
    }
}

/// One vCPU with all that its thread owns.
pub(super) struct Cpu {
    /// Its number within this node.
    pub(super) local: u32,
    /// Its number in the machine.
    pub(super) vcpu: u32,
    pub(super) kvm: Vcpu,
    pub(super) lapic: Lapic,
    pub(super) table: Arc<Table>,
    pub(super) env: Environment,
    pub(super) state: State,
    pub(super) refused_msrs: u32,
    /// The last exit's instruction is not finished: see [`Exit::needs_completion`].
    pub(super) incomplete: bool,
    pub(super) last: LastExits,
    power_on: PowerOn,
    /// RFLAGS.IF when the vCPU executed HLT.
    pub(super) halted_enabled: bool,
    nmi: bool,
    /// The TSC offset that KVM has been given.
    offset: u64,
    /// The guest TSC that the timer is armed for.
    pub(super) armed: Option<u64>,
    pub(super) pace: Pace,
    /// How many shipped instructions in a row were not done.
    pub(super) in_vain: u32,
}

impl Cpu {
    /// Prepares the vCPU; its thread is to call [`Cpu::thread`].
    pub(super) fn new(
        local: u32,
        mut kvm: Vcpu,
        config: &VcpuConfig,
        table: Arc<Table>,
        env: Environment,
    ) -> Result<Cpu, KvmError> {
        let lapic = Lapic::new(config.apic_id, matches!(config.start, Start::Boot(_)));
        kvm.set_cpuid(&config.cpuid)?;
        let power_on = PowerOn::new(&mut kvm, lapic.apic_base(), &config.msrs)?;
        let state = match &config.start {
            Start::WaitForSipi => State::WaitForSipi,
            Start::Boot(registers) => {
                power_on.boot(&mut kvm, registers)?;
                State::Running
            }
        };
        if !env.clock.scale().is_one() {
            kvm.set_tsc_khz(env.clock.khz() as u32)?;
        }
        let offset = env.clock.offset();
        set_offset(&kvm, &env, offset)?;
        check_clock(&kvm, &env, offset)?;
        table.slots()[local as usize].offset.store(offset, Ordering::SeqCst);
        Ok(Cpu {
            local,
            vcpu: config.vcpu,
            kvm,
            lapic,
            table,
            pace: Pace::new(env.timer_rest, env.clock.khz()),
            env,
            state,
            refused_msrs: 0,
            incomplete: false,
            last: LastExits::default(),
            power_on,
            halted_enabled: false,
            nmi: false,
            offset,
            armed: None,
            in_vain: 0,
        })
    }

    /// The whole life of the vCPU's thread.
    pub(super) fn thread(mut self) {
        trace::event(trace::Event::VcpuThread, self.vcpu.into(), 0);
        self.slot().set_state(self.state);
        let why = match self.prepare().and_then(|timer| self.run(&timer)) {
            Ok(never) => match never {},
            Err(End::Stopped) => return,
            Err(End::Failed { why }) => why,
        };
        self.slot().set_state(State::Failed);
        let dump = self.dump();
        (self.env.on_failure.clone())(VcpuFailure { vcpu: self.vcpu, why, dump });
        self.park(|wish| wish == Wish::Stop);
    }

    pub(super) fn slot(&self) -> &Slot {
        &self.table.slots()[self.local as usize]
    }

    /// What the guest's TSC reads now.
    pub(super) fn now(&self) -> u64 {
        self.env.clock.host().wrapping_add(self.offset)
    }

    /// When the local APIC's timer interrupt is to come.
    fn timer_due(&self) -> Option<u64> {
        self.lapic.timer_deadline().map(|deadline| self.pace.due(deadline))
    }

    fn prepare(&mut self) -> Result<Timer, End> {
        let failed =
            |error: std::io::Error| End::Failed { why: format!("its thread cannot be set up: {error}") };
        let mask = signal::block_all().map_err(failed)?;
        self.slot().mailbox.adopt();
        self.kvm.set_signal_mask(mask)?;
        // Sleeps that end late would delay every timer interrupt of an idle guest.
        // SAFETY: this prctl takes a number and touches no memory.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
        Timer::new().map_err(failed)
    }

    fn run(&mut self, timer: &Timer) -> Result<std::convert::Infallible, End> {
        loop {
            self.attend()?;
            self.follow_clock()?;
            // Order: from here on posters kick; then take what they left until now.
            self.slot().mailbox.doze();
            self.ship_if_asked()?;
            self.drain()?;
            let signalled = if self.table.wish() != Wish::Run || self.table_wants_dump() {
                Signalled::Unknown
            } else if self.state == State::Running {
                self.enter(timer)?
            } else {
                self.sleep()
            };
            let kicked = self.slot().mailbox.wake();
            // A signal that stays pending only makes the next entry return at once.
            let pending = match signalled {
                Signalled::Taken => false,
                Signalled::Pending => true,
                Signalled::Unknown => kicked,
            };
            if pending && signal::take_pending() {
                self.armed = None;
            }
        }
    }

    fn table_wants_dump(&self) -> bool {
        self.slot().dump_wanted.load(Ordering::SeqCst)
    }

    /// Does what the rest of the node wants of this thread.
    fn attend(&mut self) -> Result<(), End> {
        if self.table.wish() != Wish::Run || self.table_wants_dump() {
            self.finish_instruction()?;
            self.park(|wish| wish != Wish::Park);
        }
        match self.table.wish() {
            Wish::Stop => Err(End::Stopped),
            _ => Ok(()),
        }
    }

    /// Waits, answering who wants a dump, until `enough` of the wish.
    fn park(&mut self, enough: impl Fn(Wish) -> bool) {
        let table = self.table.clone();
        let mut idle = table.idle();
        idle.parked += 1;
        table.changed.notify_all();
        loop {
            if self.table_wants_dump() {
                drop(idle);
                self.answer_dump();
                idle = table.idle();
            }
            if enough(table.wish()) {
                break;
            }
            // The bound is for a notice that should not, but might, go missing.
            let waited = table.changed.wait_timeout(idle, LONGEST_SLEEP);
            idle = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        idle.parked -= 1;
    }

    /// Shows the registers to who wants them.
    pub(super) fn answer_dump(&mut self) {
        if !self.slot().dump_wanted.swap(false, Ordering::SeqCst) {
            return;
        }
        let text = self.dump();
        *base::lock(&self.slot().dump) = Some(text);
        let table = self.table.clone();
        // Under the lock, so that who is about to wait sees the text or the notice.
        drop(table.idle());
        table.changed.notify_all();
    }

    /// Takes on the node's clock if it was stepped.
    ///
    /// A vCPU with the new offset must not meet one with the old offset in shared memory, where time would
    /// seem to go back. So it waits until the others, which have been called out, have left the guest.
    fn follow_clock(&mut self) -> Result<(), End> {
        let offset = self.env.clock.offset();
        if offset == self.offset {
            return Ok(());
        }
        let limit = self.env.clock.published().wrapping_add(self.env.clock.ticks(STEP_WAIT_NS));
        let inside = |slot: &Slot| {
            slot.in_guest.load(Ordering::SeqCst) && slot.offset.load(Ordering::SeqCst) != offset
        };
        while self.table.slots().iter().any(inside) && self.env.clock.host() < limit {
            std::thread::yield_now();
        }
        set_offset(&self.kvm, &self.env, offset)?;
        self.offset = offset;
        self.slot().offset.store(offset, Ordering::SeqCst);
        // The same guest time is now nearer in host time.
        self.armed = None;
        Ok(())
    }

    /// Takes what others left.
    fn drain(&mut self) -> Result<(), End> {
        let startup = self.slot().mailbox.take_startup();
        if startup.init {
            trace::event(trace::Event::Post, self.vcpu.into(), 0x200);
            self.finish_instruction()?;
            self.power_on.init(&mut self.kvm)?;
            self.lapic.init_reset();
            self.pace = Pace::new(self.env.timer_rest, self.env.clock.khz());
            self.nmi = false;
            self.set_state(State::WaitForSipi);
        }
        let slot = &self.table.slots()[self.local as usize];
        let (lapic, vcpu) = (&mut self.lapic, self.vcpu);
        slot.mailbox.take_vectors(|vector, level| {
            trace::event(trace::Event::Post, vcpu.into(), vector.into());
            lapic.post(vector, level);
        });
        // A CPU that waits for its start-up takes no NMI.
        if slot.mailbox.take_nmi() && self.state != State::WaitForSipi {
            trace::event(trace::Event::Post, vcpu.into(), 0x100);
            self.kvm.nmi()?;
            count(&slot.counters.nmis, 1);
            self.nmi = true;
        }
        // Last: what came before the start-up message found a CPU that takes no interrupts.
        if let Some(vector) = startup.sipi {
            trace::event(trace::Event::Post, self.vcpu.into(), 0x300 | u64::from(vector));
            if self.state == State::WaitForSipi {
                self.power_on.sipi(&mut self.kvm, vector)?;
                self.set_state(State::Running);
            }
        }
        let now = self.now();
        if self.timer_due().is_some_and(|due| due <= now) && self.lapic.expire_timer(now) {
            self.pace.interrupted(self.lapic.timer_vector(), now);
            count(&self.slot().counters.timer_interrupts, 1);
        }
        if self.state == State::Halted && (self.nmi || self.halted_enabled && self.lapic.pending().is_some())
        {
            self.set_state(State::Running);
        }
        Ok(())
    }

    fn set_state(&mut self, state: State) {
        self.state = state;
        self.slot().set_state(state);
    }

    /// Halted, or waiting for start-up: sleeps until a kick or the timer's time.
    fn sleep(&mut self) -> Signalled {
        let deadline = self.timer_due().filter(|_| self.state == State::Halted);
        let timeout = deadline.map_or(LONGEST_SLEEP, |deadline| {
            let ticks = deadline.saturating_sub(self.now());
            Duration::from_nanos(self.env.clock.nanoseconds(ticks)).min(LONGEST_SLEEP)
        });
        if !timeout.is_zero() {
            (self.env.on_idle)(base::thread::id() as u32);
        }
        let start = Instant::now();
        if signal::wait(timeout) == signal::Woken::Timer {
            self.armed = None;
        }
        if self.state == State::Halted {
            count(&self.slot().counters.halted_ns, start.elapsed().as_nanos() as u64);
        }
        Signalled::Taken
    }

    /// Runs guest code until an exit, and handles that.
    fn enter(&mut self, timer: &Timer) -> Result<Signalled, End> {
        if let Some(exit) = self.inject()? {
            self.handle(exit)?;
            return Ok(Signalled::Unknown);
        }
        self.arm(timer)?;
        let slot = self.slot();
        slot.in_guest.store(true, Ordering::SeqCst);
        // Order: a step that this does not see sees `in_guest` and calls out.
        if self.env.clock.offset() != self.offset {
            slot.in_guest.store(false, Ordering::SeqCst);
            return Ok(Signalled::Unknown);
        }
        count(&slot.counters.entries, 1);
        let exit = self.kvm.run();
        self.slot().in_guest.store(false, Ordering::SeqCst);
        let exit = exit?;
        self.nmi = false;
        self.lapic.set_cr8(self.kvm.cr8());
        if exit == Exit::Interrupted {
            // KVM finished the last instruction, if one was unfinished, before it looked for signals.
            self.incomplete = false;
            count(&self.slot().counters.kick_exits, 1);
            self.remember(exit);
            trace::event(trace::Event::Exit, u64::from(self.vcpu) << 32 | u64::from(exit.reason()), 0);
            return Ok(Signalled::Pending);
        }
        self.handle(exit)?;
        Ok(Signalled::Unknown)
    }

    /// Gives the guest the interrupt that its local APIC has for it, if it may take one now, or asks to be
    /// told when it may. Returns an exit if one came of it.
    fn inject(&mut self) -> Result<Option<Exit>, End> {
        self.kvm.set_cr8(self.lapic.cr8());
        if self.lapic.pending().is_none() {
            self.kvm.request_interrupt_window(false);
            return Ok(None);
        }
        if self.kvm.ready_for_interrupt() && self.incomplete {
            // The instruction may still fault, and its fault's handler may run with interrupts off: KVM would
            // inject nevertheless.
            if let Some(exit) = self.complete()? {
                return Ok(Some(exit));
            }
        }
        if self.kvm.ready_for_interrupt()
            && let Some(vector) = self.lapic.acknowledge()
        {
            trace::event(trace::Event::Inject, self.vcpu.into(), vector.into());
            self.kvm.interrupt(vector)?;
            count(&self.slot().counters.injected, 1);
        }
        self.kvm.request_interrupt_window(self.lapic.pending().is_some());
        Ok(None)
    }

    fn complete(&mut self) -> Result<Option<Exit>, End> {
        let exit = self.kvm.complete()?;
        self.lapic.set_cr8(self.kvm.cr8());
        self.incomplete = false;
        Ok(exit)
    }

    /// Brings the registers to an instruction boundary, handling the exits that this makes.
    fn finish_instruction(&mut self) -> Result<(), End> {
        for _ in 0..MAX_COMPLETIONS {
            if !self.incomplete {
                return Ok(());
            }
            self.kvm.set_cr8(self.lapic.cr8());
            if let Some(exit) = self.complete()? {
                self.handle(exit)?;
            }
        }
        Err(End::Failed {
            why: format!("one instruction made {MAX_COMPLETIONS} device accesses without end"),
        })
    }

    /// Arms the timer for the local APIC's next interrupt, unless it is.
    fn arm(&mut self, timer: &Timer) -> Result<(), End> {
        let deadline = self.timer_due();
        if let Some(at) = deadline
            && self.armed != deadline
        {
            let ticks = at.saturating_sub(self.now());
            timer
                .arm(self.env.clock.nanoseconds(ticks))
                .map_err(|error| End::Failed { why: format!("its timer cannot be set: {error}") })?;
            self.armed = deadline;
        }
        Ok(())
    }

    pub(super) fn remember(&mut self, exit: Exit) {
        let regs = self.kvm.regs_at_exit();
        self.last.push(exit, regs);
    }

    /// Registers and last exits.
    fn dump(&mut self) -> String {
        let name = format!("vCPU {} (APIC id {:#x})", self.vcpu, self.lapic.apic_id());
        let state = format!("{:?}", self.slot().state());
        let mut text = report::dump(&mut self.kvm, &name, &state, &self.last);
        text.push_str(&format!("  local APIC: {:?}\n", self.lapic));
        text.push_str(&format!("  guest TSC {:#x}, counters {:?}\n", self.now(), self.slot().counters));
        text.push_str(&format!("  {:?}\n", self.pace));
        text
    }
}

/// Gives KVM the node's TSC offset. A fixed clock's is not KVM's to apply.
fn set_offset(kvm: &Vcpu, env: &Environment, offset: u64) -> Result<(), KvmError> {
    if env.clock.is_fixed() { Ok(()) } else { kvm.set_tsc_offset(offset) }
}

/// Fails unless the vCPU's TSC is the node's clock: that KVM scales as this program believes it does, above
/// all.
fn check_clock(kvm: &Vcpu, env: &Environment, offset: u64) -> Result<(), KvmError> {
    // Rounding differs by a tick or two between the two ways of scaling.
    const ROUNDING: u64 = 16;
    if env.clock.is_fixed() {
        return Ok(());
    }
    let before = env.clock.host().wrapping_add(offset);
    let Some(tsc) = kvm.msr(crate::kvm::msr::TSC)? else { return Ok(()) };
    let after = env.clock.host().wrapping_add(offset);
    let early = before.wrapping_sub(tsc) as i64;
    let late = tsc.wrapping_sub(after) as i64;
    match early.max(late) {
        off if off <= ROUNDING as i64 => Ok(()),
        _ => Err(KvmError::Tsc { ticks: if early > late { -early } else { late } }),
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        let slot = self.slot();
        slot.mailbox.abandon();
        if std::thread::panicking() {
            let why = "its thread panicked, which is a mistake in this program".into();
            (self.env.on_failure)(VcpuFailure { vcpu: self.vcpu, why, dump: String::new() });
        }
        slot.set_state(State::Gone);
        self.table.idle().gone += 1;
        self.table.changed.notify_all();
    }
}
