//! IA32_ARCH_CAPABILITIES: the one set of CPU features that is in an MSR and not in a CPUID leaf.

/// RSBA and RRSBA say that a CPU *is* vulnerable: one such CPU is enough.
const VULNERABLE: u64 = 1 << 2 | 1 << 19;

/// Bits that offer a control register of the host: TSX_CTRL, MISC_PACKAGE_CTLS, ENERGY_FILTERING_CTL, DOITM,
/// FB_CLEAR_CTRL, XAPIC_DISABLE_STATUS, OVERCLOCKING_STATUS, GDS_CTRL.
const CONTROLS: u64 = 1 << 7 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 18 | 1 << 21 | 1 << 23 | 1 << 25;

/// IA32_ARCH_CAPABILITIES (MSR 0x10a) for every CPU of a machine of which each node's KVM would give one of
/// `nodes`: immune only where all are. 0 for no node. (SDM volume 4, table 2-2.)
pub fn arch_capabilities(nodes: &[u64]) -> u64 {
    let all = nodes.iter().copied().reduce(|a, b| a & b).unwrap_or(0);
    let any = nodes.iter().fold(0, |a, b| a | b);
    (all | any & VULNERABLE) & !CONTROLS
}
