//! A machine before anything of it runs: its file, the checks, the places of its devices, its keys, and the
//! messages that coordinator and nodes exchange over the control connection.
//!
//! ```text
//! machine.toml ── config::file ──┐
//!                                ├─> MachineConfig ── check ──> control::Machine ── control::wire ──> every node
//! flags of gestalt run ──────────┘
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`config`] | the machine as its owner asks for it, and the checks that need no host |
//! | [`config::file`] | machine files: TOML |
//! | [`config::devices`] | disks, network cards and the like: asked for, and placed |
//! | [`config::limits`] | what a device may do each second |
//! | [`config::rdma`] | which RDMA ports carry the fabric's frames |
//! | [`config::cloud_init`] | what cloud-init is told |
//! | [`keys`] | how coordinator and nodes know each other |
//! | [`control`] | what coordinator and node say to each other |
//! | [`control::wire`], [`control::join`] | the bytes of that, and the node's side of the connection |
//!
//! Nothing here needs KVM, a guest's memory or a device: a machine can be read, checked and talked about on
//! any host.

pub mod config;
pub mod control;
pub mod keys;
