//! This node's PCI bus with the devices that live here.

use std::sync::{Arc, OnceLock, Weak};

use coherence::engine::Engine;

use crate::pci::RootBus;
use crate::peripherals::{Kind, Peripheral};
use crate::router::Router;
use crate::virtio::block::{Block, BlockConfig, MemoryDisk, RawDisk};
use crate::virtio::entropy::Entropy;
use crate::virtio::net::{Net, Tap};
use crate::virtio::transport::Surroundings;
use crate::virtio::{Device, GuestRam, Transport};

/// Tells the engine that a device's thread sleeps. The engine comes later than the devices.
#[derive(Clone, Default)]
pub struct Idle(Arc<OnceLock<Weak<Engine>>>);

impl Idle {
    /// From now on threads that sleep are known to `engine`.
    pub fn connect(&self, engine: &Arc<Engine>) {
        // Connected once.
        let _ = self.0.set(Arc::downgrade(engine));
    }

    fn now(&self) {
        if let Some(engine) = self.0.get().and_then(Weak::upgrade) {
            engine.idle(nix::unistd::gettid().as_raw() as u32);
        }
    }
}

/// The bus of node `node` with those of `devices` that live there; `None` for a node beyond the last bus.
///
/// # Errors
/// A disk that cannot be opened and the like, in a sentence.
pub fn root_bus(
    node: u16,
    devices: &[Peripheral],
    ram: &GuestRam,
    router: &Arc<Router>,
    idle: &Idle,
) -> anyhow::Result<Option<RootBus>> {
    let Some(number) = u8::try_from(node).ok() else { return Ok(None) };
    let (router, idle) = (router.clone(), idle.clone());
    let around = Surroundings {
        memory: ram.clone(),
        deliver: Arc::new(move |message| router.deliver_message(message)),
        on_idle: Arc::new(move || idle.now()),
    };
    let mut bus = RootBus::new(number);
    for place in devices.iter().filter(|place| place.node == node) {
        let (name, device) = device(&place.kind)?;
        let base = RootBus::registers_of(number, place.slot);
        bus.insert(place.slot, Arc::new(Transport::new(&name, device, base, &around)?));
    }
    Ok(Some(bus))
}

/// The device and its name in messages.
fn device(kind: &Kind) -> anyhow::Result<(String, Box<dyn Device>)> {
    Ok(match kind {
        Kind::Disk { path, readonly, serial, queues } => {
            let config = BlockConfig {
                name: format!("disk {}", path.display()),
                serial: serial.clone().unwrap_or_default(),
                readonly: *readonly,
                queues: queues.unwrap_or(1),
            };
            let disk = Arc::new(RawDisk::open(path, *readonly)?);
            (config.name.clone(), Box::new(Block::new(disk, config)))
        }
        Kind::Net { tap, mac, queues } => {
            let pairs = queues.unwrap_or(1);
            let port = Arc::new(Tap::open(tap, pairs)?);
            let card = Net::new(port, pairs, mac.unwrap_or_default());
            (format!("network card {tap}"), Box::new(card))
        }
        Kind::Seed { user_data, meta_data, network_config } => {
            let mut files = vec![("user-data", user_data.as_str()), ("meta-data", meta_data)];
            files.extend(network_config.iter().map(|text| ("network-config", text.as_str())));
            let disk = Arc::new(MemoryDisk(firmware::seed::image(&files)?));
            let name = "cloud-init's seed".to_owned();
            let config = BlockConfig { name: name.clone(), serial: "seed".into(), readonly: true, queues: 1 };
            (name, Box::new(Block::new(disk, config)))
        }
        Kind::Entropy => ("entropy device".into(), Box::new(Entropy)),
    })
}
