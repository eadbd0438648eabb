//! Nodes that speak the control protocol and have no guest, for tests of the coordinator.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::thread::JoinHandle;
use std::time::Duration;

use machine::config::{MachineConfig, NodeConfig, NodeHost};
use machine::control::join::{JoinOptions, Watchdog, join};
use machine::control::wire::Hello;
use machine::control::{
    Assignment, Change, Control, ControlError, DeviceOrder, Exit, FromCoordinator, Joined, NodeReport,
    ToCoordinator,
};
use machine::keys::MachineKey;

use machine::config::devices::PlacedKind;

/// Longer than anything here takes; a test that reaches it has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// `nodes` nodes named n0, n1, ..
pub fn machine(nodes: usize, host: NodeHost) -> MachineConfig {
    let node = |index| NodeConfig { host, ..NodeConfig::new(&format!("n{index}"), 1, 256 << 20) };
    MachineConfig {
        kernel: "vmlinuz".into(),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        nodes: (0..nodes).map(node).collect(),
        key: Some("machine.key".into()),
        join_timeout: Some(PATIENCE),
        ..MachineConfig::default()
    }
}

/// The key of every test machine.
pub fn machine_key() -> MachineKey {
    MachineKey::from_bytes([0x42; 32])
}

/// A node's introduction.
pub fn hello(name: &str) -> Hello {
    Hello { name: name.into(), host: "test".into(), kernel: "6.12".into(), emulated: true }
}

/// How to join as `name`.
pub fn options(address: &str, name: &str) -> JoinOptions {
    JoinOptions {
        address: address.into(),
        hello: hello(name),
        key: machine_key().node(name).unwrap(),
        fabric_listen: Vec::new(),
        patience: PATIENCE,
        watchdog: Watchdog::None,
    }
}

/// What every node says and waits for before its guest runs.
pub fn prepare(control: &Control) -> Result<(), ControlError> {
    control.send(ToCoordinator::Joined(Joined {
        fabric: vec!["127.0.0.1:9".parse().unwrap()],
        fabric_key: [9; 32],
        cpuid: Vec::new(),
        arch_capabilities: 0,
        tsc_khz: 2_000_000,
        tsc_control: false,
    }))?;
    control.wait_start(PATIENCE)?;
    control.send(ToCoordinator::Ready)?;
    control.wait_go(PATIENCE)
}

/// A node that does what is asked of its devices, and whose guest lets go of them at once. It says
/// `hello\r\n`, echoes what is typed, switches off at `!` and reboots at `@`.
pub fn echo_guest(assignment: &Assignment, control: &Control) -> Result<Exit, ControlError> {
    prepare(control)?;
    if assignment.node == 0 {
        control.send(ToCoordinator::Console(b"hello\r\n".to_vec()))?;
    }
    loop {
        match control.recv_timeout(PATIENCE)? {
            Some(FromCoordinator::ConsoleInput(typed)) => {
                control.send(ToCoordinator::Console(typed.clone()))?;
                if typed.contains(&b'!') {
                    control.send(ToCoordinator::PowerOff)?;
                } else if typed.contains(&b'@') {
                    control.send(ToCoordinator::Reset)?;
                }
            }
            Some(FromCoordinator::Device { id, order }) => {
                let result = match &order {
                    DeviceOrder::Add(device) if matches!(device.kind, PlacedKind::Net { .. }) => {
                        Err("there is no such interface".into())
                    }
                    _ => Ok(None),
                };
                control.send(ToCoordinator::DeviceDone { id, result })?;
                if let DeviceOrder::Announce { slot, change: Change::Leave } = order {
                    control.send(ToCoordinator::Ejected(slot))?;
                }
            }
            Some(FromCoordinator::Stop(stop)) => {
                if stop.report {
                    let counters = vec![("remote_read_faults".into(), 10 + u64::from(assignment.node))];
                    let report = NodeReport { counters, fault_latency: vec![(50_000, 3)] };
                    control.send(ToCoordinator::Report(report))?;
                }
                assert!(control.flush(PATIENCE));
                return Ok(stop.exit());
            }
            Some(_) => {}
            None => panic!("nobody told this node to stop"),
        }
    }
}

/// Joins as `name` and is an echo guest in a thread, again after every reboot.
pub fn echo_node(address: &str, name: &str) -> JoinHandle<Result<Exit, ControlError>> {
    let options = options(address, name);
    let (mut assignment, mut control) = join(&options).unwrap();
    std::thread::spawn(move || {
        while echo_guest(&assignment, &control)? == Exit::Restart {
            drop(control);
            (assignment, control) = join(&options).unwrap();
        }
        Ok(Exit::End)
    })
}
