//! What the guest finds at power-on: memory map, ACPI tables, CPUID policy and the loaded kernel.
//!
//! Pure functions from a [`MachineSpec`] to bytes; nothing here knows of KVM, threads or sockets.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod e820;
mod error;
pub mod layout;
pub mod spec;

pub use cpuid::CpuidEntry;
pub use error::FirmwareError;
pub use layout::{CpuPlace, Layout, RamRange};
pub use spec::{MachineSpec, NodeSpec};
