//! An instruction that is carried out elsewhere while its vCPU waits for the page: here by the test, on a
//! word of its own.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use coherence::page::Page;
use kvm_bindings::kvm_regs;
use vmm::kvm::HostCpu;
use vmm::testing::{code64, patch};
use vmm::vcpu::Shipper;
use vmm::vcpu::ship::{Shipment, Shipped, Stopped};

use super::harness::{CODE, Guest, PATIENCE, Parts, Withheld};
use super::user::{self, PAGE, Setup};
use super::waiting::able;

/// `lock xadd` of the withheld page's first word.
fn xadd() -> &'static [u8] {
    code64!("lock xadd [0xa000], rax")
}

/// Adds 5 to the word so often, and then reports the sum of what it found there, low half first.
fn adder(times: u32) -> (Vec<u8>, u64) {
    let begin = [code64!("xor ebx, ebx", "mov r12d, 0x12345678"), code64!("mov eax, 5")];
    let mut code = begin.concat();
    patch(&mut code, times);
    let rip = u64::from(CODE) + code.len() as u64;
    code.extend_from_slice(xadd());
    code.extend_from_slice(code64!("add rbx, rax", "dec r12d"));
    // jnz to `mov eax, 5`.
    let back = begin[0].len() as i32 - (code.len() as i32 + 2);
    code.extend_from_slice(&[0x75, back as u8]);
    let end = code64!(
        "mov eax, ebx",
        "out 0x80, eax",
        "shr rbx, 32",
        "mov eax, ebx",
        "out 0x80, eax",
        "21:",
        "jmp 21b"
    );
    code.extend_from_slice(end);
    (code, rip)
}

/// What the adder reports in the end.
fn sum(guest: &Guest, interrupts: &mut u64) -> u64 {
    let mut halves = Vec::new();
    while halves.len() < 2 {
        match guest.report() {
            0x131 => *interrupts += 1,
            half => halves.push(half),
        }
    }
    halves[0] | halves[1] << 32
}

fn wanted(times: u32) -> u64 {
    (0..u64::from(times)).map(|i| 5 * i).sum()
}

/// The registers after the instruction.
fn after(regs: &kvm_regs, old: u64) -> Shipped {
    let rip = regs.rip + xadd().len() as u64;
    Shipped::Done(Box::new(kvm_regs { rax: old, rip, ..*regs }))
}

/// Has the answer at once.
struct Counter {
    rip: u64,
    word: AtomicU64,
    done: AtomicU64,
}

struct Ready(Option<Shipped>);

impl Shipment for Ready {
    fn poll(&mut self) -> Option<Shipped> {
        self.0.take()
    }
}

impl Shipper for Counter {
    fn begin(&self, _cpu: u32, stopped: &Stopped, page: Page) -> Option<Box<dyn Shipment>> {
        assert_eq!(page, Page(PAGE));
        // Called out for an interrupt, it may be in the handler by now.
        if stopped.regs.rip != self.rip {
            return None;
        }
        self.done.fetch_add(1, SeqCst);
        let old = self.word.fetch_add(stopped.regs.rax, SeqCst);
        Some(Box::new(Ready(Some(after(&stopped.regs, old)))))
    }
}

fn start(host: &HostCpu, code: &[u8], shipper: Arc<dyn Shipper>) -> (Guest, Withheld) {
    let mut parts = Parts::alone(host, 1);
    user::prepare(&mut parts, &Setup { kernel: &[], code, interrupts: true, vectors: &[0x31] });
    parts.shipper = Some(shipper);
    let page = parts.withhold(PAGE);
    (parts.run(), page)
}

fn counter(rip: u64) -> Arc<Counter> {
    Arc::new(Counter { rip, word: AtomicU64::new(0), done: AtomicU64::new(0) })
}

#[test]
fn ten_thousand_shipped_instructions_happen_once_each_and_take_one_fault_each() {
    let Some(host) = able() else { return };
    const TIMES: u32 = 10_000;
    let (code, rip) = adder(TIMES);
    let shipper = counter(rip);
    let (guest, page) = start(host, &code, shipper.clone());
    for _ in 0..TIMES {
        let fault = page.fault();
        assert!(fault.write);
        assert!(guest.vcpus.table().ship(fault.thread, Page(PAGE)));
    }
    assert_eq!(sum(&guest, &mut 0), wanted(TIMES));
    assert_eq!(shipper.word.load(SeqCst), 5 * u64::from(TIMES));
    assert_eq!(shipper.done.load(SeqCst), u64::from(TIMES));
    assert!(page.is_quiet_for(Duration::ZERO));
    let counters = guest.vcpus.counters()[0];
    assert_eq!((counters.shipped, counters.not_shipped), (u64::from(TIMES), 0));
}

#[test]
fn interrupts_among_shipped_instructions_lose_and_double_nothing() {
    let Some(host) = able() else { return };
    const TIMES: u32 = 2000;
    let (code, rip) = adder(TIMES);
    let shipper = counter(rip);
    let (guest, page) = start(host, &code, shipper.clone());
    let (mut interrupts, mut faults) = (0, 0);
    while shipper.done.load(SeqCst) < u64::from(TIMES) {
        // An interrupt's fault comes again; the last one may have been of the last instruction.
        let Some(fault) = page.fault_within(Duration::from_millis(200)) else { continue };
        faults += 1;
        if faults % 3 == 0 {
            guest.post(0, 0x31);
        }
        // If it is out for the interrupt already it comes again.
        guest.vcpus.table().ship(fault.thread, Page(PAGE));
        if faults % 3 == 1 {
            guest.post(0, 0x31);
        }
    }
    assert_eq!(sum(&guest, &mut interrupts), wanted(TIMES));
    assert_eq!(shipper.word.load(SeqCst), 5 * u64::from(TIMES));
    println!("{faults} faults, {interrupts} interrupts before the end, {:?}", guest.vcpus.counters()[0]);
    assert!(interrupts > u64::from(TIMES) / 10, "{interrupts}");
}

/// Lets the test answer.
struct Slow(Mutex<mpsc::Sender<(kvm_regs, mpsc::Sender<Shipped>)>>);

struct UnderWay(mpsc::Receiver<Shipped>);

impl Shipment for UnderWay {
    fn poll(&mut self) -> Option<Shipped> {
        self.0.try_recv().ok()
    }
}

impl Shipper for Slow {
    fn begin(&self, _cpu: u32, stopped: &Stopped, _page: Page) -> Option<Box<dyn Shipment>> {
        let (answer, answers) = mpsc::channel();
        self.0.lock().unwrap().send((stopped.regs, answer)).unwrap();
        Some(Box::new(UnderWay(answers)))
    }
}

/// A guest whose first instruction on the page is under way, with where it is, its registers, and who takes
/// the answer.
fn under_way(host: &HostCpu) -> (Guest, Withheld, u64, kvm_regs, mpsc::Sender<Shipped>) {
    let (tell, told) = mpsc::channel();
    let (code, rip) = adder(1);
    let (guest, page) = start(host, &code, Arc::new(Slow(Mutex::new(tell))));
    let fault = page.fault();
    assert!(guest.vcpus.table().ship(fault.thread, Page(PAGE)));
    let (regs, answer) = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!((regs.rip, regs.rax), (rip, 5));
    (guest, page, rip, regs, answer)
}

#[test]
fn a_vcpu_shows_its_registers_while_its_instruction_is_under_way_and_pauses_after_it() {
    let Some(host) = able() else { return };
    let (guest, page, rip, regs, answer) = under_way(host);
    let before = format!("rip {rip:016x}");
    for _ in 0..3 {
        let dump = guest.dump();
        assert!(dump.contains(&before), "{dump}");
    }
    guest.post(0, 0x31);
    assert!(guest.vcpus.pause(Duration::from_millis(50)).is_err(), "paused with an instruction half done");
    answer.send(after(&regs, 1000)).unwrap();
    guest.vcpus.table().slots()[0].mailbox.kick();
    guest.vcpus.pause(PATIENCE).unwrap();
    let after = format!("rip {:016x}", rip + xadd().len() as u64);
    let dump = guest.dump();
    assert!(dump.contains(&after), "{dump}");
    assert!(guest.is_quiet());
    guest.vcpus.resume();
    let mut interrupts = 0;
    assert_eq!((sum(&guest, &mut interrupts), interrupts), (1000, 1));
    assert!(page.is_quiet_for(Duration::ZERO));
}

#[test]
fn a_vcpu_stops_though_no_answer_comes() {
    let Some(host) = able() else { return };
    let (mut guest, _page, _, _, _answer) = under_way(host);
    guest.vcpus.stop(PATIENCE).unwrap();
}

#[test]
fn what_was_not_done_elsewhere_is_begun_again_and_done_here_when_the_page_comes() {
    let Some(host) = able() else { return };
    let (guest, page, _, _, answer) = under_way(host);
    answer.send(Shipped::NotDone).unwrap();
    guest.vcpus.table().slots()[0].mailbox.kick();
    page.fault();
    page.give(70);
    assert_eq!(sum(&guest, &mut 0), 70);
    assert_eq!(page.take(), 75);
    let counters = guest.vcpus.counters()[0];
    assert_eq!((counters.shipped, counters.not_shipped), (0, 1));
}

#[test]
fn a_thread_that_is_no_vcpus_is_told_apart() {
    let Some(host) = able() else { return };
    let (code, rip) = adder(1);
    let (guest, page) = start(host, &code, counter(rip));
    let fault = page.fault();
    assert!(!guest.vcpus.table().ship(std::process::id(), Page(PAGE)));
    assert!(!guest.vcpus.table().ship(0, Page(PAGE)));
    assert!(guest.vcpus.table().ship(fault.thread, Page(PAGE)));
    assert_eq!(sum(&guest, &mut 0), 0);
}
