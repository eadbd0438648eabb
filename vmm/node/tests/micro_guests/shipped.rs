//! Two nodes with one memory, whose vCPUs ship instructions to each other: what they do to memory is as if
//! all ran on one.
//!
//! The vCPUs run at CPL 3 without interrupts: page 1 is the code, pages 12 to 14 are the page tables, which
//! nobody writes, page 16 (of node 0) and page 272 (of node 1) are what they fight for, and each has a page
//! of its own for its notes.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use coherence::engine::vcpus::Vcpus as ShippingVcpus;
use coherence::page::{Homes, PAGE_SIZE, Page};
use coherence::protocol::{Rules, Shipping as How};
use coherence::stats::Totals;
use coherence::testing::{Builder, Cluster};
use fabric::{Transport, sim};
use firmware::layout::RamRange;
use vmm::kvm::HostCpu;
use vmm::node::shipping::{Desk, Shipping};
use vmm::testing::code64;
use vmm::vcpu::user_mode;

use super::harness::{CODE, Guest, PATIENCE, Parts, places};
use super::waiting::able;

/// Pages of each node.
const PAGES: u64 = 256;
const TABLES: u16 = 0xc000;
/// What both nodes use: a page of node 0's, and one of node 1's.
const X: usize = 0x10 * PAGE_SIZE;
const Y: usize = 0x110 * PAGE_SIZE;
/// Where vCPU `n` leaves its notes: on its own node.
const NOTES: [usize; 2] = [0x40 * PAGE_SIZE, 0x140 * PAGE_SIZE];

/// Two nodes of one vCPU each.
struct Machine {
    guests: Vec<Guest>,
    shipping: Vec<Arc<Shipping>>,
    cluster: Cluster,
}

impl Machine {
    /// Both vCPUs run `code`, with their number in RSI, and report anything when they are done.
    fn start(host: &HostCpu, how: How, code: &[u8]) -> Machine {
        let places = places(&[1, 1]);
        let physical_bits = host.cpuid.iter().find(|entry| entry.leaf == 0x8000_0008).unwrap().eax as u8;
        let transports: Vec<Arc<dyn Transport>> =
            sim::cluster(2, 2).unwrap().into_iter().map(|transport| Arc::new(transport) as _).collect();
        let builder = Builder::new(Homes::new([PAGES, PAGES]));
        let builder = builder.with(|config| (config.first_lane, config.stuck) = (1, PATIENCE));
        let cluster = builder.start_over(transports.clone()).unwrap();
        let mut shipping = Vec::new();
        let mut all: Vec<Parts> = Vec::new();
        for (node, transport) in transports.into_iter().enumerate() {
            let (engine, memory) = (cluster.engine(node), cluster.memory(node));
            let mut parts = Parts::with_memory(host, &places, transport, memory.clone());
            let desk = Arc::new(Desk::new(parts.table.clone(), true));
            engine.ship(&(desk.clone() as Arc<dyn ShippingVcpus>), how);
            let ranges = [RamRange { gpa: 0, offset: 0, len: memory.len() as u64 }];
            let ships = Arc::new(Shipping::new(engine.clone(), memory.clone(), &ranges, physical_bits, desk));
            parts.shipper = Some(ships.clone());
            parts.start = user_mode::registers(TABLES.into(), CODE.into());
            parts.all_start = true;
            shipping.push(ships);
            all.push(parts);
        }
        all[0].load(TABLES, &user_mode::page_tables(TABLES.into()));
        all[0].load(CODE, code);
        Machine { guests: all.into_iter().map(Parts::run).collect(), shipping, cluster }
    }

    /// Waits until both vCPUs are done.
    fn done(&self) -> Vec<u64> {
        self.guests.iter().map(Guest::report).collect()
    }

    fn word(&self, node: usize, offset: usize) -> u64 {
        self.cluster.word(node, offset).load(SeqCst)
    }

    /// Counters of both nodes, and why instructions were not shipped.
    fn totals(&self, what: &str) -> Vec<Totals> {
        let totals = self.cluster.totals();
        for (node, (t, shipping)) in totals.iter().zip(&self.shipping).enumerate() {
            let refusals: Vec<_> = shipping.refusals().list().filter(|(_, count)| *count > 0).collect();
            println!(
                "{what}, node {node}: {} faults, {} remote reads, {} remote writes, {} operations, {} done, \
                 {} refused, {} carried out here, {:?}, {} shipped",
                t.events,
                t.remote_read_faults,
                t.remote_write_faults,
                t.operations,
                t.operations_done,
                t.operations_refused,
                t.operated,
                refusals,
                self.guests[node].vcpus.counters()[0].shipped,
            );
        }
        totals
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Before the engines, which bring what they wait for.
        self.guests.iter_mut().for_each(|guest| drop(guest.vcpus.stop(PATIENCE)));
        self.guests.clear();
    }
}

/// Ends a program: reports EAX and stays.
macro_rules! end {
    () => {
        "out 0x80, eax\n 29: pause\n jmp 29b"
    };
}

/// Waits until both are here: else the first is done before the second has its code.
macro_rules! meet {
    () => {
        "lock inc dword ptr [0x10f00]\n 18: pause\n cmp dword ptr [0x10f00], 2\n jne 18b"
    };
}

/// Adds to a word of each node's page, in all the ways that count, `times` times, with some work of its own
/// between.
fn counters(times: u32) -> Vec<u8> {
    let mut code = code64!(
        meet!(),
        "mov ebx, 0x12345678",
        "20:",
        "lock inc qword ptr [0x10000]",
        "mov eax, 1",
        "lock xadd [0x110000], rax",
        "mov rax, [0x10008]",
        "21:",
        "lea rcx, [rax + 3]",
        "lock cmpxchg [0x10008], rcx",
        "jne 21b",
        "lock add dword ptr [0x110008], 7",
        "lock sub word ptr [0x110010], 1",
        "mov ecx, 20000",
        "22:",
        "dec ecx",
        "jnz 22b",
        "dec ebx",
        "jnz 20b",
        end!(),
    )
    .to_vec();
    let at = code.windows(4).position(|bytes| bytes == 0x1234_5678u32.to_le_bytes()).unwrap();
    code[at..at + 4].copy_from_slice(&times.to_le_bytes());
    code
}

fn counters_are_exact(how: How, name: &str) -> Option<Vec<Totals>> {
    let host = able()?;
    const TIMES: u64 = 2000;
    let machine = Machine::start(host, how, &counters(TIMES as u32));
    machine.done();
    let totals = machine.totals(name);
    for node in 0..2 {
        assert_eq!(machine.word(node, X), 2 * TIMES);
        assert_eq!(machine.word(node, X + 8), 6 * TIMES);
        assert_eq!(machine.word(node, Y), 2 * TIMES);
        assert_eq!(machine.word(node, Y + 8), 14 * TIMES);
        assert_eq!(machine.word(node, Y + 16), 0x1_0000 - 2 * TIMES);
    }
    Some(totals)
}

#[test]
fn counters_of_two_nodes_are_exact_when_everything_is_shipped_that_can_be() {
    let Some(totals) = counters_are_exact(How::Always, "always") else { return };
    // How they divide depends on who has a page when one of its users needs it for something else.
    let done = totals[0].operations_done + totals[1].operations_done;
    assert!(done > 4000, "{done} operations were shipped");
    assert_eq!(done, totals[0].operated + totals[1].operated);
}

#[test]
fn counters_of_two_nodes_are_exact_when_hot_pages_are_shipped() {
    // How many are depends on how the host's own CPUs are shared: when the pages become hot.
    counters_are_exact(How::Auto(Rules::default()), "auto");
}

#[test]
fn counters_of_two_nodes_are_exact_when_nothing_is_shipped() {
    let Some(totals) = counters_are_exact(How::Off, "off") else { return };
    assert_eq!(totals[0].operations + totals[1].operations, 0);
}

/// Each takes a lock that is shipped, and adds to a word that moves, with an instruction that cannot be
/// shipped.
#[test]
fn a_lock_that_is_shipped_guards_a_word_that_moves() {
    let Some(host) = able() else { return };
    let code = code64!(
        meet!(),
        "mov ebx, 1000",
        "mov eax, 1",
        "movq xmm1, rax",
        "20:",
        "mov eax, 1",
        "xchg [0x10000], eax",
        "test eax, eax",
        "jz 22f",
        "21:",
        "pause",
        "cmp dword ptr [0x10000], 0",
        "jne 21b",
        "jmp 20b",
        "22:",
        "movq xmm0, [0x110000]",
        "paddq xmm0, xmm1",
        "movq [0x110000], xmm0",
        "mov dword ptr [0x10000], 0",
        "dec ebx",
        "jnz 20b",
        end!(),
    );
    let machine = Machine::start(host, How::Always, code);
    machine.done();
    machine.totals("lock");
    assert_eq!(machine.word(0, Y), 2000);
    assert_eq!(machine.word(1, X), 0);
}

/// Message passing: whoever sees the flag sees the data. vCPU 0 writes, vCPU 1 reads; EAX is how often it was
/// wrong.
fn message_passing(name: &str, code: &[u8]) {
    let Some(host) = able() else { return };
    let machine = Machine::start(host, How::Always, code);
    assert_eq!(machine.done()[1], 0, "reads of the data that were older than the flag");
    machine.totals(name);
}

#[test]
fn data_that_move_are_seen_by_who_sees_a_flag_that_is_shipped() {
    message_passing(
        "moving data, shipped flag",
        code64!(
            meet!(),
            "test esi, esi",
            "jnz 23f",
            "xor ebx, ebx",
            "20:",
            "inc rbx",
            "movq xmm0, rbx",
            "movq [0x110000], xmm0",
            "mov [0x10000], rbx",
            "mov ecx, 20000",
            "27:",
            "dec ecx",
            "jnz 27b",
            "cmp ebx, 1500",
            "jne 20b",
            "28:",
            end!(),
            "23:",
            "xor edi, edi",
            "24:",
            "mov rcx, [0x10000]",
            "movq xmm0, [0x110000]",
            "movq rdx, xmm0",
            "cmp rdx, rcx",
            "jae 25f",
            "inc edi",
            "25:",
            "cmp ecx, 1500",
            "jne 24b",
            "mov eax, edi",
            "jmp 28b",
        ),
    );
}

#[test]
fn data_that_are_shipped_are_seen_by_who_sees_a_flag_that_moves() {
    message_passing(
        "shipped data, moving flag",
        code64!(
            meet!(),
            "test esi, esi",
            "jnz 23f",
            "xor ebx, ebx",
            "20:",
            "inc rbx",
            "mov [0x110000], rbx",
            "movq xmm0, rbx",
            "movq [0x10000], xmm0",
            "cmp ebx, 1500",
            "jne 20b",
            "28:",
            end!(),
            "23:",
            "xor edi, edi",
            "24:",
            "movq xmm0, [0x10000]",
            "movq rcx, xmm0",
            "mov rdx, [0x110000]",
            "cmp rdx, rcx",
            "jae 25f",
            "inc edi",
            "25:",
            "cmp ecx, 1500",
            "jne 24b",
            "mov eax, edi",
            "jmp 28b",
        ),
    );
}

/// Store buffering, with a fence: vCPU 0 writes x (shipped or not) and then reads y (which moves), vCPU 1 the
/// other way round. Each notes what it read each time. If vCPU 0's i-th read found y older than j, it came
/// before vCPU 1's j-th write, and so that vCPU's j-th read must find x at i or newer.
#[test]
fn of_two_who_write_and_then_read_what_the_other_writes_one_sees_the_others() {
    let Some(host) = able() else { return };
    const TIMES: usize = 500;
    let code = code64!(
        "mov edi, 0x40000",
        "test esi, esi",
        "jz 19f",
        "mov edi, 0x140000",
        "19:",
        meet!(),
        "xor ebx, ebx",
        "20:",
        "inc rbx",
        "movq xmm0, rbx",
        "test esi, esi",
        "jnz 21f",
        "mov [0x10000], rbx",
        "mfence",
        "movq xmm1, [0x110000]",
        "movq rax, xmm1",
        "jmp 22f",
        "21:",
        "movq [0x110000], xmm0",
        "mfence",
        "mov rax, [0x10000]",
        "22:",
        "mov [rdi + rbx * 8], rax",
        "mov ecx, 200000",
        "23:",
        "dec ecx",
        "jnz 23b",
        "cmp ebx, 500",
        "jne 20b",
        end!(),
    );
    let machine = Machine::start(host, How::Always, code);
    machine.done();
    machine.totals("store buffering");
    let read = |cpu: usize, i: usize| machine.word(cpu, NOTES[cpu] + i * 8) as usize;
    let mut overlaps = 0;
    for i in 1..=TIMES {
        let j = read(0, i) + 1;
        if j <= TIMES {
            assert!(
                read(1, j) >= i,
                "vCPU 0's read {i} found {}, vCPU 1's read {j} found {}",
                j - 1,
                read(1, j)
            );
            overlaps += usize::from(j > 1);
        }
    }
    println!("{overlaps} of {TIMES} reads came between two writes of the other");
}

/// Each vCPU's notes are on a page of its own node, which is not shipped from there.
#[test]
fn what_a_node_does_with_its_own_pages_is_not_shipped() {
    let Some(host) = able() else { return };
    let code = code64!(
        "mov edi, 0x40000",
        "test esi, esi",
        "jz 19f",
        "mov edi, 0x140000",
        "19:",
        "mov ebx, 100000",
        "20:",
        "lock inc qword ptr [rdi]",
        "dec ebx",
        "jnz 20b",
        end!(),
    );
    let machine = Machine::start(host, How::Always, code);
    machine.done();
    let totals = machine.totals("own pages");
    assert_eq!((machine.word(0, NOTES[0]), machine.word(1, NOTES[1])), (100_000, 100_000));
    assert_eq!(totals[0].operations + totals[0].operated, 0);
    assert!(totals[1].operations <= 8, "{}", totals[1].operations);
    assert_eq!(Page(0x40).offset(), NOTES[0]);
}
