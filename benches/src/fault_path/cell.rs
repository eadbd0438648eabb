//! A cell: a set of nodes, engines or bare ones, over one transport and with one way of waiting.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};

use super::command::{Command, Op, Pages, Polling, Reply, Setup, Side, Times};
use super::peers::Peer;
use super::worker::Worker;
use crate::choice::Net;
use crate::handover::guest;
use crate::place;

/// Pages whose home is node 1; what is measured uses them one after the other.
pub const HOME_PAGES: u64 = 16384;
/// Pages of every other node.
const OTHER_PAGES: u64 = 512;

/// What distinguishes cells.
#[derive(Copy, Clone, Debug)]
pub struct Kind {
    /// Ours or the floor.
    pub side: Side,
    /// The transport.
    pub net: Net,
    /// How threads wait.
    pub polling: Polling,
    /// How many nodes.
    pub nodes: usize,
    /// How long a page that was won is kept, in microseconds.
    pub hold_us: u64,
    /// Whether instructions of guests go to pages that stay elsewhere.
    pub ship: bool,
    /// Pages of other nodes that each may have; any number if none is given.
    pub copies: Option<u64>,
}

/// A cell that runs.
pub struct Cell {
    peers: Vec<Peer>,
    cpus: Vec<usize>,
    next: u64,
}

impl Cell {
    /// Starts the nodes on these CPUs.
    ///
    /// # Errors
    /// What a node says.
    pub fn start(kind: Kind, cpus: &[usize]) -> Result<Cell> {
        let mut peers = Vec::new();
        match kind.net {
            Net::Tcp | Net::TcpPlain | Net::TcpRails => {
                peers.push(Peer::Here(Box::new(Worker::new(None))));
                for _ in 1..kind.nodes {
                    peers.push(Peer::process()?);
                }
            }
            Net::InProcess => {
                let mut transports = fabric::sim::cluster(kind.nodes, guest::LANE + 1)?.into_iter();
                peers.push(Peer::Here(Box::new(Worker::new(transports.next()))));
                peers.extend(transports.map(Peer::thread));
            }
        }
        let mut cell = Cell { peers, cpus: cpus.to_vec(), next: OTHER_PAGES };
        let mut addresses: Vec<Vec<SocketAddr>> = Vec::new();
        if kind.net != Net::InProcess {
            for peer in &mut cell.peers {
                match peer.call(Command::Listen(kind.side, if kind.net == Net::TcpRails { 2 } else { 1 }))? {
                    Reply::Addresses(rails) => addresses.push(rails),
                    other => bail!("a node answered {other:?} instead of its address"),
                }
            }
        }
        let pages = (0..kind.nodes).map(|node| if node == 1 { HOME_PAGES } else { OTHER_PAGES });
        let setup = |node: usize| Setup {
            node: node as u16,
            side: kind.side,
            polling: kind.polling,
            pages: pages.clone().collect(),
            hold_us: kind.hold_us,
            ship: kind.ship,
            copies: kind.copies,
            addresses: addresses.clone(),
            plaintext: kind.net == Net::TcpPlain,
            cpus: place::share(cpus, node, kind.nodes),
        };
        for (node, peer) in cell.peers.iter_mut().enumerate().skip(1) {
            peer.begin(&Command::Start(setup(node)))?;
        }
        cell.peers[0].call(Command::Start(setup(0)))?;
        for peer in &mut cell.peers[1..] {
            peer.finish()?;
        }
        Ok(cell)
    }

    /// Tells a node something.
    ///
    /// # Errors
    /// What the node says.
    pub fn tell(&mut self, node: usize, command: Command) -> Result<Reply> {
        self.peers[node].call(command)
    }

    /// Tells each node its own command, at the same time; their answers.
    ///
    /// # Errors
    /// What a node says.
    pub fn tell_all(&mut self, commands: &[Command]) -> Result<Vec<Reply>> {
        for (peer, command) in self.peers.iter_mut().zip(commands).skip(1) {
            peer.begin(command)?;
        }
        let mut replies = Vec::new();
        if let Some(command) = commands.first() {
            replies.push(self.peers[0].call(command.clone())?);
        }
        for peer in self.peers.iter_mut().take(commands.len()).skip(1) {
            replies.push(peer.finish()?);
        }
        Ok(replies)
    }

    /// The first page of a node's own memory.
    pub fn own_page(node: usize) -> u64 {
        match node {
            0 | 1 => node as u64 * OTHER_PAGES,
            _ => HOME_PAGES + (node as u64 - 1) * OTHER_PAGES,
        }
    }

    /// So many pages of the home that nobody has touched.
    ///
    /// # Errors
    /// There are not that many left.
    pub fn fresh(&mut self, count: u64) -> Result<Pages> {
        let pages = Pages { first: self.next, count };
        self.next += count;
        (self.next <= OTHER_PAGES + HOME_PAGES).then_some(pages).context("the home has no pages left")
    }

    /// Such pages, which the home has written.
    ///
    /// # Errors
    /// What a node says.
    pub fn filled(&mut self, count: u64) -> Result<Pages> {
        let pages = self.fresh(count)?;
        self.tell(1, Command::Fill(pages))?;
        Ok(pages)
    }

    /// Such pages, which every node from 2 on has read.
    ///
    /// # Errors
    /// What a node says.
    pub fn shared(&mut self, count: u64) -> Result<Pages> {
        let pages = self.filled(count)?;
        for node in 2..self.peers.len() {
            self.tell(node, Command::Look(pages))?;
        }
        Ok(pages)
    }

    /// Times node 0's faults.
    ///
    /// # Errors
    /// What the node says.
    pub fn touch(&mut self, op: Op, pages: Pages, threads: usize) -> Result<Times> {
        times(self.tell(0, Command::Touch(op, pages, threads))?)
    }

    /// Times node 0's reading of pages in order.
    ///
    /// # Errors
    /// What the node says.
    pub fn stream(&mut self, pages: Pages) -> Result<Times> {
        times(self.tell(0, Command::Stream(pages))?)
    }

    /// Nodes 0 and 1 take turns in changing a word of the page.
    ///
    /// # Errors
    /// What a node says.
    pub fn ping_pong(&mut self, page: u64, rounds: u64) -> Result<Times> {
        self.peers[1].begin(&Command::PingPong { page, rounds, turn: 1 })?;
        let reply = self.tell(0, Command::PingPong { page, rounds, turn: 0 })?;
        self.peers[1].finish()?;
        times(reply)
    }
}

fn times(reply: Reply) -> Result<Times> {
    match reply {
        Reply::Times(times) => Ok(times),
        other => bail!("a node answered {other:?} instead of times"),
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        // The others first: an engine of this process would report their loss.
        let _ = self.peers[0].call(Command::Quit);
        self.peers.truncate(1);
        place::realtime(None);
        place::pin(&self.cpus);
    }
}
