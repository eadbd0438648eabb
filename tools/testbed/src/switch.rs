//! The network between emulated hosts: an Ethernet switch made of a few threads.
//!
//! Each port is a stream socket on which QEMU (`-netdev stream`) writes frames behind a big-endian 32-bit
//! length. A frame goes to every other port: with a handful of hosts, learning addresses would save little. A
//! port whose reader falls behind slows the senders down, which is what TCP above it needs; nothing is
//! dropped, except at a port that was cut.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

/// Longest frame accepted, in bytes: QEMU's own limit.
const MAX_FRAME: usize = 68 * 1024;

struct Port {
    writer: Mutex<UnixStream>,
    connected: AtomicBool,
}

/// A switch with a fixed number of ports.
pub struct Switch {
    ports: Arc<Vec<Port>>,
}

impl Switch {
    /// Makes a switch; returns the far end of each port for QEMU.
    ///
    /// # Errors
    /// No more descriptors or threads.
    pub fn new(ports: usize) -> Result<(Self, Vec<OwnedFd>)> {
        let (mut near, mut far) = (Vec::new(), Vec::new());
        let mut readers = Vec::new();
        for _ in 0..ports {
            let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
            readers.push(ours.try_clone()?);
            near.push(Port { writer: Mutex::new(ours), connected: AtomicBool::new(true) });
            far.push(theirs.into());
        }
        let ports = Arc::new(near);
        for (index, reader) in readers.into_iter().enumerate() {
            let ports = ports.clone();
            std::thread::Builder::new().name(format!("switch-{index}")).spawn(move || {
                // It ends when the host's QEMU does.
                let _ = forward(index, reader, &ports);
            })?;
        }
        Ok((Self { ports }, far))
    }

    /// Pulls a host's cable (`false`), or plugs it in again.
    pub fn set_connected(&self, port: usize, connected: bool) {
        if let Some(port) = self.ports.get(port) {
            port.connected.store(connected, Ordering::Relaxed);
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        for port in self.ports.iter() {
            // The port may be closed already.
            let _ = port.writer.lock().expect("no holder panics").shutdown(std::net::Shutdown::Both);
        }
    }
}

fn forward(from: usize, mut reader: UnixStream, ports: &[Port]) -> io::Result<()> {
    let mut frame = vec![0; 4 + MAX_FRAME];
    loop {
        reader.read_exact(&mut frame[..4])?;
        let length = u32::from_be_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
        if length > MAX_FRAME {
            return Err(io::ErrorKind::InvalidData.into());
        }
        reader.read_exact(&mut frame[4..4 + length])?;
        if !ports[from].connected.load(Ordering::Relaxed) {
            continue;
        }
        for (_, port) in ports.iter().enumerate().filter(|(to, _)| *to != from) {
            if port.connected.load(Ordering::Relaxed) {
                // A host that is gone takes nothing; the others still talk.
                let _ = port.writer.lock().expect("no holder panics").write_all(&frame[..4 + length]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switch(ports: usize) -> (Switch, Vec<UnixStream>) {
        let (switch, far) = Switch::new(ports).unwrap();
        (switch, far.into_iter().map(UnixStream::from).collect())
    }

    fn send(mut to: &UnixStream, content: &[u8]) {
        to.write_all(&(content.len() as u32).to_be_bytes()).unwrap();
        to.write_all(content).unwrap();
    }

    fn receive(mut from: &UnixStream) -> Vec<u8> {
        let mut length = [0; 4];
        from.read_exact(&mut length).unwrap();
        let mut content = vec![0; u32::from_be_bytes(length) as usize];
        from.read_exact(&mut content).unwrap();
        content
    }

    #[test]
    fn a_frame_reaches_every_other_port_and_not_its_own() {
        let (_switch, ports) = switch(3);
        send(&ports[0], b"hello");
        assert_eq!(receive(&ports[1]), b"hello");
        assert_eq!(receive(&ports[2]), b"hello");
        // Had the first frame come back to port 0, it would be ahead of this one.
        send(&ports[1], b"answer");
        assert_eq!(receive(&ports[0]), b"answer");
    }

    #[test]
    fn a_cut_port_hears_and_says_nothing_until_it_is_restored() {
        let (switch, ports) = switch(3);
        switch.set_connected(1, false);
        send(&ports[0], b"lost at 1");
        // Ports are served in order: what port 2 has, port 1 was left out of.
        assert_eq!(receive(&ports[2]), b"lost at 1");
        switch.set_connected(1, true);
        send(&ports[0], b"heard");
        assert_eq!(receive(&ports[1]), b"heard");
    }

    #[test]
    fn a_port_that_left_does_not_disturb_the_others() {
        let (_switch, mut ports) = switch(3);
        drop(ports.remove(2));
        send(&ports[0], b"on");
        assert_eq!(receive(&ports[1]), b"on");
    }
}
