//! The thread that owns lane 0, and handles the messages that other nodes send on it.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::Sender;
use fabric::{FabricError, NodeId, Receiver};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Router;
use super::remote::{AllDevices, DeviceQueue};
use crate::clock::GuestClock;
use crate::clock::align::is_forward;
use crate::clock::estimator::Round;
use crate::clock::thread::Pong;
use crate::node_msg::NodeMsg;
use crate::trace;

/// Longest sleep of the lane thread, in milliseconds.
const SLEEP_MS: u16 = 500;

/// What device messages mean at this node.
pub struct DeviceSide {
    /// Where accesses of other nodes' vCPUs go.
    pub served: DeviceQueue,
    /// Whose vCPUs get the replies.
    pub asked: Arc<AllDevices>,
}

/// What the lane thread works with.
pub struct LaneConfig {
    /// The sending side.
    pub router: Arc<Router>,
    /// This node's clock.
    pub clock: Arc<GuestClock>,
    /// Where answers to clock pings go; `None` at node 0.
    pub pongs: Option<Sender<Pong>>,
    /// Device messages.
    pub devices: DeviceSide,
    /// How long to poll after the last message before sleeping. Zero where CPUs are scarce.
    pub spin: Duration,
}

/// The running thread.
pub struct ControlLane {
    stop: Arc<AtomicBool>,
    wake: EventFd,
    thread: JoinHandle<()>,
}

impl ControlLane {
    /// Starts the thread on `receiver`, lane 0 of the transport.
    ///
    /// # Errors
    /// What the operating system says of a new thread or an eventfd.
    pub fn start(receiver: Box<dyn Receiver>, config: LaneConfig) -> std::io::Result<ControlLane> {
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let (flag, bell) = (stop.clone(), wake.try_clone()?);
        let thread = std::thread::Builder::new()
            .name("control lane".into())
            .spawn(move || Lane { config, receiver, bell }.run(&flag))?;
        Ok(ControlLane { stop, wake, thread })
    }

    /// Ends the thread.
    pub fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        // Writing fails only when the counter is full, and then the thread wakes anyway.
        let _ = self.wake.write(1);
        // A panic there has been printed; the machine ends anyway.
        let _ = self.thread.join();
    }
}

struct Lane {
    config: LaneConfig,
    receiver: Box<dyn Receiver>,
    bell: EventFd,
}

impl Lane {
    fn run(&mut self, stop: &AtomicBool) {
        trace::event(trace::Event::ControlThread, 0, 0);
        base::thread::make_urgent();
        let spin = self.config.clock.ticks(self.config.spin.as_nanos() as u64);
        let mut busy_until = 0;
        while !stop.load(Ordering::SeqCst) {
            let config = &self.config;
            let polled = self.receiver.poll(&mut |from, frame| config.receive(from, frame));
            match polled {
                Ok(0) => {}
                Ok(_) => {
                    busy_until = self.config.clock.host().wrapping_add(spin);
                    continue;
                }
                Err(error) => {
                    self.config.fault(error);
                    continue;
                }
            }
            if spin != 0 && (busy_until.wrapping_sub(self.config.clock.host()) as i64) > 0 {
                std::hint::spin_loop();
                continue;
            }
            match self.receiver.arm() {
                Ok(true) => {}
                Ok(false) => self.sleep(),
                Err(error) => self.config.fault(error),
            }
        }
    }

    fn sleep(&self) {
        // SAFETY: the eventfd is open as long as this call.
        let bell = unsafe { BorrowedFd::borrow_raw(self.bell.as_raw_fd()) };
        let mut fds =
            [PollFd::new(self.receiver.fd(), PollFlags::POLLIN), PollFd::new(bell, PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(SLEEP_MS)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => self.config.router.peers().failed(&format!("waiting for messages: {errno}")),
        }
    }
}

impl LaneConfig {
    fn fault(&self, error: FabricError) {
        match error {
            FabricError::PeerLost { peer, why } => self.router.peers().lost(peer, &why),
            other => self.router.peers().failed(&other.to_string()),
        }
    }

    fn receive(&self, from: NodeId, frame: &[u8]) {
        // Read first: what this thread does before it has the time counts as the wire's.
        let now = self.clock.host();
        let peers = self.router.peers();
        if !peers.is_present(from) {
            return;
        }
        peers.heard(from);
        let handled = NodeMsg::decode(frame).map_err(|malformed| malformed.to_string()).and_then(|message| {
            trace::event(trace::Event::ControlReceive, message.kind().into(), from.index() as u64);
            self.handle(from, message, now)
        });
        if let Err(why) = handled {
            peers.lost(from, &why);
        }
    }

    /// Acts on a message. An error is a clause about a sender that makes no sense.
    fn handle(&self, from: NodeId, message: NodeMsg, now: u64) -> Result<(), String> {
        let router = &self.router;
        match message {
            NodeMsg::Interrupt { signal, first, set } => {
                let last = u64::from(first) + u64::from(63 - set.leading_zeros().min(63));
                if set == 0 || last >= router.table().len() as u64 {
                    return Err(format!(
                        "it sent an interrupt for CPU {last}, which this node does not have"
                    ));
                }
                (0..64)
                    .filter(|bit| set >> bit & 1 != 0)
                    .for_each(|bit| router.table().post(first + bit, signal));
            }
            NodeMsg::Eoi { vector } => {
                at_node_0(router)?;
                router.finish(vector);
            }
            NodeMsg::Access(access) => {
                if access.cpu as usize >= router.cpus_on(from) {
                    return Err(format!(
                        "it sent a device access of its CPU {}, which it does not have",
                        access.cpu
                    ));
                }
                if !self.devices.served.push(from, access) {
                    return Err("it sent device accesses that no CPU makes".into());
                }
            }
            NodeMsg::Reply { cpu, seq, data } => {
                if !self.devices.asked.reply(from, cpu, seq, data) {
                    return Err("it sent the answer to a device access that nobody made".into());
                }
            }
            NodeMsg::ClockPing { seq, t1 } => {
                at_node_0(router)?;
                let offset = self.clock.offset();
                let t3 = self.clock.host();
                router.send(from, &NodeMsg::ClockPong { seq, t1, t2: now, t3, offset });
            }
            NodeMsg::ClockPong { seq, t1, t2, t3, offset } => {
                let (0, Some(pongs)) = (from.0, &self.pongs) else {
                    return Err("it answered a clock measurement that nobody made".into());
                };
                // A full or closed channel loses one measurement of many.
                let _ = pongs.try_send(Pong { seq, round: Round { t1, t2, t3, t4: now }, offset });
            }
            NodeMsg::ClockAhead { offset } => {
                at_node_0(router)?;
                let ours = self.clock.offset();
                if is_forward(ours, offset, self.clock.khz()) {
                    self.clock.step_to(offset);
                } else if (offset.wrapping_sub(ours) as i64) > 0 {
                    return Err("its clock jumped far ahead of this node's".into());
                }
            }
            NodeMsg::Heartbeat => {}
            NodeMsg::Leaving => router.peers().left(from),
        }
        Ok(())
    }
}

fn at_node_0(router: &Router) -> Result<(), String> {
    match router.node().0 {
        0 => Ok(()),
        _ => Err("it sent this node a message that only node 0 gets".into()),
    }
}
