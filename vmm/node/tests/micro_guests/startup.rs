//! INIT, SIPI and interrupts between vCPUs of one node.

use vmm::node_msg::Signal;
use vmm::testing::code16;
use vmm::vcpu::table::State;

use super::harness::{CODE, Guest, Parts, host};
use super::interrupts::{enable_apic, eoi};
use super::vcpu::report;

/// Start-up page of the other processors.
pub const AP_PAGE: u8 = 5;

/// Writes the ICR: `$low` in EAX, destination `$dest` in EDX.
macro_rules! icr {
    ($dest:literal, $low:literal) => {
        concat!("mov ecx, 0x830\n mov edx, ", $dest, "\n mov eax, ", $low, "\n wrmsr")
    };
}
pub(crate) use icr;

/// INIT, then start-up at [`AP_PAGE`] twice, to the CPU with APIC id `$dest`: as Linux does it.
macro_rules! start_ap {
    ($dest:literal) => {
        concat!(
            "mov ecx, 0x830\n mov edx, ",
            $dest,
            "\n mov eax, 0xc500\n wrmsr\n mov eax, 0x8500\n wrmsr\n",
            "mov eax, 0x605\n wrmsr\n mov eax, 0x605\n wrmsr"
        )
    };
}
pub(crate) use start_ap;

/// Reports CS and the APIC id, then halts with interrupts on.
pub fn ap_code() -> &'static [u8] {
    code16!(
        "mov ax, cs",
        "movzx eax, ax",
        "mov ebx, eax",
        "mov ecx, 0x802",
        "rdmsr",
        "shl eax, 16",
        "or eax, ebx",
        report!(),
        "xor ax, ax",
        "mov ds, ax",
        "mov ss, ax",
        "mov sp, 0x7000",
        enable_apic!(),
        "20:",
        "sti",
        "hlt",
        "jmp 20b",
    )
}

/// Reports `0x4800 | APIC id << 16` and finishes the interrupt.
pub fn ap_handler() -> &'static [u8] {
    code16!("mov ecx, 0x802", "rdmsr", "shl eax, 16", "or eax, 0x4800", report!(), eoi!(), "iret")
}

fn parts(host: &vmm::kvm::HostCpu, cpus: u32, code: &[u8]) -> Parts {
    let parts = Parts::alone(host, cpus);
    parts.load(u16::from(AP_PAGE) << 12, ap_code());
    parts.load(0x2000, ap_handler());
    parts.handler(0x48, 0x2000);
    parts.load(CODE, code);
    parts
}

#[test]
fn a_start_up_message_starts_a_waiting_vcpu_once_in_real_mode_at_its_page() {
    let Some(host) = host() else { return };
    let guest = parts(host, 2, code16!(start_ap!("1"), "hlt")).run();
    assert_eq!(guest.next_write().value, 1 << 16 | u64::from(AP_PAGE) << 8);
    guest.wait_state(1, State::Halted);
    assert!(guest.is_quiet(), "the second start-up message is ignored");
}

#[test]
fn init_stops_a_vcpu_until_it_is_started_again() {
    let Some(host) = host() else { return };
    let guest = parts(host, 2, code16!(start_ap!("1"), "hlt")).run();
    assert_eq!(guest.report() >> 16, 1);
    // The boot processor has sent its second start-up message when it halts.
    guest.wait_state(0, State::Halted);
    guest.wait_state(1, State::Halted);
    guest.vcpus.post(1, Signal::Init);
    guest.wait_state(1, State::WaitForSipi);
    // Neither wakes it.
    guest.post(1, 0x48);
    guest.vcpus.post(1, Signal::Nmi);
    guest.vcpus.post(1, Signal::Sipi { vector: AP_PAGE });
    assert_eq!(guest.report(), 1 << 16 | u64::from(AP_PAGE) << 8);
    guest.wait_state(1, State::Halted);
    guest.post(1, 0x48);
    assert_eq!(guest.report(), 1 << 16 | 0x4800);
}

#[test]
fn init_reaches_a_vcpu_that_spins_with_interrupts_off() {
    let Some(host) = host() else { return };
    let parts = parts(host, 2, code16!(start_ap!("1"), "hlt"));
    parts.load(u16::from(AP_PAGE) << 12, code16!("cli", "mov eax, 3", report!(), "20:", "jmp 20b"));
    let guest = parts.run();
    // The boot processor has sent its second start-up message when it halts.
    guest.wait_state(0, State::Halted);
    for _ in 0..5 {
        assert_eq!(guest.report(), 3);
        guest.vcpus.post(1, Signal::Init);
        guest.wait_state(1, State::WaitForSipi);
        guest.vcpus.post(1, Signal::Sipi { vector: AP_PAGE });
    }
    assert_eq!(guest.report(), 3);
}

#[test]
fn interprocessor_interrupts_reach_physical_logical_and_all_other_cpus() {
    let Some(host) = host() else { return };
    // Starts both others, then sends once for each new word of the device, as its low byte says.
    let code = code16!(
        enable_apic!(),
        start_ap!("1"),
        start_ap!("2"),
        "xor ebx, ebx",
        "20:",
        "in eax, 0x84",
        "cmp eax, ebx",
        "je 20b",
        "mov ebx, eax",
        "cmp al, 1",
        "je 21f",
        "cmp al, 2",
        "je 22f",
        icr!("0", "0xc4048"),
        "jmp 30f",
        "21:",
        icr!("2", "0x4048"),
        "jmp 30f",
        "22:",
        icr!("0x6", "0x4848"),
        "30:",
        "mov eax, 0x30",
        report!(),
        "jmp 20b",
    );
    let parts = parts(host, 3, code);
    *parts.devices.answer.lock().unwrap() = Some(0);
    let guest: Guest = parts.run();
    let mut started = [guest.report() >> 16, guest.report() >> 16];
    started.sort_unstable();
    assert_eq!(started, [1, 2]);
    for (how, expected) in [(1, &[2u64][..]), (2, &[1, 2]), (3, &[1, 2]), (1, &[2])] {
        guest.wait_state(1, State::Halted);
        guest.wait_state(2, State::Halted);
        guest.tell(how);
        let mut seen: Vec<u64> = (0..=expected.len()).map(|_| guest.report()).collect();
        seen.sort_unstable();
        let mut wanted = vec![0x30];
        wanted.extend(expected.iter().map(|id| id << 16 | 0x4800));
        assert_eq!(seen, wanted, "way {how}");
    }
}
