//! One node of a Gestalt machine, and the coordinator that holds the nodes together.

pub mod cli;
pub mod clock;
pub mod config;
pub mod coordinator;
pub mod devices;
pub mod doctor;
pub mod irq;
pub mod kvm;
pub mod machine_file;
pub mod node;
pub mod node_api;
pub mod node_msg;
pub mod router;
pub mod terminal;
pub mod vcpu;
