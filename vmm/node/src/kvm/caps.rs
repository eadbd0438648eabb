//! The KVM capabilities that a node needs.

use kvm_bindings::{KVM_CAP_SYNC_REGS, KVM_CAP_TSC_CONTROL, KVM_CAP_VCPU_ATTRIBUTES, KVM_SYNC_X86_REGS};
use kvm_ioctls::{Cap, Kvm};

use super::KvmError;

/// What a node cannot do without, and how it is called in messages.
pub const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::UserNmi, "KVM_CAP_USER_NMI"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`KvmError::Open`], also when it is not KVM or of another API version than 12.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|errno| KvmError::Open(errno.into()))?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(KvmError::Open(std::io::Error::other(format!("its API version is {other}, not 12")))),
    }
}

/// The names of needed capabilities that `kvm` lacks; empty when all is well.
pub fn missing(kvm: &Kvm) -> Vec<&'static str> {
    NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
}

/// Whether guest TSCs can run at another frequency than the host's.
pub fn has_tsc_control(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0
}

/// Whether vCPUs have device attributes, of which the TSC offset is one.
pub fn has_vcpu_attributes(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into()) > 0
}

/// Whether KVM copies the general registers out at each exit.
pub fn has_sync_regs(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_SYNC_REGS.into()) & KVM_SYNC_X86_REGS as i32 != 0
}

/// Fails unless `kvm` has all that a node needs.
///
/// # Errors
/// [`KvmError::Missing`] with every name.
pub fn check(kvm: &Kvm) -> Result<(), KvmError> {
    match missing(kvm) {
        none if none.is_empty() => Ok(()),
        names => Err(KvmError::Missing(names)),
    }
}
