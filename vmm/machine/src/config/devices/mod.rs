//! Disks, network cards and the like: what the owner asks for, and where each of them goes.
//!
//! ```text
//!  --disk root.img,node=n1    [[disk]] in a machine file    gestalt device add
//!        └── parse ──────────────────┴──────────────────────────────┘
//!                 DeviceRequest ── place, check ──> PlacedDevice ──> the node that builds it
//! ```
//!
//! | file | concept |
//! |---|---|
//! | this one | a device as it is asked for, and in its place |
//! | [`parse`] | requests from the command line's text |
//! | `place` | a request gets its node, slot and name, and all that its owner left open |
//! | `check` | whether such a device can be |
//!
//! A request may leave things open: a serial number, an address, how many queues. A placed device has all of
//! them, so whoever builds it has nothing to choose. A device's name is what its owner calls it by while the
//! machine runs. A disk's serial number and a card's address follow from the name unless they are given, so
//! that they stay the same wherever a device of that name is added.

mod check;
pub mod parse;
mod place;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(in crate::config) use self::check::check_share;
pub use self::parse::{parse_balloon, parse_channel, parse_console, parse_disk, parse_mac, parse_net};
pub(in crate::config) use self::place::{place, place_next};
use crate::config::limits::Limits;

/// The most queues of a disk.
pub const MAX_DISK_QUEUES: u16 = 64;
/// Bytes of a disk's serial number (virtio 1.3, 5.2.6).
pub const SERIAL_LEN: usize = 20;
/// The most pairs of queues of a network card.
pub const MAX_QUEUE_PAIRS: u16 = 32;
/// The longest name of a network interface on the host, in bytes (`IFNAMSIZ - 1`).
pub const MAX_TAP_NAME: usize = 15;
/// The longest name of a channel, in bytes.
pub const MAX_CHANNEL_NAME: usize = 64;

/// A device as its owner asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRequest {
    /// The name of its node; `None`: node 0.
    pub node: Option<String>,
    /// Its own name. Default: `disk0`, `net0` and so on.
    pub name: Option<String>,
    /// What it may do each second.
    pub limits: Limits,
    /// Its share of what the devices of its node may do; `None`: the usual one.
    pub share: Option<u32>,
    /// What it is.
    pub kind: RequestedKind,
}

impl DeviceRequest {
    /// A device of node `node` with the default name and no limits.
    pub fn new(node: Option<String>, kind: RequestedKind) -> DeviceRequest {
        DeviceRequest { node, name: None, limits: Limits::default(), share: None, kind }
    }
}

/// What a device is, as far as its owner says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RequestedKind {
    /// A disk.
    Disk {
        /// A raw image or a block device, on its node's host.
        path: PathBuf,
        /// The guest may not write to it.
        readonly: bool,
        /// It is used even where its file system has no locks: nothing keeps others from writing it as well.
        unlocked: bool,
        /// What the guest reads as its serial number. Default: the device's name.
        serial: Option<String>,
        /// Queues. Default: one for each CPU, 16 at most.
        queues: Option<u16>,
    },
    /// A network card.
    Net {
        /// A TAP interface of its node's host.
        tap: String,
        /// Its address. Default: made from the names of machine and device.
        mac: Option<[u8; 6]>,
        /// Pairs of queues. Default: 1.
        queues: Option<u16>,
    },
    /// A small disk from which cloud-init learns what the guest is to be: [`crate::config::cloud_init`].
    Seed {
        /// The file `user-data`.
        user_data: String,
        /// The file `meta-data`.
        meta_data: String,
        /// The file `network-config`, if there is one.
        network_config: Option<String>,
    },
    /// A source of random numbers.
    Entropy,
    /// A second console, at a Unix socket of its node's host; or, with a name, a channel to a program there.
    Console {
        /// The socket.
        socket: PathBuf,
        /// The channel's name in the guest.
        name: Option<String>,
    },
    /// Takes back memory that the guest does not use.
    Balloon {
        /// Bytes that it takes from the guest even if they are used, as far as the guest can do without.
        size: u64,
    },
}

/// A device in its place, with nothing left open. The same at every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedDevice {
    /// Its name, which no other has.
    pub name: String,
    /// Its node's index, which is its bus.
    pub node: u16,
    /// Its slot there.
    pub slot: u8,
    /// What it may do each second.
    pub limits: Limits,
    /// Its share of what the devices of its node may do.
    pub share: u32,
    /// What it is.
    pub kind: PlacedKind,
}

/// What a placed device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlacedKind {
    /// A disk.
    Disk {
        /// A raw image or a block device, on its node's host.
        path: PathBuf,
        /// The guest may not write to it.
        readonly: bool,
        /// It is used even where its file system has no locks: nothing keeps others from writing it as well.
        unlocked: bool,
        /// What the guest reads as its serial number, `1..=SERIAL_LEN` bytes.
        serial: String,
        /// Queues, `1..=MAX_DISK_QUEUES`.
        queues: u16,
    },
    /// A network card.
    Net {
        /// A TAP interface of its node's host.
        tap: String,
        /// Its address.
        mac: [u8; 6],
        /// Pairs of queues, `1..=MAX_QUEUE_PAIRS`.
        queues: u16,
    },
    /// A small disk for cloud-init.
    Seed {
        /// The file `user-data`.
        user_data: String,
        /// The file `meta-data`.
        meta_data: String,
        /// The file `network-config`; cloud-init does without if there is none.
        network_config: Option<String>,
    },
    /// A source of random numbers.
    Entropy,
    /// A second console at a Unix socket of its node's host, which it makes.
    Console {
        /// The socket.
        socket: PathBuf,
    },
    /// A channel from programs in the guest to a Unix socket of its node's host, which it makes.
    Channel {
        /// The socket.
        socket: PathBuf,
        /// The channel's name in the guest.
        name: String,
    },
    /// Takes back memory that the guest does not use.
    Balloon {
        /// Bytes that it takes from the guest even if they are used, as far as the guest can do without.
        size: u64,
    },
}

impl PlacedKind {
    /// How its kind is called, which is what devices without names are named after.
    pub fn word(&self) -> &'static str {
        match self {
            PlacedKind::Disk { .. } => "disk",
            PlacedKind::Net { .. } => "net",
            PlacedKind::Seed { .. } => "seed",
            PlacedKind::Entropy => "entropy",
            PlacedKind::Console { .. } => "console",
            PlacedKind::Channel { .. } => "channel",
            PlacedKind::Balloon { .. } => "balloon",
        }
    }
}

impl RequestedKind {
    /// How its kind is called: [`PlacedKind::word`] of what it will be.
    pub fn word(&self) -> &'static str {
        match self {
            RequestedKind::Disk { .. } => "disk",
            RequestedKind::Net { .. } => "net",
            RequestedKind::Seed { .. } => "seed",
            RequestedKind::Entropy => "entropy",
            RequestedKind::Console { name: None, .. } => "console",
            RequestedKind::Console { .. } => "channel",
            RequestedKind::Balloon { .. } => "balloon",
        }
    }
}
