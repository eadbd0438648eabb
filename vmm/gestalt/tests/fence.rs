//! A node that stands still while the others give it up, and then goes on, writes nothing more: a process
//! with SIGSTOP.

mod common;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, echo_guest, machine, machine_key, options};
use crossbeam::channel;
use gestalt::coordinator::event::Outcome;
use gestalt::coordinator::spawn::{NodeProcess, Spawner};
use gestalt::coordinator::{Console, Coordinator, Ended};
use machine::config::{MachineConfig, NodeHost};
use machine::control::join::join;
use machine::keys::NodeKey;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// In the child: whom to join, and the file that stands for a disk.
const JOIN: &str = "GESTALT_TEST_JOIN";
const DISK: &str = "GESTALT_TEST_DISK";

/// All nodes are processes of the test's.
struct NoLocalNodes;

impl Spawner for NoLocalNodes {
    fn spawn(
        &mut self,
        _: &str,
        _: std::net::SocketAddr,
        _: &NodeKey,
    ) -> std::io::Result<Arc<dyn NodeProcess>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// The node whose device writes without pause, if this is the child.
#[test]
fn the_node() {
    let Ok(address) = std::env::var(JOIN) else { return };
    let mut disk = OpenOptions::new().append(true).open(std::env::var(DISK).unwrap()).unwrap();
    let (assignment, control) = join(&options(&address, "n0")).unwrap();
    let fence = control.fence().clone();
    thread::spawn(move || echo_guest(&assignment, &control));
    while fence.pass().is_ok() {
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

/// Starts a machine of one remote node; where to join it, and its end.
fn start(silence: Duration) -> (String, channel::Receiver<Ended>) {
    let config = MachineConfig { silence, ..machine(1, NodeHost::Remote) };
    let (finish, ended) = channel::bounded(1);
    let (say, address) = channel::bounded(1);
    thread::spawn(move || {
        let coordinator =
            Coordinator::bind(config.check().unwrap(), machine_key(), Box::new(NoLocalNodes)).unwrap();
        say.send(coordinator.address().unwrap().to_string()).unwrap();
        let console = Console {
            input: channel::never(),
            interrupts: channel::never(),
            requests: channel::never(),
            attach: Box::new(|_| {}),
            output: Box::new(|_| {}),
            dumps: None,
        };
        finish.send(coordinator.run(console).unwrap()).unwrap();
    });
    (address.recv_timeout(PATIENCE).unwrap(), ended)
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
    let (address, ended) = start(Duration::from_secs(2));
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
    let outcome = ended.recv_timeout(PATIENCE).unwrap().outcome;
    assert!(matches!(&outcome, Outcome::Failed(why) if why.contains("n0")), "{outcome:?}");
    // From here on another machine may have the disk.
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
