//! The places of devices: the node that has the device at an address, the same answer at every node, without
//! asking anybody.

use fabric::NodeId;
use firmware::pci::bus_of;

use crate::vcpu::Space;
use devices::pci::is_doorbell;

/// Where an address is served.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node that has the device.
    pub node: NodeId,
    /// The address is a doorbell: whoever writes it waits for nothing.
    pub doorbell: bool,
}

impl Place {
    /// The place of `addr` in a machine with `buses` PCI buses: bus `n` is at node `n`, everything else at
    /// node 0.
    pub fn of(buses: usize, space: Space, addr: u64) -> Place {
        match bus_of(addr).filter(|bus| space == Space::Memory && usize::from(*bus) < buses) {
            Some(bus) => Place { node: NodeId(bus.into()), doorbell: is_doorbell(addr) },
            None => Place { node: NodeId(0), doorbell: false },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::pci::{DOORBELLS, REGISTERS};
    use firmware::pci::{ecam, window};

    #[test]
    fn a_bus_is_at_its_node_and_all_else_at_node_0() {
        let at = |node, doorbell| Place { node: NodeId(node), doorbell };
        assert_eq!(Place::of(2, Space::Memory, ecam(1).start), at(1, false));
        assert_eq!(Place::of(2, Space::Memory, ecam(2).start), at(0, false));
        assert_eq!(Place::of(2, Space::Memory, window(1).start), at(1, false));
        let doorbell = window(1).start + 3 * REGISTERS + DOORBELLS.start;
        assert_eq!(Place::of(2, Space::Memory, doorbell), at(1, true));
        assert_eq!(Place::of(0, Space::Memory, doorbell), at(0, false));
        assert_eq!(Place::of(2, Space::Port, 0x3f8), at(0, false));
        assert_eq!(Place::of(2, Space::Memory, firmware::addresses::IOAPIC_ADDR), at(0, false));
    }
}
