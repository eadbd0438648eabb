//! Requests for devices from the command line's text: `PATH,readonly,node=n1` and the like.

use std::path::PathBuf;

use super::{DeviceRequest, RequestedKind};
use crate::config::units::parse_size;
use crate::config::{ConfigError, limits, wrong};

/// Six bytes from `02:00:00:00:00:07`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_mac(text: &str) -> Result<[u8; 6], ConfigError> {
    let byte = |part: &str| (part.len() <= 2).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| {
        ConfigError(format!("{text:?} is not a network card's address: write for example 02:00:00:00:00:07"))
    })
}

/// A network card from `tap=NAME[,mac=ADDRESS][,queues=NUMBER]` and what all devices have: `node=`, `name=`,
/// `share=`, `iops=`, `bandwidth=`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_net(text: &str) -> Result<DeviceRequest, ConfigError> {
    let (mut tap, mut mac, mut queues) = (None, None, None);
    let mut device = DeviceRequest::new(None, RequestedKind::Entropy);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) => tap = Some(name.to_owned()),
            Some(("mac", address)) => mac = Some(parse_mac(address)?),
            Some(("queues", count)) => queues = Some(number(count)?),
            Some((key, value)) if set(&mut device, key, value)? => {}
            _ => return wrong(format!("a network card has no {part:?}: write for example tap=tap0,node=n1")),
        }
    }
    match tap {
        Some(tap) => Ok(DeviceRequest { kind: RequestedKind::Net { tap, mac, queues }, ..device }),
        None => wrong(format!("{text:?} names no interface: write for example tap=tap0,node=n1")),
    }
}

/// A disk from `PATH[,readonly][,unlocked][,serial=TEXT][,queues=NUMBER]` and what all devices have: `node=`,
/// `name=`, `share=`, `iops=`, `bandwidth=`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_disk(text: &str) -> Result<DeviceRequest, ConfigError> {
    let mut parts = text.split(',');
    let path = PathBuf::from(parts.next().unwrap_or_default());
    let (mut readonly, mut unlocked, mut serial, mut queues) = (false, false, None, None);
    let mut device = DeviceRequest::new(None, RequestedKind::Entropy);
    for part in parts {
        match part.split_once('=') {
            None if part == "readonly" => readonly = true,
            None if part == "unlocked" => unlocked = true,
            Some(("serial", text)) => serial = Some(text.to_owned()),
            Some(("queues", count)) => queues = Some(number(count)?),
            Some((key, value)) if set(&mut device, key, value)? => {}
            _ => {
                return wrong(format!("a disk has no {part:?}: write for example root.img,node=n1,readonly"));
            }
        }
    }
    Ok(DeviceRequest { kind: RequestedKind::Disk { path, readonly, unlocked, serial, queues }, ..device })
}

/// A console from `SOCKET[,node=NAME]`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_console(text: &str) -> Result<DeviceRequest, ConfigError> {
    let (socket, node) = socket_and_node("console", text)?;
    Ok(DeviceRequest::new(node, RequestedKind::Console { socket, name: None }))
}

/// A channel from `NAME=SOCKET[,node=NAME]`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_channel(text: &str) -> Result<DeviceRequest, ConfigError> {
    let Some((name, rest)) = text.split_once('=') else {
        return wrong(format!(
            "{text:?} is no channel: write for example org.qemu.guest_agent.0=/run/agent.sock"
        ));
    };
    let (socket, node) = socket_and_node("channel", rest)?;
    Ok(DeviceRequest::new(node, RequestedKind::Console { socket, name: Some(name.into()) }))
}

fn socket_and_node(what: &str, text: &str) -> Result<(PathBuf, Option<String>), ConfigError> {
    let mut parts = text.split(',');
    let (socket, mut node) = (PathBuf::from(parts.next().unwrap_or_default()), None);
    for part in parts {
        match part.split_once('=') {
            Some(("node", name)) => node = Some(name.to_owned()),
            _ => {
                return wrong(format!("a {what} has no {part:?}: write for example /run/guest.sock,node=n1"));
            }
        }
    }
    Ok((socket, node))
}

/// A balloon from `[SIZE][,node=NAME]`, the size as for memory; 0 if there is none.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_balloon(text: &str) -> Result<DeviceRequest, ConfigError> {
    let (mut size, mut node) = (0, None);
    for part in text.split(',').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            None => size = parse_size(part)?,
            Some(("node", name)) => node = Some(name.to_owned()),
            _ => return wrong(format!("a balloon has no {part:?}: write for example 512M,node=n1")),
        }
    }
    Ok(DeviceRequest::new(node, RequestedKind::Balloon { size }))
}

fn number(text: &str) -> Result<u16, ConfigError> {
    text.parse().map_err(|_| ConfigError(format!("{text:?} is not a number of queues")))
}

/// Takes an option that all devices have: `node`, `name`, `share`, `iops`, `bandwidth`; `false` if `key` is
/// another.
fn set(device: &mut DeviceRequest, key: &str, value: &str) -> Result<bool, ConfigError> {
    match key {
        "node" => device.node = Some(value.to_owned()),
        "name" => device.name = Some(value.to_owned()),
        "share" => device.share = limits::parse_share(value)?,
        _ => return device.limits.set(key, value),
    }
    Ok(true)
}
