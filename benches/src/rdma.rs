//! Our own times over RDMA: both nodes are threads here, connected through one port of this host.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fabric::rdma::{RdmaSettings, RdmaTransport};
use fabric::{NodeId, Receiver, Transport, sim};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Nothing takes longer than this.
const PATIENCE: Duration = Duration::from_secs(30);
/// Frames under way in the throughput test, below the fabric's own credits.
const WINDOW: usize = 64;
/// The receiver says that it has so many more frames.
const ACKNOWLEDGE: usize = 16;

/// One side of the connection.
pub struct Side {
    transport: RdmaTransport,
    receiver: Box<dyn Receiver>,
    peer: NodeId,
    blocking: bool,
}

impl Side {
    /// Both sides, through the port that `settings` choose; `blocking`: sleep instead of polling.
    ///
    /// # Errors
    /// RDMA is unavailable.
    pub fn pair(settings: &RdmaSettings, blocking: bool) -> Result<[Side; 2]> {
        let sessions = sim::cluster(2, 1)?;
        thread::scope(|scope| {
            let connecting = sessions.into_iter().map(|session| {
                scope.spawn(move || RdmaTransport::connect(Arc::new(session), settings, None, PATIENCE))
            });
            let connecting: Vec<_> = connecting.collect();
            let mut sides = Vec::new();
            for (node, connected) in (0..).zip(connecting) {
                let transport = connected.join().map_err(|_| anyhow!("a node panicked"))??;
                let receiver = transport.take_receiver(0).context("the lane is missing")?;
                sides.push(Side { transport, receiver, peer: NodeId(1 - node), blocking });
            }
            sides.try_into().map_err(|_| anyhow!("there are two nodes"))
        })
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        Ok(self.transport.send(self.peer, 0, &[frame])?)
    }

    /// Waits for at least one frame; how many came.
    fn receive(&mut self) -> Result<usize> {
        let until = Instant::now() + PATIENCE;
        loop {
            let frames = self.receiver.poll(&mut |_, frame| {
                std::hint::black_box(frame);
            })?;
            if frames > 0 {
                return Ok(frames);
            }
            ensure!(Instant::now() < until, "nothing came within {PATIENCE:?}");
            if self.blocking && !self.receiver.arm()? {
                poll(&mut [PollFd::new(self.receiver.fd(), PollFlags::POLLIN)], PollTimeout::from(1000u16))?;
            }
        }
    }
}

/// Times of `rounds` round trips in nanoseconds: `request` bytes there, `reply` bytes back.
///
/// # Errors
/// The connection fails.
pub fn round_trips(sides: &mut [Side; 2], request: usize, reply: usize, rounds: usize) -> Result<Vec<u64>> {
    let [near, far] = sides;
    thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<()> {
            let answer = vec![1; reply];
            (0..rounds).try_for_each(|_| far.receive().and_then(|_| far.send(&answer)))
        });
        let question = vec![2; request];
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let began = Instant::now();
            near.send(&question)?;
            near.receive()?;
            times.push(began.elapsed().as_nanos() as u64);
        }
        server.join().map_err(|_| anyhow!("the server panicked"))??;
        Ok(times)
    })
}

/// Microseconds a frame when `count` frames of `size` bytes are sent one way.
///
/// # Errors
/// The connection fails.
pub fn one_way(sides: &mut [Side; 2], size: usize, count: usize) -> Result<f64> {
    let [near, far] = sides;
    let count = count.next_multiple_of(ACKNOWLEDGE);
    thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<()> {
            let (mut have, mut told) = (0, 0);
            while have < count {
                have += far.receive()?;
                while have - told >= ACKNOWLEDGE {
                    told += ACKNOWLEDGE;
                    far.send(&[1])?;
                }
            }
            Ok(())
        });
        let frame = vec![2; size];
        let began = Instant::now();
        let (mut sent, mut done) = (0, 0);
        while done < count {
            while sent < count && sent - done < WINDOW {
                near.send(&frame)?;
                sent += 1;
            }
            done += ACKNOWLEDGE * near.receive()?;
        }
        let took = began.elapsed();
        server.join().map_err(|_| anyhow!("the server panicked"))??;
        Ok(took.as_secs_f64() * 1e6 / count as f64)
    })
}
