//! What a local APIC does, told as Linux drives it, and checked against a naive oracle.

use super::*;

const SPURIOUS: u64 = 0xff;
const ENABLE: u64 = 0x100 | SPURIOUS;
const MASKED: u64 = 1 << 16;

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
