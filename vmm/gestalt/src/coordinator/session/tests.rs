//! The session without anything around it: every step is an event and a moment.

use super::*;
use crate::operator::{Answer, Request};
use machine::config::{MachineConfig, NodeConfig};
use machine::control::NodeReport;

/// A session with its own clock.
struct Run {
    session: Session,
    now: Instant,
    links: Vec<LinkId>,
}

fn config(hosts: &[NodeHost]) -> MachineConfig {
    let node = |(index, host): (usize, &NodeHost)| NodeConfig {
        host: *host,
        ..NodeConfig::new(&format!("n{index}"), 1, 256 << 20)
    };
    MachineConfig {
        kernel: "vmlinuz".into(),
        listen: Some("192.0.2.1:7700".parse().unwrap()),
        nodes: hosts.iter().enumerate().map(node).collect(),
        key: Some("machine.key".into()),
        ..MachineConfig::default()
    }
}

fn hello(name: &str) -> Hello {
    Hello { name: name.into(), host: "h".into(), kernel: "6.12".into(), emulated: false }
}

fn fabric(port: u16) -> Joined {
    Joined {
        fabric: vec![SocketAddr::from(([127, 0, 0, 1], port))],
        fabric_key: [port as u8; 32],
        cpuid: Vec::new(),
        arch_capabilities: 0,
        tsc_khz: 2_000_000,
        tsc_control: false,
    }
}

impl Run {
    fn new(hosts: &[NodeHost]) -> (Run, Vec<Action>) {
        Run::with(config(hosts))
    }

    fn with(config: MachineConfig) -> (Run, Vec<Action>) {
        let (now, links) = (Instant::now(), (0..config.nodes.len() as u64).collect());
        let mut session = Session::new(config.check().unwrap(), "192.0.2.1:7700".into(), now);
        let actions = session.start(now);
        (Run { session, now, links }, actions)
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        self.session.handle(event, self.now)
    }

    fn hello(&mut self, link: LinkId, name: &str) -> Vec<Action> {
        let from = "127.0.0.1:40000".parse().unwrap();
        self.handle(Event::Hello { link, hello: hello(name), from })
    }

    fn said(&mut self, node: usize, message: ToCoordinator) -> Vec<Action> {
        let link = self.links[node];
        self.handle(Event::Said { link, message })
    }

    fn ended(&mut self, node: usize, how: ProcessEnd) -> Vec<Action> {
        let life = self.session.life;
        self.handle(Event::Ended { node, life, how })
    }

    fn closed(&mut self, node: usize) -> Vec<Action> {
        let link = self.links[node];
        self.handle(Event::Closed { link, why: "it closed the connection".into(), by_node: true })
    }

    /// Takes a machine of a local node, which has ended, and a remote one to where only the latter is left, at
    /// which nothing arrives any more; how long it takes from there to the end.
    fn waits_for_remote(&mut self) -> (Vec<Action>, Duration) {
        self.closed(0);
        let (mut actions, begin) = (self.ended(0, ProcessEnd::Code(0)), self.now);
        while outcome(&actions).is_none() {
            assert!(self.now - begin < Duration::from_secs(60), "{actions:?}");
            actions.extend(self.pass(super::super::TICK, &[]));
        }
        (actions, self.now - begin)
    }

    /// Lets time pass in ticks, with heartbeats of the nodes in `alive`.
    fn pass(&mut self, time: Duration, alive: &[usize]) -> Vec<Action> {
        let mut actions = Vec::new();
        let end = self.now + time;
        while self.now < end {
            self.now += super::super::TICK;
            for node in alive {
                let answers = self.said(*node, ToCoordinator::Heartbeat(1));
                let is_heartbeat = |action: &Action| {
                    matches!(action, Action::Send { message: FromCoordinator::Heartbeat(1), .. })
                };
                actions.extend(answers.into_iter().filter(|action| !is_heartbeat(action)));
            }
            actions.extend(self.handle(Event::Tick));
        }
        actions
    }

    /// Takes all nodes to Running.
    fn boot(&mut self) {
        for node in 0..self.links.len() {
            let name = format!("n{node}");
            let link = self.links[node];
            assert!(self.hello(link, &name).contains(&Action::Admit { link, node }));
        }
        let mut actions = Vec::new();
        for node in 0..self.links.len() {
            actions = self.said(node, ToCoordinator::Joined(fabric(9000 + node as u16)));
        }
        assert_eq!(sent(&actions).len(), self.links.len(), "Start goes to every node");
        for node in 0..self.links.len() {
            actions = self.said(node, ToCoordinator::Ready);
        }
        assert!(actions.contains(&Action::Attach(true)));
        assert!(sent(&actions).iter().all(|message| **message == FromCoordinator::Go));
        assert_eq!(self.session.input_link(), Some(self.links[0]));
    }
}

fn running(hosts: &[NodeHost]) -> Run {
    let (mut run, _) = Run::new(hosts);
    run.boot();
    run
}

fn sent(actions: &[Action]) -> Vec<&FromCoordinator> {
    fn message(action: &Action) -> Option<&FromCoordinator> {
        match action {
            Action::Send { message, .. } => Some(message),
            _ => None,
        }
    }
    actions.iter().filter_map(message).collect()
}

fn stops(actions: &[Action]) -> Vec<Stop> {
    let stop = |message: &FromCoordinator| match message {
        FromCoordinator::Stop(stop) => Some(*stop),
        _ => None,
    };
    sent(actions).into_iter().filter_map(stop).collect()
}

fn outcome(actions: &[Action]) -> Option<&Outcome> {
    actions.iter().find_map(|action| match action {
        Action::Over(outcome) => Some(outcome),
        _ => None,
    })
}

fn failure(actions: &[Action]) -> &str {
    match outcome(actions) {
        Some(Outcome::Failed(why)) => why,
        other => panic!("the outcome is {other:?}"),
    }
}

const LOCAL2: &[NodeHost] = &[NodeHost::Local, NodeHost::Local];

#[test]
fn a_start_spawns_local_nodes_and_names_the_command_for_remote_ones() {
    let (_, actions) = Run::new(&[NodeHost::Local, NodeHost::Remote]);
    assert_eq!(actions[0], Action::NewRun);
    assert_eq!(actions[1], Action::Spawn { node: 0, life: 1 });
    let Action::Say(text) = &actions[2] else { panic!("{actions:?}") };
    assert!(text.contains("gestalt node --join 192.0.2.1:7700 --name n1"), "{text}");
}

#[test]
fn a_power_off_asks_for_reports_and_ends_well() {
    let mut run = running(LOCAL2);
    let actions = run.said(0, ToCoordinator::PowerOff);
    assert!(actions.contains(&Action::Attach(false)));
    assert_eq!(stops(&actions).len(), 2);
    assert!(stops(&actions).iter().all(|stop| stop.report && !stop.restart));
    let report = NodeReport { counters: vec![("invalidations".into(), 2)], fault_latency: Vec::new() };
    run.said(0, ToCoordinator::Report(report.clone()));
    run.said(0, ToCoordinator::Report(report.clone()));
    run.said(1, ToCoordinator::Report(report));
    for node in [0, 1] {
        assert_eq!(outcome(&run.closed(node)), None);
    }
    assert_eq!(outcome(&run.ended(0, ProcessEnd::Code(0))), None);
    assert_eq!(outcome(&run.ended(1, ProcessEnd::Code(0))), Some(&Outcome::PoweredOff));
    let json = run.session.tally().to_json(&Outcome::PoweredOff);
    assert_eq!(json["invalidations"], 4, "a node's second report does not count");
}

#[test]
fn a_heartbeat_is_answered_with_its_own_time_until_something_has_failed() {
    let mut run = running(LOCAL2);
    let link = run.links[1];
    let answer = Action::Send { link, message: FromCoordinator::Heartbeat(77) };
    assert_eq!(run.said(1, ToCoordinator::Heartbeat(77)), [answer]);
    run.said(0, ToCoordinator::PeerLost { node: 1, why: "it said nothing for 3.0 s".into() });
    assert_eq!(run.said(1, ToCoordinator::Heartbeat(78)), [], "its lease is not renewed any more");
    run.pass(SETTLE, &[0, 1]);
    assert_eq!(run.said(1, ToCoordinator::Heartbeat(79)), []);
}

#[test]
fn a_killed_node_is_named_whatever_its_peers_say_first() {
    let mut run = running(LOCAL2);
    run.said(0, ToCoordinator::PeerLost { node: 1, why: "the connection was reset".into() });
    run.said(0, ToCoordinator::Failed { why: "page 7 is lost".into(), dump: None });
    run.closed(1);
    assert_eq!(outcome(&run.ended(1, ProcessEnd::Signal(9))), None, "evidence is still collected");
    let stopped = run.pass(SETTLE, &[0]);
    assert_eq!(stops(&stopped).len(), 1, "only n0 is left to be told");
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Code(1));
    assert_eq!(failure(&actions), "node n1 was lost: its process ended with signal 9");
}

#[test]
fn what_a_node_said_explains_its_own_death() {
    let mut run = running(LOCAL2);
    let dump =
        run.said(1, ToCoordinator::Failed { why: "vCPU 3 shut down".into(), dump: Some("rip".into()) });
    assert!(dump.contains(&Action::Dump { node: 1, text: "rip".into() }));
    run.ended(1, ProcessEnd::Signal(6));
    run.closed(1);
    run.pass(SETTLE, &[0]);
    run.closed(0);
    assert_eq!(failure(&run.ended(0, ProcessEnd::Code(0))), "node n1 failed: vCPU 3 shut down");
}

#[test]
fn a_silent_node_is_noticed_stopped_and_killed_within_five_seconds() {
    let mut run = running(LOCAL2);
    let begin = run.now;
    let mut actions = run.pass(Duration::from_secs(3), &[0]);
    assert!(actions.is_empty(), "{actions:?}");
    while !actions.contains(&Action::KillAll) {
        assert!(run.now - begin < Duration::from_secs(5), "{actions:?}");
        actions.extend(run.pass(super::super::TICK, &[0]));
    }
    run.ended(0, ProcessEnd::Signal(9));
    let over = run.ended(1, ProcessEnd::Signal(9));
    assert!(failure(&over).starts_with("node n1 was lost: it was silent for 3."), "{over:?}");
}

#[test]
fn a_remote_node_that_stays_silent_is_given_up() {
    let mut run = running(&[NodeHost::Local, NodeHost::Remote]);
    run.pass(Duration::from_millis(3500), &[0]);
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Code(0));
    assert!(actions.contains(&Action::Close(1)), "nobody else is waited for: {actions:?}");
    let actions = run.pass(super::super::TICK, &[]);
    assert!(failure(&actions).starts_with("node n1 was lost: it was silent"));
}

#[test]
fn the_machine_has_not_ended_while_a_node_that_is_cut_off_may_still_write_to_its_disks() {
    for silence in [MachineConfig::default().silence, Duration::from_secs(20)] {
        let hosts = [NodeHost::Local, NodeHost::Remote];
        let (mut run, _) = Run::with(MachineConfig { silence, ..config(&hosts) });
        run.boot();
        run.pass(Duration::from_secs(1), &[0, 1]);
        // From here on n1 hears nothing and says nothing; the operator is in a hurry.
        let mut said = Vec::new();
        (0..2).for_each(|_| said.extend(run.handle(Event::Interrupted(Interrupt::Signal(2)))));
        let (actions, took) = run.waits_for_remote();
        said.extend(actions);
        assert!(took >= fence::lease(silence) && took < silence, "{took:?}");
        let told = |action: &Action| matches!(action, Action::Say(text) if text.contains("node n1"));
        assert!(said.iter().any(told), "{said:?}");
        assert_eq!(outcome(&said), Some(&Outcome::Interrupted(Interrupt::Signal(2))));
    }
}

/// A machine whose guest asked for a reboot and whose node n1 is cut off, where only n1's lease is waited for.
fn rebooting_without_n1() -> Run {
    let mut run = running(&[NodeHost::Local, NodeHost::Remote]);
    run.pass(Duration::from_secs(1), &[0, 1]);
    run.said(0, ToCoordinator::Reset);
    run.handle(Event::Closed { link: 1, why: "its connection was cut off".into(), by_node: false });
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Code(0));
    assert!(actions.contains(&Action::KillAll), "{actions:?}");
    run
}

const CTRL_C: Interrupt = Interrupt::Signal(2);

#[test]
fn an_interrupt_while_a_cut_off_node_is_waited_for_keeps_the_machine_from_starting_again() {
    let mut run = rebooting_without_n1();
    let actions = run.handle(Event::Interrupted(CTRL_C));
    assert!(matches!(&actions[..], [Action::Say(text)] if text.contains("another interrupt")), "{actions:?}");
    let actions = run.pass(Duration::from_secs(2), &[]);
    assert_eq!(actions, vec![], "the lease is waited for all the same");
    let actions = run.pass(Duration::from_millis(500), &[]);
    assert_eq!(actions, vec![Action::Over(Outcome::Interrupted(CTRL_C))]);
}

#[test]
fn a_further_interrupt_ends_the_wait_with_a_warning_of_who_may_write_and_for_how_long() {
    let mut run = rebooting_without_n1();
    run.handle(Event::Interrupted(CTRL_C));
    // Of the lease, 2.25 s and what clocks may differ.
    run.now += Duration::from_millis(1090);
    let actions = run.handle(Event::Interrupted(CTRL_C));
    let warning = "node n1 may still write to disks for 1.3 s: wait so long before these disks are given to \
                   another machine";
    let over = Action::Over(Outcome::Interrupted(CTRL_C));
    assert_eq!(actions, vec![Action::Warn(warning.into()), over]);
    assert_eq!(run.handle(Event::Interrupted(CTRL_C)), vec![]);
}

#[test]
fn interrupts_do_not_change_why_a_machine_ended() {
    let mut run = running(&[NodeHost::Local, NodeHost::Remote]);
    run.pass(Duration::from_secs(1), &[0, 1]);
    run.handle(Event::Closed { link: 1, why: "its connection was cut off".into(), by_node: false });
    run.pass(SETTLE, &[0]);
    // Stopping: the first says now; Killing: the second is noted, the third ends it.
    let mut actions = Vec::new();
    (0..3).for_each(|_| {
        assert_eq!(outcome(&actions), None);
        actions.extend(run.handle(Event::Interrupted(CTRL_C)));
    });
    assert_eq!(failure(&actions), "node n1 was lost: its connection was cut off");
}

#[test]
fn a_connection_that_breaks_on_its_way_is_not_the_end_of_the_nodes_writing() {
    let mut run = running(&[NodeHost::Local, NodeHost::Remote]);
    run.pass(Duration::from_secs(1), &[0, 1]);
    run.handle(Event::Closed { link: 1, why: "its connection failed".into(), by_node: false });
    let broke = run.now;
    run.pass(SETTLE, &[0]);
    run.waits_for_remote();
    let lease = fence::lease(MachineConfig::default().silence);
    assert!(run.now - broke >= lease, "{:?}", run.now - broke);
}

#[test]
fn the_coordinators_own_sleep_is_not_the_nodes_silence() {
    let mut run = running(LOCAL2);
    run.now += Duration::from_secs(60);
    assert_eq!(run.handle(Event::Tick), vec![]);
    assert_eq!(run.pass(Duration::from_secs(2), &[]), vec![]);
}

#[test]
fn a_closed_connection_alone_is_a_loss() {
    let mut run = running(&[NodeHost::Local, NodeHost::Remote]);
    run.closed(1);
    run.pass(SETTLE, &[0]);
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Code(0));
    assert_eq!(failure(&actions), "node n1 was lost: it closed the connection");
}

#[test]
fn a_loss_seen_only_by_a_peer_names_both() {
    let mut run = running(LOCAL2);
    run.said(0, ToCoordinator::PeerLost { node: 1, why: "lane 2 broke its framing".into() });
    let actions = run.pass(SETTLE + GRACE_FAILED + super::super::TICK, &[0, 1]);
    assert!(actions.contains(&Action::KillAll), "nodes that do not end are killed");
    run.ended(0, ProcessEnd::Signal(9));
    let actions = run.ended(1, ProcessEnd::Signal(9));
    assert_eq!(failure(&actions), "node n1 was lost: node n0 says lane 2 broke its framing");
}

#[test]
fn a_reboot_starts_the_machine_again() {
    let mut run = running(&[NodeHost::Local, NodeHost::Remote]);
    let actions = run.said(0, ToCoordinator::Reset);
    assert!(stops(&actions).iter().all(|stop| stop.restart));
    // The remote node is quick and knocks before the old one has been cleared away.
    run.closed(1);
    let early = run.hello(7, "n1");
    assert!(matches!(&early[..], [Action::Refuse { later: true, .. }]), "{early:?}");
    run.closed(0);
    let again = run.ended(0, ProcessEnd::Code(0));
    assert_eq!(again, vec![Action::NewRun, Action::Spawn { node: 0, life: 2 }]);
    // News of the life before means nothing now.
    run.handle(Event::Ended { node: 0, life: 1, how: ProcessEnd::Signal(9) });
    run.links = vec![10, 11];
    run.boot();
}

#[test]
fn a_node_that_dies_before_it_joins_ends_the_start_at_once() {
    let (mut run, _) = Run::new(LOCAL2);
    run.hello(0, "n0");
    run.ended(1, ProcessEnd::Code(1));
    run.pass(SETTLE, &[0]);
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Code(0));
    assert_eq!(failure(&actions), "node n1 was lost: its process ended with exit code 1");
}

#[test]
fn a_process_that_cannot_be_started_is_the_cause() {
    let (mut run, _) = Run::new(&[NodeHost::Local]);
    run.handle(Event::NotSpawned { node: 0, why: "no such file".into() });
    let actions = run.pass(SETTLE + super::super::TICK, &[]);
    assert_eq!(failure(&actions), "node n0 could not be started: no such file");
}

#[test]
fn nodes_that_do_not_join_are_named_with_the_command() {
    let (mut run, _) = Run::new(&[NodeHost::Local, NodeHost::Remote]);
    run.hello(0, "n0");
    run.said(0, ToCoordinator::Joined(fabric(9000)));
    run.pass(machine::config::DEFAULT_JOIN_REMOTE, &[0]);
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Code(0));
    let why = failure(&actions);
    assert!(why.starts_with("node n1 did not join within 600 s"), "{why}");
    assert!(why.contains("gestalt node --join 192.0.2.1:7700 --name n1"), "{why}");
}

#[test]
fn nodes_that_do_not_get_ready_are_named() {
    let (mut run, _) = Run::new(LOCAL2);
    for node in [0, 1] {
        run.hello(node as u64, &format!("n{node}"));
        run.said(node, ToCoordinator::Joined(fabric(9000)));
    }
    run.said(1, ToCoordinator::Ready);
    run.pass(PREPARE, &[0, 1]);
    for node in [0, 1] {
        run.closed(node);
    }
    run.ended(0, ProcessEnd::Code(0));
    let actions = run.ended(1, ProcessEnd::Code(0));
    assert_eq!(failure(&actions), "node n0 did not get ready within 110 s");
}

#[test]
fn strangers_are_refused_and_do_not_disturb() {
    let mut run = running(LOCAL2);
    for (name, part) in [("n9", "its nodes are n0, n1"), ("n1", "has joined already")] {
        let actions = run.hello(50, name);
        let refused = |action: &Action| matches!(action, Action::Refuse { link: 50, why, later: false } if why.contains(part));
        assert!(actions.iter().any(refused), "{actions:?}");
        assert_eq!(sent(&actions), Vec::<&FromCoordinator>::new());
    }
    assert_eq!(run.pass(Duration::from_secs(2), &[0, 1]), vec![]);
}

#[test]
fn messages_that_make_no_sense_name_their_sender() {
    for (node, message, part) in [
        (1, ToCoordinator::PowerOff, "PowerOff"),
        (1, ToCoordinator::Console(b"x".to_vec()), "Console"),
        (1, ToCoordinator::PeerLost { node: 1, why: String::new() }, "PeerLost"),
        (1, ToCoordinator::PeerLost { node: 9, why: String::new() }, "PeerLost"),
        (0, ToCoordinator::Ready, "Ready"),
        (0, ToCoordinator::Joined(fabric(1)), "Joined"),
    ] {
        let mut run = running(LOCAL2);
        run.said(node, message);
        run.pass(SETTLE, &[0, 1]);
        run.closed(0);
        run.closed(1);
        run.ended(0, ProcessEnd::Code(0));
        let actions = run.ended(1, ProcessEnd::Code(0));
        let why = failure(&actions);
        assert!(why.contains(&format!("node n{node} failed: it said {part},")), "{why}");
    }
}

#[test]
fn a_signal_ends_the_machine_and_a_second_one_at_once() {
    let mut run = running(LOCAL2);
    let actions = run.handle(Event::Interrupted(Interrupt::Signal(15)));
    assert!(stops(&actions).iter().all(|stop| stop.report && stop.grace == GRACE_FAILED));
    let actions = run.handle(Event::Interrupted(Interrupt::Signal(15)));
    assert!(actions.contains(&Action::KillAll));
    run.ended(0, ProcessEnd::Signal(9));
    let actions = run.ended(1, ProcessEnd::Signal(9));
    assert_eq!(outcome(&actions), Some(&Outcome::Interrupted(Interrupt::Signal(15))));
}

#[test]
fn a_node_that_ends_badly_after_power_off_is_mentioned() {
    let mut run = running(&[NodeHost::Local]);
    run.said(0, ToCoordinator::PowerOff);
    run.closed(0);
    let actions = run.ended(0, ProcessEnd::Signal(11));
    assert!(
        matches!(&actions[0], Action::Warn(text) if text.contains("ended with signal 11")),
        "{actions:?}"
    );
    assert_eq!(outcome(&actions), Some(&Outcome::PoweredOff));
}

#[test]
fn a_fabric_that_listens_everywhere_is_reached_where_the_node_came_from() {
    let (mut run, _) = Run::new(&[NodeHost::Local]);
    run.hello(0, "n0");
    let everywhere = Joined { fabric: vec!["0.0.0.0:9000".parse().unwrap()], ..fabric(0) };
    let actions = run.said(0, ToCoordinator::Joined(everywhere));
    let [FromCoordinator::Start(start)] = sent(&actions)[..] else { panic!("{actions:?}") };
    assert_eq!(start.addresses(), [["127.0.0.1:9000".parse().unwrap()]]);
}

#[test]
fn a_node_with_another_number_of_rails_fails_the_machine() {
    let (mut run, _) = Run::new(&[NodeHost::Local]);
    run.hello(0, "n0");
    let two = Joined { fabric: [fabric(1).fabric, fabric(2).fabric].concat(), ..fabric(1) };
    run.said(0, ToCoordinator::Joined(two));
    run.pass(SETTLE, &[0]);
    let all = format!("{:?}", run.session);
    assert!(all.contains("it has 2 rails and the machine has 1"), "{all}");
}

#[test]
fn orders_about_devices_go_to_the_nodes_of_a_running_machine() {
    let now = Instant::now();
    let mut config = config(&[NodeHost::Local, NodeHost::Local]);
    config.devices.push(machine::config::devices::parse_disk("a,node=n1").unwrap());
    let mut session = Session::new(config.check().unwrap(), "192.0.2.1:7700".into(), now);
    session.start(now);
    let mut run = Run { session, now, links: vec![0, 1] };
    let set = || Event::Asked {
        asker: 5,
        request: Request::Set { name: "disk0".into(), settings: vec!["iops=9".into()] },
    };
    assert!(matches!(&run.handle(set())[..], [Action::Answer { asker: 5, answer: Answer::Refused(_) }]));
    run.boot();
    let actions = run.handle(set());
    let [Action::Send { link: 1, message: FromCoordinator::Device { id, .. } }] = &actions[..] else {
        panic!("{actions:?}")
    };
    let actions = run.said(1, ToCoordinator::DeviceDone { id: *id, result: Ok(None) });
    assert!(matches!(&actions[..], [Action::Answer { asker: 5, answer: Answer::Done(_) }]), "{actions:?}");
    assert_eq!(run.session.devices()[0].limits.iops, Some(9));
    // Again: it was not asked any more.
    run.said(1, ToCoordinator::DeviceDone { id: *id, result: Ok(None) });
    let actions = run.pass(Duration::from_secs(1), &[0, 1]);
    assert!(sent(&actions).iter().any(|message| matches!(message, FromCoordinator::Stop(_))), "{actions:?}");
}
