//! Accesses to model-specific registers that KVM leaves to the node and that are not the local APIC's: some
//! reads give zero, writes to the TSC are dropped, and all others fault.

/// What becomes of an access that is not the local APIC's.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A read gives this.
    Value(u64),
    /// A write is dropped.
    Ignore,
    /// #GP(0), as an absent register raises.
    Refuse,
}

/// Registers that KVM leaves to us and that some kernels read without expecting a fault: power, temperature
/// and SMI counters, which say nothing in a guest (SDM vol. 4, table 2-2).
const HARMLESS: [u32; 8] = [
    0x34,  // SMI count
    0x198, // performance status
    0x19c, // thermal status
    0x1a2, // temperature target
    0x1b1, // package thermal status
    0x606, // power units
    0x611, // package energy
    0x619, // DRAM energy
];

/// Answers a read of `index`.
pub fn read(index: u32) -> Answer {
    if HARMLESS.contains(&index) { Answer::Value(0) } else { Answer::Refuse }
}

/// Answers a write to `index`.
pub fn write(index: u32) -> Answer {
    match index {
        // All CPUs' TSCs are one clock, which the nodes keep: no CPU sets its own.
        crate::kvm::msr::TSC => Answer::Ignore,
        _ => Answer::Refuse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_registers_fault_and_the_tsc_cannot_be_set() {
        assert_eq!(read(0x1234_5678), Answer::Refuse);
        assert_eq!(read(0x606), Answer::Value(0));
        assert_eq!(write(0x606), Answer::Refuse);
        assert_eq!(write(0x10), Answer::Ignore);
    }
}
