//! The checks of a device, as far as they can be made without its host.

use super::{MAX_CHANNEL_NAME, MAX_DISK_QUEUES, MAX_QUEUE_PAIRS, MAX_TAP_NAME, PlacedKind, SERIAL_LEN};
use crate::config::limits::{self, Limits};
use crate::config::{ConfigError, MachineConfig, wrong};

/// Finds what is wrong with a device of this kind.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn check(kind: &PlacedKind) -> Result<(), ConfigError> {
    let graphic = |text: &str, most: usize| {
        (1..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match kind {
        PlacedKind::Disk { path, .. } if path.as_os_str().is_empty() => {
            wrong("a disk has no file: name an image or a block device")
        }
        PlacedKind::Disk { serial, .. } if !graphic(serial, SERIAL_LEN) => wrong(format!(
            "{serial:?} cannot be a disk's serial number: use 1 to {SERIAL_LEN} letters, digits and signs"
        )),
        PlacedKind::Disk { queues, .. } => check_queues(*queues, MAX_DISK_QUEUES),
        PlacedKind::Net { tap, mac, queues } => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            if tap.is_empty() || tap.len() > MAX_TAP_NAME || !tap.bytes().all(plain) {
                return wrong(format!(
                    "{tap:?} cannot be a TAP interface: use 1 to {MAX_TAP_NAME} letters, digits, '.', '_' and '-'"
                ));
            }
            if mac[0] & 1 != 0 {
                return wrong("a network card's address must not be a group's: its first byte must be even");
            }
            check_queues(*queues, MAX_QUEUE_PAIRS)
        }
        PlacedKind::Console { socket } | PlacedKind::Channel { socket, .. }
            if socket.as_os_str().is_empty() =>
        {
            wrong("a console or channel has no socket: name one, such as /run/guest.sock")
        }
        PlacedKind::Channel { name, .. } if !graphic(name, MAX_CHANNEL_NAME) => wrong(format!(
            "{name:?} cannot be a channel's name: use 1 to {MAX_CHANNEL_NAME} letters, digits and signs, as in \
             org.qemu.guest_agent.0"
        )),
        _ => Ok(()),
    }
}

fn check_queues(queues: u16, most: u16) -> Result<(), ConfigError> {
    if (1..=most).contains(&queues) {
        return Ok(());
    }
    wrong(format!("{queues} queues are not possible: choose 1 to {most}"))
}

/// Finds what is wrong with such a share, given to a device of node `node`.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn check_share(
    machine: &MachineConfig,
    node: usize,
    kind: &PlacedKind,
    share: u32,
) -> Result<(), ConfigError> {
    limits::check_share(share)?;
    let Some(node) = machine.nodes.get(node) else { return Ok(()) };
    let (rates, what, key) = match kind {
        PlacedKind::Net { .. } => (node.capacity.cards, "network cards", "net_bandwidth"),
        _ => (node.capacity.disks, "disks", "disk_bandwidth"),
    };
    if rates == Limits::default() {
        return wrong(format!(
            "a share says which part of what the {what} of node {} may do, and nothing limits that: give the node \
             {key} in the machine file",
            node.spec.name
        ));
    }
    Ok(())
}
