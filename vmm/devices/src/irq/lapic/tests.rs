//! The local APIC, told as Linux drives it, and checked against a naive oracle.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const SPURIOUS: u64 = 0xff;
const ENABLE: u64 = 0x100 | SPURIOUS;
const MASKED: u64 = 1 << 16;
const ERROR_VECTOR: u8 = 0xfe;
const TIMER_VECTOR: u8 = 0xec;
const DEADLINE_MODE: u64 = 2 << 17;
const PERIODIC_MODE: u64 = 1 << 17;

fn enabled(apic_id: u32) -> Lapic {
    let mut apic = Lapic::new(apic_id, apic_id == 0);
    write(&mut apic, msr::SIVR, ENABLE);
    apic
}

#[track_caller]
fn write(apic: &mut Lapic, msr: u32, value: u64) -> Option<Effect> {
    apic.write_msr(msr, value, 0).expect("a legal write")
}

#[track_caller]
fn read(apic: &Lapic, msr: u32) -> u64 {
    apic.read_msr(msr, 0).expect("a legal read")
}

fn ipi(from: u32, dest: Destination, mode: Mode) -> Option<Effect> {
    Some(Effect::Ipi(Ipi { dest, mode, from }))
}

const fn fixed(vector: u8) -> Mode {
    Mode::Fixed { vector, level: false }
}

#[test]
fn power_on_is_disabled_masked_and_silent() {
    let mut apic = Lapic::new(0x12, false);
    assert_eq!(read(&apic, msr::ID), 0x12);
    assert_eq!(read(&apic, msr::LDR), 0x0001_0004);
    assert_eq!(read(&apic, msr::SIVR), SPURIOUS);
    assert_eq!(read(&apic, msr::APIC_BASE), 0xfee0_0c00);
    assert_eq!(Lapic::new(0, true).apic_base(), 0xfee0_0d00);
    for entry in msr::LVT_TIMER..=msr::LVT_ERROR {
        assert_eq!(read(&apic, entry), MASKED);
    }
    assert!(!apic.post(0x30, false));
    assert_eq!((apic.pending(), apic.timer_deadline()), (None, None));
}

#[test]
fn the_version_says_six_lvt_entries_and_no_eoi_suppression() {
    let version = read(&Lapic::new(0, true), msr::VERSION);
    assert_eq!(version >> 16 & 0xff, 5);
    assert_eq!(version & 1 << 24, 0);
    assert_eq!(enabled(0).write_msr(msr::SIVR, ENABLE | 1 << 12, 0), Err(Gp));
}

#[test]
fn the_apic_base_may_be_written_back_but_not_changed() {
    let mut apic = Lapic::new(0, true);
    assert_eq!(apic.write_msr(msr::APIC_BASE, apic.apic_base(), 0), Ok(None));
    assert_eq!(apic.write_msr(msr::APIC_BASE, 0xfee0_0900, 0), Err(Gp));
}

#[test]
fn higher_vector_is_taken_first_and_lower_waits_for_its_eoi() {
    let mut apic = enabled(0);
    assert!(apic.post(0x31, false) && apic.post(0x52, false) && apic.post(0x51, false));
    assert_eq!(apic.acknowledge(), Some(0x52));
    assert_eq!(read(&apic, msr::PPR), 0x50);
    // 0x51 is of the same priority class, 0x31 of a lower one.
    assert_eq!(apic.acknowledge(), None);
    assert!(apic.post(0x61, false));
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!(write(&mut apic, msr::EOI, 0), None);
    assert_eq!(apic.acknowledge(), None);
    assert_eq!(write(&mut apic, msr::EOI, 0), None);
    assert_eq!(apic.acknowledge(), Some(0x51));
    write(&mut apic, msr::EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x31));
    write(&mut apic, msr::EOI, 0);
    assert_eq!((apic.acknowledge(), read(&apic, msr::PPR)), (None, 0));
}

#[test]
fn a_vector_posted_while_in_service_is_taken_again_after_eoi() {
    let mut apic = enabled(0);
    apic.post(0x41, false);
    assert_eq!(apic.acknowledge(), Some(0x41));
    apic.post(0x41, false);
    assert_eq!(apic.pending(), None);
    write(&mut apic, msr::EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x41));
}

#[test]
fn task_priority_holds_back_its_class_and_below() {
    let mut apic = enabled(0);
    apic.post(0x4f, false);
    write(&mut apic, msr::TPR, 0x40);
    assert_eq!((apic.pending(), read(&apic, msr::PPR)), (None, 0x40));
    write(&mut apic, msr::TPR, 0x3f);
    assert_eq!(apic.pending(), Some(0x4f));
    assert_eq!(apic.acknowledge(), Some(0x4f));
    assert_eq!(read(&apic, msr::PPR), 0x40);
    write(&mut apic, msr::TPR, 0x47);
    assert_eq!(read(&apic, msr::PPR), 0x47);
    assert_eq!(apic.write_msr(msr::TPR, 0x100, 0), Err(Gp));
}

#[test]
fn cr8_is_the_task_priority_class_and_an_unchanged_one_keeps_the_subclass() {
    let mut apic = enabled(0);
    write(&mut apic, msr::TPR, 0x47);
    assert_eq!(apic.cr8(), 4);
    apic.set_cr8(4);
    assert_eq!(read(&apic, msr::TPR), 0x47);
    apic.set_cr8(9);
    assert_eq!(read(&apic, msr::TPR), 0x90);
}

#[test]
fn only_level_interrupts_tell_the_io_apic_of_their_eoi() {
    let mut apic = enabled(0);
    apic.post(0x41, true);
    assert_eq!(read(&apic, msr::TMR + 2), 1 << 1);
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(write(&mut apic, msr::EOI, 0), Some(Effect::Eoi { vector: 0x41 }));
    apic.post(0x41, false);
    assert_eq!(apic.acknowledge(), Some(0x41));
    assert_eq!(write(&mut apic, msr::EOI, 0), None);
    assert_eq!(write(&mut apic, msr::EOI, 0), None, "nothing in service");
    assert_eq!(apic.write_msr(msr::EOI, 1, 0), Err(Gp));
}

#[test]
fn requested_and_in_service_vectors_show_in_their_registers() {
    let mut apic = enabled(0);
    apic.post(0x21, false);
    apic.post(0xfd, false);
    assert_eq!((read(&apic, msr::IRR + 1), read(&apic, msr::IRR + 7)), (1 << 1, 1 << 29));
    apic.acknowledge();
    assert_eq!((read(&apic, msr::IRR + 7), read(&apic, msr::ISR + 7)), (0, 1 << 29));
}

#[test]
fn a_disabled_apic_keeps_what_waits_and_takes_nothing_new() {
    let mut apic = enabled(0);
    apic.post(0x41, false);
    write(&mut apic, msr::LVT_LINT1, 0x400);
    assert!(apic.lint1_is_nmi());
    assert_eq!(write(&mut apic, msr::SIVR, SPURIOUS), Some(Effect::TimerChanged));
    assert_eq!(read(&apic, msr::LVT_LINT1), 0x400 | MASKED);
    assert!(!apic.post(0x51, false));
    assert_eq!(apic.acknowledge(), None);
    write(&mut apic, msr::LVT_LINT1, 0x400);
    assert_eq!(read(&apic, msr::LVT_LINT1), 0x400 | MASKED);
    assert!(!apic.lint1_is_nmi());
    write(&mut apic, msr::SIVR, ENABLE);
    assert_eq!(apic.acknowledge(), Some(0x41));
}

#[test]
fn init_forgets_everything_but_the_identity() {
    let mut apic = enabled(0x21);
    apic.post(0x41, true);
    apic.acknowledge();
    apic.post(0x51, false);
    write(&mut apic, msr::LVT_TIMER, DEADLINE_MODE | u64::from(TIMER_VECTOR));
    write(&mut apic, msr::TSC_DEADLINE, 99);
    apic.init_reset();
    assert_eq!((apic.apic_id(), apic.pending(), apic.timer_deadline()), (0x21, None, None));
    assert_eq!(
        (read(&apic, msr::ISR + 2), read(&apic, msr::TMR + 2), read(&apic, msr::SIVR)),
        (0, 0, SPURIOUS)
    );
}

#[test]
fn the_icr_sends_what_linux_sends() {
    let mut apic = enabled(2);
    let to = |id: u64| id << 32;
    let nmi_to_all = ipi(2, Destination::AllButSelf, Mode::Nmi);
    for (icr, expected) in [
        (to(0x11) | 0xfb, ipi(2, Destination::Physical(0x11), fixed(0xfb))),
        (to(0x1_0003) | 0x800 | 0xfb, ipi(2, Destination::Logical(0x1_0003), fixed(0xfb))),
        (to(0xffff_ffff) | 0xfb, ipi(2, Destination::All, fixed(0xfb))),
        (0x000c_0000 | 0xfd, ipi(2, Destination::AllButSelf, fixed(0xfd))),
        (0x0008_0000 | 0xfd, ipi(2, Destination::All, fixed(0xfd))),
        (0x000c_0400, nmi_to_all),
        (to(5) | 0xc500, ipi(2, Destination::Physical(5), Mode::Init)),
        (to(5) | 0x8500, None),
        (to(5) | 0x0600 | 0x9a, ipi(2, Destination::Physical(5), Mode::Sipi { vector: 0x9a })),
        (
            to(5) | 0x0100 | 0x44,
            ipi(2, Destination::Physical(5), Mode::LowestPriority { vector: 0x44, level: false }),
        ),
        (to(5) | 0x0200, None),
    ] {
        assert_eq!(write(&mut apic, msr::ICR, icr), expected, "ICR {icr:#x}");
        assert_eq!(read(&apic, msr::ICR), icr);
    }
    assert_eq!(apic.write_msr(msr::ICR, 1 << 13 | 0x41, 0), Err(Gp));
    assert_eq!(apic.write_msr(msr::ICR, 1 << 20 | 0x41, 0), Err(Gp));
    // The delivery status is always idle.
    write(&mut apic, msr::ICR, to(5) | 1 << 12 | 0x41);
    assert_eq!(read(&apic, msr::ICR), to(5) | 0x41);
}

#[test]
fn an_ipi_to_oneself_needs_no_router() {
    let mut apic = enabled(0);
    assert_eq!(write(&mut apic, msr::SELF_IPI, 0xf6), None);
    assert_eq!(apic.acknowledge(), Some(0xf6));
    write(&mut apic, msr::EOI, 0);
    assert_eq!(write(&mut apic, msr::ICR, 1 << 18 | 0xf6), None);
    assert_eq!(apic.acknowledge(), Some(0xf6));
    assert_eq!(apic.write_msr(msr::SELF_IPI, 0x1f6, 0), Err(Gp));
    assert_eq!(apic.read_msr(msr::SELF_IPI, 0), Err(Gp));
}

#[test]
fn illegal_vectors_are_noted_and_raise_the_error_interrupt() {
    let mut apic = enabled(0);
    write(&mut apic, msr::LVT_ERROR, u64::from(ERROR_VECTOR));
    assert_eq!(write(&mut apic, msr::ICR, 1 << 32 | 0x0f), None);
    assert_eq!(apic.acknowledge(), Some(ERROR_VECTOR));
    write(&mut apic, msr::EOI, 0);
    assert!(!apic.post(0x0f, false));
    assert_eq!(apic.acknowledge(), Some(ERROR_VECTOR));
    // The register shows what was seen before the last write to it.
    assert_eq!(read(&apic, msr::ESR), 0);
    write(&mut apic, msr::ESR, 0);
    assert_eq!(read(&apic, msr::ESR), 0x60);
    write(&mut apic, msr::ESR, 0);
    assert_eq!(read(&apic, msr::ESR), 0);
    assert_eq!(apic.write_msr(msr::ESR, 1, 0), Err(Gp));
}

#[test]
fn an_illegal_error_vector_ends_in_the_status_register() {
    let mut apic = enabled(0);
    write(&mut apic, msr::LVT_ERROR, 0);
    write(&mut apic, msr::SELF_IPI, 3);
    write(&mut apic, msr::ESR, 0);
    assert_eq!((read(&apic, msr::ESR), apic.pending()), (0x60, None));
}

#[test]
fn the_deadline_timer_fires_once_at_its_tsc() {
    let mut apic = enabled(0);
    write(&mut apic, msr::LVT_TIMER, DEADLINE_MODE | u64::from(TIMER_VECTOR));
    assert_eq!(write(&mut apic, msr::TSC_DEADLINE, 1000), Some(Effect::TimerChanged));
    assert_eq!((apic.timer_deadline(), read(&apic, msr::TSC_DEADLINE)), (Some(1000), 1000));
    assert!(!apic.expire_timer(999));
    assert!(apic.expire_timer(1000));
    assert_eq!((apic.timer_deadline(), apic.read_msr(msr::TSC_DEADLINE, 1000)), (None, Ok(0)));
    assert!(!apic.expire_timer(2000));
    assert_eq!(apic.acknowledge(), Some(TIMER_VECTOR));
    write(&mut apic, msr::TSC_DEADLINE, 3000);
    write(&mut apic, msr::TSC_DEADLINE, 0);
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn a_due_deadline_is_not_lost_when_the_next_is_armed() {
    let mut apic = enabled(0);
    write(&mut apic, msr::LVT_TIMER, DEADLINE_MODE | u64::from(TIMER_VECTOR));
    write(&mut apic, msr::TSC_DEADLINE, 1000);
    apic.write_msr(msr::TSC_DEADLINE, 5000, 1001).expect("a legal write");
    assert_eq!((apic.pending(), apic.timer_deadline()), (Some(TIMER_VECTOR), Some(5000)));
}

#[test]
fn a_masked_timer_runs_unheard_and_unmasking_before_expiry_brings_it_back() {
    let mut apic = enabled(0);
    write(&mut apic, msr::LVT_TIMER, DEADLINE_MODE | MASKED | u64::from(TIMER_VECTOR));
    write(&mut apic, msr::TSC_DEADLINE, 1000);
    assert_eq!(apic.timer_deadline(), None);
    let unmasked = DEADLINE_MODE | u64::from(TIMER_VECTOR);
    assert_eq!(apic.write_msr(msr::LVT_TIMER, unmasked, 500), Ok(Some(Effect::TimerChanged)));
    assert_eq!(apic.timer_deadline(), Some(1000));
    apic.write_msr(msr::LVT_TIMER, unmasked | MASKED, 500).expect("a legal write");
    apic.write_msr(msr::LVT_TIMER, unmasked, 1500).expect("a legal write");
    assert_eq!((apic.timer_deadline(), apic.pending()), (None, None), "it expired while masked");
}

#[test]
fn the_periodic_timer_fires_every_period() {
    let mut apic = enabled(0);
    write(&mut apic, msr::LVT_TIMER, PERIODIC_MODE | u64::from(TIMER_VECTOR));
    write(&mut apic, msr::TIMER_DIVIDE, 0b0011);
    assert_eq!(write(&mut apic, msr::TIMER_INITIAL, 100), Some(Effect::TimerChanged));
    for now in (1600..16000).step_by(1600) {
        assert_eq!(apic.timer_deadline(), Some(now));
        assert!(!apic.expire_timer(now - 1) && apic.expire_timer(now));
        assert_eq!(apic.acknowledge(), Some(TIMER_VECTOR));
        write(&mut apic, msr::EOI, 0);
    }
    assert_eq!(apic.read_msr(msr::TIMER_CURRENT, 14400 + 160), Ok(90));
    write(&mut apic, msr::TIMER_INITIAL, 0);
    assert_eq!(apic.timer_deadline(), None);
}

#[test]
fn reserved_bits_and_absent_registers_fault_and_change_nothing() {
    let mut apic = enabled(0);
    let before = format!("{apic:?}");
    for (msr, value) in [
        (msr::ID, 0),
        (msr::VERSION, 0),
        (msr::PPR, 0),
        (msr::LDR, 0),
        (msr::ISR, 0),
        (msr::TMR + 7, 0),
        (msr::IRR + 3, 0),
        (msr::TIMER_CURRENT, 0),
        (msr::LVT_TIMER, 3 << 17),
        (msr::LVT_TIMER, 1 << 8),
        (msr::LVT_LINT0, 1 << 17),
        (msr::LVT_ERROR, 1 << 32),
        (msr::TIMER_INITIAL, 1 << 32),
        (msr::TIMER_DIVIDE, 1 << 2),
        (msr::SIVR, 1 << 10),
        (0x800, 0),
        (0x80e, 0),
        (0x82f, 0),
        (0x831, 0),
        (0x840, 0),
        (0x8ff, 0),
        (0x10, 0),
    ] {
        assert_eq!(apic.write_msr(msr, value, 77), Err(Gp), "MSR {msr:#x}");
        assert_eq!(format!("{apic:?}"), before, "MSR {msr:#x}");
    }
    for msr in [msr::EOI, msr::SELF_IPI, 0x800, 0x80c, 0x80e, 0x82f, 0x831, 0x840, 0x8ff, 0x10] {
        assert_eq!(apic.read_msr(msr, 0), Err(Gp), "MSR {msr:#x}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Post { vector: u8, level: bool },
    Acknowledge,
    Eoi,
    Tpr(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (16u8..=255, any::<bool>()).prop_map(|(vector, level)| Step::Post { vector, level }),
        3 => Just(Step::Acknowledge),
        2 => Just(Step::Eoi),
        1 => any::<u8>().prop_map(Step::Tpr),
    ]
}

/// The naive oracle: sets, and the manual's words.
#[derive(Default)]
struct Oracle {
    requested: BTreeSet<u8>,
    in_service: BTreeSet<u8>,
    level: BTreeSet<u8>,
    tpr: u8,
}

impl Oracle {
    fn deliverable(&self) -> Option<u8> {
        let busy = self.in_service.last().map_or(0, |vector| vector / 16).max(self.tpr / 16);
        self.requested.iter().rev().find(|vector| *vector / 16 > busy).copied()
    }
}

proptest! {
    #[test]
    fn priorities_follow_the_oracle_and_no_vector_is_ever_lost(steps in proptest::collection::vec(step(), 0..300)) {
        let mut apic = enabled(0);
        let mut oracle = Oracle::default();
        for step in steps {
            match step {
                Step::Post { vector, level } => {
                    prop_assert!(apic.post(vector, level));
                    oracle.requested.insert(vector);
                    if level { oracle.level.insert(vector); } else { oracle.level.remove(&vector); }
                }
                Step::Acknowledge => {
                    let expected = oracle.deliverable();
                    if let Some(vector) = expected {
                        oracle.requested.remove(&vector);
                        oracle.in_service.insert(vector);
                    }
                    prop_assert_eq!(apic.acknowledge(), expected);
                }
                Step::Eoi => {
                    let finished = oracle.in_service.pop_last().filter(|vector| oracle.level.contains(vector));
                    prop_assert_eq!(write(&mut apic, msr::EOI, 0), finished.map(|vector| Effect::Eoi { vector }));
                }
                Step::Tpr(tpr) => {
                    oracle.tpr = tpr;
                    prop_assert_eq!(write(&mut apic, msr::TPR, tpr.into()), None);
                }
            }
            prop_assert_eq!(apic.pending(), oracle.deliverable());
        }
        // With the priority down and everything finished, each requested vector comes out, highest first.
        write(&mut apic, msr::TPR, 0);
        for _ in &oracle.in_service {
            write(&mut apic, msr::EOI, 0);
        }
        for vector in oracle.requested.iter().rev() {
            prop_assert_eq!(apic.acknowledge(), Some(*vector));
            write(&mut apic, msr::EOI, 0);
        }
        prop_assert_eq!(apic.acknowledge(), None);
    }

    #[test]
    fn no_access_with_any_value_at_any_time_panics(
        accesses in proptest::collection::vec(
            (prop_oneof![0x800u32..0x840, 0x800u32..0x900, Just(msr::TSC_DEADLINE), Just(msr::APIC_BASE), any::<u32>()],
             prop_oneof![any::<u64>(), 0u64..0x2_0000, Just(0), Just(ENABLE), Just(DEADLINE_MODE | 0x40)],
             any::<u64>(), any::<u8>(), any::<bool>()),
            0..100),
    ) {
        let mut apic = enabled(0);
        for (msr, value, now, vector, level) in accesses {
            let before = format!("{apic:?}");
            if apic.write_msr(msr, value, now).is_err() {
                prop_assert_eq!(before, format!("{apic:?}"), "a fault changed something");
            }
            if let Ok(value) = apic.read_msr(msr, now) {
                prop_assert!(msr == msr::APIC_BASE || msr == msr::TSC_DEADLINE || msr == msr::ICR || value <= u64::from(u32::MAX));
            }
            apic.post(vector, level);
            apic.expire_timer(now);
            apic.acknowledge();
            apic.set_cr8(value);
            if let Some(deadline) = apic.timer_deadline() {
                apic.expire_timer(deadline);
            }
        }
    }
}
