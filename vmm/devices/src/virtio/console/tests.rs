//! Consoles and channels between a driver and the sockets of those who connect.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use super::port::BACKLOG;
use super::*;
use crate::virtio::testing::{DATA, Driver, rings};

/// A device, and where its socket is.
struct Guest {
    driver: Driver,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn guest(name: Option<&str>, features: u64) -> Guest {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let port = Port::bind(&path).unwrap();
    let device = match name {
        None => Console::terminal(port),
        Some(name) => Console::channel(port, name),
    };
    let mut driver = Driver::new(Box::new(device));
    driver.start(features);
    Guest { driver, path, _folder: folder }
}

fn connect(path: &std::path::Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

impl Guest {
    /// The guest says something.
    fn say(&mut self, queue: u16, bytes: &[u8]) {
        self.driver.put(DATA, bytes);
        self.driver.request(queue, &[(DATA, bytes.len() as u32, false)]);
    }

    /// The guest gives a buffer of `len` bytes and waits until something is in it.
    fn hear(&mut self, queue: u16, len: u32) -> Vec<u8> {
        let at = DATA + 0x4000;
        self.driver.descriptor(rings(queue)[0], 1, at, len, 2, 0);
        self.driver.offer(queue, 1);
        let (head, written) = self.driver.wait(queue);
        assert_eq!(head, 1);
        self.driver.get(at, written as usize)
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_console_carries_bytes_both_ways_and_over_a_reset() {
    let mut guest = guest(None, 0);
    let mut host = connect(&guest.path);
    host.write_all(b"root\n").unwrap();
    assert_eq!(guest.hear(0, 3), b"roo");
    assert_eq!(guest.hear(0, 100), b"t\n");
    guest.say(1, b"Password:");
    assert_eq!(read(&mut host, 9), b"Password:");
    guest.driver.reset();
    guest.driver.start(0);
    guest.say(1, b"again");
    assert_eq!(read(&mut host, 5), b"again");
    drop(host);
    let mut next = connect(&guest.path);
    next.write_all(b"x").unwrap();
    assert_eq!(guest.hear(0, 100), b"x");
}

#[test]
fn who_connects_to_a_console_reads_its_last_bytes() {
    let mut guest = guest(None, 0);
    guest.say(1, b"too old");
    let last: Vec<u8> = (0..BACKLOG / 16).flat_map(|n| format!("{n:15}\n").into_bytes()).collect();
    last.chunks(4096).for_each(|bytes| guest.say(1, bytes));
    let mut host = connect(&guest.path);
    assert!(read(&mut host, BACKLOG) == last);
}

#[test]
fn a_console_that_nobody_reads_does_not_hold_the_guest_up() {
    let mut guest = guest(None, 0);
    let mut host = connect(&guest.path);
    host.write_all(b"x").unwrap();
    assert_eq!(guest.hear(0, 1), b"x", "it is connected");
    // More than any socket takes: each request comes back at once.
    (0..1000).for_each(|_| guest.say(1, &[b'y'; 0x4000]));
    assert_eq!(read(&mut host, 3), b"yyy");
}

const NAME: &str = "org.qemu.guest_agent.0";

/// The driver learns that there is a port, and its name; whether somebody is connected.
fn introduce(guest: &mut Guest) -> bool {
    guest.say(3, &[0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(guest.hear(2, 100), [1, 0, 0, 0, 1, 0, 0, 0], "a port is added");
    guest.say(3, &[1, 0, 0, 0, 3, 0, 1, 0]);
    let name = guest.hear(2, 100);
    assert_eq!((&name[..8], &name[8..]), (&[1, 0, 0, 0, 7, 0, 1, 0][..], NAME.as_bytes()));
    let open = guest.hear(2, 100);
    assert_eq!(open[..6], [1, 0, 0, 0, 6, 0]);
    open[6] == 1
}

#[test]
fn a_channel_has_a_name_and_says_when_it_opens_and_closes() {
    let mut guest = guest(Some(NAME), MULTIPORT);
    assert_eq!(guest.driver.read(0x2004, 4), 2, "ports");
    assert!(!introduce(&mut guest));
    let mut host = connect(&guest.path);
    host.write_all(b"{}").unwrap();
    guest.say(3, &[1, 0, 0, 0, 6, 0, 1, 0]);
    assert_eq!(guest.hear(2, 100), [1, 0, 0, 0, 6, 0, 1, 0], "opened at the host");
    assert_eq!(guest.hear(4, 100), b"{}");
    guest.say(5, b"answer");
    assert_eq!(read(&mut host, 6), b"answer");
    drop(host);
    assert_eq!(guest.hear(2, 100), [1, 0, 0, 0, 6, 0, 0, 0], "closed at the host");
    guest.say(5, b"lost");
    let mut host = connect(&guest.path);
    assert_eq!(guest.hear(2, 100), [1, 0, 0, 0, 6, 0, 1, 0]);
    guest.say(5, b"new");
    assert_eq!(read(&mut host, 3), b"new");
    guest.driver.reset();
    guest.driver.start(MULTIPORT);
    assert!(introduce(&mut guest), "still connected");
}

#[test]
fn a_channel_waits_for_its_reader_and_a_reset_does_not() {
    let mut guest = guest(Some(NAME), MULTIPORT);
    introduce(&mut guest);
    guest.say(3, &[1, 0, 0, 0, 6, 0, 1, 0]);
    let mut host = connect(&guest.path);
    assert_eq!(guest.hear(2, 100), [1, 0, 0, 0, 6, 0, 1, 0]);
    const LEN: usize = 4 << 20;
    let reader = std::thread::spawn(move || {
        let bytes = read(&mut host, LEN);
        (host, bytes)
    });
    (0..LEN / 0x4000).for_each(|n| guest.say(5, &[n as u8; 0x4000]));
    let (_host, bytes) = reader.join().unwrap();
    assert!(bytes.chunks(0x4000).zip(0..).all(|(chunk, n)| chunk == [n as u8; 0x4000]), "nothing is lost");
    // Nobody reads any more: the last request waits, and a reset ends that.
    guest.driver.chain(5, &[(DATA, 0x4_0000, false)]);
    (0..10).for_each(|_| guest.driver.offer(5, 0));
    guest.driver.reset();
}

#[test]
fn a_port_that_cannot_be_had_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |name: &str| match Port::bind(&folder.path().join(name)) {
        Ok(_) => panic!("{name} can be bound"),
        Err(error) => error.to_string(),
    };
    assert!(refusal("no/such/folder").contains("cannot be made"));
    std::fs::write(folder.path().join("file"), "content").unwrap();
    assert!(refusal("file").contains("is no socket"));
    let first = Port::bind(&folder.path().join("s")).unwrap();
    assert!(refusal("s").contains("in use"));
    drop(first);
    assert!(!folder.path().join("s").exists());
    // What a program left behind that is no more.
    drop(UnixListener::bind(folder.path().join("s")).unwrap());
    Port::bind(&folder.path().join("s")).unwrap();
}
