//! A thread that panics ends its node, whichever kind of thread it is, while the main thread is busy with
//! something else. (`main_panics` is the same for the main thread.)

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{never, unbounded};
use devices::platform::hotplug::HotPlug;
use devices::virtio::Workers;
use fabric::{FabricError, LaneId, NodeId, Receiver, Transport, TransportStats, sim};
use firmware::layout::CpuPlace;
use machine::control::fence::Fence;
use machine::control::{Change, Control, DeviceOrder, Outgoing, SlotId, ToCoordinator};
use vmm::clock::thread::{Aligner, ClockLink};
use vmm::clock::{GuestClock, Scale};
use vmm::node::{console, orders, panics};
use vmm::node_msg::Access;
use vmm::router::lane::{ControlLane, DeviceSide, LaneConfig};
use vmm::router::peers::{Peers, spawn_heartbeat};
use vmm::router::remote::{AllDevices, DeviceServer};
use vmm::router::{CONTROL_LANE, Router};
use vmm::vcpu::{Devices, Space, Table};

/// Names the kind of thread that is to panic; set in the child only.
const KIND: &str = "GESTALT_TEST_PANIC";

/// Each kind of thread, and the name that its panic's sentence must have.
const KINDS: [(&str, &str); 8] = [
    ("device", "disk 0"),
    ("console", "console"),
    ("clock", "clock"),
    ("heartbeat", "heartbeat"),
    ("lane", "control lane"),
    ("devices", "devices"),
    ("orders", "device orders"),
    ("dependency", "of some crate"),
];

#[test]
fn a_panic_in_a_thread_of_any_kind_ends_the_process_and_the_coordinator_has_its_message() {
    for (kind, thread) in KINDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_node", "--nocapture"])
            .env(KIND, kind)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(1), "{kind}: {said}");
        let expected = format!("its thread {thread:?} panicked at ");
        let told = |to: &str| said.lines().any(|line| line.starts_with(to) && line.contains(&expected));
        assert!(told("COORDINATOR: ") && said.contains("injected"), "{kind}: {said}");
        assert!(told("EVENT: "), "{kind}: {said}");
    }
}

/// A node of which a thread panics, if it is the child.
#[test]
fn the_node() {
    let Ok(kind) = std::env::var(KIND) else { return };
    let (control, end) = Control::pair();
    let (events, happened) = unbounded();
    panics::end_node(&control, &events, Duration::from_millis(50));
    let say = |to: &str, why: &str| {
        let mut out = io::stdout().lock();
        writeln!(out, "\n{to}: {why}").and_then(|()| out.flush()).unwrap();
    };
    std::thread::spawn(move || {
        for outgoing in end.from_node {
            match outgoing {
                Outgoing::Message(ToCoordinator::Failed { why, .. }) => say("COORDINATOR", &why),
                Outgoing::Flush(done) => drop(done.send(())),
                _ => {}
            }
        }
    });
    std::thread::spawn(move || {
        for event in happened {
            if let vmm::node::Event::Failed { why, .. } = event {
                say("EVENT", &why);
            }
        }
    });
    let _kept = lose_thread(&kind, &control);
    // What is to be shown is that this does not last so long.
    let _ = never::<()>().recv_timeout(Duration::from_secs(30));
    say("NOBODY", "nothing has ended the process");
    std::process::exit(0);
}

/// Whatever must be kept for the thread to get there.
fn lose_thread(kind: &str, control: &Control) -> Box<dyn std::any::Any> {
    match kind {
        "device" => {
            let mut workers = Workers::new("disk", Vec::new(), Arc::new(Fence::open()));
            workers.spawn(|| panic!("injected")).unwrap();
            Box::new(workers)
        }
        "console" => {
            let (mut out, thread) = console::output(|_| panic!("injected")).unwrap();
            out.write_all(b"x").unwrap();
            Box::new((out, thread))
        }
        "clock" => {
            let (pongs, answers) = unbounded();
            let clock = Arc::new(GuestClock::new(1_000_000, Scale::ONE));
            let aligner = Aligner::new(clock, Arc::new(Panics), answers);
            Box::new((pongs, aligner.spawn(never(), Box::new(drop)).unwrap()))
        }
        "heartbeat" => Box::new(spawn_heartbeat(router(Arc::new(Panics)), never()).unwrap()),
        "lane" => {
            let router = router(Arc::new(sim::cluster(2, 1).unwrap().remove(0)));
            let local: Arc<dyn Devices> = Arc::new(Panics);
            let server = DeviceServer::start(router.clone(), local.clone()).unwrap();
            let asked = Arc::new(AllDevices::new(router.clone(), 0, local));
            let config = LaneConfig {
                router,
                clock: Arc::new(GuestClock::new(1_000_000, Scale::ONE)),
                pongs: None,
                devices: DeviceSide { served: server.queue(), asked },
                spin: Duration::ZERO,
            };
            Box::new((server, ControlLane::start(Box::new(Panics), config).unwrap()))
        }
        "devices" => {
            let router = router(Arc::new(sim::cluster(2, 1).unwrap().remove(0)));
            let server = DeviceServer::start(router, Arc::new(Panics)).unwrap();
            let access =
                Access { memory: false, write: None, posted: false, size: 1, cpu: 0, seq: 0, addr: 0x70 };
            assert!(server.queue().push(NodeId(1), access));
            Box::new(server)
        }
        "orders" => {
            let hotplug = HotPlug::new(|_| panic!("injected"), |_| {});
            let hotplug = Some(devices::platform::bus::share(hotplug));
            let orders = orders::start(orders::Subjects { pci: None, hotplug }, control.clone()).unwrap();
            let slot = SlotId { bus: 0, slot: 1 };
            orders.send((0, DeviceOrder::Announce { slot, change: Change::Come })).unwrap();
            Box::new(orders)
        }
        "dependency" => {
            let thread = std::thread::Builder::new().name("of some crate".into());
            // And somebody catches it.
            let work = || drop(std::panic::catch_unwind(|| panic!("injected")));
            Box::new(thread.spawn(work).unwrap())
        }
        kind => unreachable!("{kind}"),
    }
}

fn router(transport: Arc<dyn Transport>) -> Arc<Router> {
    let place = |node| CpuPlace { vcpu: node, node: node as u16, apic_id: node << 8, local: 0 };
    let peers = Arc::new(Peers::new(NodeId(0), 2, Duration::from_secs(60), Box::new(drop)));
    Arc::new(Router::new(&[place(0), place(1)], Arc::new(Table::new(1)), transport, peers))
}

/// Whatever is asked of it, it panics.
struct Panics;

impl ClockLink for Panics {
    fn ping(&self, _: u32, _: u64) {
        panic!("injected")
    }

    fn ahead(&self, _: u64) {
        panic!("injected")
    }
}

impl Devices for Panics {
    fn read(&self, _: u32, _: Space, _: u64, _: &mut [u8]) {
        panic!("injected")
    }

    fn write(&self, _: u32, _: Space, _: u64, _: &[u8]) {
        panic!("injected")
    }
}

impl Receiver for Panics {
    fn poll(&mut self, _: &mut dyn FnMut(NodeId, &[u8])) -> Result<usize, FabricError> {
        panic!("injected")
    }

    fn fd(&self) -> BorrowedFd<'_> {
        panic!("injected")
    }

    fn arm(&mut self) -> Result<bool, FabricError> {
        panic!("injected")
    }
}

impl Transport for Panics {
    fn node(&self) -> NodeId {
        NodeId(0)
    }

    fn nodes(&self) -> usize {
        2
    }

    fn lanes(&self) -> usize {
        usize::from(CONTROL_LANE) + 1
    }

    fn send(&self, _: NodeId, _: LaneId, _: &[&[u8]]) -> Result<(), FabricError> {
        panic!("injected")
    }

    fn take_receiver(&self, _: LaneId) -> Option<Box<dyn Receiver>> {
        None
    }

    fn stats(&self) -> TransportStats {
        TransportStats::default()
    }
}

/// Vcpus, shards, rails and all other threads have nothing of their own to say here: the hook is the
/// process's. These are the only ways past it.
#[test]
fn nothing_in_the_tree_passes_by_the_panic_hook() {
    // What sets hooks: this mechanism, and the coordinator's, which is another process.
    let allowed = ["fabric/base/src/panic.rs", "vmm/gestalt/src/terminal.rs"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let ways = ["resume_unwind(", "set_hook(", "take_hook("];
    let mut found = Vec::new();
    for folder in ["fabric", "coherence", "firmware", "vmm"] {
        visit(&root.join(folder), &mut |path, text| {
            let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
            let passes = ways.iter().any(|way| text.contains(way));
            if passes && !allowed.contains(&&*name) && !name.ends_with("tests/panics.rs") {
                found.push(name);
            }
        });
    }
    assert!(found.is_empty(), "{found:?}: a panic must reach base::panic's hook");
}

fn visit(folder: &Path, see: &mut impl FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path, see);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            see(&path, &std::fs::read_to_string(&path).unwrap());
        }
    }
}
