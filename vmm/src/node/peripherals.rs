//! This node's PCI bus with the devices that live here; they may come, go and get other limits while the machine runs.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use coherence::engine::Engine;
use coherence::page::PAGE_SIZE;
use firmware::Layout;

use crate::limits::{Limiter, Limits};
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

/// How long the threads of a device that is taken away may be busy on the host.
const CLOSE: Duration = Duration::from_secs(20);

/// What devices tell the engine, which comes later than they: that a thread of theirs sleeps, and what memory nobody
/// needs.
#[derive(Clone, Default)]
pub struct EngineLink(Arc<OnceLock<Weak<Engine>>>);

impl EngineLink {
    /// From now on it leads to `engine`.
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

    /// The calling thread is about to sleep.
    fn idle(&self) {
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

/// The devices of this node.
pub struct Peripherals {
    number: u8,
    bus: Arc<RootBus>,
    around: Surroundings,
    give_up: GiveUp,
    present: Mutex<BTreeMap<u8, Present>>,
}

/// A device in its slot.
struct Present {
    name: String,
    transport: Arc<Transport>,
    /// One for each direction of a network card.
    limiters: Vec<Arc<Limiter>>,
}

impl Peripherals {
    /// The bus of node `node`, with nothing on it; `None` for a node beyond the last bus.
    pub fn new(
        node: u16,
        ram: &GuestRam,
        layout: &Layout,
        router: &Arc<Router>,
        link: &EngineLink,
    ) -> Option<Peripherals> {
        let number = u8::try_from(node).ok()?;
        let give_up = link.give_up(layout.clone());
        let (router, link) = (router.clone(), link.clone());
        let around = Surroundings {
            memory: ram.clone(),
            deliver: Arc::new(move |message| router.deliver_message(message)),
            on_idle: Arc::new(move || link.idle()),
        };
        let bus = Arc::new(RootBus::new(number));
        Some(Peripherals { number, bus, around, give_up, present: Mutex::default() })
    }

    /// The bus.
    pub fn bus(&self) -> &Arc<RootBus> {
        &self.bus
    }

    /// Opens a device and puts it into its slot.
    ///
    /// # Errors
    /// A disk that cannot be opened and the like, in a sentence.
    pub fn add(&self, place: &Peripheral) -> anyhow::Result<()> {
        if self.lock().contains_key(&place.slot) {
            bail!("slot {} has a device already", place.slot);
        }
        let opened = open(place, &self.give_up)?;
        let base = RootBus::registers_of(self.number, place.slot);
        let transport = Arc::new(Transport::new(&opened.title, opened.device, base, &self.around)?);
        self.bus.insert(place.slot, transport.clone());
        let present = Present { name: place.name.clone(), transport, limiters: opened.limiters };
        self.lock().insert(place.slot, present);
        Ok(())
    }

    /// Takes a device out of its slot and closes it.
    ///
    /// # Errors
    /// There is none, or the host keeps one of its threads busy.
    pub fn remove(&self, slot: u8) -> anyhow::Result<()> {
        let gone = self.lock().remove(&slot).with_context(|| format!("slot {slot} has no device"))?;
        self.bus.remove(slot);
        if !gone.transport.close(CLOSE) {
            bail!(
                "{} is gone from the guest, but its host has not finished its last request within {} s: its file or \
                 interface stays in use until it has",
                gone.name,
                CLOSE.as_secs()
            );
        }
        Ok(())
    }

    /// Holds a device to other limits.
    ///
    /// # Errors
    /// There is no device.
    pub fn set(&self, slot: u8, limits: Limits) -> anyhow::Result<()> {
        let present = self.lock();
        let device = present.get(&slot).with_context(|| format!("slot {slot} has no device"))?;
        device.limiters.iter().for_each(|limiter| limiter.set(limits));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Present>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device before it has a slot.
struct Opened {
    /// Its name in messages.
    title: String,
    device: Box<dyn Device>,
    limiters: Vec<Arc<Limiter>>,
}

fn open(place: &Peripheral, give_up: &GiveUp) -> anyhow::Result<Opened> {
    let unlimited = |title: String, device: Box<dyn Device>| Opened { title, device, limiters: Vec::new() };
    let limiter = || Arc::new(Limiter::new(place.limits));
    Ok(match &place.kind {
        Kind::Disk { path, readonly, serial, queues } => {
            let config = BlockConfig {
                name: format!("disk {}", path.display()),
                serial: serial.clone().unwrap_or_default(),
                readonly: *readonly,
                queues: queues.unwrap_or(1),
            };
            let (title, limiter) = (config.name.clone(), limiter());
            let disk = block::open(path, *readonly)?;
            let device = Box::new(Block::new(disk, config).limited(limiter.clone()));
            Opened { title, device, limiters: vec![limiter] }
        }
        Kind::Net { tap, mac, queues } => {
            let pairs = queues.unwrap_or(1);
            let port = Arc::new(Tap::open(tap, pairs)?);
            let (receive, transmit) = (limiter(), limiter());
            let card = Net::new(port, pairs, mac.unwrap_or_default());
            let device = Box::new(card.limited(receive.clone(), transmit.clone()));
            Opened { title: format!("network card {tap}"), device, limiters: vec![receive, transmit] }
        }
        Kind::Seed { user_data, meta_data, network_config } => {
            let mut files = vec![("user-data", user_data.as_str()), ("meta-data", meta_data)];
            files.extend(network_config.iter().map(|text| ("network-config", text.as_str())));
            let disk = Arc::new(MemoryDisk(firmware::seed::image(&files)?));
            let title = "cloud-init's seed".to_owned();
            let config =
                BlockConfig { name: title.clone(), serial: "seed".into(), readonly: true, queues: 1 };
            unlimited(title, Box::new(Block::new(disk, config)))
        }
        Kind::Entropy => unlimited("entropy device".into(), Box::new(Entropy)),
        Kind::Console { socket, name } => {
            let port = Port::bind(socket)?;
            match name {
                None => unlimited(format!("console {}", socket.display()), Box::new(Console::terminal(port))),
                Some(name) => unlimited(format!("channel {name}"), Box::new(Console::channel(port, name))),
            }
        }
        Kind::Balloon { size } => unlimited("balloon".into(), Box::new(Balloon::new(*size, give_up.clone()))),
    })
}
