//! The machine as its owner describes it: nodes with CPUs and memory.

use crate::FirmwareError;
use crate::addresses::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// Most nodes one machine may have.
pub const MAX_NODES: usize = 512;

/// Least memory of node 0, in bytes: the kernel (up to 60 MiB unpacked, beside its packed copy), the
/// initrd and what the kernel allocates before it knows of the other nodes must all fit there.
pub const MIN_NODE0_MEMORY: u64 = 128 << 20;

/// Least memory of any node, in bytes: Linux ignores a NUMA node smaller than its `NODE_MIN_SIZE`.
pub const MIN_NODE_MEMORY: u64 = 4 << 20;

/// Most memory of the whole machine, in bytes: x86-64's 52 physical address bits, less room for MMIO.
pub const MAX_MEMORY: u64 = 1 << 51;

/// The largest APIC id a CPU may have. Interrupts that the I/O APIC or an MSI sends carry 8 bits of it,
/// 255 means "all", and Linux refuses CPUs that such an interrupt cannot reach unless the hypervisor
/// offers `KVM_FEATURE_MSI_EXT_DEST_ID` (Linux `try_to_enable_x2apic`).
pub const MAX_APIC_ID: u32 = 254;

/// The SLIT distance of a node to itself (ACPI 6.5, 5.2.17).
pub const LOCAL_DISTANCE: u8 = 10;

/// The SLIT distance between two nodes when the machine's description gives none.
pub const REMOTE_DISTANCE: u8 = 20;

/// One server's share of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// The operator's name for it, unique in the machine.
    pub name: String,
    /// vCPUs that run there; 0 for a memory-only node. Node 0 has at least one.
    pub cpus: u32,
    /// Guest memory whose home is there, in bytes: a multiple of 4096, at least [`MIN_NODE_MEMORY`]
    /// ([`MIN_NODE0_MEMORY`] on node 0).
    pub memory: u64,
}

/// The whole machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The nodes; their position is their node id and their NUMA node in the guest.
    pub nodes: Vec<NodeSpec>,
    /// SLIT distances, `distances[from][to]`: 10 on the diagonal, larger elsewhere. Empty: 10 and 20.
    pub distances: Vec<Vec<u8>>,
    /// Whether there is PCI: a root bus on each node ([`crate::pci`]).
    pub pci: bool,
}

impl MachineSpec {
    /// Whether such a machine can exist; [`FirmwareError::Spec`] says in one sentence what is wrong.
    pub fn check(&self) -> Result<(), FirmwareError> {
        let wrong = |why: String| Err(FirmwareError::Spec(why));
        if self.nodes.is_empty() {
            return wrong("the machine has no node: describe at least one, with CPUs and memory".into());
        }
        if self.nodes.len() > MAX_NODES {
            return wrong(format!(
                "the machine has {} nodes: at most {MAX_NODES} are possible",
                self.nodes.len()
            ));
        }
        let mut names = std::collections::HashMap::new();
        for (id, node) in self.nodes.iter().enumerate() {
            if node.name.is_empty() {
                return wrong(format!("node {id} has no name: give every node a name of its own"));
            }
            if let Some(other) = names.insert(node.name.as_str(), id) {
                return wrong(format!(
                    "nodes {other} and {id} are both named \"{}\": give every node a name of its own",
                    node.name
                ));
            }
        }
        self.check_memory()?;
        self.check_cpus()?;
        self.check_distances()
    }

    /// The distance from node `from` to node `to` as the SLIT shows it; both must be nodes of the
    /// machine, otherwise it is [`REMOTE_DISTANCE`].
    pub fn distance(&self, from: usize, to: usize) -> u8 {
        let given = self.distances.get(from).and_then(|row| row.get(to)).copied();
        given.unwrap_or(if from == to { LOCAL_DISTANCE } else { REMOTE_DISTANCE })
    }

    /// Low bits of an APIC id that number the CPUs within a node: enough for the largest one.
    pub(crate) fn apic_id_shift(&self) -> u32 {
        let largest = self.nodes.iter().map(|node| node.cpus).max().unwrap_or(0);
        u64::from(largest.max(1)).next_power_of_two().trailing_zeros()
    }

    fn check_memory(&self) -> Result<(), FirmwareError> {
        let wrong = |why: String| Err(FirmwareError::Spec(why));
        let mut total = 0u64;
        for (id, node) in self.nodes.iter().enumerate() {
            let name = &node.name;
            if node.memory == 0 {
                return wrong(format!("node \"{name}\" has no memory: every node must give some"));
            }
            if !node.memory.is_multiple_of(PAGE_SIZE) {
                return wrong(format!(
                    "node \"{name}\" has {} bytes of memory: make it a multiple of {PAGE_SIZE}, the page size",
                    node.memory
                ));
            }
            if id == 0 && node.memory < MIN_NODE0_MEMORY {
                return wrong(format!(
                    "node \"{name}\" has {}: node 0 needs at least {}, because the kernel and its initrd are loaded there",
                    mib(node.memory),
                    mib(MIN_NODE0_MEMORY)
                ));
            }
            if node.memory < MIN_NODE_MEMORY {
                return wrong(format!(
                    "node \"{name}\" has {}: give it at least {}, because Linux ignores smaller NUMA nodes",
                    mib(node.memory),
                    mib(MIN_NODE_MEMORY)
                ));
            }
            total = match total.checked_add(node.memory) {
                Some(sum) if sum <= MAX_MEMORY => sum,
                _ => {
                    return wrong(format!(
                        "the machine's memory exceeds {} TiB at node \"{name}\": x86-64 cannot address more",
                        MAX_MEMORY >> 40
                    ));
                }
            };
        }
        Ok(())
    }

    fn check_cpus(&self) -> Result<(), FirmwareError> {
        let wrong = |why: String| Err(FirmwareError::Spec(why));
        if self.nodes[0].cpus == 0 {
            return wrong(format!(
                "node \"{}\" has no CPU: node 0 starts the machine and needs at least one",
                self.nodes[0].name
            ));
        }
        let shift = self.apic_id_shift();
        for (id, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.cpus > 0) {
            let highest = ((id as u64) << shift) + u64::from(node.cpus) - 1;
            if highest > u64::from(MAX_APIC_ID) {
                return wrong(format!(
                    "node \"{}\" would need APIC id {highest}, and {MAX_APIC_ID} is the last that interrupts can \
                     reach: ids are given in blocks of {} per node, so use fewer nodes, fewer CPUs on the largest \
                     node, or put memory-only nodes last",
                    node.name,
                    1u64 << shift
                ));
            }
        }
        Ok(())
    }

    fn check_distances(&self) -> Result<(), FirmwareError> {
        let wrong = |why: String| Err(FirmwareError::Spec(why));
        if self.distances.is_empty() {
            return Ok(());
        }
        let nodes = self.nodes.len();
        if self.distances.len() != nodes || self.distances.iter().any(|row| row.len() != nodes) {
            return wrong(format!(
                "the distances are not {nodes} rows of {nodes}: give one row per node with one distance to each node"
            ));
        }
        for (from, row) in self.distances.iter().enumerate() {
            for (to, &distance) in row.iter().enumerate() {
                if from == to && distance != LOCAL_DISTANCE {
                    return wrong(format!(
                        "the distance of node {from} to itself is {distance}: it must be {LOCAL_DISTANCE}"
                    ));
                }
                // 255 means "unreachable" in a SLIT, which no node of one machine is.
                if from != to && (distance <= LOCAL_DISTANCE || distance == u8::MAX) {
                    return wrong(format!(
                        "the distance from node {from} to node {to} is {distance}: make it 11 to 254, where \
                         {LOCAL_DISTANCE} is a node's own memory"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Bytes as an operator reads them.
fn mib(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) {
        format!("{} MiB of memory", bytes >> 20)
    } else {
        format!("{bytes} bytes of memory")
    }
}
