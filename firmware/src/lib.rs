//! What the guest finds at power-on: memory map, ACPI tables, CPUID policy and the loaded kernel.
//!
//! Pure functions from a [`MachineSpec`] to bytes; nothing here knows of KVM, threads or sockets.

mod error;
mod spec;

pub use error::FirmwareError;
pub use spec::{MachineSpec, NodeSpec};
