//! This node's PCI bus with the devices that live here.

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use coherence::engine::Engine;
use coherence::page::PAGE_SIZE;
use firmware::Layout;

use crate::pci::RootBus;
use crate::peripherals::{Kind, Peripheral};
use crate::router::Router;
use crate::virtio::balloon::{Balloon, GiveUp};
use crate::virtio::block::{self, Block, BlockConfig, MemoryDisk};
use crate::virtio::console::{Console, Port};
use crate::virtio::entropy::Entropy;
use crate::virtio::net::{Net, Tap};
use crate::virtio::transport::Surroundings;
use crate::virtio::{Device, GuestRam, Transport};

/// How long a balloon waits for the homes of pages that it gives up.
const GIVE_UP: Duration = Duration::from_secs(60);

/// What devices tell the engine, which comes later than they: that a thread of theirs sleeps, and what memory nobody
/// needs.
#[derive(Clone, Default)]
pub struct Idle(Arc<OnceLock<Weak<Engine>>>);

impl Idle {
    /// From now on threads that sleep are known to `engine`.
    pub fn connect(&self, engine: &Arc<Engine>) {
        // Connected once.
        let _ = self.0.set(Arc::downgrade(engine));
    }

    fn engine(&self) -> Option<Arc<Engine>> {
        self.0.get().and_then(Weak::upgrade)
    }

    /// Gives up pages of the guest's memory, which is laid out as `layout` says.
    fn give_up(&self, layout: Layout) -> GiveUp {
        let link = self.clone();
        Arc::new(move |addresses| {
            // Before the engine is there nothing runs that could need memory.
            let Some(engine) = link.engine() else { return Ok(()) };
            engine.discard(&pages(&layout, addresses), GIVE_UP).map_err(io::Error::other)
        })
    }

    fn now(&self) {
        if let Some(engine) = self.engine() {
            engine.idle(nix::unistd::gettid().as_raw() as u32);
        }
    }
}

/// The pages of RAM at these addresses, whole pages in order.
fn pages(layout: &Layout, addresses: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut pages = Vec::with_capacity(addresses.len());
    for wanted in addresses {
        for ram in layout.ram_ranges() {
            let (start, end) = (wanted.start.max(ram.gpa), wanted.end.min(ram.gpa + ram.len));
            if start < end {
                let page = |gpa: u64| (gpa - ram.gpa + ram.offset) / PAGE_SIZE as u64;
                pages.push(page(start)..page(end));
            }
        }
    }
    pages
}

/// The bus of node `node` with those of `devices` that live there; `None` for a node beyond the last bus.
///
/// # Errors
/// A disk that cannot be opened and the like, in a sentence.
pub fn root_bus(
    node: u16,
    devices: &[Peripheral],
    ram: &GuestRam,
    layout: &Layout,
    router: &Arc<Router>,
    idle: &Idle,
) -> anyhow::Result<Option<RootBus>> {
    let Some(number) = u8::try_from(node).ok() else { return Ok(None) };
    let give_up = idle.give_up(layout.clone());
    let (router, idle) = (router.clone(), idle.clone());
    let around = Surroundings {
        memory: ram.clone(),
        deliver: Arc::new(move |message| router.deliver_message(message)),
        on_idle: Arc::new(move || idle.now()),
    };
    let mut bus = RootBus::new(number);
    for place in devices.iter().filter(|place| place.node == node) {
        let (name, device) = device(&place.kind, &give_up)?;
        let base = RootBus::registers_of(number, place.slot);
        bus.insert(place.slot, Arc::new(Transport::new(&name, device, base, &around)?));
    }
    Ok(Some(bus))
}

/// The device and its name in messages.
fn device(kind: &Kind, give_up: &GiveUp) -> anyhow::Result<(String, Box<dyn Device>)> {
    Ok(match kind {
        Kind::Disk { path, readonly, serial, queues } => {
            let config = BlockConfig {
                name: format!("disk {}", path.display()),
                serial: serial.clone().unwrap_or_default(),
                readonly: *readonly,
                queues: queues.unwrap_or(1),
            };
            let disk = block::open(path, *readonly)?;
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
        Kind::Console { socket, name } => {
            let port = Port::bind(socket)?;
            match name {
                None => (format!("console {}", socket.display()), Box::new(Console::terminal(port))),
                Some(name) => (format!("channel {name}"), Box::new(Console::channel(port, name))),
            }
        }
        Kind::Balloon { size } => ("balloon".into(), Box::new(Balloon::new(*size, give_up.clone()))),
    })
}
