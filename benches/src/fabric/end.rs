//! One end of a connection between two threads: the fabric's, or the floor's.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver as Inbox, Sender, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fabric::secure::PrivateKey;
use fabric::tcp::{Listener, MeshConfig, MeshKeys, TcpTransport};
use fabric::{LaneId, NodeId, Receiver, Transport, sim};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::choice::Net;
use crate::fault_path::command::Polling;

/// One end. Messages of one measurement all have one size.
pub trait End: Send {
    /// Sends one message.
    ///
    /// # Errors
    /// The other end is gone.
    fn send(&mut self, message: &[u8]) -> Result<()>;

    /// Waits for messages of `size` bytes; how many came, at least one and at most `most`.
    ///
    /// # Errors
    /// The other end is gone.
    fn receive(&mut self, size: usize, most: usize) -> Result<usize>;
}

/// Both ends over the fabric.
///
/// # Errors
/// The mesh cannot be made.
pub fn ours(net: Net, polling: Polling) -> Result<[Box<dyn End>; 2]> {
    if net == Net::InProcess {
        let mut nodes = sim::cluster(2, 1)?.into_iter();
        let (near, far) = nodes.next().zip(nodes.next()).context("two nodes were asked for")?;
        return Ok([Ours::end(near, polling)?, Ours::end(far, polling)?]);
    }
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    let rails = vec![any; if net == Net::TcpRails { 2 } else { 1 }];
    over_tcp(&rails, 1, net == Net::TcpPlain, polling)
}

/// Both ends over TCP, with a rail for each address; messages go over all `lanes` in turn.
///
/// # Errors
/// The mesh cannot be made.
pub fn over_tcp(
    rails: &[SocketAddr],
    lanes: u16,
    plaintext: bool,
    polling: Polling,
) -> Result<[Box<dyn End>; 2]> {
    let listeners = [Listener::bind(rails)?, Listener::bind(rails)?];
    let addresses = listeners.each_ref().map(|listener| listener.local_addrs().to_vec()).to_vec();
    // No secret: who can connect to the bench is on this host.
    let keys = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]));
    let mesh = |listener: Listener, node: u16| -> Result<TcpTransport> {
        Ok(listener.mesh(MeshConfig {
            node: NodeId(node),
            addresses: addresses.clone(),
            lanes,
            machine: [7; 16],
            version: "bench".into(),
            keys: MeshKeys {
                own: keys[usize::from(node)].clone(),
                nodes: keys.each_ref().map(PrivateKey::public).to_vec(),
            },
            plaintext,
            timeout: Duration::from_secs(10),
            silence: Duration::from_secs(10),
        })?)
    };
    let [near, far] = listeners;
    std::thread::scope(|scope| {
        let far = scope.spawn(|| mesh(far, 1));
        let near = mesh(near, 0)?;
        let Ok(far) = far.join() else { bail!("the far end's thread panicked") };
        Ok([Ours::end(near, polling)?, Ours::end(far?, polling)?])
    })
}

/// Both ends without the fabric: bare sockets, or a channel of boxes where `net` is in process.
///
/// # Errors
/// What the sockets say.
pub fn floor(net: Net, polling: Polling) -> Result<[Box<dyn End>; 2]> {
    if net == Net::InProcess {
        let ((to_far, far), (to_near, near)) = (channel(), channel());
        let end = |to, from| Box::new(Boxes { to, from, polling }) as Box<dyn End>;
        return Ok([end(to_far, near), end(to_near, far)]);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let far = listener.accept()?.0;
    let end = |socket: TcpStream| -> Result<Box<dyn End>> {
        socket.set_nodelay(true)?;
        socket.set_nonblocking(polling == Polling::Busy)?;
        Ok(Box::new(Bare { socket, buffer: vec![0; 256 * 1024], have: 0 }))
    };
    Ok([end(near)?, end(far)?])
}

struct Ours {
    transport: Box<dyn Transport>,
    /// By lane.
    receivers: Vec<Box<dyn Receiver>>,
    peer: NodeId,
    polling: Polling,
    /// The lane of the next message.
    lane: LaneId,
    /// Frames that came beyond those that were asked for.
    extra: usize,
}

impl Ours {
    fn end(transport: impl Transport + 'static, polling: Polling) -> Result<Box<dyn End>> {
        let lanes = 0..transport.lanes() as LaneId;
        let receivers = lanes.map(|lane| transport.take_receiver(lane)).collect::<Option<_>>();
        let receivers = receivers.context("a lane was taken before")?;
        let peer = NodeId(1 - transport.node().0);
        Ok(Box::new(Ours { transport: Box::new(transport), receivers, peer, polling, lane: 0, extra: 0 }))
    }

    /// Sleeps until a lane may have something.
    fn wait(&mut self) -> Result<()> {
        for receiver in &mut self.receivers {
            if receiver.arm()? {
                return Ok(());
            }
        }
        let fds = self.receivers.iter().map(|receiver| PollFd::new(receiver.fd(), PollFlags::POLLIN));
        let mut fds: Vec<PollFd<'_>> = fds.collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl End for Ours {
    fn send(&mut self, message: &[u8]) -> Result<()> {
        // As the engine sends: a head, and a page or nothing.
        let (head, body) = message.split_at(message.len().min(16));
        let lane = self.lane;
        self.lane = (lane + 1) % self.receivers.len() as LaneId;
        Ok(self.transport.send(self.peer, lane, &[head, body])?)
    }

    fn receive(&mut self, _: usize, most: usize) -> Result<usize> {
        while self.extra == 0 {
            for receiver in &mut self.receivers {
                self.extra += receiver.poll(&mut |_, _| ())?;
            }
            if self.extra == 0 && self.polling == Polling::Blocking {
                self.wait()?;
            }
        }
        let taken = self.extra.min(most);
        self.extra -= taken;
        Ok(taken)
    }
}

struct Bare {
    socket: TcpStream,
    buffer: Vec<u8>,
    have: usize,
}

impl End for Bare {
    fn send(&mut self, mut message: &[u8]) -> Result<()> {
        while !message.is_empty() {
            match self.socket.write(message) {
                Ok(sent) => message = &message[sent..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn receive(&mut self, size: usize, most: usize) -> Result<usize> {
        while self.have < size {
            match self.socket.read(&mut self.buffer[self.have..]) {
                Ok(0) => bail!("the other end is gone"),
                Ok(n) => self.have += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        let taken = (self.have / size).min(most);
        self.buffer.copy_within(taken * size..self.have, 0);
        self.have -= taken * size;
        Ok(taken)
    }
}

struct Boxes {
    to: Sender<Box<[u8]>>,
    from: Inbox<Box<[u8]>>,
    polling: Polling,
}

impl End for Boxes {
    fn send(&mut self, message: &[u8]) -> Result<()> {
        Ok(self.to.send(message.into())?)
    }

    fn receive(&mut self, _: usize, _: usize) -> Result<usize> {
        if self.polling == Polling::Blocking {
            self.from.recv()?;
            return Ok(1);
        }
        loop {
            match self.from.try_recv() {
                Ok(_) => return Ok(1),
                Err(TryRecvError::Empty) => std::hint::spin_loop(),
                Err(TryRecvError::Disconnected) => bail!("the other end is gone"),
            }
        }
    }
}
