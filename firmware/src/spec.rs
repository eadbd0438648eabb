//! The machine as its owner describes it: nodes with CPUs and memory.

use serde::{Deserialize, Serialize};

/// One server's share of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// The operator's name for it, unique in the machine.
    pub name: String,
    /// vCPUs that run there; 0 for a memory-only node. Node 0 has at least one.
    pub cpus: u32,
    /// Guest memory whose home is there, in bytes: a multiple of 4096 and more than 0.
    pub memory: u64,
}

/// The whole machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// The nodes; their position is their node id and their NUMA node in the guest.
    pub nodes: Vec<NodeSpec>,
    /// SLIT distances, `distances[from][to]`: 10 on the diagonal, larger elsewhere. Empty: 10 and 20.
    pub distances: Vec<Vec<u8>>,
}
