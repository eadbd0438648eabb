//! Disks, network cards and the like: what the owner asks for, and where each of them goes.
//!
//! ```text
//!  --disk root.img,node=n1      [[disk]] in a machine file
//!            └────────> PeripheralConfig (a node's name) ── place ──> Peripheral (node and slot) ──> that node builds it
//! ```
//!
//! A device's name is what its owner calls it by while the machine runs. A disk's serial number and a card's address
//! follow from the name unless they are given, so that they stay the same wherever a device of that name is added.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::cloud_init::fnv;
use crate::config::limits::{self, Limits};
use crate::config::{ConfigError, MachineConfig, check_word, parse_size};

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
/// Slots of one node's bus that devices can have; the last one is kept for the function that tells a kernel built for
/// aggregated machines what it runs on.
const SLOTS: usize = 31;
/// Longest name of a device: as long as a disk's serial number can be.
const MAX_DEVICE_NAME: usize = SERIAL_LEN;
/// Queues of a device if nothing is said, at most: one for each CPU of the machine.
const DEFAULT_QUEUES: u16 = 16;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A disk.
    Disk {
        /// A raw image or a block device, on its node's host.
        path: PathBuf,
        /// The guest may not write to it.
        readonly: bool,
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

impl Kind {
    /// How its kind is called, which is what devices without names are named after.
    pub fn word(&self) -> &'static str {
        match self {
            Kind::Disk { .. } => "disk",
            Kind::Net { .. } => "net",
            Kind::Seed { .. } => "seed",
            Kind::Entropy => "entropy",
            Kind::Console { name: None, .. } => "console",
            Kind::Console { .. } => "channel",
            Kind::Balloon { .. } => "balloon",
        }
    }
}

/// A device as its owner asks for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeripheralConfig {
    /// The name of its node; `None`: node 0.
    pub node: Option<String>,
    /// Its own name. Default: `disk0`, `net0` and so on.
    pub name: Option<String>,
    /// What it may do each second.
    pub limits: Limits,
    /// Its share of what the devices of its node may do; `None`: the usual one.
    pub share: Option<u32>,
    /// What it is.
    pub kind: Kind,
}

impl PeripheralConfig {
    /// A device of node `node` with the default name and no limits.
    pub fn new(node: Option<String>, kind: Kind) -> PeripheralConfig {
        PeripheralConfig { node, name: None, limits: Limits::default(), share: None, kind }
    }

    /// Takes an option that all devices have: `node`, `name`, `share`, `iops`, `bandwidth`; `false` if `key` is another.
    fn set(&mut self, key: &str, value: &str) -> Result<bool, ConfigError> {
        match key {
            "node" => self.node = Some(value.to_owned()),
            "name" => self.name = Some(value.to_owned()),
            "share" => self.share = limits::parse_share(value)?,
            _ => return self.limits.set(key, value),
        }
        Ok(true)
    }
}

/// A device in its place, with nothing left open. The same at every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peripheral {
    /// Its name, which no other has.
    pub name: String,
    /// Its node's index, which is its bus.
    pub node: u16,
    /// Its slot there.
    pub slot: u8,
    /// What it may do each second.
    pub limits: Limits,
    /// Its share of what the devices of its node may do; `None`: the usual one.
    pub share: Option<u32>,
    /// What it is.
    pub kind: Kind,
}

/// Gives every device of a machine its place: slots in the order in which they are asked for.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn place(machine: &MachineConfig) -> Result<Vec<Peripheral>, ConfigError> {
    let mut placed = Vec::with_capacity(machine.devices.len());
    for device in &machine.devices {
        let chosen = machine.devices.iter().filter_map(|other| other.name.as_deref());
        let next = place_next(machine, device, &placed, SLOTS, chosen)?;
        placed.push(next);
    }
    Ok(placed)
}

/// Gives one more device a place beside those in `taken`: a slot below `slots`, and a name that is neither theirs nor,
/// unless it is its own, one of `chosen`.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn place_next<'a>(
    machine: &MachineConfig,
    device: &PeripheralConfig,
    taken: &[Peripheral],
    slots: usize,
    chosen: impl Iterator<Item = &'a str> + Clone,
) -> Result<Peripheral, ConfigError> {
    let node = match &device.node {
        None => 0,
        Some(name) => machine.node_named(name).ok_or_else(|| {
            ConfigError(format!("a device is to be on node {name:?}, which the machine does not have"))
        })?,
    };
    if node >= firmware::pci::MAX_BUSES {
        return wrong(format!(
            "node {node} cannot have devices: only the first {} can",
            firmware::pci::MAX_BUSES
        ));
    }
    let free =
        |slot: &usize| !taken.iter().any(|o| usize::from(o.node) == node && usize::from(o.slot) == *slot);
    let Some(slot) = (0..slots).find(free) else {
        return wrong(format!(
            "node {node} has no room for more than {slots} devices: put some on other nodes"
        ));
    };
    let name = name(device, taken, chosen)?;
    let mut kind = device.kind.clone();
    match &mut kind {
        Kind::Disk { serial, queues, path, .. } => {
            serial.get_or_insert_with(|| name.clone());
            queues.get_or_insert_with(|| default_queues(machine));
            if path.as_os_str().is_empty() {
                return wrong("a disk has no file: name an image or a block device");
            }
        }
        Kind::Net { mac, queues, .. } => {
            mac.get_or_insert_with(|| address(&machine.name, &name));
            queues.get_or_insert(1);
        }
        _ => {}
    }
    let is_balloon = |kind: &Kind| matches!(kind, Kind::Balloon { .. });
    if is_balloon(&kind) && taken.iter().any(|other| is_balloon(&other.kind)) {
        return wrong("a machine has one balloon at most: it is for the memory of all nodes");
    }
    check(&kind)?;
    device.limits.check()?;
    check_share(machine, node, &kind, device.share)?;
    let (node, slot) = (node as u16, slot as u8);
    Ok(Peripheral { name, node, slot, limits: device.limits, share: device.share, kind })
}

/// Whether a device of node `node` can have such a share.
///
/// # Errors
/// One sentence: what is wrong and what to do.
pub fn check_share(
    machine: &MachineConfig,
    node: usize,
    kind: &Kind,
    share: Option<u32>,
) -> Result<(), ConfigError> {
    let Some(share) = share else { return Ok(()) };
    limits::check_share(share)?;
    let Some(node) = machine.nodes.get(node) else { return Ok(()) };
    let (rates, what, key) = match kind {
        Kind::Net { .. } => (node.capacity.cards, "network cards", "net_bandwidth"),
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

/// A queue for each CPU of the machine, as long as there are enough.
fn default_queues(machine: &MachineConfig) -> u16 {
    let cpus: u32 = machine.nodes.iter().map(|node| node.spec.cpus).sum();
    u16::try_from(cpus).unwrap_or(u16::MAX).clamp(1, DEFAULT_QUEUES)
}

/// The name that a device was given, or the next free one of its kind.
fn name<'a>(
    device: &PeripheralConfig,
    taken: &[Peripheral],
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

fn check(kind: &Kind) -> Result<(), ConfigError> {
    let queues = match kind {
        Kind::Disk { serial, queues, .. } => {
            if let Some(serial) = serial
                && (serial.is_empty()
                    || serial.len() > SERIAL_LEN
                    || !serial.bytes().all(|b| b.is_ascii_graphic()))
            {
                return wrong(format!(
                    "{serial:?} cannot be a disk's serial number: use 1 to {SERIAL_LEN} letters, digits and signs"
                ));
            }
            queues.map(|queues| (queues, MAX_DISK_QUEUES))
        }
        Kind::Net { tap, mac, queues } => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
            if tap.is_empty() || tap.len() > MAX_TAP_NAME || !tap.bytes().all(plain) {
                return wrong(format!(
                    "{tap:?} cannot be a TAP interface: use 1 to {MAX_TAP_NAME} letters, digits, '.', '_' and '-'"
                ));
            }
            if mac.is_some_and(|mac| mac[0] & 1 != 0) {
                return wrong("a network card's address must not be a group's: its first byte must be even");
            }
            queues.map(|queues| (queues, MAX_QUEUE_PAIRS))
        }
        Kind::Console { socket, name } => {
            if socket.as_os_str().is_empty() {
                return wrong("a console or channel has no socket: name one, such as /run/guest.sock");
            }
            if let Some(name) = name
                && (name.is_empty()
                    || name.len() > MAX_CHANNEL_NAME
                    || !name.bytes().all(|b| b.is_ascii_graphic()))
            {
                return wrong(format!(
                    "{name:?} cannot be a channel's name: use 1 to {MAX_CHANNEL_NAME} letters, digits and signs, as in \
                     org.qemu.guest_agent.0"
                ));
            }
            None
        }
        Kind::Seed { .. } | Kind::Entropy | Kind::Balloon { .. } => None,
    };
    match queues {
        Some((queues, most)) if !(1..=most).contains(&queues) => {
            wrong(format!("{queues} queues are not possible: choose 1 to {most}"))
        }
        _ => Ok(()),
    }
}

/// An address that stays the same from run to run: locally administered, the rest a hash (FNV-1a) of the names.
fn address(machine: &str, device: &str) -> [u8; 6] {
    let names = [machine, device].join("/");
    let hash = fnv(&[names.as_bytes()]).to_le_bytes();
    [0x02, hash[3], hash[4], hash[5], hash[6], hash[7]]
}

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

/// A network card from `tap=NAME[,mac=ADDRESS][,queues=NUMBER]` and what all devices have: `node=`, `name=`, `share=`,
/// `iops=`, `bandwidth=`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_net(text: &str) -> Result<PeripheralConfig, ConfigError> {
    let (mut tap, mut mac, mut queues) = (None, None, None);
    let mut device = PeripheralConfig::new(None, Kind::Entropy);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) => tap = Some(name.to_owned()),
            Some(("mac", address)) => mac = Some(parse_mac(address)?),
            Some(("queues", count)) => queues = Some(number(count)?),
            Some((key, value)) if device.set(key, value)? => {}
            _ => return wrong(format!("a network card has no {part:?}: write for example tap=tap0,node=n1")),
        }
    }
    match tap {
        Some(tap) => Ok(PeripheralConfig { kind: Kind::Net { tap, mac, queues }, ..device }),
        None => wrong(format!("{text:?} names no interface: write for example tap=tap0,node=n1")),
    }
}

/// A disk from `PATH[,readonly][,serial=TEXT][,queues=NUMBER]` and what all devices have: `node=`, `name=`, `share=`,
/// `iops=`, `bandwidth=`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_disk(text: &str) -> Result<PeripheralConfig, ConfigError> {
    let mut parts = text.split(',');
    let path = PathBuf::from(parts.next().unwrap_or_default());
    let (mut readonly, mut serial, mut queues) = (false, None, None);
    let mut device = PeripheralConfig::new(None, Kind::Entropy);
    for part in parts {
        match part.split_once('=') {
            None if part == "readonly" => readonly = true,
            Some(("serial", text)) => serial = Some(text.to_owned()),
            Some(("queues", count)) => queues = Some(number(count)?),
            Some((key, value)) if device.set(key, value)? => {}
            _ => {
                return wrong(format!("a disk has no {part:?}: write for example root.img,node=n1,readonly"));
            }
        }
    }
    Ok(PeripheralConfig { kind: Kind::Disk { path, readonly, serial, queues }, ..device })
}

/// A console from `SOCKET[,node=NAME]`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_console(text: &str) -> Result<PeripheralConfig, ConfigError> {
    let (socket, node) = socket_and_node("console", text)?;
    Ok(PeripheralConfig::new(node, Kind::Console { socket, name: None }))
}

/// A channel from `NAME=SOCKET[,node=NAME]`.
///
/// # Errors
/// One sentence with the form that is understood.
pub fn parse_channel(text: &str) -> Result<PeripheralConfig, ConfigError> {
    let Some((name, rest)) = text.split_once('=') else {
        return wrong(format!(
            "{text:?} is no channel: write for example org.qemu.guest_agent.0=/run/agent.sock"
        ));
    };
    let (socket, node) = socket_and_node("channel", rest)?;
    Ok(PeripheralConfig::new(node, Kind::Console { socket, name: Some(name.into()) }))
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
pub fn parse_balloon(text: &str) -> Result<PeripheralConfig, ConfigError> {
    let (mut size, mut node) = (0, None);
    for part in text.split(',').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            None => size = parse_size(part)?,
            Some(("node", name)) => node = Some(name.to_owned()),
            _ => return wrong(format!("a balloon has no {part:?}: write for example 512M,node=n1")),
        }
    }
    Ok(PeripheralConfig::new(node, Kind::Balloon { size }))
}

fn number(text: &str) -> Result<u16, ConfigError> {
    text.parse().map_err(|_| ConfigError(format!("{text:?} is not a number of queues")))
}

fn wrong<T>(why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;

    /// Two nodes, `n0` and `n1`, with these disks.
    fn machine(devices: &[&str]) -> MachineConfig {
        let node = |name| NodeConfig::new(name, 2, 256 << 20);
        MachineConfig {
            kernel: "vmlinuz".into(),
            nodes: vec![node("n0"), node("n1")],
            devices: devices.iter().map(|text| parse_disk(text).unwrap()).collect(),
            ..MachineConfig::default()
        }
    }

    #[test]
    fn devices_get_slots_on_their_nodes_in_order() {
        let placed = place(&machine(&["a", "b,node=n1,readonly", "c,serial=root,queues=3"])).unwrap();
        let slots: Vec<_> = placed.iter().map(|device| (device.node, device.slot)).collect();
        assert_eq!(slots, [(0, 0), (1, 0), (0, 1)]);
        let disk = |path: &str, readonly, serial: &str, queues| Kind::Disk {
            path: path.into(),
            readonly,
            serial: Some(serial.into()),
            queues: Some(queues),
        };
        assert_eq!(placed[1].kind, disk("b", true, "disk1", 4), "a queue for each of the machine's CPUs");
        assert_eq!(placed[2].kind, disk("c", false, "root", 3));
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        let too_many = vec!["a"; 32];
        for (devices, part) in [
            (&["a,node=n7"][..], "\"n7\""),
            (&[""], "no file"),
            (&["a,serial=a long serial number"], "serial number"),
            (&["a,queues=0"], "0 queues"),
            (&["a,queues=65"], "65 queues"),
            (&too_many, "more than 31"),
            (&["a,name=a/b"], "\"a/b\""),
            (&["a,name=long-names-are-no-serials"], "1 to 20"),
            (&["a,name=x", "b,name=x"], "x already"),
            (&["a,iops=0"], "at least 1"),
        ] {
            let said = machine(devices).check().unwrap_err().0;
            assert!(said.contains(part), "{said:?} does not contain {part:?}");
        }
        assert!(parse_disk("a,colour=red").unwrap_err().0.contains("colour"));
        assert!(parse_disk("a,queues=many").unwrap_err().0.contains("many"));
    }

    #[test]
    fn shares_are_for_devices_whose_node_has_something_to_share() {
        let mut machine = machine(&["a,node=n1,share=300", "b"]);
        let said = place(&machine).unwrap_err().0;
        assert!(said.contains("disks of node n1") && said.contains("disk_bandwidth"), "{said}");
        machine.nodes[1].capacity.disks.iops = Some(500);
        assert_eq!(place(&machine).unwrap()[0].share, Some(300));
        machine.devices[0] = parse_net("tap=t,node=n1,share=9").unwrap();
        assert!(place(&machine).unwrap_err().0.contains("net_bandwidth"));
        assert_eq!(parse_disk("a,share=none").unwrap().share, None);
        for (text, part) in [("a,share=0", "1 to 10000"), ("a,share=most", "\"most\"")] {
            assert!(parse_disk(text).unwrap_err().0.contains(part), "{text}");
        }
    }

    #[test]
    fn devices_without_names_get_free_ones() {
        let placed = place(&machine(&["a,name=disk1", "b", "c,name=root,serial=1", "d,iops=9"])).unwrap();
        let names: Vec<_> = placed.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["disk1", "disk2", "root", "disk3"]);
        assert!(matches!(&placed[1].kind, Kind::Disk { serial: Some(serial), .. } if serial == "disk2"));
        assert_eq!(placed[3].limits, Limits { iops: Some(9), bandwidth: None });
    }

    #[test]
    fn a_network_card_keeps_its_address_from_run_to_run() {
        let mut machine = machine(&[]);
        let cards = ["tap=tap0", "tap=tap1", "tap=tap0,node=n1", "tap=t,mac=02:0:a:b:c:ff,queues=2"];
        machine.devices = cards.iter().map(|text| parse_net(text).unwrap()).collect();
        let macs = |machine: &MachineConfig| -> Vec<[u8; 6]> {
            let mac = |device: Peripheral| match device.kind {
                Kind::Net { mac, .. } => mac.unwrap(),
                other => panic!("{other:?}"),
            };
            place(machine).unwrap().into_iter().map(mac).collect()
        };
        let first = macs(&machine);
        assert_eq!(first, macs(&machine));
        assert_eq!(first[3], [2, 0, 10, 11, 12, 255]);
        assert!(first.iter().all(|mac| mac[0] == 2));
        assert!(first[0] != first[1] && first[0] != first[2]);
        // Wherever it is, and whatever it is connected to.
        let moved = ["tap=a,name=x", "tap=b,node=n1,name=x"].map(|text| {
            machine.devices = vec![parse_net(text).unwrap()];
            macs(&machine)
        });
        assert_eq!(moved[0], moved[1]);
    }

    #[test]
    fn a_network_card_that_cannot_be_is_refused() {
        for (text, part) in [
            ("node=n1", "no interface"),
            ("tap=t,speed=9", "speed"),
            ("tap=t,mac=1:2:3", "not a network card's address"),
            ("tap=t,mac=100:0:0:0:0:0", "not a network card's address"),
            ("tap=t,queues=x", "not a number"),
        ] {
            let said = parse_net(text).unwrap_err().0;
            assert!(said.contains(part), "{said:?} does not contain {part:?}");
        }
        for (text, part) in [
            ("tap=a-name-that-is-too-long", "TAP interface"),
            ("tap=a/b", "TAP interface"),
            ("tap=t,mac=01:0:0:0:0:0", "group"),
            ("tap=t,queues=33", "33 queues"),
        ] {
            let devices = vec![parse_net(text).unwrap()];
            let said = place(&MachineConfig { devices, ..machine(&[]) }).unwrap_err().0;
            assert!(said.contains(part), "{said:?} does not contain {part:?}");
        }
    }

    #[test]
    fn consoles_and_channels_have_sockets_and_channels_names() {
        let kind = |name: Option<&str>| Kind::Console { socket: "/run/s".into(), name: name.map(Into::into) };
        let console = parse_console("/run/s,node=n1").unwrap();
        assert_eq!(console, PeripheralConfig::new(Some("n1".into()), kind(None)));
        let channel = parse_channel("org.qemu.guest_agent.0=/run/s").unwrap();
        assert_eq!(channel, PeripheralConfig::new(None, kind(Some("org.qemu.guest_agent.0"))));
        assert!(parse_channel("/run/s").unwrap_err().0.contains("no channel"));
        assert!(parse_console("/run/s,colour=red").unwrap_err().0.contains("colour"));
        for (device, part) in [
            (parse_console(""), "no socket"),
            (parse_channel("a="), "no socket"),
            (parse_channel("a name=s"), "channel's name"),
            (parse_channel("=s"), "channel's name"),
        ] {
            let said =
                place(&MachineConfig { devices: vec![device.unwrap()], ..machine(&[]) }).unwrap_err().0;
            assert!(said.contains(part), "{said:?} does not contain {part:?}");
        }
    }

    #[test]
    fn a_machine_has_one_balloon_for_all_its_memory() {
        let balloon = parse_balloon("512M,node=n1").unwrap();
        let expected = PeripheralConfig::new(Some("n1".into()), Kind::Balloon { size: 512 << 20 });
        assert_eq!(balloon, expected);
        assert_eq!(parse_balloon("").unwrap().kind, Kind::Balloon { size: 0 });
        assert!(parse_balloon("colour=red").unwrap_err().0.contains("colour"));
        let devices = vec![balloon.clone(), balloon];
        let said = place(&MachineConfig { devices, ..machine(&[]) }).unwrap_err().0;
        assert!(said.contains("one balloon"), "{said}");
    }

    #[test]
    fn a_machine_has_pci_only_with_devices() {
        assert!(!machine(&[]).spec().pci && machine(&["a"]).spec().pci);
    }
}
