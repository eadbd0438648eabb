//! Tests of RDMA alone: the errors of a host without it, and the ends of connections.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Kind, PATIENCE, Tap, rdma_all, rdma_is_there, rdma_rails, traffic, two_rdma_devices};
use fabric::rdma::{RdmaSettings, RdmaTransport};
use fabric::{FabricError, NodeId, Transport, sim};

fn connect(session: impl Transport + 'static, settings: &RdmaSettings) -> Result<RdmaTransport, FabricError> {
    RdmaTransport::connect(Arc::new(session), settings, None, Duration::from_secs(2))
}

fn one_session() -> sim::SimTransport {
    sim::cluster(2, 1).unwrap().remove(0)
}

#[test]
fn a_device_that_does_not_exist_is_named_in_one_sentence() {
    let settings = RdmaSettings { device: Some("nothing0".into()), ..RdmaSettings::default() };
    let Err(error) = connect(one_session(), &settings) else { panic!("it connected") };
    let said = error.to_string();
    assert!(said.contains("RDMA is unavailable because") && !said.contains('\n'), "{said}");
}

#[test]
fn a_service_level_that_does_not_exist_is_refused() {
    let settings = RdmaSettings { service_level: 16, ..RdmaSettings::default() };
    let Err(error) = connect(one_session(), &settings) else { panic!("it connected") };
    assert!(error.to_string().contains("choose 0 to 15"), "{error}");
}

#[test]
fn a_peer_that_does_not_use_rdma_is_named_when_the_time_is_over() {
    if !rdma_is_there() {
        return;
    }
    let mut nodes = sim::cluster(3, 1).unwrap();
    let silent = nodes.pop();
    thread::scope(|scope| {
        let running: Vec<_> = nodes
            .into_iter()
            .map(|node| scope.spawn(move || connect(node, &RdmaSettings::default()).map(drop)))
            .collect();
        for node in running {
            let said = node.join().unwrap().unwrap_err().to_string();
            // The one whose time is over first leaves, and the other may see that instead.
            assert!(said.contains("node 2") || said.contains("was lost"), "{said}");
        }
    });
    drop(silent);
}

#[test]
fn nonsense_on_the_session_ends_that_peer_only() {
    if !rdma_is_there() {
        return;
    }
    for nonsense in [&b"?"[..], &[1, 2, 0], &[2, 2], &[9; 40], &[3, 2]] {
        let sessions = sim::cluster(3, 1).unwrap();
        let sessions: Vec<Arc<dyn Transport>> =
            sessions.into_iter().map(|session| Arc::new(session) as Arc<dyn Transport>).collect();
        let nodes: Vec<RdmaTransport> = thread::scope(|scope| {
            let connect = |session: &Arc<dyn Transport>| {
                let session = session.clone();
                let settings = RdmaSettings::default();
                scope.spawn(move || RdmaTransport::connect(session, &settings, None, PATIENCE).unwrap())
            };
            let running: Vec<_> = sessions.iter().map(connect).collect();
            running.into_iter().map(|node| node.join().unwrap()).collect()
        });
        let mut tap = Tap::new(&nodes[0], 0);
        sessions[1].send(NodeId(0), 0, &[nonsense]).unwrap();
        let loss = tap.expect_loss().to_string();
        assert!(loss.starts_with("node 1 was lost"), "{loss}");
        nodes[2].send(NodeId(0), 0, &[b"still here"]).unwrap();
        assert_eq!(tap.take(1), [(NodeId(2), b"still here".to_vec())]);
    }
}

/// A soft-RoCE device that nothing but tests can use, and its interface.
fn dummy_device() -> Option<(String, String)> {
    let devices = std::fs::read_dir("/sys/class/infiniband").ok()?.flatten();
    devices.map(|device| device.path()).find_map(|device| {
        let interface = std::fs::read_to_string(device.join("parent")).ok()?.trim().to_owned();
        let is_virtual = Path::new("/sys/devices/virtual/net").join(&interface).exists();
        let name = device.file_name()?.to_str()?.to_owned();
        (interface.starts_with("dummy") && is_virtual).then_some((name, interface))
    })
}

/// Frames of each lane in each direction.
const FRAMES: u64 = 3000;

fn set_link(interface: &str, state: &str) {
    let status = Command::new("ip").args(["link", "set", interface, state]).status().unwrap();
    assert!(status.success(), "ip link set {interface} {state}");
}

#[test]
fn a_port_that_goes_down_loses_its_peers_within_seconds() {
    let Some((device, interface)) = dummy_device() else {
        println!("skipped: this host has no soft-RoCE device on a dummy interface");
        return;
    };
    let settings = RdmaSettings { device: Some(device), ..RdmaSettings::default() };
    let nodes = rdma_all(Kind::Sim.cluster(2, 1), &settings);
    let (mut near, mut far) = (Tap::new(&*nodes[0], 0), Tap::new(&*nodes[1], 0));
    nodes[0].send(NodeId(1), 0, &[b"before"]).unwrap();
    far.take(1);
    let cut = Instant::now();
    set_link(&interface, "down");
    let losses = [near.expect_loss().to_string(), far.expect_loss().to_string()];
    let took = cut.elapsed();
    set_link(&interface, "up");
    assert!(took < Duration::from_secs(5), "it took {took:?}");
    assert!(losses.iter().any(|loss| loss.contains("port")), "{losses:?}");
}

#[test]
fn lanes_leave_a_device_whose_port_goes_down_and_lose_double_and_reorder_nothing() {
    let (Some((dummy, interface)), Some(devices)) = (dummy_device(), two_rdma_devices()) else {
        println!("skipped: this host has no second RDMA device on a dummy interface");
        return;
    };
    let other = devices.into_iter().find(|device| *device != dummy).unwrap();
    // Lane 1 begins on the second rail, and lane 0 leaves that alone.
    let nodes = rdma_rails(Kind::Tcp.cluster(2, 4), &[other, dummy]);
    let nodes = [&*nodes[0], &*nodes[1]];
    traffic(nodes, FRAMES, |slowest| {
        while slowest() < FRAMES / 3 {}
        set_link(&interface, "down");
    });
    set_link(&interface, "up");
    for node in nodes {
        let stats = node.stats();
        assert_eq!((stats.frames_sent, stats.frames_received), (2 * FRAMES, 2 * FRAMES));
    }
}

#[test]
fn lanes_return_to_a_device_whose_port_is_up_again_and_lose_double_and_reorder_nothing() {
    let (Some((dummy, interface)), Some(devices)) = (dummy_device(), two_rdma_devices()) else {
        println!("skipped: this host has no second RDMA device on a dummy interface");
        return;
    };
    let counter = format!("/sys/class/infiniband/{dummy}/ports/1/hw_counters/sent_pkts");
    let packets = || std::fs::read_to_string(&counter).unwrap().trim().parse::<u64>().unwrap();
    let other = devices.into_iter().find(|device| *device != dummy).unwrap();
    let nodes = rdma_rails(Kind::Tcp.cluster(2, 4), &[other, dummy]);
    traffic([&*nodes[0], &*nodes[1]], u64::MAX, |slowest| {
        let some = || {
            let before = slowest();
            while slowest() < before + FRAMES / 3 {}
        };
        for _ in 0..2 {
            some();
            set_link(&interface, "down");
            // Lane 1 is on the device when it begins, and goes on without it.
            some();
            set_link(&interface, "up");
            // Connecting it again takes a few packets. More of them are frames.
            let before = packets();
            while packets() < before + FRAMES / 3 {
                slowest();
            }
        }
    });
}
