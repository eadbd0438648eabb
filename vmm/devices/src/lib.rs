//! The devices of a machine: interrupt controllers, what every PC has, PCI and virtio. Nothing here knows KVM
//! or which node a CPU is on: interrupts, output and power events leave through closures that the node gives.
//!
//! ```text
//! guest writes a doorbell ─> pci::RootBus ─> virtio::Transport ─ bell ─> a queue's thread ─ I/O ─┐
//! guest's CPU <─ the node's router <─ irq::Message <─ MSI-X vector <── used ring <───────────────┘
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`irq`] | local APIC and I/O APIC, pure state machines |
//! | [`platform`] | node 0's devices: console, clock, power, hot plug, and the buses they sit on |
//! | [`pci`] | each node's PCI bus |
//! | [`virtio`] | the devices on it: disks, network cards, consoles, a balloon |
//! | [`rate_limit`] | how a device is held to what it may do each second |

pub mod irq;
pub mod pci;
pub mod platform;
pub mod rate_limit;
pub mod virtio;
