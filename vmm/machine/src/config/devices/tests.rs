//! Devices as users write them: where they are placed, and what is refused with a reason.

use super::*;
use crate::config::{MachineConfig, NodeConfig, limits};

/// Two nodes, `n0` and `n1`, with these disks.
fn machine(devices: &[&str]) -> MachineConfig {
    let node = |name| NodeConfig::new(name, 2, 256 << 20);
    MachineConfig {
        kernel: "vmlinuz".into(),
        nodes: vec![node("n0"), node("n1")],
        devices: devices.iter().map(|text| parse_disk(text).unwrap()).collect(),
        ..MachineConfig::default()
    }
}

#[test]
fn devices_get_slots_on_their_nodes_in_order() {
    let placed = place(&machine(&["a", "b,node=n1,readonly", "c,unlocked,serial=root,queues=3"])).unwrap();
    let slots: Vec<_> = placed.iter().map(|device| (device.node, device.slot)).collect();
    assert_eq!(slots, [(0, 0), (1, 0), (0, 1)]);
    let disk = |path: &str, readonly, serial: &str, queues| PlacedKind::Disk {
        path: path.into(),
        readonly,
        unlocked: path == "c",
        serial: serial.into(),
        queues,
    };
    assert_eq!(placed[1].kind, disk("b", true, "disk1", 4), "a queue for each of the machine's CPUs");
    assert_eq!(placed[2].kind, disk("c", false, "root", 3));
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let too_many = vec!["a"; 32];
    for (devices, part) in [
        (&["a,node=n7"][..], "\"n7\""),
        (&[""], "no file"),
        (&["a,serial=a long serial number"], "serial number"),
        (&["a,queues=0"], "0 queues"),
        (&["a,queues=65"], "65 queues"),
        (&too_many, "more than 31"),
        (&["a,name=a/b"], "\"a/b\""),
        (&["a,name=long-names-are-no-serials"], "1 to 20"),
        (&["a,name=x", "b,name=x"], "x already"),
        (&["a,iops=0"], "at least 1"),
    ] {
        let said = machine(devices).check().unwrap_err().0;
        assert!(said.contains(part), "{said:?} does not contain {part:?}");
    }
    assert!(parse_disk("a,colour=red").unwrap_err().0.contains("colour"));
    assert!(parse_disk("a,queues=many").unwrap_err().0.contains("many"));
}

#[test]
fn shares_are_for_devices_whose_node_has_something_to_share() {
    let mut machine = machine(&["a,node=n1,share=300", "b"]);
    let said = place(&machine).unwrap_err().0;
    assert!(said.contains("disks of node n1") && said.contains("disk_bandwidth"), "{said}");
    machine.nodes[1].capacity.disks.iops = Some(500);
    assert_eq!(place(&machine).unwrap()[0].share, 300);
    machine.devices[0] = parse_net("tap=t,node=n1,share=9").unwrap();
    assert!(place(&machine).unwrap_err().0.contains("net_bandwidth"));
    machine.devices[0] = parse_disk("a,share=none").unwrap();
    assert_eq!(place(&machine).unwrap()[0].share, limits::DEFAULT_SHARE);
    for (text, part) in [("a,share=0", "1 to 10000"), ("a,share=most", "\"most\"")] {
        assert!(parse_disk(text).unwrap_err().0.contains(part), "{text}");
    }
}

#[test]
fn devices_without_names_get_free_ones() {
    let placed = place(&machine(&["a,name=disk1", "b", "c,name=root,serial=1", "d,iops=9"])).unwrap();
    let names: Vec<_> = placed.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["disk1", "disk2", "root", "disk3"]);
    assert!(matches!(&placed[1].kind, PlacedKind::Disk { serial, .. } if serial == "disk2"));
    assert_eq!(placed[3].limits, Limits { iops: Some(9), bandwidth: None });
}

#[test]
fn a_network_card_keeps_its_address_from_run_to_run() {
    let mut machine = machine(&[]);
    let cards = ["tap=tap0", "tap=tap1", "tap=tap0,node=n1", "tap=t,mac=02:0:a:b:c:ff,queues=2"];
    machine.devices = cards.iter().map(|text| parse_net(text).unwrap()).collect();
    let macs = |machine: &MachineConfig| -> Vec<[u8; 6]> {
        let mac = |device: PlacedDevice| match device.kind {
            PlacedKind::Net { mac, .. } => mac,
            other => panic!("{other:?}"),
        };
        place(machine).unwrap().into_iter().map(mac).collect()
    };
    let first = macs(&machine);
    assert_eq!(first, macs(&machine));
    assert_eq!(first[3], [2, 0, 10, 11, 12, 255]);
    assert!(first.iter().all(|mac| mac[0] == 2));
    assert!(first[0] != first[1] && first[0] != first[2]);
    // Wherever it is, and whatever it is connected to.
    let moved = ["tap=a,name=x", "tap=b,node=n1,name=x"].map(|text| {
        machine.devices = vec![parse_net(text).unwrap()];
        macs(&machine)
    });
    assert_eq!(moved[0], moved[1]);
}

#[test]
fn a_network_card_that_cannot_be_is_refused() {
    for (text, part) in [
        ("node=n1", "no interface"),
        ("tap=t,speed=9", "speed"),
        ("tap=t,mac=1:2:3", "not a network card's address"),
        ("tap=t,mac=100:0:0:0:0:0", "not a network card's address"),
        ("tap=t,queues=x", "not a number"),
    ] {
        let said = parse_net(text).unwrap_err().0;
        assert!(said.contains(part), "{said:?} does not contain {part:?}");
    }
    for (text, part) in [
        ("tap=a-name-that-is-too-long", "TAP interface"),
        ("tap=a/b", "TAP interface"),
        ("tap=t,mac=01:0:0:0:0:0", "group"),
        ("tap=t,queues=33", "33 queues"),
    ] {
        let devices = vec![parse_net(text).unwrap()];
        let said = place(&MachineConfig { devices, ..machine(&[]) }).unwrap_err().0;
        assert!(said.contains(part), "{said:?} does not contain {part:?}");
    }
}

#[test]
fn consoles_and_channels_have_sockets_and_channels_names() {
    let kind =
        |name: Option<&str>| RequestedKind::Console { socket: "/run/s".into(), name: name.map(Into::into) };
    let console = parse_console("/run/s,node=n1").unwrap();
    assert_eq!(console, DeviceRequest::new(Some("n1".into()), kind(None)));
    let channel = parse_channel("org.qemu.guest_agent.0=/run/s").unwrap();
    assert_eq!(channel, DeviceRequest::new(None, kind(Some("org.qemu.guest_agent.0"))));
    assert!(parse_channel("/run/s").unwrap_err().0.contains("no channel"));
    assert!(parse_console("/run/s,colour=red").unwrap_err().0.contains("colour"));
    for (device, part) in [
        (parse_console(""), "no socket"),
        (parse_channel("a="), "no socket"),
        (parse_channel("a name=s"), "channel's name"),
        (parse_channel("=s"), "channel's name"),
    ] {
        let said = place(&MachineConfig { devices: vec![device.unwrap()], ..machine(&[]) }).unwrap_err().0;
        assert!(said.contains(part), "{said:?} does not contain {part:?}");
    }
}

#[test]
fn a_machine_has_one_balloon_for_all_its_memory() {
    let balloon = parse_balloon("512M,node=n1").unwrap();
    let expected = DeviceRequest::new(Some("n1".into()), RequestedKind::Balloon { size: 512 << 20 });
    assert_eq!(balloon, expected);
    assert_eq!(parse_balloon("").unwrap().kind, RequestedKind::Balloon { size: 0 });
    assert!(parse_balloon("colour=red").unwrap_err().0.contains("colour"));
    let devices = vec![balloon.clone(), balloon];
    let said = place(&MachineConfig { devices, ..machine(&[]) }).unwrap_err().0;
    assert!(said.contains("one balloon"), "{said}");
}

#[test]
fn a_machine_has_pci_only_with_devices() {
    assert!(!machine(&[]).spec().pci && machine(&["a"]).spec().pci);
}

#[test]
fn a_placed_device_has_all_that_its_owner_left_open() {
    let mut machine = machine(&["a"]);
    let requests =
        [parse_net("tap=t"), parse_console("/run/c"), parse_channel("agent=/run/a"), parse_balloon("")];
    machine.devices.extend(requests.map(Result::unwrap));
    let placed = place(&machine).unwrap();
    let disk = PlacedKind::Disk {
        path: "a".into(),
        readonly: false,
        unlocked: false,
        serial: "disk0".into(),
        queues: 4,
    };
    assert_eq!((&placed[0].kind, placed[0].share), (&disk, limits::DEFAULT_SHARE));
    assert!(matches!(&placed[1].kind, PlacedKind::Net { mac: [2, ..], queues: 1, .. }), "{:?}", placed[1]);
    assert_eq!(placed[2].kind, PlacedKind::Console { socket: "/run/c".into() });
    assert_eq!(placed[3].kind, PlacedKind::Channel { socket: "/run/a".into(), name: "agent".into() });
    // What a device is called does not depend on whether it has been placed.
    let words =
        machine.devices.iter().zip(&placed).map(|(asked, placed)| (asked.kind.word(), placed.kind.word()));
    assert!(words.into_iter().all(|(asked, placed)| asked == placed));
}
