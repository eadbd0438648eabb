//! Interrupts into the guest: posted, its own, timed, masked.

use vmm::node_msg::Signal;
use vmm::testing::{code16, patch};
use vmm::vcpu::table::State;

use super::harness::{CODE, Guest, PATIENCE, Parts, host};
use super::vcpu::report;

/// Where the handlers are.
const HANDLER: u16 = 0x2000;
const OTHER: u16 = 0x2100;

/// Enables the local APIC.
macro_rules! enable_apic {
    () => {
        "mov ecx, 0x80f
         mov eax, 0x1ff
         xor edx, edx
         wrmsr"
    };
}
pub(crate) use enable_apic;

/// Ends the interrupt at the local APIC.
macro_rules! eoi {
    () => {
        "mov ecx, 0x80b
         xor eax, eax
         xor edx, edx
         wrmsr"
    };
}
pub(crate) use eoi;

/// A handler that reports `0x100 + vector` and finishes the interrupt.
fn reporting(vector: u8) -> Vec<u8> {
    let mut code = code16!("mov eax, 0x12345678", "out 0x80, eax", eoi!(), "iret").to_vec();
    patch(&mut code, 0x100 + u32::from(vector));
    code
}

/// One vCPU that runs `code`, with reporting handlers for these vectors.
fn parts(host: &vmm::kvm::HostCpu, vectors: &[u8], code: &[u8]) -> Parts {
    let parts = Parts::alone(host, 1);
    for (index, vector) in (0..).zip(vectors) {
        let at = HANDLER + index * 0x40;
        parts.load(at, &reporting(*vector));
        parts.handler(*vector, at);
    }
    parts.load(CODE, code);
    parts
}

#[test]
fn a_posted_interrupt_wakes_a_halted_vcpu() {
    let Some(host) = host() else { return };
    let code = code16!(enable_apic!(), "20:", "sti", "hlt", "mov eax, 2", report!(), "jmp 20b");
    let guest = parts(host, &[0x30, 0x45], code).run();
    for vector in [0x30, 0x45, 0x30] {
        guest.wait_state(0, State::Halted);
        guest.post(0, vector);
        assert_eq!(guest.report(), 0x100 + u64::from(vector));
        assert_eq!(guest.report(), 2);
    }
    assert_eq!(guest.vcpus.counters()[0].injected, 3);
}

#[test]
fn a_spinning_vcpu_takes_an_interrupt_within_bounded_time() {
    let Some(host) = host() else { return };
    let code = code16!(enable_apic!(), "sti", "mov eax, 1", report!(), "20:", "jmp 20b");
    let guest = parts(host, &[0x31], code).run();
    assert_eq!(guest.report(), 1);
    for _ in 0..200 {
        guest.post(0, 0x31);
        assert_eq!(guest.report(), 0x131);
    }
}

#[test]
fn an_interrupt_waits_until_the_guest_enables_interrupts() {
    let Some(host) = host() else { return };
    // Spins with interrupts off until the device says go, then allows them.
    let code = code16!(
        enable_apic!(),
        "cli",
        "20:",
        "in eax, 0x84",
        "cmp eax, 1",
        "jne 20b",
        report!(),
        "sti",
        "21:",
        "hlt",
        "jmp 21b",
    );
    let parts = parts(host, &[0x40], code);
    *parts.devices.answer.lock().unwrap() = Some(0);
    let guest = parts.run();
    let spin = |accesses| {
        while guest.vcpus.counters()[0].pio_exits < accesses {
            std::thread::yield_now();
        }
    };
    // Until the guest has enabled its local APIC, interrupts are dropped.
    spin(1);
    guest.post(0, 0x40);
    spin(50);
    assert_eq!(guest.vcpus.counters()[0].injected, 0);
    *guest.parts.devices.answer.lock().unwrap() = Some(1);
    assert_eq!([0; 2].map(|_| guest.report()), [1, 0x140]);
}

#[test]
fn an_interrupt_during_a_port_write_returns_to_the_next_instruction() {
    let Some(host) = host() else { return };
    let parts = Parts::alone(host, 1);
    parts.handler(0x50, HANDLER);
    // Reports where it returns to.
    let handler = code16!(
        "push bp",
        "mov bp, sp",
        "movzx eax, word ptr [bp+2]",
        "pop bp",
        "out 0x80, eax",
        eoi!(),
        "iret"
    );
    parts.load(HANDLER, handler);
    let setup = code16!(enable_apic!(), "sti", "mov bx, 100");
    let body = code16!(
        "20:",
        "mov al, 9",
        "out 0x90, al",
        "nop",
        "dec bx",
        "jnz 20b",
        "mov eax, 5",
        report!(),
        "hlt"
    );
    parts.load(CODE, &[setup, body].concat());
    let after_out = u64::from(CODE) + setup.len() as u64 + 4;
    let table = parts.table.clone();
    let on_write = move |write: &super::harness::Write| {
        if write.addr == 0x90 {
            table.post(0, Signal::Vector { vector: 0x50, level: false });
        }
    };
    assert!(parts.devices.on_write.set(Box::new(on_write)).is_ok());
    let guest = parts.run();
    for _ in 0..100 {
        assert_eq!(guest.next_write().addr, 0x90);
        assert_eq!(guest.report(), after_out);
    }
    assert_eq!(guest.report(), 5);
}

#[test]
fn a_self_ipi_arrives_and_higher_vectors_go_first() {
    let Some(host) = host() else { return };
    let code = code16!(
        enable_apic!(),
        "cli",
        "mov ecx, 0x83f",
        "xor edx, edx",
        "mov eax, 0x41",
        "wrmsr",
        "mov eax, 0x62",
        "wrmsr",
        "mov eax, 0x53",
        "wrmsr",
        "mov eax, 1",
        report!(),
        "20:",
        "sti",
        "hlt",
        "jmp 20b",
    );
    let guest = parts(host, &[0x41, 0x53, 0x62], code).run();
    assert_eq!([0; 4].map(|_| guest.report()), [1, 0x162, 0x153, 0x141]);
}

#[test]
fn the_task_priority_holds_lower_vectors_back() {
    let Some(host) = host() else { return };
    let code = code16!(
        enable_apic!(),
        "mov ecx, 0x808",
        "xor edx, edx",
        "mov eax, 0x50",
        "wrmsr",
        "mov ecx, 0x83f",
        "mov eax, 0x41",
        "wrmsr",
        "sti",
        "nop",
        "mov eax, 1",
        report!(),
        "mov ecx, 0x808",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "20:",
        "hlt",
        "jmp 20b",
    );
    let guest = parts(host, &[0x41], code).run();
    assert_eq!([0; 2].map(|_| guest.report()), [1, 0x141]);
}

/// Programs the timer's LVT, mode in bits 17 and 18, vector 0x61.
macro_rules! timer_lvt {
    ($value:literal) => {
        concat!("mov ecx, 0x832\n xor edx, edx\n mov eax, ", $value, "\n wrmsr")
    };
}

#[test]
fn a_tsc_deadline_fires_not_before_its_time() {
    let Some(host) = host() else { return };
    if !host.deadline_exits {
        return eprintln!("skipped: this KVM does not pass IA32_TSC_DEADLINE on");
    }
    // Deadline: now plus about 4 million ticks; reports the TSC before and in the handler.
    let parts = Parts::alone(host, 1);
    parts.handler(0x61, HANDLER);
    parts.load(HANDLER, code16!("rdtsc", "out 0x80, eax", "mov eax, edx", "out 0x80, eax", eoi!(), "iret"));
    parts.load(
        CODE,
        code16!(
            enable_apic!(),
            timer_lvt!("0x40061"),
            "20:",
            "rdtsc",
            "add eax, 4000000",
            "adc edx, 0",
            "mov ecx, 0x6e0",
            "wrmsr",
            "out 0x80, eax",
            "mov eax, edx",
            "out 0x80, eax",
            "sti",
            "hlt",
            "cli",
            "jmp 20b",
        ),
    );
    let guest = parts.run();
    for _ in 0..10 {
        let deadline = guest.report() | guest.report() << 32;
        let fired = guest.report() | guest.report() << 32;
        assert!(fired >= deadline, "{fired} is before {deadline}");
        assert!(fired - deadline < 20 * guest.parts.hz(), "{fired} is long after {deadline}");
    }
    assert!(guest.vcpus.counters()[0].timer_interrupts >= 10);
}

#[test]
fn a_deadline_fires_while_the_guest_spins_and_one_in_the_past_at_once() {
    let Some(host) = host() else { return };
    if !host.deadline_exits {
        return eprintln!("skipped: this KVM does not pass IA32_TSC_DEADLINE on");
    }
    let code = code16!(
        enable_apic!(),
        timer_lvt!("0x40061"),
        "sti",
        "mov ecx, 0x6e0",
        "xor edx, edx",
        "mov eax, 1",
        "wrmsr",
        "rdtsc",
        "add eax, 4000000",
        "adc edx, 0",
        "wrmsr",
        "20:",
        "jmp 20b",
    );
    let parts = parts(host, &[], code);
    parts.handler(0x61, HANDLER);
    // Restores the registers: the second deadline's code is interrupted in the middle.
    parts.load(
        HANDLER,
        code16!(
            "push eax",
            "push ecx",
            "push edx",
            "mov eax, 0x161",
            report!(),
            eoi!(),
            "pop edx",
            "pop ecx",
            "pop eax",
            "iret"
        ),
    );
    let guest = parts.run();
    assert_eq!(guest.report(), 0x161);
    assert_eq!(guest.report(), 0x161);
}

#[test]
fn the_one_shot_timer_fires_once_and_the_periodic_one_again_and_again() {
    let Some(host) = host() else { return };
    let code = code16!(
        enable_apic!(),
        timer_lvt!("0x61"),
        "mov ecx, 0x83e",
        "mov eax, 0xb",
        "wrmsr",
        "mov ecx, 0x838",
        "mov eax, 100000",
        "wrmsr",
        "sti",
        "hlt",
        "mov eax, 1",
        report!(),
        timer_lvt!("0x20061"),
        "mov ecx, 0x838",
        "mov eax, 1000000",
        "wrmsr",
        "20:",
        "hlt",
        "jmp 20b",
    );
    let guest = parts(host, &[0x61], code).run();
    assert_eq!([0; 2].map(|_| guest.report()), [0x161, 1]);
    assert_eq!([0; 5].map(|_| guest.report()), [0x161; 5]);
}

#[test]
fn a_vcpu_halted_with_interrupts_off_wakes_for_an_nmi_only() {
    let Some(host) = host() else { return };
    let code = code16!(enable_apic!(), "cli", "20:", "hlt", "mov eax, 2", report!(), "jmp 20b");
    let parts = parts(host, &[0x33], code);
    parts.handler(2, OTHER);
    parts.load(OTHER, code16!("mov eax, 0x102", report!(), "iret"));
    let guest = parts.run();
    guest.wait_state(0, State::Halted);
    guest.post(0, 0x33);
    guest.vcpus.post(0, Signal::Nmi);
    assert_eq!([0; 2].map(|_| guest.report()), [0x102, 2]);
    guest.wait_state(0, State::Halted);
    guest.vcpus.post(0, Signal::Nmi);
    assert_eq!([0; 2].map(|_| guest.report()), [0x102, 2]);
    guest.wait_state(0, State::Halted);
    guest.vcpus.pause(PATIENCE).unwrap();
    assert_eq!(guest.vcpus.counters()[0].injected, 0);
}

#[test]
fn a_level_triggered_interrupt_is_finished_at_the_ioapic() {
    use base::lock;
    use devices::platform::bus::share;
    use devices::platform::ioapic::IoApicDevice;
    let Some(host) = host() else { return };
    let code = code16!(enable_apic!(), "20:", "sti", "hlt", "jmp 20b");
    let parts = parts(host, &[0x44], code);
    let router = parts.router.clone();
    let ioapic = share(IoApicDevice::new(0, move |message| router.deliver_message(message)));
    parts.router.set_ioapic(&ioapic);
    {
        // Pin 9: vector 0x44, level-triggered, for APIC id 0, not masked.
        use devices::platform::BusDevice;
        let mut ioapic = lock(&ioapic);
        ioapic.write(0, &(0x10u32 + 18).to_le_bytes());
        ioapic.write(0x10, &0x8044u32.to_le_bytes());
    }
    // The line stays up for two interrupts: the second comes of the first one's end.
    let (line, rounds) = (ioapic.clone(), std::sync::atomic::AtomicU32::new(0));
    let lower = move |_: &super::harness::Write| {
        if rounds.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 1 {
            lock(&line).set_pin(9, false);
        }
    };
    assert!(parts.devices.on_write.set(Box::new(lower)).is_ok());
    let guest = parts.run();
    // Until the guest has enabled its local APIC, interrupts are dropped.
    guest.wait_state(0, State::Halted);
    lock(&ioapic).set_pin(9, true);
    assert_eq!([0; 2].map(|_| guest.report()), [0x144, 0x144]);
    guest.wait_state(0, State::Halted);
    lock(&ioapic).set_pin(9, true);
    assert_eq!(guest.report(), 0x144);
}

#[test]
fn nothing_posted_is_lost_under_load() {
    let Some(host) = host() else { return };
    let code = code16!(enable_apic!(), "20:", "sti", "hlt", "jmp 20b");
    let guest: Guest = parts(host, &[0x70, 0x81, 0x92], code).run();
    guest.wait_state(0, State::Halted);
    for round in 0..300u64 {
        let vector = [0x70, 0x81, 0x92][round as usize % 3];
        guest.post(0, vector);
        assert_eq!(guest.report(), 0x100 + u64::from(vector), "round {round}");
    }
}
