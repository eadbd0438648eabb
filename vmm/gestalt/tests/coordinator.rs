//! The coordinator with real sockets and real processes, and nodes that have no guest.

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, echo_guest, echo_node, hello, machine, machine_key, options, prepare};
use crossbeam::channel::{self, Receiver, Sender};
use gestalt::coordinator::event::{Interrupt, Outcome, ProcessEnd};
use gestalt::coordinator::spawn::{NodeProcess, Spawner, start};
use gestalt::coordinator::{Console, Coordinator, CoordinatorError, Ended};
use machine::config::{MachineConfig, NodeHost};
use machine::control::join::{JoinError, JoinOptions, join};
use machine::control::wire::{self, Answer, Assigned};
use machine::control::{Assignment, Control, FromCoordinator, ToCoordinator};
use machine::keys::{MachineKey, NodeKey};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

/// What a fake node does once it has joined; its process is ended when it returns `true`.
type Behaviour = dyn Fn(&Assignment, &Control) -> bool + Send + Sync;
/// Processes started so far, by node.
type Started = Arc<Mutex<Vec<(String, Arc<dyn NodeProcess>)>>>;

/// A node is a process that sleeps and a thread that speaks for it.
struct Fakes {
    behaviour: Arc<Behaviour>,
    started: Started,
}

impl Spawner for Fakes {
    fn spawn(
        &mut self,
        name: &str,
        join_at: SocketAddr,
        key: &NodeKey,
    ) -> std::io::Result<Arc<dyn NodeProcess>> {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = start(command, name, b"")?;
        self.started.lock().unwrap().push((name.into(), process.clone()));
        let (behaviour, own) = (self.behaviour.clone(), process.clone());
        let options = JoinOptions { key: key.clone(), ..options(&join_at.to_string(), name) };
        thread::spawn(move || {
            let Ok((assignment, control)) = join(&options) else { return };
            if behaviour(&assignment, &control) {
                own.kill();
            }
        });
        Ok(process)
    }
}

/// A machine that runs in a thread of its own.
struct Machine {
    address: String,
    type_in: Sender<Vec<u8>>,
    interrupt: Sender<Interrupt>,
    console: Receiver<Vec<u8>>,
    ended: Receiver<Ended>,
    started: Started,
}

impl Machine {
    fn start(config: MachineConfig, behaviour: Arc<Behaviour>) -> Machine {
        Self::start_with(config, behaviour, None)
    }

    fn start_with(
        config: MachineConfig,
        behaviour: Arc<Behaviour>,
        dumps: Option<std::path::PathBuf>,
    ) -> Machine {
        let started = Started::default();
        let spawned = started.clone();
        let (type_in, input) = channel::bounded(4);
        let (interrupt, interrupts) = channel::unbounded();
        let (write, console) = channel::unbounded();
        let (finish, ended) = channel::bounded(1);
        let (say_address, address) = channel::bounded(1);
        // Processes end with the thread that starts them: the coordinator's own.
        thread::spawn(move || {
            let fakes = Box::new(Fakes { behaviour, started: spawned });
            let coordinator = Coordinator::bind(config.check().unwrap(), machine_key(), fakes).unwrap();
            say_address.send(coordinator.address().unwrap().to_string()).unwrap();
            let output = Box::new(move |bytes| write.send(bytes).unwrap_or(()));
            let requests = channel::never();
            let console = Console { input, interrupts, requests, attach: Box::new(|_| {}), output, dumps };
            finish.send(coordinator.run(console).unwrap()).unwrap();
        });
        let address = address.recv_timeout(PATIENCE).unwrap();
        Machine { address, type_in, interrupt, console, ended, started }
    }

    fn type_text(&self, text: &str) {
        self.type_in.send_timeout(text.into(), PATIENCE).unwrap();
    }

    /// Waits until the guest has written all of `text`.
    fn expect(&self, text: &str) {
        let mut seen = String::new();
        while !seen.contains(text) {
            let piece =
                self.console.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("only {seen:?} was written"));
            seen.push_str(&String::from_utf8(piece).unwrap());
        }
    }

    fn pid_of(&self, name: &str) -> Pid {
        let started = self.started.lock().unwrap();
        let (_, process) = started.iter().rev().find(|(node, _)| node == name).unwrap();
        Pid::from_raw(process.id() as i32)
    }

    /// How it ended; no process is left then.
    fn end(self) -> Ended {
        let ended = self.ended.recv_timeout(PATIENCE).unwrap();
        for (name, process) in self.started.lock().unwrap().iter() {
            let alive = kill(Pid::from_raw(process.id() as i32), None).is_ok();
            assert!(!alive, "the process of {name} is left");
        }
        ended
    }

    fn failure(self) -> String {
        match self.end().outcome {
            Outcome::Failed(why) => why,
            other => panic!("the machine ended with {other:?}"),
        }
    }
}

fn echo() -> Arc<Behaviour> {
    Arc::new(|assignment, control| echo_guest(assignment, control).is_ok())
}

#[test]
fn three_nodes_start_and_their_guest_talks_and_switches_off() {
    let machine = Machine::start(machine(3, NodeHost::Local), echo());
    machine.expect("hello\r\n");
    machine.type_text("ls");
    machine.expect("ls");
    machine.type_text("!");
    let ended = machine.end();
    assert_eq!(ended.outcome, Outcome::PoweredOff);
    assert_eq!(ended.report["remote_read_faults"], 10 + 11 + 12);
    assert_eq!(ended.report["fault_p50_us"], 50.0);
    assert_eq!(ended.report["nodes"][2]["name"], "n2");
    assert_eq!(ended.report["emulated"], true);
}

#[test]
fn what_is_typed_before_the_guest_runs_reaches_it() {
    let config = machine(2, NodeHost::Remote);
    let machine = Machine::start(config, echo());
    machine.type_text("early!");
    let nodes: Vec<_> = ["n0", "n1"].map(|name| echo_node(&machine.address, name)).into();
    machine.expect("early!");
    assert_eq!(machine.end().outcome, Outcome::PoweredOff);
    for node in nodes {
        node.join().unwrap().unwrap();
    }
}

#[test]
fn a_killed_node_process_ends_the_machine_within_five_seconds_and_is_named() {
    let machine = Machine::start(machine(3, NodeHost::Local), echo());
    machine.expect("hello");
    let begin = Instant::now();
    kill(machine.pid_of("n1"), Signal::SIGKILL).unwrap();
    assert_eq!(machine.failure(), "node n1 was lost: its process ended with signal 9");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
fn a_peer_that_reports_the_loss_first_does_not_hide_the_cause() {
    let (lost, told) = channel::bounded::<()>(1);
    let behaviour: Arc<Behaviour> = Arc::new(move |assignment, control| {
        prepare(control).unwrap();
        if assignment.node == 0 {
            control.send(ToCoordinator::Console(b"up".to_vec())).unwrap();
            told.recv_timeout(PATIENCE).unwrap();
            control
                .send(ToCoordinator::PeerLost { node: 1, why: "the connection was reset".into() })
                .unwrap();
        }
        while !matches!(control.recv_timeout(PATIENCE), Ok(Some(FromCoordinator::Stop(_))) | Err(_)) {}
        true
    });
    let machine = Machine::start(machine(2, NodeHost::Local), behaviour);
    machine.expect("up");
    lost.send(()).unwrap();
    kill(machine.pid_of("n1"), Signal::SIGSEGV).unwrap();
    assert_eq!(machine.failure(), "node n1 was lost: its process ended with signal 11");
}

#[test]
fn a_node_that_falls_silent_ends_the_machine_within_five_seconds() {
    let config = MachineConfig { silence: Duration::from_secs(1), ..machine(2, NodeHost::Remote) };
    let machine = Machine::start(config, echo());
    let loud = echo_node(&machine.address, "n0");
    // By hand, without the heartbeats of the real thing.
    let mut silent = TcpStream::connect(&machine.address).unwrap();
    let key = machine_key().node("n1").unwrap();
    let (Answer::Assigned(_), _) = wire::introduce(&silent, &key, &hello("n1")).unwrap() else {
        panic!("refused")
    };
    silent.set_write_timeout(Some(PATIENCE)).unwrap();
    let begin = Instant::now();
    let why = machine.failure();
    assert!(why.starts_with("node n1 was lost: it was silent for 1."), "{why}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    loud.join().unwrap().unwrap_err();
    // The coordinator has closed it: there is an end to what can be read.
    silent.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn a_failing_node_is_quoted_and_its_dump_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let behaviour: Arc<Behaviour> = Arc::new(|assignment, control| {
        prepare(control).unwrap();
        if assignment.node == 1 {
            let why = "vCPU 3 stopped with a triple fault".into();
            control.send(ToCoordinator::Failed { why, dump: Some("rip=0xfff0".into()) }).unwrap();
        }
        while !matches!(control.recv_timeout(PATIENCE), Ok(Some(FromCoordinator::Stop(_))) | Err(_)) {}
        if assignment.node == 0 {
            control.send(ToCoordinator::Dump("trace of n0".into())).unwrap();
            assert!(control.flush(PATIENCE));
        }
        true
    });
    let machine = Machine::start_with(machine(2, NodeHost::Local), behaviour, Some(folder.path().into()));
    assert_eq!(machine.failure(), "node n1 failed: vCPU 3 stopped with a triple fault");
    let dump = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(dump("n1.dump"), "rip=0xfff0\n");
    assert_eq!(dump("n0.dump"), "trace of n0\n");
}

#[test]
fn a_dump_that_cannot_be_written_does_not_keep_the_machine_from_ending() {
    let folder = tempfile::tempdir().unwrap();
    // Whoever opens this to write waits for a reader: as with a disk that stands still.
    mkfifo(&folder.path().join("n0.dump"), Mode::S_IRWXU).unwrap();
    let behaviour: Arc<Behaviour> = Arc::new(|_, control| {
        prepare(control).unwrap();
        control.send(ToCoordinator::Failed { why: "it broke".into(), dump: Some("rip".into()) }).unwrap();
        while !matches!(control.recv_timeout(PATIENCE), Ok(Some(FromCoordinator::Stop(_))) | Err(_)) {}
        true
    });
    let machine = Machine::start_with(machine(1, NodeHost::Local), behaviour, Some(folder.path().into()));
    assert_eq!(machine.failure(), "node n0 failed: it broke");
}

#[test]
fn a_reboot_starts_local_nodes_again_and_waits_for_remote_ones() {
    let mut config = machine(2, NodeHost::Local);
    config.nodes[1].host = NodeHost::Remote;
    let ids = Arc::new(Mutex::new(Vec::new()));
    let seen = ids.clone();
    let behaviour: Arc<Behaviour> = Arc::new(move |assignment, control| {
        seen.lock().unwrap().push(assignment.machine.id);
        echo_guest(assignment, control).is_ok()
    });
    let machine = Machine::start(config, behaviour);
    let remote = echo_node(&machine.address, "n1");
    machine.expect("hello");
    machine.type_text("@");
    machine.expect("@hello");
    machine.type_text("!");
    let ended = machine.end();
    assert_eq!(ended.outcome, Outcome::PoweredOff);
    assert_eq!(ended.report["starts"], 2);
    assert_eq!(ended.report["remote_read_faults"], 2 * (10 + 11));
    remote.join().unwrap().unwrap();
    let ids = ids.lock().unwrap();
    assert_eq!(ids.len(), 2);
    assert_ne!(ids[0], ids[1], "every start has an id of its own");
}

#[test]
fn an_interrupt_ends_all_nodes() {
    let machine = Machine::start(machine(2, NodeHost::Local), echo());
    machine.expect("hello");
    machine.interrupt.send(Interrupt::Signal(15)).unwrap();
    assert_eq!(machine.end().outcome, Outcome::Interrupted(Interrupt::Signal(15)));
}

/// What the coordinator answers to raw bytes before it closes the connection.
fn answer_to(address: &str, bytes: &[u8]) -> String {
    String::from_utf8_lossy(&answer_bytes(address, bytes)).into_owned()
}

fn answer_bytes(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A reset is an end as well: the coordinator closed with our garbage unread.
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn frame(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_le_bytes()[..], payload].concat()
}

#[test]
fn strangers_are_told_off_and_do_not_disturb_a_running_machine() {
    let machine = Machine::start(machine(1, NodeHost::Local), echo());
    machine.expect("hello");
    let address = &machine.address;
    let refused = |options| match join(&options) {
        Err(JoinError::Refused { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(options(address, "n7")).contains("its key is of no node of this machine"));
    let claims = |name: &str, key: NodeKey| JoinOptions { key, ..options(address, name) };
    let stranger = MachineKey::from_bytes([1; 32]).node("n0").unwrap();
    // Another machine's: it expects another coordinator, which this one is not.
    assert!(refused(claims("n0", stranger.clone())).contains("key is not that of this machine"));
    let coordinator = machine_key().node("n0").unwrap().coordinator;
    let stranger = NodeKey { coordinator, ..stranger };
    assert!(refused(claims("n0", stranger)).contains("its key is of no node of this machine"));
    let own = machine_key().node("n0").unwrap();
    let said = refused(claims("n9", own));
    assert!(said.contains("the key of node n0 and claims the place of \"n9\""), "{said}");
    assert!(refused(options(address, "n0")).contains("has joined already"));
    // One that never says anything, and keeps its connection.
    let _silent = TcpStream::connect(address).unwrap();
    answer_to(address, b"GET / HTTP/1.1\r\n\r\n");
    answer_to(address, &frame(&[0xff; 100]));
    answer_to(address, &[0xff; 4]);
    let other = [b"gestalt\0", &99u32.to_le_bytes()[..], b"9.9.9"].concat();
    let said = answer_to(address, &frame(&other));
    assert!(said.contains("install one version"), "{said}");
    machine.type_text("still here");
    machine.expect("still here");
    machine.type_text("!");
    assert_eq!(machine.end().outcome, Outcome::PoweredOff);
}

#[test]
fn a_replayed_introduction_joins_nothing() {
    let machine = Machine::start(machine(2, NodeHost::Remote), echo());
    // What node n0 says on its way in is written down.
    let tap = TcpListener::bind("127.0.0.1:0").unwrap();
    let at_tap = tap.local_addr().unwrap().to_string();
    let (said, coordinator) = (Arc::new(Mutex::new(Vec::new())), machine.address.clone());
    let said_to_tap = said.clone();
    thread::spawn(move || {
        let (mut near, _) = tap.accept().unwrap();
        let mut far = TcpStream::connect(coordinator).unwrap();
        let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = near.read(&mut piece) {
            said_to_tap.lock().unwrap().extend_from_slice(&piece[..length]);
            far.write_all(&piece[..length]).unwrap();
        }
    });
    let first = echo_node(&at_tap, "n0");
    let said = said.lock().unwrap().clone();
    let answer = answer_bytes(&machine.address, &said);
    // The second handshake message, which only the true node can use, and no word more.
    assert_eq!(answer.len(), 4 + 1 + 48);
    let second = echo_node(&machine.address, "n1");
    machine.expect("hello");
    machine.type_text("!");
    assert_eq!(machine.end().outcome, Outcome::PoweredOff);
    first.join().unwrap().unwrap();
    second.join().unwrap().unwrap();
}

#[test]
fn a_node_that_sends_garbage_after_joining_is_named() {
    let machine = Machine::start(machine(1, NodeHost::Remote), echo());
    let mut stream = TcpStream::connect(&machine.address).unwrap();
    let key = machine_key().node("n0").unwrap();
    let (Answer::Assigned(_), _) = wire::introduce(&stream, &key, &hello("n0")).unwrap() else {
        panic!("refused")
    };
    stream.write_all(&[0xff; 64]).unwrap();
    let why = machine.failure();
    assert!(why.starts_with("node n0 was lost: it sent a frame of 4294967295 bytes"), "{why}");
}

#[test]
fn an_address_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = MachineConfig { listen: taken.local_addr().ok(), ..machine(1, NodeHost::Local) };
    let fakes = Fakes { behaviour: echo(), started: Started::default() };
    match Coordinator::bind(config.check().unwrap(), machine_key(), Box::new(fakes)) {
        Err(CoordinatorError::InUse(address)) => assert_eq!(Some(address), taken.local_addr().ok()),
        other => panic!("{:?}", other.map(|coordinator| coordinator.address())),
    }
}

/// A coordinator that admits one node and then does as told with the connection.
fn lone_coordinator(then: impl FnOnce(TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let keys = machine_key().coordinator(["n0"].into_iter()).unwrap();
        let (_, mut session) = wire::receive_hello(&stream, &keys).unwrap();
        let config = MachineConfig { silence: Duration::from_secs(1), ..machine(1, NodeHost::Remote) };
        let machine = config.check().unwrap().machine([7; 16], Vec::new());
        let assigned = Assigned { node: 0, machine, fabric_listen: Vec::new() };
        wire::answer(&stream, &mut session.sender, &Answer::Assigned(Box::new(assigned))).unwrap();
        then(stream);
    });
    address
}

/// What the node's end says once the coordinator is gone.
fn loss_seen_by_node(then: impl FnOnce(TcpStream) + Send + 'static) -> (String, Duration) {
    let (_assignment, control) = join(&options(&lone_coordinator(then), "n0")).unwrap();
    let begin = Instant::now();
    loop {
        match control.recv_timeout(PATIENCE) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the loss was not noticed"),
            Err(error) => return (error.to_string(), begin.elapsed()),
        }
    }
}

#[test]
fn a_node_may_write_as_long_as_it_is_heard_and_never_again_once_its_machine_has_ended() {
    let silence = Duration::from_secs(3);
    let (tell, told) = channel::unbounded();
    let behaviour = move |assignment: &Assignment, control: &Control| {
        let (fence, tell) = (control.fence().clone(), tell.clone());
        thread::spawn(move || {
            let end = Instant::now() + 2 * silence;
            let mut passed = fence.pass();
            while passed.is_ok() && Instant::now() < end {
                passed = fence.pass();
            }
            tell.send((passed, fence)).unwrap();
        });
        echo_guest(assignment, control).is_ok()
    };
    let config = MachineConfig { silence, ..machine(1, NodeHost::Local) };
    let machine = Machine::start(config, Arc::new(behaviour));
    machine.expect("hello");
    let (passed, fence) = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(passed, Ok(()));
    machine.type_text("!");
    assert_eq!(machine.end().outcome, Outcome::PoweredOff);
    assert!(fence.has_ended());
}

#[test]
fn a_node_that_has_lost_its_coordinator_writes_nothing_in_the_time_that_it_has_to_end() {
    let (_assignment, control) = join(&options(&lone_coordinator(drop), "n0")).unwrap();
    while control.recv_timeout(PATIENCE).is_ok() {}
    assert!(control.fence().has_ended());
}

#[test]
fn a_node_notices_within_five_seconds_that_its_coordinator_is_gone() {
    let (why, _) = loss_seen_by_node(|mut stream| {
        stream.shutdown(Shutdown::Write).unwrap();
        // Dropped before the node's heartbeats are read, it would be reset.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert_eq!(why, "the coordinator was lost: it closed the connection");
    let (hold, until) = channel::bounded::<()>(0);
    let (why, after) = loss_seen_by_node(move |stream| {
        let _ = until.recv();
        drop(stream);
    });
    assert_eq!(why, "the coordinator was lost: it was silent for 1.0s");
    assert!(after < Duration::from_secs(5), "{after:?}");
    drop(hold);
    let (why, _) = loss_seen_by_node(|mut stream| stream.write_all(&[9; 5]).unwrap());
    assert!(why.contains("it sent a frame of"), "{why}");
}

#[test]
fn processes_end_with_the_thread_that_started_them() {
    let process = thread::spawn(|| {
        let mut command = Command::new("sleep");
        command.arg("1000");
        start(command, "n0", b"").unwrap()
    });
    assert_eq!(process.join().unwrap().wait(), ProcessEnd::Signal(9));
}

#[test]
fn a_process_can_be_killed_and_waited_for_any_number_of_times() {
    let mut command = Command::new("sh");
    command.args(["-c", "exit 3"]);
    let process = start(command, "n0", b"").unwrap();
    assert_eq!(process.wait(), ProcessEnd::Code(3));
    process.kill();
    assert_eq!(process.wait(), ProcessEnd::Code(3));
}
