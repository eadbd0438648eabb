//! This node's PCI bus with the devices that live here; they may come, go and get other limits while the
//! machine runs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::router::Router;
use devices::pci::RootBus;
use devices::rate_limit::{Limiter, Pool};
use devices::virtio::balloon::{Account, Balloon};
use devices::virtio::block::{self, Access, Block, BlockConfig, Durable, MemoryDisk};
use devices::virtio::console::{Console, Port};
use devices::virtio::entropy::Entropy;
use devices::virtio::net::{Net, Tap};
use devices::virtio::pci_device::DeviceContext;
use devices::virtio::{GuestRam, VirtioDevice, VirtioPciDevice};
use machine::config::devices::{PlacedDevice, PlacedKind};
use machine::config::limits::Capacity;
use machine::control::fence::Fence;
use machine::control::{GivenUp, Setting};

/// How long the threads of a device that is taken away may be busy on the host.
const CLOSE: Duration = Duration::from_secs(20);

/// The devices of this node.
pub struct PciDevices {
    number: u8,
    bus: Arc<RootBus>,
    context: DeviceContext,
    pools: Pools,
    present: Mutex<BTreeMap<u8, Present>>,
}

/// The pools from which devices take what they may do together, where that is limited.
struct Pools {
    disks: Option<Arc<Pool>>,
    receive: Option<Arc<Pool>>,
    transmit: Option<Arc<Pool>>,
}

/// A device in its slot.
struct Present {
    name: String,
    function: Arc<VirtioPciDevice>,
    handles: Handles,
}

/// The handles by which a device is changed while it is used.
enum Handles {
    /// One for each direction of a network card.
    Limits(Vec<Arc<Limiter>>),
    Balloon(Arc<Account>),
    None,
}

impl PciDevices {
    /// The bus of node `node`, with nothing on it; `None` for a node beyond the last bus. All devices on it
    /// may do what `capacity` says.
    pub fn new(
        node: u16,
        capacity: Capacity,
        ram: &GuestRam,
        router: &Arc<Router>,
        fence: Arc<Fence>,
    ) -> Option<PciDevices> {
        let number = u8::try_from(node).ok()?;
        let router = router.clone();
        let context = DeviceContext {
            memory: ram.clone(),
            deliver: Arc::new(move |message| router.deliver_message(message)),
            fence,
        };
        let bus = Arc::new(RootBus::new(number));
        let pools = Pools {
            disks: Pool::new(capacity.disks),
            receive: Pool::new(capacity.cards),
            transmit: Pool::new(capacity.cards),
        };
        Some(PciDevices { number, bus, context, pools, present: Mutex::default() })
    }

    /// The bus.
    pub fn bus(&self) -> &Arc<RootBus> {
        &self.bus
    }

    /// Opens a device and puts it into its slot.
    ///
    /// # Errors
    /// A disk that cannot be opened and the like, in a sentence.
    pub fn add(&self, device: &PlacedDevice) -> anyhow::Result<()> {
        let slot = device.slot;
        if self.lock().contains_key(&slot) {
            bail!("slot {slot} has a device already");
        }
        let opened = open(device, &self.pools)?;
        let base = RootBus::registers_of(self.number, slot);
        let function = Arc::new(VirtioPciDevice::new(&opened.title, opened.device, base, &self.context)?);
        self.bus.insert(slot, function.clone());
        let present = Present { name: device.name.clone(), function, handles: opened.handles };
        self.lock().insert(slot, present);
        Ok(())
    }

    /// Takes a device out of its slot and closes it.
    ///
    /// # Errors
    /// There is none, or the host keeps one of its threads busy.
    pub fn remove(&self, slot: u8) -> anyhow::Result<()> {
        let gone = self.lock().remove(&slot).with_context(|| format!("slot {slot} has no device"))?;
        self.bus.remove(slot);
        if !gone.function.close(CLOSE) {
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
                    limiter.set_share(share);
                }
            }
            (Handles::Balloon(account), Setting::Size(size)) => {
                account.set_size(size);
                device.function.changed();
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
    device: Box<dyn VirtioDevice>,
    handles: Handles,
}

fn open(device: &PlacedDevice, pools: &Pools) -> anyhow::Result<Opened> {
    let fixed =
        |title: String, device: Box<dyn VirtioDevice>| Opened { title, device, handles: Handles::None };
    let limiter = |pool: &Option<Arc<Pool>>| {
        let member = pool.as_ref().map(|pool| pool.join(device.share));
        Arc::new(Limiter::new(device.limits, member))
    };
    Ok(match &device.kind {
        PlacedKind::Disk { path, readonly, unlocked, serial, queues } => {
            let config = BlockConfig {
                name: format!("disk {}", path.display()),
                serial: serial.clone(),
                readonly: *readonly,
                queues: *queues,
            };
            let title = config.name.clone();
            let access = Access { readonly: *readonly, unlocked: *unlocked };
            let disk = block::open(path, access)?;
            let disk = Arc::new(Durable::new(disk));
            let limiter = limiter(&pools.disks);
            let device = Box::new(Block::new(disk, config).limited(limiter.clone()));
            Opened { title, device, handles: Handles::Limits(vec![limiter]) }
        }
        PlacedKind::Net { tap, mac, queues } => {
            let port = Arc::new(Tap::open(tap, *queues)?);
            let (receive, transmit) = (limiter(&pools.receive), limiter(&pools.transmit));
            let card = Net::new(port, *queues, *mac);
            let device = Box::new(card.limited(receive.clone(), transmit.clone()));
            let handles = Handles::Limits(vec![receive, transmit]);
            Opened { title: format!("network card {tap}"), device, handles }
        }
        PlacedKind::Seed { user_data, meta_data, network_config } => {
            let mut files = vec![("user-data", user_data.as_str()), ("meta-data", meta_data)];
            files.extend(network_config.iter().map(|text| ("network-config", text.as_str())));
            let disk = Arc::new(MemoryDisk(firmware::seed::image(&files)?));
            let title = "cloud-init's seed".to_owned();
            let config =
                BlockConfig { name: title.clone(), serial: "seed".into(), readonly: true, queues: 1 };
            fixed(title, Box::new(Block::new(disk, config)))
        }
        PlacedKind::Entropy => fixed("entropy device".into(), Box::new(Entropy)),
        PlacedKind::Console { socket } => {
            let port = Port::bind(socket)?;
            fixed(format!("console {}", socket.display()), Box::new(Console::terminal(port)))
        }
        PlacedKind::Channel { socket, name } => {
            let port = Port::bind(socket)?;
            fixed(format!("channel {name}"), Box::new(Console::channel(port, name)))
        }
        PlacedKind::Balloon { size } => {
            let balloon = Balloon::new(*size);
            let handles = Handles::Balloon(balloon.account().clone());
            Opened { title: "balloon".into(), device: Box::new(balloon), handles }
        }
    })
}
