//! The guest's TSC is the node's clock, on every vCPU, also across steps.

use std::sync::Arc;

use vmm::clock::{GuestClock, Scale};
use vmm::testing::code16;

use super::harness::{CODE, Parts, host};
use super::startup::{AP_PAGE, start_ap};

/// Reports the TSC, low word first, again and again.
fn reporting() -> &'static [u8] {
    code16!("20:", "rdtsc", "out 0x80, eax", "mov eax, edx", "out 0x80, eax", "jmp 20b")
}

#[test]
fn the_guests_tsc_is_the_nodes_clock_and_never_goes_back_across_steps() {
    let Some(host) = host() else { return };
    if !host.tsc_offset {
        return eprintln!("skipped: this KVM cannot set a TSC offset");
    }
    let parts = Parts::alone(host, 1);
    parts.load(CODE, reporting());
    let clock = parts.clock.clone();
    let guest = parts.run();
    let mut last = 0;
    for round in 0..200u64 {
        let first = guest.report() | guest.report() << 32;
        let second = guest.report() | guest.report() << 32;
        let third = guest.report() | guest.report() << 32;
        let after = clock.now();
        assert!(last <= first && first <= second && second <= third);
        assert!(first <= after, "{first} is ahead of the clock's {after}");
        last = third;
        if round % 20 == 0 {
            assert!(clock.step_to(clock.offset().wrapping_add(clock.ticks(50_000_000))));
        }
    }
    // After the last step the guest runs on the stepped clock.
    while !guest.is_quiet() {}
    let now = clock.now();
    let mut seen = 0;
    for _ in 0..100_000 {
        seen = guest.report() | guest.report() << 32;
        if seen >= now {
            break;
        }
    }
    assert!(seen >= now, "{seen} stays behind {now}");
    assert_eq!(clock.stats().steps, 10);
}

#[test]
fn a_scaled_tsc_is_the_nodes_clock() {
    let Some(host) = host() else { return };
    if !host.tsc_offset || !host.tsc_control {
        return eprintln!("skipped: this KVM cannot scale the TSC");
    }
    let vendor = host.cpuid.iter().find(|entry| entry.leaf == 0).unwrap();
    let amd = vendor.ebx == u32::from_le_bytes(*b"Auth");
    let (own, machine) = (u64::from(host.tsc_khz), u64::from(host.tsc_khz) * 3 / 4);
    let scale = Scale::choose(own, machine, true, amd).unwrap();
    let mut parts = Parts::alone(host, 1);
    parts.clock = Arc::new(GuestClock::new(machine, scale));
    parts.load(CODE, reporting());
    let clock = parts.clock.clone();
    let guest = parts.run();
    for _ in 0..20 {
        let before = clock.now();
        // The first readings may have been taken before `before`.
        let seen = (0..1000).map(|_| guest.report() | guest.report() << 32).find(|seen| *seen >= before);
        let seen = seen.expect("the guest's clock is behind the node's");
        assert!(seen <= clock.now(), "{seen} is ahead of the node's clock");
    }
}

#[test]
fn a_cpu_that_hears_of_another_cpus_time_never_reads_an_earlier_one() {
    let Some(host) = host() else { return };
    if !host.tsc_offset {
        return eprintln!("skipped: this KVM cannot set a TSC offset");
    }
    // CPU 1 stores its TSC (low word: a run is far shorter than 2^32 ticks apart) at 0x3000; CPU 0 reads it,
    // then its own, and reports how far its own is behind, if it is.
    let parts = Parts::alone(host, 2);
    parts.load(
        u16::from(AP_PAGE) << 12,
        code16!("xor ax, ax", "mov ds, ax", "20:", "rdtsc", "mov [0x3000], eax", "jmp 20b"),
    );
    parts.load(
        CODE,
        code16!(
            start_ap!("1"),
            "20:",
            "mov ecx, [0x3000]",
            "test ecx, ecx",
            "jz 20b",
            "mov bx, 500",
            "xor esi, esi",
            "21:",
            "mov ecx, [0x3000]",
            "rdtsc",
            "sub ecx, eax",
            "js 22f",
            "mov esi, ecx",
            "22:",
            "dec bx",
            "jnz 21b",
            "mov eax, esi",
            "out 0x80, eax",
            "jmp 20b",
        ),
    );
    let clock = parts.clock.clone();
    let guest = parts.run();
    for _ in 0..50 {
        assert_eq!(guest.report(), 0, "ticks that a CPU's time was behind another's");
        assert!(clock.step_to(clock.offset().wrapping_add(clock.ticks(200_000))));
    }
}
