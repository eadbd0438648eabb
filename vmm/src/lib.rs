//! One node of a Gestalt machine, and the coordinator that holds the nodes together.
//!
//! ```text
//! gestalt run ── cli ── coordinator ══ control connection ══ node_api ── node ── gestalt node
//!                                                                         │
//!                        vcpu threads ── kvm        irq ── router ══ lane 0 of the fabric
//!                             └── exits ──> devices ─────────┘       clock
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`], [`config`], [`machine_file`], [`rdma`] | the command line and what it describes |
//! | [`coordinator`], [`terminal`] | `gestalt run`: brings the nodes up and holds them to the end |
//! | [`operator`] | what `gestalt device` says to a running machine |
//! | [`node_api`] | what coordinator and node say to each other |
//! | [`node`] | one node, from its assignment to the machine's end: start reading here |
//! | [`keys`] | how coordinator and nodes know each other |
//! | [`doctor`] | whether a node can run on this host |
//! | [`kvm`] | KVM behind safe types |
//! | [`vcpu`] | one thread a vCPU |
//! | [`irq`] | local APIC and I/O APIC, pure state machines |
//! | [`router`], [`node_msg`] | interrupts and device accesses between nodes |
//! | [`devices`] | node 0's devices |
//! | [`pci`], [`virtio`] | each node's PCI bus and the devices on it: disks, network cards, consoles, a balloon |
//! | [`peripherals`], [`seed`] | these as the owner asks for them; what cloud-init is told |
//! | [`limits`] | what a device may do each second |
//! | [`clock`] | one time stamp counter for all nodes |
//!
//! `docs/architecture.md` follows one interrupt and one port access through these modules.

pub mod cli;
pub mod clock;
pub mod config;
pub mod coordinator;
pub mod devices;
pub mod doctor;
pub mod irq;
pub mod keys;
pub mod kvm;
pub mod limits;
pub mod machine_file;
pub mod node;
pub mod node_api;
pub mod node_msg;
pub mod operator;
pub mod pci;
pub mod peripherals;
pub mod rdma;
pub mod router;
pub mod seed;
pub mod terminal;
mod trace;
pub mod vcpu;
pub mod virtio;
