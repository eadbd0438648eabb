//! CPUID: the abilities and the topology of the guest's CPUs, as its kernel may know them.
//!
//! Every node says what its KVM supports (`KVM_GET_SUPPORTED_CPUID`). [`intersect`] makes of that the one
//! set of abilities that all CPUs of the machine have, without those that this kind of machine cannot
//! give; [`for_vcpu`] adds what differs from CPU to CPU: APIC id and topology.
//!
//! ```text
//!  node 0's entries --\
//!  node 1's entries ----> combine -> policy -> base -> for_vcpu -> KVM_SET_CPUID2
//!  node n's entries --/   (all can)  (we can)          (one CPU)
//! ```
//!
//! Leaf numbers and bits: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; for 0x4000_0000 Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use crate::FirmwareError;
use crate::layout::Layout;
use serde::{Deserialize, Serialize};

mod combine;
mod msr;
mod policy;
mod topology;
mod xsave;

pub use msr::arch_capabilities;
pub use topology::for_vcpu;

/// One answer of the CPUID instruction; the same facts as KVM's `kvm_cpuid_entry2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question, where the leaf has subleaves; otherwise 0.
    pub subleaf: u32,
    /// Whether the leaf has subleaves (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
    pub significant_index: bool,
    /// EAX of the answer.
    pub eax: u32,
    /// EBX of the answer.
    pub ebx: u32,
    /// ECX of the answer.
    pub ecx: u32,
    /// EDX of the answer.
    pub edx: u32,
}

/// The abilities that the CPUs of all `nodes` share and that the machine can offer, for [`for_vcpu`].
///
/// Each element is what one node's KVM supports, in node order; an empty one is a node without CPUs. Model,
/// brand and cache sizes are those of the first node with CPUs. Hosts need not be alike, but must be of one
/// vendor.
///
/// # Errors
/// [`FirmwareError::Spec`] if there is no CPU, or two nodes' CPUs are of different vendors or have different
/// cache lines.
pub fn intersect(nodes: &[Vec<CpuidEntry>]) -> Result<Vec<CpuidEntry>, FirmwareError> {
    let mut base = combine::all(nodes)?;
    policy::apply(&mut base);
    xsave::settle(&mut base);
    Ok(base.entries)
}

/// Whether CPUs with `base` (from [`intersect`]) can address all memory of the machine.
///
/// # Errors
/// [`FirmwareError::Spec`] if they cannot.
pub fn check_memory(base: &[CpuidEntry], layout: &Layout) -> Result<(), FirmwareError> {
    let widths = base.iter().find(|entry| entry.leaf == 0x8000_0008).map_or(0, |entry| entry.eax);
    // 36 bits is what a CPU without the leaf has (SDM volume 3A, 4.1.4).
    let bits = [widths & 0xff, widths >> 16 & 0xff].into_iter().filter(|bits| *bits > 0).min().unwrap_or(36);
    let last = layout.ram_end() - 1;
    if bits < 64 && last >> bits != 0 {
        return Err(FirmwareError::Spec(format!(
            "the machine's memory ends at {:#x}, and its CPUs address {bits} bits: give the nodes less memory or use \
             hosts with wider physical addresses",
            last + 1
        )));
    }
    Ok(())
}

/// CPUID entries by leaf and subleaf.
#[derive(Clone, Debug, Default)]
struct Table {
    entries: Vec<CpuidEntry>,
}

impl Table {
    fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.entries.iter().find(|entry| entry.leaf == leaf && entry.subleaf == subleaf)
    }

    fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.entries.iter_mut().find(|entry| entry.leaf == leaf && entry.subleaf == subleaf)
    }

    /// The entry, made of zeros if it was not there.
    fn entry(&mut self, leaf: u32, subleaf: u32) -> &mut CpuidEntry {
        let found = self.entries.iter().position(|entry| entry.leaf == leaf && entry.subleaf == subleaf);
        let index = found.unwrap_or_else(|| {
            self.entries.push(CpuidEntry {
                leaf,
                subleaf,
                significant_index: has_subleaves(leaf),
                eax: 0,
                ebx: 0,
                ecx: 0,
                edx: 0,
            });
            self.entries.len() - 1
        });
        &mut self.entries[index]
    }

    fn remove(&mut self, leaf: u32) {
        self.entries.retain(|entry| entry.leaf != leaf);
    }

    /// The vendor's twelve letters.
    fn vendor(&self) -> [u8; 12] {
        let mut name = [0; 12];
        if let Some(entry) = self.get(0, 0) {
            for (part, register) in name.chunks_mut(4).zip([entry.ebx, entry.edx, entry.ecx]) {
                part.copy_from_slice(&register.to_le_bytes());
            }
        }
        name
    }

    fn is_intel(&self) -> bool {
        &self.vendor() == b"GenuineIntel"
    }
}

/// Leaves whose answer depends on ECX.
fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0x1d | 0x1e | 0x1f | 0x8000_001d)
}

#[cfg(test)]
mod tests;
