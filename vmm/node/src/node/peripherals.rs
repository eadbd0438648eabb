//! This node's PCI bus with the devices that live here; they may come, go and get other limits while the machine runs.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use coherence::engine::Engine;
use coherence::page::PAGE_SIZE;
use firmware::Layout;

use crate::router::Router;
use devices::pci::RootBus;
use devices::rate_limit::{Limiter, Pool};
use devices::virtio::balloon::{Account, Balloon, GiveUp};
use devices::virtio::block::{self, Block, BlockConfig, MemoryDisk};
use devices::virtio::console::{Console, Port};
use devices::virtio::entropy::Entropy;
use devices::virtio::net::{Net, Tap};
use devices::virtio::transport::Surroundings;
use devices::virtio::{Device, GuestRam, Transport};
use machine::config::devices::{Kind, Peripheral};
use machine::config::limits::{Capacity, DEFAULT_SHARE};
use machine::control::{GivenUp, Setting};

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
            engine.idle(base::thread::id() as u32);
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
    pools: Pools,
    present: Mutex<BTreeMap<u8, Present>>,
}

/// What devices do together where that is limited.
struct Pools {
    disks: Option<Arc<Pool>>,
    receive: Option<Arc<Pool>>,
    transmit: Option<Arc<Pool>>,
}

/// A device in its slot.
struct Present {
    name: String,
    transport: Arc<Transport>,
    handles: Handles,
}

/// By what a device is changed while it is used.
enum Handles {
    /// One for each direction of a network card.
    Limits(Vec<Arc<Limiter>>),
    Balloon(Arc<Account>),
    None,
}

impl Peripherals {
    /// The bus of node `node`, with nothing on it; `None` for a node beyond the last bus. All devices on it may do what
    /// `capacity` says.
    pub fn new(
        node: u16,
        capacity: Capacity,
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
        let pools = Pools {
            disks: Pool::new(capacity.disks),
            receive: Pool::new(capacity.cards),
            transmit: Pool::new(capacity.cards),
        };
        Some(Peripherals { number, bus, around, give_up, pools, present: Mutex::default() })
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
        let opened = open(place, &self.pools, &self.give_up)?;
        let base = RootBus::registers_of(self.number, place.slot);
        let transport = Arc::new(Transport::new(&opened.title, opened.device, base, &self.around)?);
        self.bus.insert(place.slot, transport.clone());
        let present = Present { name: place.name.clone(), transport, handles: opened.handles };
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

    /// Changes a device.
    ///
    /// # Errors
    /// There is no device, or not one with such a setting.
    pub fn set(&self, slot: u8, setting: Setting) -> anyhow::Result<()> {
        let present = self.lock();
        let device = present.get(&slot).with_context(|| format!("slot {slot} has no device"))?;
        match (&device.handles, setting) {
            (Handles::Limits(limiters), Setting::Limits { limits, share }) => {
                for limiter in limiters {
                    limiter.set(limits);
                    limiter.set_share(share.unwrap_or(DEFAULT_SHARE));
                }
            }
            (Handles::Balloon(account), Setting::Size(size)) => {
                account.set_size(size);
                device.transport.changed();
            }
            _ => bail!("{} cannot be changed in that way", device.name),
        }
        Ok(())
    }

    /// What the guest has given up through a balloon.
    ///
    /// # Errors
    /// There is no balloon in that slot.
    pub fn given_up(&self, slot: u8) -> anyhow::Result<GivenUp> {
        match self.lock().get(&slot).map(|device| &device.handles) {
            Some(Handles::Balloon(account)) => Ok(account.given_up()),
            _ => bail!("slot {slot} has no balloon"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u8, Present>> {
        base::lock(&self.present)
    }
}

/// A device before it has a slot.
struct Opened {
    /// Its name in messages.
    title: String,
    device: Box<dyn Device>,
    handles: Handles,
}

fn open(place: &Peripheral, pools: &Pools, give_up: &GiveUp) -> anyhow::Result<Opened> {
    let fixed = |title: String, device: Box<dyn Device>| Opened { title, device, handles: Handles::None };
    let limiter = |pool: &Option<Arc<Pool>>| {
        let member = pool.as_ref().map(|pool| pool.join(place.share.unwrap_or(DEFAULT_SHARE)));
        Arc::new(Limiter::new(place.limits, member))
    };
    Ok(match &place.kind {
        Kind::Disk { path, readonly, serial, queues } => {
            let config = BlockConfig {
                name: format!("disk {}", path.display()),
                serial: serial.clone().unwrap_or_default(),
                readonly: *readonly,
                queues: queues.unwrap_or(1),
            };
            let title = config.name.clone();
            let disk = block::open(path, *readonly)?;
            let limiter = limiter(&pools.disks);
            let device = Box::new(Block::new(disk, config).limited(limiter.clone()));
            Opened { title, device, handles: Handles::Limits(vec![limiter]) }
        }
        Kind::Net { tap, mac, queues } => {
            let pairs = queues.unwrap_or(1);
            let port = Arc::new(Tap::open(tap, pairs)?);
            let (receive, transmit) = (limiter(&pools.receive), limiter(&pools.transmit));
            let card = Net::new(port, pairs, mac.unwrap_or_default());
            let device = Box::new(card.limited(receive.clone(), transmit.clone()));
            let handles = Handles::Limits(vec![receive, transmit]);
            Opened { title: format!("network card {tap}"), device, handles }
        }
        Kind::Seed { user_data, meta_data, network_config } => {
            let mut files = vec![("user-data", user_data.as_str()), ("meta-data", meta_data)];
            files.extend(network_config.iter().map(|text| ("network-config", text.as_str())));
            let disk = Arc::new(MemoryDisk(firmware::seed::image(&files)?));
            let title = "cloud-init's seed".to_owned();
            let config =
                BlockConfig { name: title.clone(), serial: "seed".into(), readonly: true, queues: 1 };
            fixed(title, Box::new(Block::new(disk, config)))
        }
        Kind::Entropy => fixed("entropy device".into(), Box::new(Entropy)),
        Kind::Console { socket, name } => {
            let port = Port::bind(socket)?;
            match name {
                None => fixed(format!("console {}", socket.display()), Box::new(Console::terminal(port))),
                Some(name) => fixed(format!("channel {name}"), Box::new(Console::channel(port, name))),
            }
        }
        Kind::Balloon { size } => {
            let balloon = Balloon::new(*size, give_up.clone());
            let handles = Handles::Balloon(balloon.account().clone());
            Opened { title: "balloon".into(), device: Box::new(balloon), handles }
        }
    })
}
