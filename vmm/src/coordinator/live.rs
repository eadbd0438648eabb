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
//! An operator who asks is answered once, at the latest after [`PATIENCE`]; what was begun then goes on without. The
//! guest may also let go of a device that nobody has asked it for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use firmware::pci::HOT_SLOTS;

use crate::config::{ConfigError, MachineConfig};
use crate::devices::hotplug::{Change, SlotId};
use crate::limits::Limits;
use crate::node_api::DeviceOrder;
use crate::operator::{Answer, DeviceState, Request};
use crate::peripherals::{self, Kind, Peripheral, PeripheralConfig};

/// How long a node may take over a device, and how long a guest may take to let go of one, before the operator who
/// waits is told.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Who asks; never reused.
pub type AskerId = u64;

/// What is to be done.
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

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum State {
    Opening,
    Present,
    Leaving,
    Closing,
}

#[derive(Debug)]
struct Entry {
    device: Peripheral,
    state: State,
    /// Who waits for what is being done to it, and until when.
    asker: Option<(AskerId, Instant)>,
}

impl Entry {
    fn slot(&self) -> SlotId {
        // Devices are on the first 256 nodes.
        SlotId { bus: self.device.node as u8, slot: self.device.slot }
    }
}

/// What a node has been asked to do.
#[derive(Debug)]
enum Given {
    Open(String),
    Close(String),
    Set(String, Limits, AskerId),
    Announce,
}

/// All devices, and what is being done to them.
#[derive(Debug)]
pub struct Live {
    config: MachineConfig,
    entries: Vec<Entry>,
    given: BTreeMap<u32, (usize, Given)>,
    next: u32,
    /// Serial numbers and addresses of devices that have been removed, by name.
    known: BTreeMap<String, Kind>,
}

impl Live {
    /// The devices that a machine begins with. `config` has been checked.
    pub fn new(config: &MachineConfig) -> Live {
        let entry = |device| Entry { device, state: State::Present, asker: None };
        let entries = peripherals::place(config).unwrap_or_default().into_iter().map(entry).collect();
        Live { config: config.clone(), entries, given: BTreeMap::new(), next: 0, known: BTreeMap::new() }
    }

    /// The devices that the machine has when it starts again.
    pub fn devices(&self) -> Vec<Peripheral> {
        self.entries.iter().map(|entry| entry.device.clone()).collect()
    }

    /// The machine starts again: what was leaving has left, and what was coming does not come.
    pub fn restart(&mut self) -> Vec<Step> {
        self.given.clear();
        let mut steps = Vec::new();
        for entry in &mut self.entries {
            let name = &entry.device.name;
            let answer = match entry.state {
                State::Opening => {
                    Answer::Refused(format!("the machine started again before {name} was there"))
                }
                State::Present => Answer::Done(format!("{name} is held to {}", entry.device.limits)),
                State::Leaving | State::Closing => {
                    Answer::Done(format!("{name} is gone: the machine started again"))
                }
            };
            steps.extend(entry.asker.take().map(|(asker, _)| Step::Answer(asker, answer)));
        }
        self.entries.retain(|entry| entry.state == State::Present);
        steps
    }

    /// An operator asks for something; `running` says whether the guest is there.
    pub fn ask(&mut self, asker: AskerId, request: Request, running: bool, now: Instant) -> Vec<Step> {
        let until = (asker, now + PATIENCE);
        let result = match request {
            Request::List => {
                return vec![Step::Answer(asker, Answer::Devices(self.list()))];
            }
            _ if !running => refuse("the machine does not run yet, or no more: try again"),
            Request::Add { device } => self.add(&device, until),
            Request::Remove { name } => self.remove(&name, until),
            Request::Set { name, settings } => self.set(&name, &settings, until),
        };
        result.unwrap_or_else(|why| vec![Step::Answer(asker, Answer::Refused(why.0))])
    }

    /// A node has done what it was told, or says why not. `None` if it was not told so.
    pub fn done(&mut self, node: usize, id: u32, result: Result<(), String>) -> Option<Vec<Step>> {
        self.given.get(&id).filter(|(asked, _)| *asked == node)?;
        let (_, given) = self.given.remove(&id)?;
        let mut steps = Vec::new();
        match given {
            Given::Announce => {}
            Given::Open(name) => {
                let place = self.entries.iter().position(|entry| entry.device.name == name)?;
                match result {
                    Ok(()) => {
                        let entry = &mut self.entries[place];
                        entry.state = State::Present;
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
                    Ok(()) => Answer::Done(format!("{name} is gone")),
                    Err(why) => Answer::Refused(why),
                };
                tell(entry.asker, answer, &mut steps);
            }
            Given::Set(name, limits, by) => {
                // The guest may have let go of it in between.
                let Some(entry) = self.entries.iter_mut().find(|entry| entry.device.name == name) else {
                    return Some(steps);
                };
                let answer = match result {
                    Ok(()) => {
                        entry.device.limits = limits;
                        Answer::Done(format!("{name} is held to {limits}"))
                    }
                    Err(why) => Answer::Refused(why),
                };
                // Who asked may have given up, and another may ask for something else.
                let asker = entry.asker.take_if(|(asker, _)| *asker == by && entry.state == State::Present);
                tell(asker, answer, &mut steps);
            }
        }
        Some(steps)
    }

    /// The guest has let go of what is in a slot.
    pub fn ejected(&mut self, slot: SlotId) -> Vec<Step> {
        let mut steps = Vec::new();
        let held = |entry: &&mut Entry| matches!(entry.state, State::Present | State::Leaving);
        // A guest may say so of an empty slot, or twice.
        let Some(entry) = self.entries.iter_mut().filter(held).find(|entry| entry.slot() == slot) else {
            return steps;
        };
        let name = entry.device.name.clone();
        if entry.state == State::Present {
            steps.push(Step::Say(format!("the guest has let go of {name}: it is removed")));
        }
        entry.state = State::Closing;
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
        for entry in &mut self.entries {
            let (name, seconds) = (&entry.device.name, PATIENCE.as_secs());
            let Some((asker, _)) = entry.asker.take_if(|(_, until)| now >= *until) else { continue };
            let why = match entry.state {
                State::Leaving => format!(
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

    fn add(
        &mut self,
        wanted: &PeripheralConfig,
        until: (AskerId, Instant),
    ) -> Result<Vec<Step>, ConfigError> {
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
        let device =
            peripherals::place_next(&self.config, &wanted, &taken, HOT_SLOTS.into(), std::iter::empty())?;
        let (node, name) = (usize::from(device.node), device.name.clone());
        let order = DeviceOrder::Add(device.clone());
        self.entries.push(Entry { device, state: State::Opening, asker: Some(until) });
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
        entry.state = State::Leaving;
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
        if entry.state != State::Present {
            return refuse(format!("{name} is leaving"));
        }
        if !matches!(entry.device.kind, Kind::Disk { .. } | Kind::Net { .. }) {
            return refuse(format!("{name} has nothing that could be set: disks and network cards have"));
        }
        let mut limits = entry.device.limits;
        for setting in settings {
            let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
            if !limits.set(key, value)? {
                return refuse(format!(
                    "{setting:?} cannot be set: write for example iops=500, bandwidth=20M or iops=none"
                ));
            }
        }
        limits.check()?;
        entry.asker = Some(until);
        let (node, slot) = (usize::from(entry.device.node), entry.device.slot);
        let order = DeviceOrder::Set { slot, limits };
        let mut steps = Vec::new();
        self.tell_node(node, Given::Set(name.into(), limits, until.0), order, &mut steps);
        Ok(steps)
    }

    /// The device of this name, if nothing is being done to it that somebody waits for.
    fn free(&mut self, name: &str) -> Result<&mut Entry, ConfigError> {
        let names: Vec<_> = self.entries.iter().map(|entry| entry.device.name.clone()).collect();
        let Some(entry) = self.entries.iter_mut().find(|entry| entry.device.name == name) else {
            let known = if names.is_empty() {
                "there is none".into()
            } else {
                format!("there is {}", names.join(", "))
            };
            return Err(ConfigError(format!("there is no device {name:?}: {known}")));
        };
        if entry.asker.is_some() || !matches!(entry.state, State::Present | State::Leaving) {
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

    fn list(&self) -> Vec<DeviceState> {
        self.entries.iter().map(|entry| self.describe(entry)).collect()
    }

    fn describe(&self, entry: &Entry) -> DeviceState {
        let device = &entry.device;
        let (backend, identity) = match &device.kind {
            Kind::Disk { path, serial, .. } => {
                (path.display().to_string(), serial.clone().unwrap_or_default())
            }
            Kind::Net { tap, mac, .. } => {
                let mac = mac.unwrap_or_default().map(|byte| format!("{byte:02x}"));
                (tap.clone(), mac.join(":"))
            }
            _ => Default::default(),
        };
        let state = match entry.state {
            State::Opening => "coming",
            State::Present => "present",
            State::Leaving | State::Closing => "leaving",
        };
        DeviceState {
            name: device.name.clone(),
            kind: device.kind.word().into(),
            node: self.node_name(device.node.into()).into(),
            address: address(entry.slot()),
            backend,
            identity,
            limits: device.limits,
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

/// A device that had this name before keeps by what the guest knows it, unless it is given anew.
fn keep_identity(kind: &mut Kind, known: &Kind) {
    match (kind, known) {
        (Kind::Disk { serial, .. }, Kind::Disk { serial: old, .. }) if serial.is_none() => {
            serial.clone_from(old)
        }
        (Kind::Net { mac, .. }, Kind::Net { mac: old, .. }) if mac.is_none() => *mac = *old,
        _ => {}
    }
}

fn tell(asker: Option<(AskerId, Instant)>, answer: Answer, steps: &mut Vec<Step>) {
    steps.extend(asker.map(|(asker, _)| Step::Answer(asker, answer)));
}

fn refuse<T>(why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(why.into()))
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
