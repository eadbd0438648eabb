//! What the guest finds at power-on: memory map, ACPI tables, CPUID and the loaded kernel.
//!
//! Pure functions from a [`MachineSpec`] to bytes; nothing here knows of KVM, threads or sockets. The only
//! files read are the kernel and the initrd, or the disk image that holds them.
//!
//! The way of a machine from its description to its first instruction:
//!
//! ```text
//! MachineSpec --check--> Layout -----------+--> KVM's memory slots, homes, vCPU table
//!                          |               |
//!                          +--acpi::build--+
//!                          |               v
//! kernel, initrd ----------+--boot::load--> guest memory, BspRegisters of vCPU 0
//!                          |
//! each node's CPUID --cpuid::intersect--> base --cpuid::for_vcpu--> each vCPU's CPUID
//! ```
//!
//! - [`spec`]: the description and what can be wrong with it.
//! - [`layout`]: guest physical addresses, homes, APIC ids, and the addresses and ports of legacy devices.
//! - [`e820`]: the memory map as the kernel reads it.
//! - [`acpi`]: CPUs, interrupt controllers, NUMA, power-off.
//! - [`cpuid`]: what CPUs of many hosts have in common, and what such a machine must not offer.
//! - [`pci`]: where PCI is: one root bus per node.
//! - [`disk`]: the kernel inside a disk image.
//! - [`seed`]: what cloud-init reads at the first start.
//! - [`boot`]: the kernel in memory, and the registers that start it.

pub mod acpi;
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
