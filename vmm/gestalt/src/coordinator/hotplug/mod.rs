//! The devices of a running machine, as they come, go and change: decisions only, without sockets or a clock.
//!
//! ```text
//!           add                         done                 guest lets go            done
//! (nothing) ───> Opening ── node: Add ──────> Present ──> ... ──> Closing ── node: Remove ──> (nothing)
//!                   │ node says why not          │ remove           ^
//!                   └──> (nothing)               └──> Leaving ──────┘
//!                                                 node 0: Announce
//! ```
//!
//! An operator who asks is answered once, at the latest after [`PATIENCE`]; what was begun then goes on
//! without. The guest may also let go of a device that nobody has asked it for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use firmware::pci::HOT_SLOTS;

use crate::operator::{Answer, BalloonState, DeviceState, Request};
use machine::config::devices::{DeviceRequest, PlacedDevice, PlacedKind, RequestedKind};
use machine::config::limits::{DEFAULT_SHARE, parse_share};
use machine::config::units::parse_size;
use machine::config::{CheckedMachine, ConfigError};
use machine::control::{Change, DeviceOrder, DeviceResult, GivenUp, Setting, SlotId};

/// How long a node may take over a device, and how long a guest may take to let go of one, before the
/// operator who waits is told.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The number of an operator who waits for an answer; never reused.
pub type AskerId = u64;

/// A step that follows from an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Give a node an order.
    Tell {
        /// The node's index.
        node: usize,
        /// The order's number.
        id: u32,
        /// The order.
        order: DeviceOrder,
    },
    /// Answer an operator.
    Answer(AskerId, Answer),
    /// Tell whoever holds the terminal.
    Say(String),
}

/// How far a device has come.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Presence {
    Opening,
    Present,
    Leaving,
    Closing,
}

#[derive(Debug)]
struct HotplugDevice {
    device: PlacedDevice,
    state: Presence,
    /// Who waits for what is being done to it, and until when.
    asker: Option<(AskerId, Instant)>,
}

impl HotplugDevice {
    fn slot(&self) -> SlotId {
        // Devices are on the first 256 nodes.
        SlotId { bus: self.device.node as u8, slot: self.device.slot }
    }

    /// Notes what its node has changed; a sentence about it.
    fn change(&mut self, setting: Setting) -> String {
        let name = &self.device.name;
        match setting {
            Setting::Limits { limits, share } => {
                (self.device.limits, self.device.share) = (limits, share);
                let share = own_share(share).map_or(String::new(), |share| format!(" share={share}"));
                format!("{name} is held to {limits}{share}")
            }
            Setting::Size(new) => {
                if let PlacedKind::Balloon { size } = &mut self.device.kind {
                    *size = new;
                }
                format!("{name} asks the guest for {new} bytes: `gestalt device list` shows what it gives")
            }
        }
    }
}

/// An order that a node has not answered yet.
#[derive(Debug)]
enum Given {
    Open(String),
    Close(String),
    Set(String, Setting, AskerId),
    /// For a list of all devices; who waits for that, and until when.
    Measure(Option<(AskerId, Instant)>),
    Announce,
}

/// All devices, and what is being done to them.
#[derive(Debug)]
pub struct Hotplug {
    config: CheckedMachine,
    entries: Vec<HotplugDevice>,
    given: BTreeMap<u32, (usize, Given)>,
    next: u32,
    /// Serial numbers and addresses of devices that have been removed, by name.
    known: BTreeMap<String, PlacedKind>,
}

impl Hotplug {
    /// The devices that a machine begins with.
    pub fn new(config: &CheckedMachine) -> Hotplug {
        let entry = |device| HotplugDevice { device, state: Presence::Present, asker: None };
        let entries = config.placed().iter().cloned().map(entry).collect();
        Hotplug { config: config.clone(), entries, given: BTreeMap::new(), next: 0, known: BTreeMap::new() }
    }

    /// The devices that the machine has when it starts again.
    pub fn devices(&self) -> Vec<PlacedDevice> {
        self.entries.iter().map(|entry| entry.device.clone()).collect()
    }

    /// The machine starts again: what was leaving has left, and what was coming does not come.
    pub fn restart(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (_, given) in std::mem::take(&mut self.given).into_values() {
            if let Given::Measure(asker) = given {
                tell(asker, Answer::Devices(self.list(None)), &mut steps);
            }
        }
        for entry in &mut self.entries {
            let name = &entry.device.name;
            let answer = match entry.state {
                Presence::Opening => {
                    Answer::Refused(format!("the machine started again before {name} was there"))
                }
                Presence::Present => Answer::Done(format!("{name} is as it was: the machine started again")),
                Presence::Leaving | Presence::Closing => {
                    Answer::Done(format!("{name} is gone: the machine started again"))
                }
            };
            steps.extend(entry.asker.take().map(|(asker, _)| Step::Answer(asker, answer)));
        }
        self.entries.retain(|entry| entry.state == Presence::Present);
        steps
    }

    /// An operator asks for something; `running` says whether the guest is there.
    pub fn ask(&mut self, asker: AskerId, request: Request, running: bool, now: Instant) -> Vec<Step> {
        let until = (asker, now + PATIENCE);
        let result = match request {
            Request::List => return self.measure(until, running),
            _ if !running => refuse("the machine does not run yet, or no more: try again"),
            Request::Add { device } => self.add(&device, until),
            Request::Remove { name } => self.remove(&name, until),
            Request::Set { name, settings } => self.set(&name, &settings, until),
        };
        result.unwrap_or_else(|why| vec![Step::Answer(asker, Answer::Refused(why.0))])
    }

    /// A node has done what it was told, or says why not. `None` if it was not told so.
    pub fn done(&mut self, node: usize, id: u32, result: DeviceResult) -> Option<Vec<Step>> {
        self.given.get(&id).filter(|(asked, _)| *asked == node)?;
        let (_, given) = self.given.remove(&id)?;
        let mut steps = Vec::new();
        match given {
            Given::Announce => {}
            Given::Measure(asker) => {
                // A balloon that has gone in between has nothing to say.
                tell(asker, Answer::Devices(self.list(result.ok().flatten())), &mut steps);
            }
            Given::Open(name) => {
                let place = self.entries.iter().position(|entry| entry.device.name == name)?;
                match result {
                    Ok(_) => {
                        let entry = &mut self.entries[place];
                        entry.state = Presence::Present;
                        let (slot, asker) = (entry.slot(), entry.asker.take());
                        self.announce(slot, Change::Come, &mut steps);
                        let said = format!("{name} is at {} on {}", address(slot), self.node_name(node));
                        tell(asker, Answer::Done(said), &mut steps);
                    }
                    Err(why) => {
                        let entry = self.entries.remove(place);
                        tell(entry.asker, Answer::Refused(why), &mut steps);
                    }
                }
            }
            Given::Close(name) => {
                let place = self.entries.iter().position(|entry| entry.device.name == name)?;
                let entry = self.entries.remove(place);
                self.known.insert(name.clone(), entry.device.kind);
                let answer = match result {
                    Ok(_) => Answer::Done(format!("{name} is gone")),
                    Err(why) => Answer::Refused(why),
                };
                tell(entry.asker, answer, &mut steps);
            }
            Given::Set(name, setting, by) => {
                // The guest may have let go of it in between.
                let Some(entry) = self.entries.iter_mut().find(|entry| entry.device.name == name) else {
                    return Some(steps);
                };
                let answer = match result {
                    Ok(_) => Answer::Done(entry.change(setting)),
                    Err(why) => Answer::Refused(why),
                };
                // Who asked may have given up, and another may ask for something else.
                let asker =
                    entry.asker.take_if(|(asker, _)| *asker == by && entry.state == Presence::Present);
                tell(asker, answer, &mut steps);
            }
        }
        Some(steps)
    }

    /// The guest has let go of what is in a slot.
    pub fn ejected(&mut self, slot: SlotId) -> Vec<Step> {
        let mut steps = Vec::new();
        let held = |entry: &&mut HotplugDevice| matches!(entry.state, Presence::Present | Presence::Leaving);
        // A guest may say so of an empty slot, or twice.
        let Some(entry) = self.entries.iter_mut().filter(held).find(|entry| entry.slot() == slot) else {
            return steps;
        };
        let name = entry.device.name.clone();
        if entry.state == Presence::Present {
            steps.push(Step::Say(format!("the guest has let go of {name}: it is removed")));
        }
        entry.state = Presence::Closing;
        self.tell_node(
            usize::from(slot.bus),
            Given::Close(name),
            DeviceOrder::Remove { slot: slot.slot },
            &mut steps,
        );
        steps
    }

    /// Time has passed: who has waited too long is told.
    pub fn tick(&mut self, now: Instant) -> Vec<Step> {
        let mut steps = Vec::new();
        let list = Answer::Devices(self.list(None));
        for (_, given) in self.given.values_mut() {
            if let Given::Measure(asker) = given {
                tell(asker.take_if(|(_, until)| now >= *until), list.clone(), &mut steps);
            }
        }
        for entry in &mut self.entries {
            let (name, seconds) = (&entry.device.name, PATIENCE.as_secs());
            let Some((asker, _)) = entry.asker.take_if(|(_, until)| now >= *until) else { continue };
            let why = match entry.state {
                Presence::Leaving => format!(
                    "the guest has not let go of {name} within {seconds} s: it has been asked, and {name} goes when it \
                     does; see whether the guest is busy, or its kernel lacks ACPI hot plug (acpiphp)"
                ),
                _ => format!(
                    "the node of {name} has not answered within {seconds} s: see `gestalt device list`"
                ),
            };
            steps.push(Step::Answer(asker, Answer::Refused(why)));
        }
        steps
    }

    fn add(&mut self, wanted: &DeviceRequest, until: (AskerId, Instant)) -> Result<Vec<Step>, ConfigError> {
        if !self.config.spec().pci {
            return refuse(
                "this machine has no PCI, because it was started without any device: start it with one (--entropy will \
                 do) to add others later",
            );
        }
        let mut wanted = wanted.clone();
        if let Some(known) = wanted.name.as_ref().and_then(|name| self.known.get(name)) {
            keep_identity(&mut wanted.kind, known);
        }
        let taken = self.devices();
        let device = self.config.place_more(&wanted, &taken)?;
        let (node, name) = (usize::from(device.node), device.name.clone());
        let order = DeviceOrder::Add(device.clone());
        self.entries.push(HotplugDevice { device, state: Presence::Opening, asker: Some(until) });
        let mut steps = Vec::new();
        self.tell_node(node, Given::Open(name), order, &mut steps);
        Ok(steps)
    }

    fn remove(&mut self, name: &str, until: (AskerId, Instant)) -> Result<Vec<Step>, ConfigError> {
        let entry = self.free(name)?;
        let slot = entry.slot();
        if slot.slot >= HOT_SLOTS {
            return refuse(format!(
                "{name} is in slot {} of its bus, and devices can only go from the first {HOT_SLOTS}",
                slot.slot
            ));
        }
        // Who asks for one that is leaving asks the guest again.
        entry.state = Presence::Leaving;
        entry.asker = Some(until);
        let mut steps = Vec::new();
        self.announce(slot, Change::Leave, &mut steps);
        Ok(steps)
    }

    fn set(
        &mut self,
        name: &str,
        settings: &[String],
        until: (AskerId, Instant),
    ) -> Result<Vec<Step>, ConfigError> {
        let entry = self.free(name)?;
        if entry.state != Presence::Present {
            return refuse(format!("{name} is leaving"));
        }
        let device = entry.device.clone();
        let setting = wanted(&self.config, &device, settings)?;
        self.free(name)?.asker = Some(until);
        let (node, slot) = (usize::from(device.node), device.slot);
        let order = DeviceOrder::Set { slot, setting };
        let mut steps = Vec::new();
        self.tell_node(node, Given::Set(name.into(), setting, until.0), order, &mut steps);
        Ok(steps)
    }

    /// A list of all devices, once the node of the balloon has said what the guest has given up.
    fn measure(&mut self, until: (AskerId, Instant), running: bool) -> Vec<Step> {
        let balloon = |entry: &&HotplugDevice| matches!(entry.device.kind, PlacedKind::Balloon { .. });
        let balloon = self.entries.iter().filter(|entry| entry.state == Presence::Present).find(balloon);
        let Some(slot) = balloon.map(HotplugDevice::slot).filter(|_| running) else {
            return vec![Step::Answer(until.0, Answer::Devices(self.list(None)))];
        };
        let mut steps = Vec::new();
        let order = DeviceOrder::Measure { slot: slot.slot };
        self.tell_node(slot.bus.into(), Given::Measure(Some(until)), order, &mut steps);
        steps
    }

    /// The device of this name, if nothing is being done to it that somebody waits for.
    fn free(&mut self, name: &str) -> Result<&mut HotplugDevice, ConfigError> {
        let names: Vec<_> = self.entries.iter().map(|entry| entry.device.name.clone()).collect();
        let Some(entry) = self.entries.iter_mut().find(|entry| entry.device.name == name) else {
            let known = if names.is_empty() {
                "there is none".into()
            } else {
                format!("there is {}", names.join(", "))
            };
            return Err(ConfigError(format!("there is no device {name:?}: {known}")));
        };
        if entry.asker.is_some() || !matches!(entry.state, Presence::Present | Presence::Leaving) {
            return Err(ConfigError(format!("{name} is being changed by another command: wait for that")));
        }
        Ok(entry)
    }

    fn announce(&mut self, slot: SlotId, change: Change, steps: &mut Vec<Step>) {
        self.tell_node(0, Given::Announce, DeviceOrder::Announce { slot, change }, steps);
    }

    fn tell_node(&mut self, node: usize, given: Given, order: DeviceOrder, steps: &mut Vec<Step>) {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.given.insert(id, (node, given));
        steps.push(Step::Tell { node, id, order });
    }

    fn list(&self, given_up: Option<GivenUp>) -> Vec<DeviceState> {
        self.entries.iter().map(|entry| self.describe(entry, given_up)).collect()
    }

    fn describe(&self, entry: &HotplugDevice, given_up: Option<GivenUp>) -> DeviceState {
        let device = &entry.device;
        let (backend, identity) = match &device.kind {
            PlacedKind::Disk { path, serial, .. } => (path.display().to_string(), serial.clone()),
            PlacedKind::Net { tap, mac, .. } => {
                (tap.clone(), mac.map(|byte| format!("{byte:02x}")).join(":"))
            }
            _ => Default::default(),
        };
        let state = match entry.state {
            Presence::Opening => "coming",
            Presence::Present => "present",
            Presence::Leaving | Presence::Closing => "leaving",
        };
        DeviceState {
            name: device.name.clone(),
            kind: device.kind.word().into(),
            node: self.node_name(device.node.into()).into(),
            address: address(entry.slot()),
            backend,
            identity,
            limits: device.limits,
            share: own_share(device.share),
            balloon: match device.kind {
                PlacedKind::Balloon { size } => Some(BalloonState { size, given_up }),
                _ => None,
            },
            state: state.into(),
        }
    }

    fn node_name(&self, node: usize) -> &str {
        self.config.nodes.get(node).map_or("", |node| &node.spec.name)
    }
}

/// A slot as the guest's tools show it.
fn address(slot: SlotId) -> String {
    format!("0000:{:02x}:{:02x}.0", slot.bus, slot.slot)
}

/// What an operator's settings make of a device.
fn wanted(
    machine: &CheckedMachine,
    device: &PlacedDevice,
    settings: &[String],
) -> Result<Setting, ConfigError> {
    let parts = || settings.iter().map(|setting| setting.split_once('=').unwrap_or((setting, "")));
    match device.kind {
        PlacedKind::Disk { .. } | PlacedKind::Net { .. } => {
            let (mut limits, mut share) = (device.limits, device.share);
            for (key, value) in parts() {
                if key == "share" {
                    share = match parse_share(value)? {
                        Some(share) => {
                            machine.check_share(device, share)?;
                            share
                        }
                        None => DEFAULT_SHARE,
                    };
                } else if !limits.set(key, value)? {
                    return refuse(format!(
                        "{key:?} cannot be set: write for example iops=500, bandwidth=20M, iops=none or share=300"
                    ));
                }
            }
            limits.check()?;
            Ok(Setting::Limits { limits, share })
        }
        PlacedKind::Balloon { mut size } => {
            for (key, value) in parts() {
                if key != "size" {
                    return refuse(format!("{key:?} cannot be set: write for example size=512M"));
                }
                size = parse_size(value)?;
            }
            Ok(Setting::Size(size))
        }
        _ => refuse(format!(
            "{} has nothing that could be set: disks, network cards and balloons have",
            device.name
        )),
    }
}

/// A device that had this name before keeps by what the guest knows it, unless the request says otherwise.
fn keep_identity(kind: &mut RequestedKind, known: &PlacedKind) {
    match (kind, known) {
        (RequestedKind::Disk { serial, .. }, PlacedKind::Disk { serial: old, .. }) => {
            serial.get_or_insert_with(|| old.clone());
        }
        (RequestedKind::Net { mac, .. }, PlacedKind::Net { mac: old, .. }) => {
            mac.get_or_insert(*old);
        }
        _ => {}
    }
}

/// A share worth a word: one that is not the usual.
fn own_share(share: u32) -> Option<u32> {
    (share != DEFAULT_SHARE).then_some(share)
}

fn tell(asker: Option<(AskerId, Instant)>, answer: Answer, steps: &mut Vec<Step>) {
    steps.extend(asker.map(|(asker, _)| Step::Answer(asker, answer)));
}

fn refuse<T>(why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(why.into()))
}

#[cfg(test)]
mod tests;
