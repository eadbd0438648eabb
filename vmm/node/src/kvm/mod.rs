//! Stock KVM behind safe types: everything here is about one host, nothing about the cluster.
//!
//! | file | concept |
//! |---|---|
//! | [`caps`] | the capabilities that a node needs, checked before anything starts |
//! | [`vm`] | one virtual machine: memory slots, which MSR accesses come to us |
//! | [`vcpu`] | one virtual CPU: entering the guest, why it came back, registers |
//! | [`host`] | what this host offers: CPUID, TSC frequency, whether deadline timers can be trapped |
//! | [`cpuid`] | CPUID entries in KVM's form |
//! | `ioctls` | the few ioctls that kvm-ioctls lacks |
//!
//! There is no in-kernel interrupt controller: an ICR write for a vCPU of another node must reach us. So
//! x2APIC registers, the TSC-deadline register and IA32_APIC_BASE leave the guest as MSR exits, HLT leaves
//! it as well, and CR8 is mirrored in `kvm_run`.

pub mod caps;
pub mod cpuid;
pub mod host;
mod ioctls;
pub mod vcpu;
pub mod vm;

pub use host::HostCpu;
pub use vcpu::{Exit, Vcpu};
pub use vm::Vm;

/// What can go wrong with KVM, in sentences for the operator.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm cannot be opened: {0}; load kvm_intel or kvm_amd, and let this user read and write it")]
    Open(std::io::Error),
    /// The host's KVM is too old or too small.
    #[error("this host's KVM lacks {}; a Linux kernel of version 6.4 or newer has it", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// An ioctl failed.
    #[error("KVM refused to {what}: {source}")]
    Call {
        /// What was being done, as an infinitive.
        what: &'static str,
        /// The error itself.
        source: std::io::Error,
    },
    /// The guest's TSC is not what was asked for.
    #[error(
        "KVM runs the guest's time stamp counter {ticks} ticks from where it was set; leave its module \
         parameter tsc_tolerance_ppm at 250"
    )]
    Tsc {
        /// How far, in ticks.
        ticks: i64,
    },
    /// KVM did something other than what it was asked.
    #[error("KVM set {done} of {asked} model-specific registers: it does not know the next one, {next:#x}")]
    Msr {
        /// How many were set.
        done: usize,
        /// How many there were.
        asked: usize,
        /// The first that was not set.
        next: u32,
    },
}

impl KvmError {
    fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
        move |errno| KvmError::Call { what, source: errno.into() }
    }

    fn last(what: &'static str) -> KvmError {
        KvmError::Call { what, source: std::io::Error::last_os_error() }
    }
}

/// Numbers of the model-specific registers that this crate names (SDM vol. 4).
pub mod msr {
    /// Time stamp counter.
    pub const TSC: u32 = 0x10;
    /// Local APIC base and mode.
    pub const APIC_BASE: u32 = 0x1b;
    /// What was added to the TSC.
    pub const TSC_ADJUST: u32 = 0x3b;
    /// Which speculation flaws the CPU does not have.
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    /// Miscellaneous features; bit 0: fast strings.
    pub const MISC_ENABLE: u32 = 0x1a0;
    /// Default memory type; bits 10 and 11: fixed and all MTRRs are on.
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    /// The local APIC timer's deadline.
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// First x2APIC register.
    pub const X2APIC_FIRST: u32 = 0x800;
    /// Last x2APIC register.
    pub const X2APIC_LAST: u32 = 0x8ff;
}
