//! The machine as its guest finds it at power-on: memory map, ACPI tables, CPUID and the loaded kernel.
//!
//! Pure functions from a [`MachineSpec`] to bytes; nothing here knows of KVM, threads or sockets. The only
//! files read are the kernel and the initrd, or the disk image that holds them.
//!
//! The way of a machine from its description to its first instruction:
//!
//! ```text
//! MachineSpec --acpi::size_bound--> Layout +--> KVM's memory slots, homes, vCPU table
//!                          |               |
//!                          +--acpi::build--+
//!                          |               v
//! kernel, initrd ----------+--boot::load--> guest memory, BspRegisters of vCPU 0
//!                          |
//! each node's CPUID --cpuid::intersect--> base --cpuid::for_vcpu--> each vCPU's CPUID
//! ```
//!
//! - [`spec`]: the description, and the check of it.
//! - [`addresses`]: addresses, ports and interrupt lines that are the same in every machine.
//! - [`layout`]: guest physical addresses, homes, APIC ids.
//! - [`e820`]: the memory map as the kernel reads it.
//! - [`acpi`]: CPUs, interrupt controllers, NUMA, power-off.
//! - [`cpuid`]: the common abilities of many hosts' CPUs, without those that such a machine must not offer.
//! - [`pci`]: the PCI address map: one root bus per node.
//! - [`disk`]: the kernel inside a disk image.
//! - [`seed`]: the disk that cloud-init reads at the first start.
//! - [`boot`]: the kernel in memory, and the registers that start it.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod addresses;
pub mod boot;
pub mod cpuid;
pub mod disk;
pub mod e820;
mod error;
pub mod layout;
pub mod pci;
pub mod seed;
pub mod spec;

pub use cpuid::CpuidEntry;
pub use error::FirmwareError;
pub use layout::{CpuPlace, Layout, RamRange};
pub use spec::{MachineSpec, NodeSpec};
