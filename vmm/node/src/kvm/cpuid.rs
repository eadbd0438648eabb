//! CPUID entries in KVM's form.

use firmware::cpuid::CpuidEntry;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::KvmError;

/// Leaf 1, ECX bit 24: the local APIC timer has a TSC-deadline mode.
pub const TSC_DEADLINE_BIT: u32 = 1 << 24;

/// What KVM can offer a guest here (`KVM_GET_SUPPORTED_CPUID`), as it says it.
///
/// # Errors
/// What KVM answers.
pub fn supported(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmError> {
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("tell which CPUID leaves it supports"))?;
    Ok(table.as_slice().iter().map(from_kvm).collect())
}

pub(super) fn table(entries: &[CpuidEntry]) -> Result<CpuId, KvmError> {
    let entries: Vec<_> = entries.iter().map(to_kvm).collect();
    CpuId::from_entries(&entries).map_err(|_| KvmError::Call {
        what: "take that many CPUID entries",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}

/// An entry as KVM writes it.
pub fn from_kvm(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: entry.function,
        subleaf: entry.index,
        significant_index: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

/// An entry as KVM reads it.
pub fn to_kvm(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.leaf,
        index: entry.subleaf,
        flags: if entry.significant_index { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    }
}
