//! The floor's transport: the least code that moves a frame. Raw sockets over TCP; in process there is
//! nothing below the fabric's own queues, so that these are used as they are.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use coherence::page::PAGE_SIZE;
use fabric::sim::SimTransport;
use fabric::{NodeId, Receiver, Transport};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, sendmsg};

/// The head of a frame, as long as a coherence message's: what is wanted or answered, and the page.
pub type Head = [u8; 16];

/// Takes frames: the sender, the head, and the page's bytes or nothing.
pub type Sink<'a> = &'a mut dyn FnMut(u16, &Head, &[u8]);

/// A head from its two words.
pub fn head(kind: u8, page: u64) -> Head {
    let mut head = [0; 16];
    head[0] = kind;
    head[8..].copy_from_slice(&page.to_le_bytes());
    head
}

/// The page that a head names.
pub fn page(head: &Head) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&head[8..]);
    u64::from_le_bytes(bytes)
}

/// Frames to and from all other nodes.
pub trait Wire: Send {
    /// Sends one frame.
    ///
    /// # Errors
    /// The peer is gone.
    fn send(&mut self, to: u16, head: &Head, body: &[u8]) -> Result<()>;
    /// Delivers what has arrived, without waiting (`false`) or after something has (`true`).
    ///
    /// # Errors
    /// A peer is gone.
    fn receive(&mut self, wait: bool, sink: Sink<'_>) -> Result<()>;
    /// Readable when something has arrived.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Sends bytes without frames.
    ///
    /// # Errors
    /// The peer is gone.
    fn pour(&mut self, to: u16, bytes: &[u8]) -> Result<()>;
    /// Fills `bytes` with what was poured.
    ///
    /// # Errors
    /// The peer is gone.
    fn drain(&mut self, from: u16, bytes: &mut [u8]) -> Result<()>;
}

/// Bytes in front of a frame that say how long it is.
const LENGTH: usize = 4;
const CAPACITY: usize = 256 * 1024;

struct Connection {
    socket: TcpStream,
    bytes: Vec<u8>,
    end: usize,
}

/// One plain socket to each other node.
pub struct Sockets {
    connections: Vec<Option<Connection>>,
    /// The only peer, which is received from without asking who has something.
    only: Option<usize>,
    epoll: Epoll,
}

impl Sockets {
    /// Connects node `me` with all others: to those before it, and it is called by those behind it.
    ///
    /// # Errors
    /// What the sockets say.
    pub fn mesh(me: u16, listener: &TcpListener, addresses: &[SocketAddr]) -> Result<Sockets> {
        let mut sockets: Vec<Option<TcpStream>> = addresses.iter().map(|_| None).collect();
        for (peer, address) in addresses.iter().enumerate().take(me.into()) {
            let mut socket = TcpStream::connect_timeout(address, Duration::from_secs(10))?;
            socket.write_all(&me.to_le_bytes())?;
            sockets[peer] = Some(socket);
        }
        for _ in usize::from(me) + 1..addresses.len() {
            let (mut socket, _) = listener.accept()?;
            let mut peer = [0; 2];
            socket.read_exact(&mut peer)?;
            let place = sockets.get_mut(usize::from(u16::from_le_bytes(peer)));
            *place.context("a stranger called")? = Some(socket);
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut connections = Vec::new();
        for (peer, socket) in (0..).zip(sockets) {
            if let Some(socket) = &socket {
                socket.set_nodelay(true)?;
                epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, peer))?;
            }
            connections.push(socket.map(|socket| Connection { socket, bytes: vec![0; CAPACITY], end: 0 }));
        }
        let peers: Vec<usize> = (0..connections.len()).filter(|&peer| connections[peer].is_some()).collect();
        let only = if peers.len() == 1 { peers.first().copied() } else { None };
        Ok(Sockets { connections, only, epoll })
    }

    fn socket(&mut self, peer: u16) -> Result<&mut Connection> {
        let connection = self.connections.get_mut(usize::from(peer)).and_then(Option::as_mut);
        connection.with_context(|| format!("there is no node {peer}"))
    }
}

impl Connection {
    fn receive(&mut self, peer: u16, wait: bool, sink: Sink<'_>) -> Result<()> {
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        match recv(self.socket.as_raw_fd(), &mut self.bytes[self.end..], flags) {
            Ok(0) => bail!("node {peer} closed its connection"),
            Ok(n) => self.end += n,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let mut start = 0;
        while let Some((length, rest)) = self.bytes[start..self.end].split_first_chunk::<LENGTH>() {
            let length = u32::from_le_bytes(*length) as usize;
            ensure!((16..=16 + PAGE_SIZE).contains(&length), "node {peer} sent nonsense");
            let Some((head, body)) = rest.get(..length).and_then(|frame| frame.split_first_chunk()) else {
                break;
            };
            sink(peer, head, body);
            start += LENGTH + length;
        }
        self.bytes.copy_within(start..self.end, 0);
        self.end -= start;
        Ok(())
    }
}

impl Wire for Sockets {
    fn send(&mut self, to: u16, head: &Head, body: &[u8]) -> Result<()> {
        let length = ((head.len() + body.len()) as u32).to_le_bytes();
        let parts = [&length[..], head, body].map(std::io::IoSlice::new);
        let parts = if body.is_empty() { &parts[..2] } else { &parts };
        let sent =
            sendmsg::<()>(self.socket(to)?.socket.as_raw_fd(), parts, &[], MsgFlags::MSG_NOSIGNAL, None)?;
        ensure!(sent == LENGTH + head.len() + body.len(), "a blocking socket took half a frame");
        Ok(())
    }

    fn receive(&mut self, wait: bool, sink: Sink<'_>) -> Result<()> {
        if let Some(only) = self.only {
            return self.socket(only as u16)?.receive(only as u16, wait, sink);
        }
        let mut events = [EpollEvent::empty(); 16];
        let timeout = if wait { EpollTimeout::NONE } else { EpollTimeout::ZERO };
        let ready = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        for event in &events[..ready] {
            self.socket(event.data() as u16)?.receive(event.data() as u16, false, sink)?;
        }
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        let only = self.only.and_then(|only| self.connections[only].as_ref());
        only.map_or(self.epoll.0.as_fd(), |connection| connection.socket.as_fd())
    }

    fn pour(&mut self, to: u16, bytes: &[u8]) -> Result<()> {
        Ok(self.socket(to)?.socket.write_all(bytes)?)
    }

    fn drain(&mut self, from: u16, bytes: &mut [u8]) -> Result<()> {
        Ok(self.socket(from)?.socket.read_exact(bytes)?)
    }
}

/// The fabric's queues inside one process.
pub struct Queues {
    transport: SimTransport,
    receiver: Box<dyn Receiver>,
    /// Poured bytes that nobody has asked for yet.
    poured: Vec<u8>,
}

impl Queues {
    /// Over lane 0 of `transport`.
    ///
    /// # Errors
    /// The lane was taken before.
    pub fn new(transport: SimTransport) -> Result<Queues> {
        let receiver = transport.take_receiver(0).context("lane 0 was taken before")?;
        Ok(Queues { transport, receiver, poured: Vec::new() })
    }
}

/// Waits until the descriptor is readable.
fn sleep(fd: BorrowedFd<'_>) -> Result<()> {
    match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Wire for Queues {
    fn send(&mut self, to: u16, head: &Head, body: &[u8]) -> Result<()> {
        Ok(self.transport.send(NodeId(to), 0, &[head, body])?)
    }

    fn receive(&mut self, wait: bool, sink: Sink<'_>) -> Result<()> {
        if wait {
            sleep(self.receiver.fd())?;
        }
        self.receiver.poll(&mut |from, frame| {
            if let Some((head, body)) = frame.split_first_chunk() {
                sink(from.0, head, body);
            }
        })?;
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.receiver.fd()
    }

    fn pour(&mut self, to: u16, bytes: &[u8]) -> Result<()> {
        for part in bytes.chunks(fabric::MAX_FRAME) {
            self.transport.send(NodeId(to), 0, &[part])?;
        }
        Ok(())
    }

    fn drain(&mut self, _: u16, bytes: &mut [u8]) -> Result<()> {
        let poured = &mut self.poured;
        while poured.len() < bytes.len() {
            if self.receiver.poll(&mut |_, part| poured.extend_from_slice(part))? == 0 {
                sleep(self.receiver.fd())?;
            }
        }
        bytes.copy_from_slice(&poured[..bytes.len()]);
        poured.drain(..bytes.len());
        Ok(())
    }
}
