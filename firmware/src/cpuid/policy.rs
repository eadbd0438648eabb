//! The policy: abilities that this kind of machine turns off or on, whatever its CPUs can do.
//!
//! Off: what needs one KVM under the whole guest (its paravirtual clock, IPIs, TLB flushes..), what counts
//! or traces on one host (performance counters, branch records, processor trace), what ends in another
//! hypervisor or enclave (VMX, SVM, SGX), what waits in ways that we cannot wake (MONITOR, WAITPKG), and
//! what lets a guest shift one CPU's clock alone (TSC_ADJUST). On: what our interrupt controllers and
//! disciplined clocks provide (x2APIC, deadline timer, invariant TSC).

use super::Table;

/// The highest basic leaf shown; what lies beyond is not understood here.
const MAX_BASIC: u32 = 0x1f;
/// The lowest one may be: Linux takes the topology from 0xb, and the state components from 0xd.
const MIN_BASIC: u32 = 0xd;
/// The same on Intel: from 0x16 Linux knows the CPU's frequency and does not look for a PIT.
const MIN_BASIC_INTEL: u32 = 0x16;
/// The highest extended leaf shown.
const MAX_EXTENDED: u32 = 0x8000_0021;
/// The lowest it may be: 0x8000_0007 promises the invariant TSC.
const MIN_EXTENDED: u32 = 0x8000_0008;

// Leaf 1 ECX: DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA, and OSXSAVE,
// which KVM itself keeps in step with CR4.
const F1_ECX_OFF: u32 = bits(&[2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18, 27]);
// Leaf 1 ECX: x2APIC, running under a hypervisor. Not the TSC deadline timer: some versions of KVM keep its
// register to themselves, and the node that finds its own does says so by leaving the bit out.
const F1_ECX_ON: u32 = bits(&[21, 31]);
// Leaf 1 EDX: processor serial number, DS, ACPI thermal MSRs, HTT (set per CPU), TM, PBE.
const F1_EDX_OFF: u32 = bits(&[18, 21, 22, 28, 29, 31]);
// Leaf 1 EDX: there is a local APIC.
const F1_EDX_ON: u32 = bits(&[9]);
// Leaf 6 EAX: the APIC timer never stops. Nothing else of power management.
const F6_EAX_ON: u32 = bits(&[2]);
// Leaf 7.0 EBX: TSC_ADJUST, SGX, HLE, RTM, PQM, MPX, PQE, Intel PT.
const F7_EBX_OFF: u32 = bits(&[1, 2, 4, 11, 12, 14, 15, 25]);
// Leaf 7.0 ECX: OSPKE (KVM's, as OSXSAVE), WAITPKG, TME, MAWAU (MPX), key locker, bus lock detection, ENQCMD,
// SGX_LC, PKS.
const F7_ECX_OFF: u32 = bits(&[4, 5, 13, 17, 18, 19, 20, 21, 23, 24, 29, 30, 31]);
// Leaf 7.0 EDX: UINTR, RTM_ALWAYS_ABORT, TSX_FORCE_ABORT, hybrid, PCONFIG, architectural LBR,
// CORE_CAPABILITIES.
const F7_EDX_OFF: u32 = bits(&[5, 11, 13, 15, 18, 19, 30]);
// Leaf 7.1 EAX: perfmon leaf 0x23, FRED (never tried with interrupts injected from outside KVM), HRESET.
const F71_EAX_OFF: u32 = bits(&[8, 17, 22]);
// Leaf 7.1 EDX: UINTR's user timer, AVX10 (its leaf 0x24 is not shown).
const F71_EDX_OFF: u32 = bits(&[13, 19]);
// KVM's features that are safe when many KVMs run one guest: it needs no delay after port accesses.
const KVM_EAX_KEPT: u32 = bits(&[1]);
// Leaf 0x8000_0001 ECX: CMP_LEGACY (set per CPU), SVM, EXTAPIC, OSVW, IBS, SKINIT, WDT, LWP, NODEID_MSR,
// PERFCTR_CORE, PERFCTR_NB, PTSC, PERFCTR_LLC, MWAITX.
const X1_ECX_OFF: u32 = bits(&[1, 2, 3, 9, 10, 12, 13, 15, 19, 23, 24, 27, 28, 29]);
// Leaf 0x8000_0007 EDX: invariant TSC. Nothing else of power management.
const X7_EDX_ON: u32 = bits(&[8]);
// Leaf 0x8000_0008 EBX: INVLPGB (its broadcast ends at the host), RDPRU.
const X8_EBX_OFF: u32 = bits(&[3, 4]);

const fn bits(positions: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < positions.len() {
        mask |= 1 << positions[at];
        at += 1;
    }
    mask
}

/// Takes from `table` what the machine cannot give and adds what it can.
pub(super) fn apply(table: &mut Table) {
    let min_basic = if table.is_intel() { MIN_BASIC_INTEL } else { MIN_BASIC };
    let max = table.entry(0, 0);
    max.eax = max.eax.clamp(min_basic, MAX_BASIC);
    let max_basic = max.eax;
    let max = table.entry(0x8000_0000, 0);
    max.eax = max.eax.clamp(MIN_EXTENDED, MAX_EXTENDED);
    let max_extended = max.eax;

    let features = table.entry(1, 0);
    features.ecx = features.ecx & !F1_ECX_OFF | F1_ECX_ON;
    features.edx = features.edx & !F1_EDX_OFF | F1_EDX_ON;

    let power = table.entry(6, 0);
    (power.eax, power.ebx, power.ecx, power.edx) = (F6_EAX_ON, 0, 0, 0);

    let mut last_subleaf = 0;
    if let Some(features) = table.get_mut(7, 0) {
        // Subleaf 2 only has mitigation controls, and later ones are not understood here.
        features.eax = features.eax.min(2);
        last_subleaf = features.eax;
        features.ebx &= !F7_EBX_OFF;
        features.ecx &= !F7_ECX_OFF;
        features.edx &= !F7_EDX_OFF;
    }
    if let Some(features) = table.get_mut(7, 1) {
        features.eax &= !F71_EAX_OFF;
        features.edx &= !F71_EDX_OFF;
    }

    // Linux enables x2APIC without interrupt remapping only under a hypervisor that it knows.
    let signature = table.entry(0x4000_0000, 0);
    signature.eax = 0x4000_0001;
    (signature.ebx, signature.ecx, signature.edx) = (0x4b4d_564b, 0x564b_4d56, 0x4d); // "KVMKVMKVM"
    let kvm = table.entry(0x4000_0001, 0);
    (kvm.eax, kvm.ebx, kvm.ecx, kvm.edx) = (kvm.eax & KVM_EAX_KEPT, 0, 0, 0);

    if let Some(features) = table.get_mut(0x8000_0001, 0) {
        features.ecx &= !X1_ECX_OFF;
    }
    let power = table.entry(0x8000_0007, 0);
    (power.eax, power.ebx, power.ecx, power.edx) = (0, 0, 0, X7_EDX_ON);
    if let Some(sizes) = table.get_mut(0x8000_0008, 0) {
        sizes.ebx &= !X8_EBX_OFF;
        (sizes.ecx, sizes.edx) = (0, 0);
    }
    if let Some(features) = table.get_mut(0x8000_0021, 0) {
        (features.ebx, features.ecx, features.edx) = (0, 0, 0);
    }

    table.entries.retain(|entry| match entry.leaf {
        7 => entry.subleaf <= last_subleaf,
        leaf if leaf < 0x4000_0000 => leaf <= max_basic,
        leaf if leaf >= 0x8000_0000 => leaf <= max_extended,
        _ => true,
    });
}
