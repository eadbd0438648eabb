//! The facts about a host, without a judgement.

use std::time::Duration;

/// A host, as [`super::probe`] finds it or a test makes it up.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// The kernel's release, as `uname -r` says.
    pub kernel: String,
    /// CPUs online.
    pub cpus: u32,
    /// The CPU flag that hardware virtualization shows itself by, if it does: `vmx` or `svm`.
    pub virtualization: Option<&'static str>,
    /// Whether this host is itself a virtual machine (the `hypervisor` CPU flag).
    pub guest: bool,
    /// What `/dev/kvm` offers, or why it offers nothing.
    pub kvm: Result<KvmFacts, Trouble>,
    /// Whether a userfaultfd can be opened for faults of the kernel itself, with the features needed.
    pub userfaultfd: Result<(), String>,
    /// Whether a minor fault could be resolved with a page that is write-protected from the start.
    pub continue_protected: Result<(), String>,
    /// Memory that a new process could use without swapping, in bytes.
    pub memory_available: u64,
    /// The chosen value of `shmem_enabled`: whether guest memory may use huge pages.
    pub shmem_huge: Option<String>,
    /// The TSC.
    pub tsc: TscFacts,
    /// Network interfaces that are up, without loopback.
    pub interfaces: Vec<Interface>,
    /// RDMA.
    pub rdma: RdmaFacts,
    /// `vm.max_map_count`.
    pub max_map_count: Option<u64>,
    /// The soft limit on open files.
    pub open_files: u64,
    /// The hard limit on open files.
    pub open_files_hard: u64,
}

/// A thing that does not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It does not exist.
    Absent,
    /// It exists, but not for this user.
    Denied,
    /// Something else; the system's words.
    Other(String),
}

/// What KVM offers.
#[derive(Clone, Debug)]
pub struct KvmFacts {
    /// Names of needed capabilities that are missing.
    pub missing: Vec<String>,
    /// The most vCPUs of one virtual machine.
    pub max_vcpus: u64,
    /// Whether a virtual machine could be made and run, or why not.
    pub runs: Result<(), String>,
    /// Whether a vCPU's TSC offset can be set exactly.
    pub tsc_offset: bool,
    /// Whether a guest TSC can run at another frequency than the host's.
    pub tsc_control: bool,
    /// How long it took to call a vCPU out of its wait for a page, or why that did not work.
    pub called_out: Result<Duration, String>,
    /// Whether guests can be given the TSC-deadline timer.
    pub deadline_timer: bool,
    /// Whether the CPU translates guest addresses itself (EPT, NPT); unknown if the module does not say.
    pub nested_paging: Option<bool>,
    /// Whether KVM lets EPT keep accessed and dirty bits, which makes every page walk a write to the guest's
    /// page tables (SDM vol. 3, "Accessed and Dirty Flags for EPT"); unknown if the module does not say, as
    /// on AMD CPUs.
    pub ept_accessed_dirty: Option<bool>,
}

/// What can be said of the TSC.
#[derive(Clone, Debug, Default)]
pub struct TscFacts {
    /// It ticks at one rate at every CPU speed.
    pub constant: bool,
    /// It goes on ticking in deep sleep.
    pub nonstop: bool,
    /// What the host's kernel itself takes the time from.
    pub clocksource: Option<String>,
}

/// A network interface.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Bytes in the largest packet.
    pub mtu: u32,
}

/// RDMA, as far as there is any.
#[derive(Clone, Debug)]
pub struct RdmaFacts {
    /// Whether libibverbs can be opened, or why not, as the end of a sentence.
    pub library: Result<(), String>,
    /// Ports of its devices.
    pub ports: Vec<RdmaPort>,
    /// Memory in bytes that a process may lock; `None` if there is no limit.
    pub lockable: Option<u64>,
}

/// One port of an RDMA device.
#[derive(Clone, Debug)]
pub struct RdmaPort {
    /// Device and port: `mlx5_0/1`.
    pub name: String,
    /// The kernel's word for its state, `ACTIVE` if it can be used.
    pub state: String,
    /// Whether it speaks RoCE on Ethernet, not InfiniBand.
    pub ethernet: bool,
    /// The address of its best GID for RoCE version 2.
    pub address: Option<String>,
    /// Its active MTU in bytes, or why it cannot be asked.
    pub mtu: Result<u32, String>,
}
