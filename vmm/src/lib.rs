//! One node of a Gestalt machine, and the coordinator that holds the nodes together.

pub mod irq;
pub mod node_api;
