//! One virtual machine: this node's share of the guest.

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::vcpu::Vcpu;
use super::{KvmError, caps, msr};

/// KVM's own pages for real mode on Intel CPUs (three for the TSS, one for the identity map): part of the
/// device hole below 4 GiB that nothing else may use.
pub const KVM_RESERVED: std::ops::Range<u64> = 0xfffb_c000..0xfffc_0000;
const IDENTITY_MAP: u64 = KVM_RESERVED.start;
const TSS: usize = 0xfffb_d000;

/// A KVM virtual machine without an in-kernel interrupt controller.
pub struct Vm {
    fd: VmFd,
    tsc_offset: bool,
    sync_regs: bool,
}

impl Vm {
    /// Creates one whose accesses to interrupt-controller MSRs, and to MSRs that KVM does not know, leave the
    /// guest as [`super::Exit::ReadMsr`] and [`super::Exit::WriteMsr`].
    ///
    /// # Errors
    /// [`KvmError::Missing`] on too small a KVM, or what KVM answers.
    pub fn new(kvm: &Kvm) -> Result<Vm, KvmError> {
        caps::check(kvm)?;
        let fd = kvm.create_vm().map_err(KvmError::call("create a virtual machine"))?;
        // Real mode on Intel CPUs without "unrestricted guest" borrows these; others ignore them.
        fd.set_identity_map_address(IDENTITY_MAP).map_err(KvmError::call("place its identity map"))?;
        fd.set_tss_address(TSS).map_err(KvmError::call("place its task state"))?;
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        cap.args[0] =
            u64::from(KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER);
        fd.enable_cap(&cap).map_err(KvmError::call("pass MSR accesses on"))?;
        filter_msrs(&fd)?;
        Ok(Vm { fd, tsc_offset: caps::has_vcpu_attributes(kvm), sync_regs: caps::has_sync_regs(kvm) })
    }

    /// Makes host memory appear in the guest as memory slot `slot`.
    ///
    /// # Errors
    /// What KVM answers: an overlap with another slot, an unaligned address or length, too many slots.
    ///
    /// # Safety
    /// `host..host + len` must stay mapped, and be memory that no Rust reference claims, until the `Vm` and
    /// all its vCPUs are dropped: the guest reads and writes it at any time.
    pub unsafe fn add_memory(&self, slot: u32, gpa: u64, host: *mut u8, len: u64) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: the caller vouches for the host memory; KVM checks the guest's side.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(KvmError::call("map guest memory"))
    }

    /// Adds a vCPU; `index` is its number within this node, `0..`.
    ///
    /// # Errors
    /// What KVM answers: a number used twice or above its limit.
    pub fn create_vcpu(&self, index: u32) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(index.into()).map_err(KvmError::call("create a vCPU"))?;
        Ok(Vcpu::new(fd, self.fd.run_size(), self.tsc_offset, self.sync_regs))
    }
}

/// Denied accesses come to us. x2APIC MSRs (0x800..) need no filter, and KVM ignores one: without an
/// in-kernel local APIC it refuses them itself, which arrives as "invalid".
fn filter_msrs(fd: &VmFd) -> Result<(), KvmError> {
    // KVM copies the bitmap in units of 8 bytes.
    const DENIED: [u8; 8] = [0; 8];
    let range = |flags, base| MsrFilterRange { flags, base, msr_count: 1, bitmap: &DENIED };
    let both = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    let ranges = [
        range(both, msr::TSC_DEADLINE),
        range(both, msr::APIC_BASE),
        // The TSC is one for the whole machine: a write for one vCPU must not change KVM's offset.
        range(MsrFilterRangeFlags::WRITE, msr::TSC),
        range(both, msr::TSC_ADJUST),
    ];
    fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(KvmError::call("filter MSR accesses"))
}
