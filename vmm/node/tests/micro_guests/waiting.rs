//! A vCPU that waits for a page still takes interrupts, and does what the node wants of it. The page comes
//! when the test says so, so that what happens before did not wait for it.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use coherence::uffd::Uffd;
use vmm::kvm::HostCpu;
use vmm::node_msg::Signal;
use vmm::testing::{code16, code64};
use vmm::vcpu::table::State;

use super::harness::{CODE, Guest, PATIENCE, Parts, Withheld, host};
use super::interrupts::{enable_apic, eoi};
use super::startup::{AP_PAGE, icr, start_ap};
use super::user::{self, PAGE, Setup};
use super::vcpu::report;

/// How long a page is withheld where that is what a test is about.
const HELD: Duration = Duration::from_millis(100);
/// Long enough for a busy loop to show.
const WHILE: Duration = Duration::from_millis(50);

/// This host, if a test can withhold pages from a guest.
pub fn able() -> Option<&'static HostCpu> {
    if let Err(why) = Uffd::open() {
        eprintln!("skipped: {why}");
        return None;
    }
    host()
}

/// Reads the withheld page again and again, and reports what it finds.
fn reader() -> &'static [u8] {
    code64!("20:", "mov eax, [0xa000]", "out 0x80, eax", "jmp 20b")
}

/// A guest whose only vCPU waits for the page.
fn waiting(host: &HostCpu, interrupts: bool, vectors: &[u8]) -> (Guest, Withheld) {
    let mut parts = Parts::alone(host, 1);
    user::prepare(&mut parts, &Setup { kernel: &[], code: reader(), interrupts, vectors });
    let page = parts.withhold(PAGE);
    let guest = parts.run();
    page.fault();
    (guest, page)
}

/// The guest goes on when the page comes.
fn goes_on(guest: &Guest, page: &Withheld) {
    page.give(77);
    assert_eq!(guest.report(), 77);
}

#[test]
fn an_interrupt_is_served_within_a_millisecond_while_its_page_is_held_elsewhere_for_100_ms() {
    let Some(host) = able() else { return };
    let mut parts = Parts::alone(host, 1);
    // Reads once, and spins until the page has gone again.
    let code = code64!(
        "20:",
        "mov eax, [0xa000]",
        "out 0x80, eax",
        "mov ebx, eax",
        "21:",
        "in eax, 0x84",
        "cmp eax, ebx",
        "jne 21b",
        "jmp 20b",
    );
    user::prepare(&mut parts, &Setup { kernel: &[], code, interrupts: true, vectors: &[0x31] });
    let page = parts.withhold(PAGE);
    let served = Arc::new(Mutex::new(None));
    let note = served.clone();
    let on_write = move |write: &super::harness::Write| {
        if write.value == 0x131 {
            *note.lock().unwrap() = Some(Instant::now());
        }
    };
    assert!(parts.devices.on_write.set(Box::new(on_write)).is_ok());
    *parts.devices.answer.lock().unwrap() = Some(0);
    let guest = parts.run();
    let mut latencies = Vec::new();
    for round in 1..=20u64 {
        page.fault();
        let held = Instant::now();
        guest.post(0, 0x31);
        // Nobody has given the page: the handler's report cannot have waited for it.
        assert_eq!(guest.report(), 0x131);
        latencies.push(served.lock().unwrap().take().unwrap() - held);
        // Back in the wait.
        page.fault();
        std::thread::sleep(HELD.saturating_sub(held.elapsed()));
        page.give(round);
        assert_eq!(guest.report(), round);
        page.take();
        *guest.parts.devices.answer.lock().unwrap() = Some(round);
    }
    latencies.sort_unstable();
    println!("from the post to the handler: {latencies:?}");
    // The median would do on a quiet host; on a busy one the threads themselves wait for a CPU.
    assert!(latencies[latencies.len() / 4] < Duration::from_millis(1), "{latencies:?}");
}

#[test]
fn an_nmi_is_served_in_a_wait_with_interrupts_off() {
    let Some(host) = able() else { return };
    let (guest, page) = waiting(host, false, &[2]);
    for _ in 0..10 {
        guest.vcpus.post(0, Signal::Nmi);
        assert_eq!(guest.report(), 0x102);
        page.fault();
    }
    goes_on(&guest, &page);
}

#[test]
fn an_interrupt_that_cannot_be_taken_calls_its_vcpu_out_once() {
    let Some(host) = able() else { return };
    let mut parts = Parts::alone(host, 1);
    let code = code64!("mov eax, [0xa000]", "out 0x80, eax", "20:", "jmp 20b");
    user::prepare(&mut parts, &Setup { kernel: &[], code, interrupts: false, vectors: &[0x31] });
    // Returns with interrupts on: sets the flag in what it returns to.
    user::handler(&parts, 2, 0x3800, code64!("or dword ptr [rsp + 16], 0x200", "iretq"));
    let page = parts.withhold(PAGE);
    let guest = parts.run();
    page.fault();
    let before = guest.vcpus.counters()[0];
    guest.post(0, 0x31);
    page.fault();
    assert!(page.is_quiet_for(WHILE), "the vCPU is called out again and again");
    let after = guest.vcpus.counters()[0];
    assert_eq!((after.kick_exits - before.kick_exits, after.injected), (1, 0));
    page.give(77);
    assert_eq!(guest.report(), 77);
    assert!(guest.is_quiet());
    guest.vcpus.post(0, Signal::Nmi);
    assert_eq!(guest.report(), 0x131);
}

#[test]
fn a_timer_interrupt_is_served_in_a_wait() {
    let Some(host) = able() else { return };
    let mut parts = Parts::alone(host, 1);
    // The periodic timer, each 4 million ticks.
    let kernel = code64!(
        "mov ecx, 0x832",
        "mov eax, 0x20061",
        "wrmsr",
        "mov ecx, 0x83e",
        "mov eax, 0xb",
        "wrmsr",
        "mov ecx, 0x838",
        "mov eax, 4000000",
        "wrmsr",
    );
    user::prepare(&mut parts, &Setup { kernel, code: reader(), interrupts: true, vectors: &[0x61] });
    let page = parts.withhold(PAGE);
    let guest = parts.run();
    page.fault();
    assert_eq!([0; 5].map(|_| guest.report()), [0x161; 5]);
}

#[test]
fn a_shootdown_does_not_wait_for_the_page_that_its_target_waits_for() {
    let Some(host) = able() else { return };
    let mut parts = Parts::alone(host, 2);
    user::prepare(
        &mut parts,
        &Setup { kernel: code64!(start_ap!("1")), code: reader(), interrupts: true, vectors: &[] },
    );
    // As a shootdown: the other CPU asks, and spins until this one has said in memory that it is done.
    let done = code64!("push rax", "push rcx", "push rdx", "inc dword ptr [0x6000]", eoi!());
    let done = [done, code64!("pop rdx", "pop rcx", "pop rax", "iretq")].concat();
    user::handler(&parts, 0x31, 0x3000, &done);
    let asks = code16!(
        "xor ax, ax",
        "mov ds, ax",
        "xor ebx, ebx",
        "20:",
        "in eax, 0x84",
        "cmp eax, 1",
        "jne 20b",
        "21:",
        icr!("0", "0x4031"),
        "inc ebx",
        "22:",
        "cmp [0x6000], ebx",
        "jne 22b",
        "mov eax, ebx",
        report!(),
        "jmp 21b",
    );
    parts.load(u16::from(AP_PAGE) << 12, &[code16!(enable_apic!()), asks].concat());
    *parts.devices.answer.lock().unwrap() = Some(0);
    let page = parts.withhold(PAGE);
    let guest = parts.run();
    page.fault();
    *guest.parts.devices.answer.lock().unwrap() = Some(1);
    for round in 1..=100 {
        assert_eq!(guest.report(), round);
    }
}

#[test]
fn a_vcpu_is_stopped_in_a_wait_that_never_ends() {
    let Some(host) = able() else { return };
    let (mut guest, page) = waiting(host, true, &[]);
    guest.vcpus.stop(PATIENCE).unwrap();
    guest.wait_state(0, State::Gone);
    assert!(page.is_quiet_for(Duration::ZERO));
}

#[test]
fn a_vcpu_is_paused_in_a_wait_and_waits_again_when_it_is_resumed() {
    let Some(host) = able() else { return };
    let (guest, page) = waiting(host, true, &[]);
    for _ in 0..10 {
        guest.vcpus.pause(PATIENCE).unwrap();
        assert!(page.is_quiet_for(Duration::ZERO));
        guest.vcpus.resume();
        page.fault();
    }
    guest.vcpus.pause(PATIENCE).unwrap();
    // The page comes while nobody waits for it.
    page.give(77);
    guest.vcpus.resume();
    assert_eq!(guest.report(), 77);
}

#[test]
fn a_vcpu_shows_its_registers_in_a_wait() {
    let Some(host) = able() else { return };
    let (guest, page) = waiting(host, true, &[]);
    let dump = guest.dump();
    let rip = format!("rip {CODE:016x}");
    assert!(dump.contains(&rip) && !dump.contains("does not answer"), "{dump}");
    page.fault();
    goes_on(&guest, &page);
}

#[test]
fn a_step_of_the_clock_reaches_a_vcpu_in_a_wait() {
    let Some(host) = able() else { return };
    let (guest, page) = waiting(host, true, &[]);
    let clock = &guest.parts.clock;
    for _ in 0..10 {
        if clock.is_fixed() {
            // Where the guest's clock cannot be stepped, what a step does to vCPUs can still be seen.
            guest.vcpus.table().call_out();
        } else {
            assert!(clock.step_to(clock.offset().wrapping_add(clock.ticks(1_000_000))));
        }
        page.fault();
    }
    goes_on(&guest, &page);
}

#[test]
fn an_init_reaches_a_vcpu_in_a_wait() {
    let Some(host) = able() else { return };
    let (guest, page) = waiting(host, true, &[]);
    guest.vcpus.post(0, Signal::Init);
    guest.wait_state(0, State::WaitForSipi);
    assert!(page.is_quiet_for(Duration::ZERO));
}
