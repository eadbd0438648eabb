//! Orders of the coordinator to this node's devices while the machine runs: one after the other, on a thread
//! of their own, since a host may take its time over a file.

use std::sync::Arc;

use anyhow::Context;
use base::lock;
use crossbeam::channel::{Receiver, Sender, unbounded};

use super::pci_devices::PciDevices;
use devices::platform::bus::Shared;
use devices::platform::hotplug::HotPlug;
use machine::control::{Control, DeviceOrder, GivenUp, ToCoordinator};

/// The subjects of orders.
pub struct Subjects {
    /// This node's devices; `None` if it has no bus.
    pub pci: Option<Arc<PciDevices>>,
    /// At node 0: the way to tell the guest.
    pub hotplug: Option<Shared<HotPlug>>,
}

/// Starts the thread; it ends with the channel.
///
/// # Errors
/// What the operating system says of a new thread.
pub fn start(subjects: Subjects, control: Control) -> std::io::Result<Sender<(u32, DeviceOrder)>> {
    let (sender, orders): (_, Receiver<(u32, DeviceOrder)>) = unbounded();
    std::thread::Builder::new().name("device orders".into()).spawn(move || {
        for (id, order) in orders {
            let result = subjects.obey(&order).map_err(|error| format!("{error:#}"));
            // A coordinator that is gone ends the machine.
            let _ = control.send(ToCoordinator::DeviceDone { id, result });
        }
    })?;
    Ok(sender)
}

impl Subjects {
    fn obey(&self, order: &DeviceOrder) -> anyhow::Result<Option<GivenUp>> {
        let devices = || self.pci.as_ref().context("this node has no PCI bus");
        match order {
            DeviceOrder::Add(device) => devices()?.add(device)?,
            DeviceOrder::Remove { slot } => devices()?.remove(*slot)?,
            DeviceOrder::Set { slot, setting } => devices()?.set(*slot, *setting)?,
            DeviceOrder::Measure { slot } => return devices()?.given_up(*slot).map(Some),
            DeviceOrder::Announce { slot, change } => {
                let hotplug = self.hotplug.as_ref().context("only node 0 can tell the guest")?;
                lock(hotplug).announce(*slot, *change);
            }
        }
        Ok(None)
    }
}
