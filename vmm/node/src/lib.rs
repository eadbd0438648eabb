//! One node of a Gestalt machine: KVM, the vCPUs, the clock, and the way of interrupts and device accesses
//! between nodes.
//!
//! ```text
//! coordinator ══ control connection ══ node
//!                                       │
//!        vcpu threads ── kvm     irq ── router ══ lane 0 of the fabric
//!             └── exits ──> devices ──────┘       clock
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`node`] | one node, from its assignment to the machine's end: start reading here |
//! | [`kvm`] | KVM behind safe types |
//! | [`vcpu`] | one thread a vCPU |
//! | [`instruction`] | what one instruction does, so that it can be carried out on another node |
//! | [`router`], [`node_msg`] | interrupts and device accesses between nodes |
//! | [`disk_search`] | what a disk boots, found by a child process that can do nothing else |
//! | [`clock`] | one time stamp counter for all nodes |
//! | `testing` | what micro guests of tests and benches share (feature `testing`) |
//!
//! What a machine is comes from the crate `machine`, its devices from `devices`, its memory from `coherence`.
//! `docs/architecture.md` follows one interrupt and one port access through these modules.

pub mod clock;
pub mod disk_search;
pub mod instruction;
pub mod kvm;
pub mod node;
pub mod node_msg;
pub mod router;
#[cfg(feature = "testing")]
pub mod testing;
mod trace;
pub mod vcpu;
