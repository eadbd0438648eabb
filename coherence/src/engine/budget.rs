//! The memory budget of a node, in bytes, and how many copies of other nodes' pages it leaves room for.
//!
//! ```text
//!  budget │ this node's own memory, whole: what comes home always finds its frame
//!         │ the home's directory and rights, and the kernel's tables for both views
//!         │ copies: a frame each, what the protocol and the kernel keep for it
//! ```
//!
//! The kernel's tables for copies are counted as if a quarter of the places in them were used. Copies that
//! lie further apart take more of it: three pages of tables for each 2 MiB of the guest that was ever touched
//! here, at most 0.6 % of the guest's memory.

use fabric::NodeId;

use super::EngineError;
use crate::page::{Homes, PAGE_SIZE};

/// For a page at home: eight bytes in each of two page tables and KVM's, nine in the file's index
/// (`struct xa_node`, 576 bytes for 64 pages), nine for its directory entry and its rights.
const HOME: u64 = 3 * 8 + 9 + 9;

/// For a copy: the kernel's tables, four times as much as if they were full, and its share of the tree of
/// rights.
const COPY: u64 = 4 * (3 * 8 + 9) + 40;

/// Fewer copies than this a shard would spend its time on fetching them.
const LEAST: u64 = 64;

/// Whether a node can work with such a budget, of so many bytes.
///
/// # Errors
/// A sentence that says how large it must be.
pub fn check_budget(budget: u64, homes: &Homes, node: NodeId, shards: u16) -> Result<(), EngineError> {
    copies_of_shard(budget, homes, node, shards).map(drop)
}

/// The budget that leaves room for so many pages of other nodes' memory at a node, in bytes.
pub fn budget_for(copies: u64, homes: &Homes, node: NodeId) -> u64 {
    let range = homes.range(node);
    (range.end - range.start) * (PAGE_SIZE as u64 + HOME) + copies * (PAGE_SIZE as u64 + COPY)
}

/// How many pages of other nodes' memory each of the shards may have here.
///
/// # Errors
/// A sentence that says how large the budget must be.
pub fn copies_of_shard(budget: u64, homes: &Homes, node: NodeId, shards: u16) -> Result<usize, EngineError> {
    let range = homes.range(node);
    let page = PAGE_SIZE as u64;
    let home = budget_for(0, homes, node);
    let shards = u64::from(shards.max(1));
    let least = budget_for(shards * LEAST, homes, node);
    if budget < least {
        return Err(EngineError::Setup(format!(
            "the memory budget of this node, {} MiB, is too small for its {} MiB of the guest's memory and some \
             copies of the others': make it at least {} MiB",
            budget >> 20,
            ((range.end - range.start) * page) >> 20,
            least.div_ceil(1 << 20),
        )));
    }
    Ok(((budget - home) / (page + COPY) / shards) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_a_nodes_own_memory_leaves_is_for_copies() {
        let homes = Homes::new([512, 256].map(|mib| mib * MIB / 4096));
        let copies = |budget: u64, node, shards| copies_of_shard(budget * MIB, &homes, NodeId(node), shards);
        // 512 MiB at home with 5.25 MiB for them; 50.75 MiB of 4268 bytes each.
        assert_eq!(copies(568, 0, 1).unwrap(), 12468);
        assert_eq!(copies(568, 0, 2).unwrap(), 6234);
        assert_eq!(copies(568, 1, 1).unwrap(), 76008);
    }

    #[test]
    fn a_budget_without_room_for_copies_is_refused_with_the_least_that_will_do() {
        let homes = Homes::new([512, 256].map(|mib| mib * MIB / 4096));
        let why = copies_of_shard(512 * MIB, &homes, NodeId(0), 4).unwrap_err().to_string();
        assert!(why.contains("512 MiB, is too small") && why.ends_with("at least 519 MiB"), "{why}");
        assert!(copies_of_shard(519 * MIB, &homes, NodeId(0), 4).is_ok());
    }
}
