//! Entering and leaving the guest: device accesses, MSRs, kicks, failures.

use std::time::{Duration, Instant};

use vmm::testing::code16;
use vmm::vcpu::Space;
use vmm::vcpu::table::State;

use super::harness::{ASK, CODE, DEVICE_MEMORY, Guest, PATIENCE, Parts, REPORT, Write, host};

/// Reports EAX.
macro_rules! report {
    () => {
        "out 0x80, eax"
    };
}
pub(crate) use report;

#[test]
fn port_accesses_of_every_size_reach_the_devices() {
    let Some(host) = host() else { return };
    let guest = Guest::start(
        host,
        code16!(
            "mov al, 0x5a",
            "out 0x80, al",
            "mov ax, 0x1234",
            "out 0x80, ax",
            "in al, 0x84",
            "out 0x80, al",
            "in eax, 0x84",
            report!(),
            "hlt",
        ),
    );
    let port = |value, size| Write { cpu: 0, space: Space::Port, addr: REPORT, value, size };
    assert_eq!(guest.next_write(), port(0x5a, 1));
    assert_eq!(guest.next_write(), port(0x1234, 2));
    assert_eq!(guest.next_write(), port((ASK << 8 | 1) & 0xff, 1));
    assert_eq!(guest.next_write(), port(ASK << 8 | 4, 4));
}

#[test]
fn string_output_arrives_element_by_element_in_order() {
    let Some(host) = host() else { return };
    let parts = Parts::alone(host, 1);
    parts.load(0x3000, b"coherent");
    parts.load(
        CODE,
        code16!(
            "cld",
            "mov si, 0x3000",
            "mov cx, 8",
            "mov dx, 0x80",
            "rep outsb",
            "mov al, 0",
            "out dx, al",
            "hlt"
        ),
    );
    let guest = parts.run();
    let text: Vec<u8> = (0..8).map(|_| guest.report() as u8).collect();
    assert_eq!(text, b"coherent");
    assert_eq!(guest.report(), 0);
}

#[test]
fn memory_accesses_without_memory_reach_the_devices() {
    let Some(host) = host() else { return };
    let guest = Guest::start(
        host,
        code16!(
            "mov ax, 0xd000",
            "mov ds, ax",
            "mov eax, [0x10]",
            "mov [0x24], eax",
            "mov byte ptr [0x31], 7",
            "hlt",
        ),
    );
    let memory = |offset, value, size| Write {
        cpu: 0,
        space: Space::Memory,
        addr: DEVICE_MEMORY + offset,
        value,
        size,
    };
    assert_eq!(guest.next_write(), memory(0x24, (DEVICE_MEMORY + 0x10) << 8 & 0xffff_ffff | 4, 4));
    assert_eq!(guest.next_write(), memory(0x31, 7, 1));
}

#[test]
fn x2apic_registers_are_those_of_our_local_apic() {
    let Some(host) = host() else { return };
    let guest = Guest::start(
        host,
        code16!(
            "mov ecx, 0x1b",
            "rdmsr",
            report!(),
            "mov ecx, 0x803",
            "rdmsr",
            report!(),
            "mov ecx, 0x80f",
            "mov eax, 0x1ff",
            "xor edx, edx",
            "wrmsr",
            "xor eax, eax",
            "rdmsr",
            report!(),
            "hlt",
        ),
    );
    assert_eq!(guest.report(), 0xfee0_0d00, "enabled, x2APIC, boot processor");
    assert_eq!(guest.report() & 0xff, 0x14);
    assert_eq!(guest.report(), 0x1ff);
}

#[test]
fn an_absent_msr_and_a_reserved_bit_raise_a_general_protection_fault() {
    let Some(host) = host() else { return };
    let parts = Parts::alone(host, 1);
    // The handler reports and skips the two bytes of RDMSR or WRMSR; real mode pushes no error code.
    let handler = code16!(
        "mov eax, 0xbad",
        report!(),
        "push bp",
        "mov bp, sp",
        "add word ptr [bp+2], 2",
        "pop bp",
        "iret"
    );
    parts.load(0x2000, handler);
    parts.handler(13, 0x2000);
    parts.load(
        CODE,
        code16!(
            "mov ecx, 0x12345678",
            "rdmsr",
            "mov eax, 1",
            report!(),
            "mov ecx, 0x80f",
            "mov eax, 0xffffffff",
            "xor edx, edx",
            "wrmsr",
            "mov eax, 2",
            report!(),
            "mov ecx, 0x606",
            "rdmsr",
            report!(),
            "hlt",
        ),
    );
    let guest = parts.run();
    assert_eq!([0; 5].map(|_| guest.report()), [0xbad, 1, 0xbad, 2, 0]);
}

#[test]
fn a_spinning_vcpu_with_interrupts_off_leaves_the_guest_when_paused() {
    let Some(host) = host() else { return };
    let guest = Guest::start(host, code16!("cli", "mov eax, 1", report!(), "20:", "jmp 20b"));
    assert_eq!(guest.report(), 1);
    for _ in 0..5 {
        let start = Instant::now();
        guest.vcpus.pause(PATIENCE).unwrap();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        let entries = guest.vcpus.counters()[0].entries;
        assert!(guest.dump().contains("rip 0000000000001"));
        assert_eq!(guest.vcpus.counters()[0].entries, entries, "a paused vCPU does not run");
        guest.vcpus.resume();
    }
    let mut guest = guest;
    guest.vcpus.stop(PATIENCE).unwrap();
    guest.wait_state(0, State::Gone);
}

#[test]
fn a_paused_port_read_is_complete_before_registers_are_seen() {
    let Some(host) = host() else { return };
    let guest = Guest::start(host, code16!("20:", "in eax, 0x84", "out 0x80, eax", "jmp 20b"));
    *guest.parts.devices.answer.lock().unwrap() = Some(0x1111);
    for round in 1..20u64 {
        guest.vcpus.pause(PATIENCE).unwrap();
        while !guest.is_quiet() {}
        *guest.parts.devices.answer.lock().unwrap() = Some(round);
        guest.vcpus.resume();
        // The first report may still be of the value that was read before the pause; no other value appears.
        let first = guest.report();
        assert!([round - 1, round, 0x1111, ASK << 8 | 4].contains(&first), "{first:#x}");
        assert_eq!(guest.report(), round);
    }
}

#[test]
fn a_triple_fault_is_reported_with_the_registers() {
    let Some(host) = host() else { return };
    // Protected mode without an interrupt table: no fault can be delivered, not even the fault of the fault.
    let guest = Guest::start(
        host,
        code16!(
            "mov ebx, 0xfee1dead",
            "push 0",
            "push 0",
            "push 0",
            "mov bp, sp",
            "lidt [bp]",
            "mov eax, cr0",
            "or al, 1",
            "mov cr0, eax",
            "mov ecx, 0x12345678",
            "rdmsr",
            "20:",
            "jmp 20b",
        ),
    );
    let failure = guest.parts.failures.recv_timeout(PATIENCE).unwrap();
    assert_eq!(failure.vcpu, 0);
    assert!(failure.to_string().contains("triple fault"), "{failure}");
    // On AMD CPUs these are the registers at the exit before, since none are left.
    assert!(failure.dump.contains("rbx 00000000fee1dead"), "{}", failure.dump);
    assert!(failure.dump.contains("Shutdown"), "{}", failure.dump);
    // The failed vCPU still answers.
    assert!(guest.dump().contains("Failed"));
}

#[test]
fn a_halted_vcpu_uses_no_entries_and_is_dumped_and_stopped_at_once() {
    let Some(host) = host() else { return };
    let mut guest = Guest::start(host, code16!("mov eax, 7", report!(), "cli", "hlt"));
    assert_eq!(guest.report(), 7);
    guest.wait_state(0, State::Halted);
    let before = guest.vcpus.counters()[0];
    let dump = guest.dump();
    assert!(dump.contains("Halted") && dump.contains("rax 0000000000000007"), "{dump}");
    guest.vcpus.stop(PATIENCE).unwrap();
    let after = guest.vcpus.counters()[0];
    assert_eq!((before.entries, before.halt_exits), (after.entries, 1));
}
