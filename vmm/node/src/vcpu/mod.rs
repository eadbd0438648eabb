//! The vCPUs of this node: one thread each.
//!
//! ```text
//!                     ┌──────────── INIT ───────────────┐
//!                     v                                 │
//!   created ──> WaitForSipi ── SIPI ──> Running ── HLT ──> Halted
//!                                       ^  │  ^            │
//!    boot processor: starts here ───────┘  │  └─ interrupt ┘ (if enabled), NMI
//!                                          v
//!                              exits: port, memory, MSR, kick, interrupt window
//! ```
//!
//! The thread owns the vCPU and its local APIC; no lock is taken on the way in or out of the guest. Others
//! reach it through its [`mailbox::Mailbox`]: they set bits there and, only if it may be in the guest or
//! asleep, *kick* it: a signal that is blocked in the thread and unblocked only inside KVM_RUN. A blocked
//! signal stays pending, so that a kick is never lost, whatever the thread was about to do.
//!
//! The way of one interrupt: `post` sets a bit in the mailbox -> the thread drains the mailbox into its local
//! APIC -> [`devices::irq::lapic::Lapic::acknowledge`] picks the vector -> KVM_INTERRUPT -> the guest's
//! handler.
//!
//! A wait for a page is not a trap: the kick ends it like any stay in the guest, with nothing done of the
//! instruction that needs the page. The thread then does what it was called for, and enters again; the guest
//! takes its interrupt, or touches the page again, which the engine knows as the same wait. An interrupt that
//! cannot be taken yet calls out once. ([`waiting`] tells on which hosts. Accesses of KVM's own emulator wait
//! to their end everywhere, and once kicked they spin there; on CPUs with VMX or SVM it makes few: device
//! accesses and string I/O.)
//!
//! | file | concept |
//! |---|---|
//! | [`mailbox`] | what others leave for a vCPU, and the kick |
//! | [`table`] | the shared side of all local vCPUs: mailboxes, counters, who is in the guest |
//! | [`run`] | the thread's loop |
//! | `exits` | what is done about each reason to leave the guest |
//! | [`msr`] | model-specific registers that are ours |
//! | [`ship`] | an instruction that is carried out elsewhere |
//! | [`registers`] | power-on, INIT, SIPI and boot states |
//! | `timer` | the local APIC timer's alarm |
//! | `pace` | how soon the next timer interrupt may come, on emulated hosts |
//! | [`signal`] | blocking, sending and awaiting the kick signal |
//! | [`waiting`] | whether a vCPU that waits for a page can be called out, tried |
//! | [`user_mode`] | a vCPU that begins at CPL 3, for probes and tests |
//! | [`report`] | what is said of a vCPU that cannot go on |
//! | [`control`] | starting, pausing, stopping and dumping all of them |

pub mod control;
mod exits;
pub mod mailbox;
pub mod msr;
mod pace;
pub mod registers;
pub mod report;
pub mod run;
pub mod ship;
pub mod signal;
pub mod table;
mod timer;
pub mod user_mode;
pub mod waiting;

pub use control::{Vcpus, VcpusError};
pub use mailbox::Mailbox;
pub use registers::Start;
pub use report::VcpuFailure;
pub use ship::Shipper;
pub use table::{Counters, Table};

use std::sync::Arc;

use firmware::cpuid::CpuidEntry;

use crate::clock::GuestClock;
use devices::irq::Ipi;

/// Port space or memory space.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Space {
    /// `in` and `out`; addresses `0..=0xffff`.
    Port,
    /// Guest physical addresses without memory.
    Memory,
}

/// Where device accesses go. The call returns when the access is done; after the machine's end reads give
/// 0xff bytes.
pub trait Devices: Send + Sync {
    /// vCPU `cpu` (its number within this node) reads `data.len()` bytes: 1, 2, 4, or in memory space any up
    /// to 8.
    fn read(&self, cpu: u32, space: Space, addr: u64, data: &mut [u8]);
    /// vCPU `cpu` writes `data`.
    fn write(&self, cpu: u32, space: Space, addr: u64, data: &[u8]);
}

/// Where what a local APIC sends goes. Must not block.
pub trait Interrupts: Send + Sync {
    /// An inter-processor interrupt.
    fn ipi(&self, ipi: Ipi);
    /// A level-triggered vector was finished.
    fn eoi(&self, vector: u8);
}

/// What all vCPUs of a node share.
#[derive(Clone)]
pub struct Environment {
    /// Ports and device memory.
    pub devices: Arc<dyn Devices>,
    /// The interrupt router.
    pub interrupts: Arc<dyn Interrupts>,
    /// The node's guest TSC, set before the vCPUs run.
    pub clock: Arc<GuestClock>,
    /// Called by a vCPU's thread when it halts, with the thread's number: it has nothing to do for now.
    pub on_idle: Arc<dyn Fn(u32) + Send + Sync>,
    /// After a timer interrupt the next one waits so many times as long as it took; 0 on real servers.
    pub timer_rest: u32,
    /// Carries instructions out elsewhere, if that is done at all.
    pub shipper: Option<Arc<dyn Shipper>>,
    /// Called at most once for each vCPU, from its thread, when it cannot go on.
    pub on_failure: Arc<dyn Fn(VcpuFailure) + Send + Sync>,
}

/// One vCPU to be made.
#[derive(Clone, Debug)]
pub struct VcpuConfig {
    /// Its number in the whole machine, for messages.
    pub vcpu: u32,
    /// Its x2APIC id.
    pub apic_id: u32,
    /// What its CPUID answers ([`firmware::cpuid::for_vcpu`]).
    pub cpuid: Vec<CpuidEntry>,
    /// Further model-specific registers to set, such as IA32_ARCH_CAPABILITIES.
    pub msrs: Vec<(u32, u64)>,
    /// Where it begins: the boot processor at the kernel, all others wait.
    pub start: Start,
}
