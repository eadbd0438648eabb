//! The place of a device: its node, its slot, its name, and what its owner left open.

use firmware::pci::MAX_BUSES;

use super::check::{check, check_share};
use super::{DeviceRequest, PlacedDevice, PlacedKind, RequestedKind, SERIAL_LEN};
use crate::config::cloud_init::fnv;
use crate::config::limits::DEFAULT_SHARE;
use crate::config::units::check_word;
use crate::config::{ConfigError, MachineConfig, wrong};

/// Slots of one node's bus that devices can have; the last one is kept for the function that tells a kernel
/// built for aggregated machines what it runs on.
const SLOTS: usize = 31;
/// Longest name of a device: as long as a disk's serial number can be.
const MAX_DEVICE_NAME: usize = SERIAL_LEN;
/// Queues of a device if nothing is said, at most: one for each CPU of the machine.
const DEFAULT_QUEUES: u16 = 16;

/// Gives every device of a machine its place: slots in the order in which they are asked for.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn place(machine: &MachineConfig) -> Result<Vec<PlacedDevice>, ConfigError> {
    let mut placed = Vec::with_capacity(machine.devices.len());
    for device in &machine.devices {
        let chosen = machine.devices.iter().filter_map(|other| other.name.as_deref());
        let next = place_next(machine, device, &placed, SLOTS, chosen)?;
        placed.push(next);
    }
    Ok(placed)
}

/// Gives one more device a place beside those in `taken`: a slot below `slots`, and a name that is neither
/// theirs nor, unless it is its own, one of `chosen`.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn place_next<'a>(
    machine: &MachineConfig,
    device: &DeviceRequest,
    taken: &[PlacedDevice],
    slots: usize,
    chosen: impl Iterator<Item = &'a str> + Clone,
) -> Result<PlacedDevice, ConfigError> {
    let node = match &device.node {
        None => 0,
        Some(name) => machine.node_named(name).ok_or_else(|| {
            ConfigError(format!("a device is to be on node {name:?}, which the machine does not have"))
        })?,
    };
    if node >= MAX_BUSES {
        return wrong(format!("node {node} cannot have devices: only the first {MAX_BUSES} can"));
    }
    let free =
        |slot: &usize| !taken.iter().any(|o| usize::from(o.node) == node && usize::from(o.slot) == *slot);
    let Some(slot) = (0..slots).find(free) else {
        return wrong(format!(
            "node {node} has no room for more than {slots} devices: put some on other nodes"
        ));
    };
    let name = name(device, taken, chosen)?;
    let kind = complete(machine, &name, device.kind.clone());
    let is_balloon = |kind: &PlacedKind| matches!(kind, PlacedKind::Balloon { .. });
    if is_balloon(&kind) && taken.iter().any(|other| is_balloon(&other.kind)) {
        return wrong("a machine has one balloon at most: it is for the memory of all nodes");
    }
    check(&kind)?;
    device.limits.check()?;
    if let Some(share) = device.share {
        check_share(machine, node, &kind, share)?;
    }
    let share = device.share.unwrap_or(DEFAULT_SHARE);
    Ok(PlacedDevice { name, node: node as u16, slot: slot as u8, limits: device.limits, share, kind })
}

/// The name that a device was given, or the next free one of its kind.
fn name<'a>(
    device: &DeviceRequest,
    taken: &[PlacedDevice],
    chosen: impl Iterator<Item = &'a str> + Clone,
) -> Result<String, ConfigError> {
    let word = device.kind.word();
    match &device.name {
        Some(name) => {
            check_word("a device's", name, MAX_DEVICE_NAME)?;
            if taken.iter().any(|other| other.name == *name) {
                return wrong(format!(
                    "there is a device {name} already: give every device a name of its own"
                ));
            }
            Ok(name.clone())
        }
        None => {
            let first = taken.iter().filter(|other| other.kind.word() == word).count();
            let used = |name: &String| {
                taken.iter().any(|other| other.name == *name) || chosen.clone().any(|other| other == name)
            };
            // There are fewer devices than numbers.
            let mut names = (first..).map(|number| format!("{word}{number}"));
            Ok(names.find(|name| !used(name)).unwrap_or_else(|| word.into()))
        }
    }
}

/// The device called `name` with all that was left open.
fn complete(machine: &MachineConfig, name: &str, kind: RequestedKind) -> PlacedKind {
    match kind {
        RequestedKind::Disk { path, readonly, unlocked, serial, queues } => PlacedKind::Disk {
            path,
            readonly,
            unlocked,
            serial: serial.unwrap_or_else(|| name.to_owned()),
            queues: queues.unwrap_or_else(|| default_queues(machine)),
        },
        RequestedKind::Net { tap, mac, queues } => PlacedKind::Net {
            tap,
            mac: mac.unwrap_or_else(|| address(&machine.name, name)),
            queues: queues.unwrap_or(1),
        },
        RequestedKind::Seed { user_data, meta_data, network_config } => {
            PlacedKind::Seed { user_data, meta_data, network_config }
        }
        RequestedKind::Entropy => PlacedKind::Entropy,
        RequestedKind::Console { socket, name: None } => PlacedKind::Console { socket },
        RequestedKind::Console { socket, name: Some(name) } => PlacedKind::Channel { socket, name },
        RequestedKind::Balloon { size } => PlacedKind::Balloon { size },
    }
}

/// A queue for each CPU of the machine, as long as there are enough.
fn default_queues(machine: &MachineConfig) -> u16 {
    let cpus: u32 = machine.nodes.iter().map(|node| node.spec.cpus).sum();
    u16::try_from(cpus).unwrap_or(u16::MAX).clamp(1, DEFAULT_QUEUES)
}

/// An address that stays the same from run to run: locally administered, the rest a hash (FNV-1a) of the
/// names.
fn address(machine: &str, device: &str) -> [u8; 6] {
    let names = [machine, device].join("/");
    let hash = fnv(&[names.as_bytes()]).to_le_bytes();
    [0x02, hash[3], hash[4], hash[5], hash[6], hash[7]]
}
