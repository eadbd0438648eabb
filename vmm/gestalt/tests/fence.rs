//! A node that stands still while the others give it up, and then goes on, writes nothing more: a process
//! with SIGSTOP.

mod common;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, machine, machine_key, options};
use machine::config::{MachineConfig, NodeHost};
use machine::control::join::join;
use machine::control::wire::{self, Answer, Assigned, MAX_FRAME};
use machine::control::{FromCoordinator, ToCoordinator};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long others wait before they give a node up.
const SILENCE: Duration = Duration::from_secs(2);

/// In the child: whom to join, and the file that stands for a disk.
const JOIN: &str = "GESTALT_TEST_JOIN";
const DISK: &str = "GESTALT_TEST_DISK";

/// The node whose device writes without pause, if this is the child.
#[test]
fn the_node() {
    let Ok(address) = std::env::var(JOIN) else { return };
    let mut disk = OpenOptions::new().append(true).open(std::env::var(DISK).unwrap()).unwrap();
    let (_assignment, control) = join(&options(&address, "n0")).unwrap();
    while control.fence().pass().is_ok() {
        disk.write_all(b"x").unwrap();
    }
}

/// Ended with the test, however that ends.
struct Node(Child);

impl Node {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A coordinator of one node, which hears no more of it and says nothing more to it once `deaf` is set: as if
/// the network between them were cut, so that nothing but the clock can tell the node that it was given up.
/// Where to join it.
fn coordinator(deaf: Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let keys = machine_key().coordinator(["n0"].into_iter()).unwrap();
        let (_, mut session) = wire::receive_hello(&stream, &keys).unwrap();
        let config = MachineConfig { silence: SILENCE, ..machine(1, NodeHost::Remote) };
        let machine = config.check().unwrap().machine([7; 16], Vec::new());
        let assigned = Assigned { node: 0, machine, fabric_listen: Vec::new() };
        wire::answer(&stream, &mut session.sender, &Answer::Assigned(Box::new(assigned))).unwrap();
        stream.set_read_timeout(None).unwrap();
        while let Ok(message) = session.receiver.read_message::<ToCoordinator>(&mut stream, MAX_FRAME) {
            if let ToCoordinator::Heartbeat(said) = message
                && !deaf.load(Ordering::SeqCst)
            {
                let answer = FromCoordinator::Heartbeat(said);
                session.sender.write_message(&mut stream, &answer).unwrap();
            }
        }
    });
    address
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::yield_now();
    }
}

#[test]
fn a_node_that_stands_still_until_it_is_given_up_and_then_goes_on_writes_nothing() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let len = || File::metadata(disk.as_file()).unwrap().size();
    let deaf = Arc::new(AtomicBool::new(false));
    let address = coordinator(deaf.clone());
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_node", "--nocapture"])
        .env(JOIN, &address)
        .env(DISK, disk.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut node = Node(child);
    wait("the node writes nothing", || len() > 1000);
    node.signal(Signal::SIGSTOP);
    deaf.store(true, Ordering::SeqCst);
    // This is what others wait as well; from then on another machine may have the disk.
    thread::sleep(SILENCE);
    let before = len();
    node.signal(Signal::SIGCONT);
    let deadline = Instant::now() + PATIENCE;
    while node.0.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "the node does not end");
        thread::yield_now();
    }
    // It may have been stopped between asking and writing, once.
    assert!(len() <= before + 1, "it wrote {} bytes more", len() - before);
}
