//! The node's parts, each built on those before it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use base::lock;
use coherence::engine::vcpus::Vcpus as ShippingVcpus;
use coherence::engine::{Engine, EngineConfig, OnFailure};
use coherence::memory::DualMemory;
use coherence::page::Homes;
use coherence::protocol;
use crossbeam::channel::{Receiver, Sender, unbounded};
use fabric::rdma::RdmaTransport;
use fabric::secure::PrivateKey;
use fabric::tcp::{Listener, MeshConfig, MeshKeys};
use fabric::{NodeId, Transport};
use firmware::{Layout, acpi, boot, cpuid};
use kvm_ioctls::Kvm;

use super::boot_disk::BootPaths;
use super::console::{self, Input};
use super::pci_devices::PciDevices;
use super::platform::Platform;
use super::shipping::{Desk, Shipping};
use super::{Event, StateText, VCPUS, counters, orders};
use crate::clock::thread::{Aligner, Pong};
use crate::clock::{GuestClock, Scale};
use crate::disk_search;
use crate::kvm::{HostCpu, Vm, caps, msr};
use crate::router::lane::{ControlLane, DeviceSide, LaneConfig};
use crate::router::peers::{Peers, spawn_heartbeat};
use crate::router::remote::{AllDevices, DeviceServer, LocalDevices};
use crate::router::{CONTROL_LANE, Router};
use crate::trace;
use crate::vcpu::{self, Environment, Shipper, Table, VcpuConfig, Vcpus, waiting};
use devices::platform::bus::Shared;
use devices::platform::hotplug::HotPlug;
use devices::virtio::GuestRam;
use machine::config::ShipMode;
use machine::control::{Assignment, Control, DeviceOrder, Joined, NodeReport, Start, ToCoordinator};

/// How long the mesh may take once everybody has joined.
const MESH: Duration = Duration::from_secs(30);
/// How long the first measurement of the clocks may take.
const ALIGN: Duration = Duration::from_secs(20);
/// A fault that waits longer than this ends the machine.
const STUCK: Duration = Duration::from_secs(30);
/// How long an idle thread polls before it sleeps, where there are CPUs to spare.
const SPIN: Duration = Duration::from_micros(50);
/// Events of the trace in a dump.
const TRACE: usize = 4000;

/// This host's contribution, before the others are known.
pub struct Host {
    kvm: Kvm,
    cpu: HostCpu,
    /// Whether a vCPU can be called out of its wait for a page.
    can_call_out: bool,
    listener: Listener,
    /// Drawn for this run.
    key: PrivateKey,
}

impl Host {
    /// Asks KVM and opens the fabric's listener.
    ///
    /// # Errors
    /// What is wrong with the host, or with the address.
    pub fn open(assignment: &Assignment) -> anyhow::Result<Host> {
        let kvm = caps::open()?;
        let cpu = HostCpu::probe(&kvm)?;
        let called_out = waiting::can_be_called_out(&kvm, &cpu);
        if let Err(why) = &called_out {
            tracing::warn!("vCPUs take no interrupts while they wait for a page: {why}");
        }
        let listener = Listener::bind(&assignment.fabric_listen)?;
        Ok(Host { kvm, cpu, can_call_out: called_out.is_ok(), listener, key: PrivateKey::generate()? })
    }

    /// What the other nodes must know of it.
    pub fn joined(&self) -> Joined {
        Joined {
            fabric: self.listener.local_addrs().to_vec(),
            fabric_key: self.key.public().0,
            cpuid: self.cpu.cpuid.clone(),
            arch_capabilities: self.cpu.arch_capabilities,
            tsc_khz: self.cpu.tsc_khz,
            tsc_control: self.cpu.tsc_control,
        }
    }
}

/// A node that is ready to run, or runs.
pub struct Node {
    /// Its vCPUs.
    pub vcpus: Vcpus,
    /// Interrupts and device accesses to and from the others.
    pub router: Arc<Router>,
    /// What is typed goes here; node 0 listens.
    pub input: Sender<Input>,
    /// Changes of this node's devices, each with its number, go here.
    pub orders: Sender<(u32, DeviceOrder)>,
    engine: Arc<Engine>,
    transport: Arc<dyn Transport>,
    clock: Arc<GuestClock>,
    /// If anything is shipped.
    shipping: Option<Arc<Shipping>>,
    /// Lives as long as the vCPUs.
    _vm: Vm,
    _memory: Arc<DualMemory>,
    _lane: ControlLane,
    _stops: Vec<Sender<()>>,
}

impl Node {
    /// Meshes with the others and builds everything up to the first instruction.
    ///
    /// # Errors
    /// What cannot be had, as a sentence.
    pub fn build(
        host: Host,
        assignment: &Assignment,
        start: &Start,
        control: &Control,
        events: &Sender<Event>,
    ) -> anyhow::Result<Node> {
        let machine = &assignment.machine;
        let node = NodeId(assignment.node);
        let layout = Layout::new(&machine.spec, acpi::size_bound(&machine.spec))?;
        let Host { kvm, cpu, can_call_out, listener, key } = host;
        let keys = MeshKeys { own: key, nodes: start.fabric_keys() };
        let transport = mesh(listener, assignment, start.addresses(), keys)?;

        let memory = Arc::new(DualMemory::new(layout.pages()).context(
            "cannot map the guest's memory: raise vm.max_map_count or vm.overcommit_memory, or make the guest smaller",
        )?);
        // Before the devices, which reach guest memory through it.
        let engine = Arc::new(engine(assignment, &layout, &memory, &transport, events)?);
        let ram = GuestRam::new(&memory, &engine, &layout)?;

        let table = Arc::new(Table::new(layout.node_cpus(node.index()).len()));
        let link_events = events.clone();
        let peers = Arc::new(Peers::new(
            node,
            layout.nodes(),
            machine.silence,
            // Nobody listens any more once the machine ends.
            Box::new(move |failure| drop(link_events.send(failure.into()))),
        ));
        let router = Arc::new(Router::new(layout.cpus(), table.clone(), transport.clone(), peers));

        let (input, inputs) = unbounded();
        let (mut local, hotplug) = match node.0 {
            0 => platform(&router, control, events, input.clone(), inputs)?,
            _ => (LocalDevices::default(), None),
        };
        let mut pci = None;
        if machine.spec.pci {
            let capacity = machine.capacities.get(node.index()).copied().unwrap_or_default();
            let devices = PciDevices::new(assignment.node, capacity, &ram, &router, control.fence().clone());
            pci = devices.map(Arc::new);
            for place in machine.devices.iter().filter(|place| place.node == assignment.node) {
                pci.as_ref().context("this node has no PCI bus")?.add(place)?;
            }
            local.pci = pci.as_ref().map(|devices| devices.bus().clone());
        }
        let orders = orders::start(orders::Subjects { pci, hotplug }, control.clone())?;
        let local = Arc::new(local);
        let buses = if machine.spec.pci { firmware::pci::buses(layout.nodes()) } else { 0 };
        let devices = Arc::new(AllDevices::new(router.clone(), buses, local.clone()));
        let server = DeviceServer::start(router.clone(), local)?;
        let side = DeviceSide { served: server.queue(), asked: devices.clone() };
        // It serves until the process ends.
        std::mem::forget(server);

        let clock = Arc::new(guest_clock(&cpu, start)?);
        let (pong_sender, pongs) = unbounded();
        let receiver = transport.take_receiver(CONTROL_LANE).context("lane 0 was taken before")?;
        let lane = LaneConfig {
            router: router.clone(),
            clock: clock.clone(),
            pongs: (node.0 != 0).then_some(pong_sender),
            devices: side,
            spin: Duration::ZERO,
        };
        let lane = ControlLane::start(receiver, lane)?;
        let mut stops = vec![heartbeat(&router)?];
        if node.0 != 0 {
            stops.push(align(&clock, &router, pongs, events)?);
        }

        let vm = Vm::new(&kvm)?;
        map_ram(&vm, &memory, &layout)?;
        let shipping;
        let vcpus = {
            let base = cpuid::intersect(&start.nodes.iter().map(|n| n.cpuid.clone()).collect::<Vec<_>>())?;
            cpuid::check_memory(&base, &layout)?;
            let khz = clock.khz() as u32;
            let boot = match node.0 {
                0 => Some(load_kernel(&ram, &layout, assignment, khz)?),
                _ => None,
            };
            let arch = cpuid::arch_capabilities(
                &start.nodes.iter().map(|n| n.arch_capabilities).collect::<Vec<_>>(),
            );
            let msrs = if arch != 0 { vec![(msr::ARCH_CAPABILITIES, arch)] } else { Vec::new() };
            let configs: Vec<_> = layout
                .node_cpus(node.index())
                .iter()
                .map(|place| VcpuConfig {
                    vcpu: place.vcpu,
                    apic_id: place.apic_id,
                    cpuid: cpuid::for_vcpu(&base, &layout, place, khz),
                    msrs: msrs.clone(),
                    start: match &boot {
                        Some(registers) if place.vcpu == 0 => vcpu::Start::Boot(Box::new(*registers)),
                        _ => vcpu::Start::WaitForSipi,
                    },
                })
                .collect();
            let vcpu_events = events.clone();
            let idle = engine.clone();
            shipping = ship(machine.ship, can_call_out, &engine, &memory, &layout, &base, &table);
            let env = Environment {
                devices,
                interrupts: router.clone(),
                clock: clock.clone(),
                on_idle: Arc::new(move |thread| idle.idle(thread)),
                timer_rest: machine.timer_rest,
                shipper: shipping.clone().map(|shipping| shipping as Arc<dyn Shipper>),
                on_failure: Arc::new(move |failure| drop(vcpu_events.send(failure.into()))),
            };
            Vcpus::create(&vm, table, &configs, &env)?
        };

        Ok(Node {
            vcpus,
            router,
            input,
            orders,
            engine,
            transport,
            clock,
            shipping,
            _vm: vm,
            _memory: memory,
            _lane: lane,
            _stops: stops,
        })
    }

    /// The node's counters.
    pub fn report(&self) -> NodeReport {
        counters::report(
            &self.engine.totals(),
            &self.transport.stats(),
            &self.vcpus.counters(),
            &self.clock.stats(),
            self.shipping.as_deref(),
        )
    }

    /// What makes the text of a dump: vCPUs, pages under way, the trace.
    pub fn state(&self) -> StateText {
        let (table, engine, clock) = (self.vcpus.table().clone(), self.engine.clone(), self.clock.clone());
        Arc::new(move || {
            let mut text = table.dump(VCPUS);
            text += &format!("\nclock: {:?}\n", clock.stats());
            let totals = engine.totals().list().into_iter().map(|(name, n)| format!("{name} {n}"));
            text += &format!("memory: {}\n", totals.collect::<Vec<_>>().join(", "));
            for line in engine.describe(VCPUS) {
                text += &line;
                text.push('\n');
            }
            let mut events = Vec::new();
            // Writing to memory does not fail.
            let _ = trace::dump(&mut events, TRACE);
            text + &String::from_utf8_lossy(&events)
        })
    }
}

fn mesh(
    listener: Listener,
    assignment: &Assignment,
    addresses: Vec<Vec<SocketAddr>>,
    keys: MeshKeys,
) -> anyhow::Result<Arc<dyn Transport>> {
    let machine = &assignment.machine;
    let rails: Vec<IpAddr> = listener.local_addrs().iter().map(SocketAddr::ip).collect();
    // Every rail of RDMA is connected over lanes of its own.
    let shares = if machine.rdma.is_some() { rails.len().max(1) as u16 } else { 1 };
    let session: Arc<dyn Transport> = Arc::new(listener.mesh(MeshConfig {
        node: NodeId(assignment.node),
        addresses,
        lanes: shares * (machine.shards + 1),
        machine: assignment.machine.id,
        version: env!("CARGO_PKG_VERSION").into(),
        keys,
        plaintext: assignment.machine.plaintext_fabric,
        timeout: MESH,
        silence: machine.silence,
    })?);
    let Some(rdma) = &machine.rdma else { return Ok(session) };
    let settings = rdma.settings(&machine.spec.nodes[usize::from(assignment.node)].name);
    if rails.len() > 1 {
        let rails: Vec<_> = rails.into_iter().map(|address| (settings.clone(), Some(address))).collect();
        return Ok(RdmaTransport::connect_rails(session, &rails, MESH)?.into());
    }
    Ok(Arc::new(RdmaTransport::connect(session, &settings, rails.first().copied(), MESH)?))
}

/// The guest's TSC at this node; its frequency is node 0's.
fn guest_clock(cpu: &HostCpu, start: &Start) -> anyhow::Result<GuestClock> {
    let machine_khz = u64::from(start.nodes.first().context("a machine without nodes")?.tsc_khz);
    if !cpu.tsc_offset {
        return Ok(GuestClock::fixed(machine_khz));
    }
    let vendor = cpu.cpuid.iter().find(|entry| entry.leaf == 0);
    let amd = vendor.is_some_and(|entry| entry.ebx == u32::from_le_bytes(*b"Auth"));
    let scale = Scale::choose(u64::from(cpu.tsc_khz), machine_khz, cpu.tsc_control, amd)?;
    Ok(GuestClock::new(machine_khz, scale))
}

fn heartbeat(router: &Arc<Router>) -> anyhow::Result<Sender<()>> {
    let (stop, stopped) = unbounded();
    spawn_heartbeat(router.clone(), stopped)?;
    Ok(stop)
}

/// What is needed to ship instructions, if they are. A host that cannot call a vCPU out ships none; the
/// others' may still be carried out there.
fn ship(
    mode: ShipMode,
    can_call_out: bool,
    engine: &Arc<Engine>,
    memory: &Arc<DualMemory>,
    layout: &Layout,
    cpuid: &[firmware::cpuid::CpuidEntry],
    table: &Arc<Table>,
) -> Option<Arc<Shipping>> {
    let how = match mode {
        ShipMode::Off => return None,
        ShipMode::Auto => protocol::Shipping::Auto(protocol::Rules::default()),
        ShipMode::Always => protocol::Shipping::Always,
    };
    let sizes = cpuid.iter().find(|entry| entry.leaf == 0x8000_0008);
    // What a CPU without the leaf has.
    let physical_bits = sizes.map_or(36, |entry| entry.eax as u8);
    let desk = Arc::new(Desk::new(table.clone(), can_call_out));
    engine.ship(&(desk.clone() as Arc<dyn ShippingVcpus>), how);
    let shipping = Shipping::new(engine.clone(), memory.clone(), layout.ram_ranges(), physical_bits, desk);
    Some(Arc::new(shipping))
}

/// Sets this node's clock to node 0's and keeps it there.
fn align(
    clock: &Arc<GuestClock>,
    router: &Arc<Router>,
    pongs: Receiver<Pong>,
    events: &Sender<Event>,
) -> anyhow::Result<Sender<()>> {
    let mut aligner = Aligner::new(clock.clone(), router.clone(), pongs);
    let bound = aligner.align(ALIGN)?;
    tracing::info!("the clock is aligned with node 0's within {:.1} us", bound as f64 / 1000.0);
    let (stop, stopped) = unbounded();
    let events = events.clone();
    let failed = move |error: crate::clock::thread::ClockError| {
        drop(events.send(Event::Failed { why: error.to_string(), dump: String::new() }));
    };
    aligner.spawn(stopped, Box::new(failed))?;
    Ok(stop)
}

/// Node 0's platform.
fn platform(
    router: &Arc<Router>,
    control: &Control,
    events: &Sender<Event>,
    room: Sender<Input>,
    inputs: Receiver<Input>,
) -> anyhow::Result<(LocalDevices, Option<Shared<HotPlug>>)> {
    let terminal = control.clone();
    // A coordinator that is gone ends the machine; its terminal needs no more output.
    let (out, _) =
        console::output(move |batch| drop(terminal.send_from_guest(ToCoordinator::Console(batch))))?;
    let (route, power, ejected) = (router.clone(), events.clone(), control.clone());
    // The machine ends after the first; a guest may say it as often as it likes.
    let said = AtomicBool::new(false);
    let platform = Platform::new(
        out,
        room,
        move |message| route.deliver_message(message),
        move |event| {
            if !said.swap(true, Ordering::SeqCst) {
                drop(power.send(Event::Power(event)));
            }
        },
        move |slot| {
            if let Ok(false) = ejected.try_send_from_guest(ToCoordinator::Ejected(slot)) {
                tracing::warn!(
                    "the guest lets go of devices faster than that can be told: {slot:?} is left out"
                );
            }
        },
    )?;
    router.set_ioapic(&platform.ioapic);
    let com1 = platform.com1();
    std::thread::Builder::new()
        .name("console input".into())
        .spawn(move || console::feed(&inputs, |bytes| lock(&com1).enqueue(bytes)))?;
    Ok((platform.buses, Some(platform.hotplug)))
}

/// The guest's memory slots.
fn map_ram(vm: &Vm, memory: &DualMemory, layout: &Layout) -> anyhow::Result<()> {
    for (slot, range) in (0..).zip(layout.ram_ranges()) {
        let host = memory.guest_view().wrapping_add(range.offset as usize);
        // SAFETY: inside the guest view, which `Node` keeps at least as long as the VM, and which Rust code
        // accesses through raw pointers only.
        unsafe { vm.add_memory(slot, range.gpa, host, range.len)? };
    }
    Ok(())
}

/// Loads the kernel into node 0's memory; how the first CPU starts.
fn load_kernel(
    ram: &GuestRam,
    layout: &Layout,
    assignment: &Assignment,
    tsc_khz: u32,
) -> anyhow::Result<boot::BspRegisters> {
    let machine = &assignment.machine;
    let acpi = acpi::build(layout, &machine.spec)?;
    let files = BootPaths::of(machine, disk_search::find)?;
    let source = files.source();
    Ok(boot::load(ram.map(), layout, &acpi, &source, tsc_khz)?)
}

fn engine(
    assignment: &Assignment,
    layout: &Layout,
    memory: &Arc<DualMemory>,
    transport: &Arc<dyn Transport>,
    events: &Sender<Event>,
) -> anyhow::Result<Engine> {
    let machine = &assignment.machine;
    let own_cpus = layout.node_cpus(usize::from(assignment.node)).len();
    let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let spare = host_cpus > own_cpus + usize::from(machine.shards);
    let config = EngineConfig {
        node: NodeId(assignment.node),
        homes: Homes::new(layout.home_ranges().iter().map(|range| range.end - range.start)),
        shards: machine.shards,
        first_lane: CONTROL_LANE + 1,
        hold: machine.hold,
        spin: if spare { SPIN } else { Duration::ZERO },
        stuck: STUCK,
        budget: machine.budgets.get(usize::from(assignment.node)).copied().flatten(),
    };
    let events = events.clone();
    let on_failure: OnFailure = Arc::new(move |error| drop(events.send(error.into())));
    Ok(Engine::start(config, memory.clone(), transport.clone(), on_failure)?)
}
