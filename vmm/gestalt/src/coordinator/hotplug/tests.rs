//! Devices that come and go, with nodes and guests that refuse, or answer late.

use super::*;
use machine::config::MachineConfig;
use machine::config::NodeConfig;
use machine::config::devices::{parse_balloon, parse_disk, parse_net};
use machine::config::limits::Limits;
use proptest::prelude::*;

/// Two nodes, `n0` and `n1`, with these disks.
fn machine(devices: &[&str]) -> MachineConfig {
    MachineConfig {
        kernel: "vmlinuz".into(),
        nodes: ["n0", "n1"].map(|name| NodeConfig::new(name, 2, 256 << 20)).into(),
        devices: devices.iter().map(|text| parse_disk(text).unwrap()).collect(),
        ..MachineConfig::default()
    }
}

/// A machine whose operator number 7 asks at the same moment again and again.
struct Desk {
    hotplug: Hotplug,
    now: Instant,
}

impl Desk {
    fn new(devices: &[&str]) -> Desk {
        Desk { hotplug: Hotplug::new(&machine(devices).check().unwrap()), now: Instant::now() }
    }

    fn ask(&mut self, request: Request) -> Vec<Step> {
        self.hotplug.ask(7, request, true, self.now)
    }

    fn add(&mut self, disk: &str) -> Vec<Step> {
        self.ask(Request::Add { device: Box::new(parse_disk(disk).unwrap()) })
    }

    fn remove(&mut self, name: &str) -> Vec<Step> {
        self.ask(Request::Remove { name: name.into() })
    }

    fn set(&mut self, name: &str, settings: &[&str]) -> Vec<Step> {
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        self.ask(Request::Set { name: name.into(), settings })
    }

    fn refusal(steps: &[Step]) -> &str {
        match steps {
            [Step::Answer(7, Answer::Refused(why))] => why,
            other => panic!("{other:?}"),
        }
    }

    /// The node does what it is told in the one step.
    fn obey(&mut self, steps: Vec<Step>) -> Vec<Step> {
        let (node, id, _) = order(&steps);
        self.hotplug.done(node, id, Ok(None)).unwrap()
    }

    fn states(&self) -> Vec<(String, String)> {
        self.hotplug.list(None).into_iter().map(|device| (device.name, device.state)).collect()
    }
}

/// The first step, which is an order.
fn order(steps: &[Step]) -> (usize, u32, &DeviceOrder) {
    match steps.first() {
        Some(Step::Tell { node, id, order }) => (*node, *id, order),
        other => panic!("{other:?}"),
    }
}

fn done(steps: &[Step]) -> &str {
    match steps.last() {
        Some(Step::Answer(7, Answer::Done(what))) => what,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_is_opened_by_its_node_before_the_guest_hears_of_it() {
    let mut desk = Desk::new(&["a"]);
    let steps = desk.add("b,node=n1,name=data,iops=5");
    let (node, _, told) = order(&steps);
    let DeviceOrder::Add(device) = told else { panic!("{told:?}") };
    assert_eq!((node, device.node, device.slot, device.name.as_str()), (1, 1, 0, "data"));
    assert_eq!(device.limits.iops, Some(5));
    assert_eq!(desk.states()[1], ("data".into(), "coming".into()));
    let steps = desk.obey(steps);
    let slot = SlotId { bus: 1, slot: 0 };
    assert_eq!(order(&steps).2, &DeviceOrder::Announce { slot, change: Change::Come });
    assert_eq!(order(&steps).0, 0, "the guest hears it from node 0");
    assert_eq!(done(&steps), "data is at 0000:01:00.0 on n1");
    assert_eq!(desk.states()[1], ("data".into(), "present".into()));
}

#[test]
fn a_device_that_cannot_be_opened_is_forgotten() {
    let mut desk = Desk::new(&["a"]);
    let steps = desk.add("b");
    let (node, id, _) = order(&steps);
    let steps = desk.hotplug.done(node, id, Err("no such file".into())).unwrap();
    assert_eq!(Desk::refusal(&steps), "no such file");
    assert_eq!(desk.states().len(), 1);
}

#[test]
fn a_device_goes_when_the_guest_has_let_go_of_it() {
    let mut desk = Desk::new(&["a", "b,node=n1"]);
    let steps = desk.remove("disk1");
    let slot = SlotId { bus: 1, slot: 0 };
    assert_eq!(order(&steps), (0, 0, &DeviceOrder::Announce { slot, change: Change::Leave }));
    assert!(desk.obey(steps).is_empty());
    assert_eq!(desk.states()[1].1, "leaving");
    assert!(Desk::refusal(&desk.remove("disk1")).contains("another command"));
    let steps = desk.hotplug.ejected(slot);
    assert_eq!(order(&steps).0, 1);
    assert_eq!(order(&steps).2, &DeviceOrder::Remove { slot: 0 });
    assert!(desk.hotplug.ejected(slot).is_empty(), "twice");
    assert_eq!(done(&desk.obey(steps)), "disk1 is gone");
    assert_eq!(desk.states().len(), 1);
}

#[test]
fn a_guest_that_does_not_let_go_in_time_may_do_so_later() {
    let mut desk = Desk::new(&["a"]);
    let steps = desk.remove("disk0");
    desk.obey(steps);
    assert!(desk.hotplug.tick(desk.now + PATIENCE / 2).is_empty());
    assert!(Desk::refusal(&desk.hotplug.tick(desk.now + PATIENCE)).contains("within 30 s"));
    assert!(desk.hotplug.tick(desk.now + 2 * PATIENCE).is_empty(), "once");
    assert!(Desk::refusal(&desk.set("disk0", &["iops=1"])).contains("leaving"));
    // Asked again, it is told again.
    let steps = desk.remove("disk0");
    desk.obey(steps);
    let steps = desk.hotplug.ejected(SlotId { bus: 0, slot: 0 });
    assert_eq!(done(&desk.obey(steps)), "disk0 is gone");
}

#[test]
fn a_guest_may_let_go_of_what_nobody_wanted() {
    let mut desk = Desk::new(&["a"]);
    let steps = desk.hotplug.ejected(SlotId { bus: 0, slot: 0 });
    assert!(matches!(&steps[0], Step::Say(text) if text.contains("disk0")));
    assert!(desk.obey(steps[1..].to_vec()).is_empty());
    assert!(desk.hotplug.ejected(SlotId { bus: 0, slot: 0 }).is_empty());
    assert!(desk.hotplug.ejected(SlotId { bus: 9, slot: 200 }).is_empty());
}

#[test]
fn by_what_the_guest_knows_a_device_stays_with_its_name() {
    let mut desk = Desk::new(&["a,name=x,serial=abc"]);
    let mut card = parse_net("tap=t,name=y,mac=02:00:00:00:00:09").unwrap();
    let steps = desk.ask(Request::Add { device: Box::new(card.clone()) });
    desk.obey(steps);
    for (name, slot) in [("x", 0), ("y", 1)] {
        let steps = desk.remove(name);
        desk.obey(steps);
        let steps = desk.hotplug.ejected(SlotId { bus: 0, slot });
        desk.obey(steps);
    }
    let added = |steps: Vec<Step>| match order(&steps).2 {
        DeviceOrder::Add(device) => device.clone(),
        other => panic!("{other:?}"),
    };
    let disk = added(desk.add("b,name=x,node=n1"));
    assert!(matches!(&disk.kind, PlacedKind::Disk { serial, .. } if serial == "abc"));
    card = parse_net("tap=u,name=y,node=n1").unwrap();
    let card = added(desk.ask(Request::Add { device: Box::new(card) }));
    assert!(matches!(&card.kind, PlacedKind::Net { mac: [2, 0, 0, 0, 0, 9], .. }));
}

#[test]
fn limits_change_one_by_one_and_count_once_the_node_has_them() {
    let mut desk = Desk::new(&["a,node=n1,iops=5"]);
    let steps = desk.set("disk0", &["bandwidth=1M"]);
    let limits = Limits { iops: Some(5), bandwidth: Some(1 << 20) };
    assert_eq!(
        order(&steps).2,
        &DeviceOrder::Set { slot: 0, setting: Setting::Limits { limits, share: DEFAULT_SHARE } }
    );
    assert_eq!(desk.hotplug.list(None)[0].limits.bandwidth, None);
    assert_eq!(done(&desk.obey(steps)), "disk0 is held to iops=5 bandwidth=1048576");
    assert_eq!(desk.hotplug.devices()[0].limits, limits);
}

#[test]
fn a_share_changes_where_the_node_has_something_to_share() {
    let mut machine = machine(&["a", "b,node=n1"]);
    machine.nodes[1].capacity.disks.bandwidth = Some(1 << 20);
    let mut desk = Desk { hotplug: Hotplug::new(&machine.check().unwrap()), now: Instant::now() };
    assert!(Desk::refusal(&desk.set("disk0", &["share=300"])).contains("disk_bandwidth"));
    assert!(Desk::refusal(&desk.set("disk1", &["share=0"])).contains("1 to 10000"));
    for (text, share) in [("share=300", Some(300)), ("share=none", None)] {
        let steps = desk.set("disk1", &[text]);
        let setting = Setting::Limits { limits: Limits::default(), share: share.unwrap_or(DEFAULT_SHARE) };
        assert_eq!(order(&steps), (1, order(&steps).1, &DeviceOrder::Set { slot: 0, setting }));
        assert_eq!(done(&desk.obey(steps)).contains("share=300"), share.is_some());
        assert_eq!(desk.hotplug.list(None)[1].share, share);
    }
}

#[test]
fn a_balloon_gets_another_size_and_is_listed_with_what_the_guest_has_given_up() {
    let mut machine = machine(&["a"]);
    machine.devices.push(parse_balloon("64M,node=n1").unwrap());
    let mut desk = Desk { hotplug: Hotplug::new(&machine.check().unwrap()), now: Instant::now() };
    let steps = desk.set("balloon0", &["size=128M"]);
    let setting = Setting::Size(128 << 20);
    assert_eq!(order(&steps), (1, 0, &DeviceOrder::Set { slot: 0, setting }));
    assert!(done(&desk.obey(steps)).contains("asks the guest for 134217728 bytes"));
    assert!(Desk::refusal(&desk.set("balloon0", &["iops=5"])).contains("size=512M"));
    assert!(Desk::refusal(&desk.set("balloon0", &["size=wide"])).contains("\"wide\""));

    let steps = desk.ask(Request::List);
    let (node, id, told) = order(&steps);
    assert_eq!((node, told), (1, &DeviceOrder::Measure { slot: 0 }));
    let given_up = Some(GivenUp { inflated: 4096, reported: 8192 });
    let balloon = |steps: Vec<Step>| match &steps[..] {
        [Step::Answer(7, Answer::Devices(devices))] => devices[1].balloon,
        other => panic!("{other:?}"),
    };
    let size = 128 << 20;
    assert_eq!(
        balloon(desk.hotplug.done(1, id, Ok(given_up)).unwrap()),
        Some(BalloonState { size, given_up })
    );

    // A node that does not answer in time may do so later.
    let steps = desk.ask(Request::List);
    let (_, id, _) = order(&steps);
    assert!(desk.hotplug.tick(desk.now + PATIENCE / 2).is_empty());
    assert_eq!(balloon(desk.hotplug.tick(desk.now + PATIENCE)), Some(BalloonState { size, given_up: None }));
    assert_eq!(desk.hotplug.done(1, id, Ok(given_up)), Some(Vec::new()));

    desk.ask(Request::List);
    assert_eq!(balloon(desk.hotplug.restart()), Some(BalloonState { size, given_up: None }));
    assert_eq!(desk.hotplug.devices()[1].kind, PlacedKind::Balloon { size });
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let mut desk = Desk::new(&["a"]);
    for (steps, part) in [
        (desk.remove("x"), "there is disk0"),
        (desk.set("disk0", &["colour=red"]), "\"colour\""),
        (desk.set("disk0", &["iops=0"]), "at least 1"),
        (desk.add("b,name=disk0"), "disk0 already"),
        (desk.add("b,node=n7"), "n7"),
        (desk.add(""), "no file"),
        (desk.hotplug.ask(7, Request::Remove { name: "disk0".into() }, false, desk.now), "does not run"),
    ] {
        assert!(Desk::refusal(&steps).contains(part), "{steps:?} does not contain {part:?}");
    }
    let mut full = Desk::new(&["a"; 18]);
    assert!(Desk::refusal(&full.add("b")).contains("no room"));
    assert!(Desk::refusal(&full.remove("disk17")).contains("slot 17"));
    assert!(Desk::refusal(&Desk::new(&[]).add("b")).contains("--entropy"));
}

#[test]
fn nodes_that_answer_what_they_were_not_asked_are_found_out() {
    let mut desk = Desk::new(&["a,node=n1"]);
    let steps = desk.set("disk0", &["iops=1"]);
    let (node, id, _) = order(&steps);
    assert_eq!(desk.hotplug.done(0, id, Ok(None)), None);
    assert_eq!(desk.hotplug.done(node, id + 1, Ok(None)), None);
    assert!(desk.hotplug.done(node, id, Ok(None)).is_some());
    assert_eq!(desk.hotplug.done(node, id, Ok(None)), None);
}

#[test]
fn a_machine_that_starts_again_has_what_was_there() {
    let mut desk = Desk::new(&["a", "b"]);
    let steps = desk.add("c");
    desk.obey(steps);
    desk.remove("disk0");
    desk.hotplug.ask(8, Request::Add { device: Box::new(parse_disk("d").unwrap()) }, true, desk.now);
    let steps = desk.hotplug.restart();
    assert!(matches!(&steps[0], Step::Answer(7, Answer::Done(text)) if text.contains("disk0")), "{steps:?}");
    assert!(matches!(&steps[1], Step::Answer(8, Answer::Refused(_))), "{steps:?}");
    let names: Vec<_> = desk.hotplug.devices().into_iter().map(|device| device.name).collect();
    assert_eq!(names, ["disk1", "disk2"]);
}

/// What may happen, in any order.
#[derive(Clone, Debug)]
enum Happening {
    Add,
    Remove(usize),
    Set(usize),
    List,
    Ejected(u8, u8),
    Done(usize, bool),
    Wait,
    Restart,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => Just(Happening::Add),
        4 => (0usize..6).prop_map(Happening::Remove),
        1 => (0usize..6).prop_map(Happening::Set),
        1 => Just(Happening::List),
        4 => (0u8..2, 0u8..6).prop_map(|(bus, slot)| Happening::Ejected(bus, slot)),
        8 => (0usize..4, any::<bool>()).prop_map(|(which, well)| Happening::Done(which, well)),
        1 => Just(Happening::Wait),
        1 => Just(Happening::Restart),
    ]
}

proptest! {
    #[test]
    fn every_operator_is_answered_once_and_nodes_have_what_is_listed(
        happenings in proptest::collection::vec(happening(), 0..80),
    ) {
        let mut machine = machine(&["a", "b,node=n1"]);
        machine.devices.push(parse_balloon("").unwrap());
        let mut hotplug = Hotplug::new(&machine.check().unwrap());
        let (mut now, mut asker) = (Instant::now(), 0);
        let mut waiting = std::collections::BTreeSet::new();
        // What the nodes have: (bus, slot).
        let mut there = std::collections::BTreeSet::from([(0u16, 0u8), (0, 1), (1, 0)]);
        let mut orders: Vec<(usize, u32, DeviceOrder)> = Vec::new();
        for happening in happenings {
            let name = |hotplug: &Hotplug, which: usize| {
                let list = hotplug.list(None);
                list.get(which % list.len().max(1)).map_or("none".into(), |device| device.name.clone())
            };
            let mut ask = |hotplug: &mut Hotplug, request| {
                asker += 1;
                waiting.insert(asker);
                hotplug.ask(asker, request, true, now)
            };
            let steps = match happening {
                Happening::Add => {
                    let node = ["n0", "n1"][there.len() % 2];
                    let disk = parse_disk(&format!("x,node={node}")).unwrap();
                    ask(&mut hotplug, Request::Add { device: Box::new(disk) })
                }
                Happening::Remove(which) => {
                    let name = name(&hotplug, which);
                    ask(&mut hotplug, Request::Remove { name })
                }
                Happening::Set(which) => {
                    let name = name(&hotplug, which);
                    ask(&mut hotplug, Request::Set { name, settings: vec!["iops=9".into()] })
                }
                Happening::List => ask(&mut hotplug, Request::List),
                Happening::Ejected(bus, slot) => hotplug.ejected(SlotId { bus, slot }),
                Happening::Done(which, well) => {
                    if orders.is_empty() {
                        continue;
                    }
                    let (node, id, order) = orders.remove(which % orders.len());
                    match &order {
                        DeviceOrder::Add(device) if well => {
                            prop_assert!(there.insert((device.node, device.slot)), "the slot is taken");
                        }
                        DeviceOrder::Remove { slot } => {
                            prop_assert!(there.remove(&(node as u16, *slot)), "the slot is empty");
                        }
                        _ => {}
                    }
                    let result = if well { Ok(None) } else { Err("no".into()) };
                    hotplug.done(node, id, result).expect("it was asked")
                }
                Happening::Wait => {
                    now += PATIENCE;
                    hotplug.tick(now)
                }
                Happening::Restart => {
                    orders.clear();
                    let steps = hotplug.restart();
                    there = hotplug.devices().iter().map(|device| (device.node, device.slot)).collect();
                    steps
                }
            };
            for step in steps {
                match step {
                    Step::Tell { node, id, order } => orders.push((node, id, order)),
                    Step::Answer(asker, _) => prop_assert!(waiting.remove(&asker), "answered twice"),
                    Step::Say(_) => {}
                }
            }
            for entry in &hotplug.entries {
                let here = there.contains(&(entry.device.node, entry.device.slot));
                prop_assert!(here || matches!(entry.state, Presence::Opening | Presence::Closing), "{entry:?}");
            }
        }
        let last = hotplug.tick(now + PATIENCE);
        for step in last {
            if let Step::Answer(asker, _) = step {
                prop_assert!(waiting.remove(&asker), "answered twice");
            }
        }
        prop_assert!(waiting.is_empty(), "nobody answers {waiting:?}");
    }
}
