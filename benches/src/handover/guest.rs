//! A node's part of a micro guest: a virtual machine over the node's memory, and one vCPU, which runs on the calling thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use ::tests::cpl3;
use anyhow::{Context, Result};
use coherence::memory::DualMemory;
use fabric::{NodeId, Receiver, Transport};
use kvm_bindings::kvm_regs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vmm::kvm::{HostCpu, Vcpu, Vm, caps};

use super::code::{DONE, SLEEP, WAKE};

/// Guest address of the code.
pub const CODE: u64 = cpl3::BEHIND_TABLES;
/// The lane of wake-ups; the engine's only shard has lane 0.
pub const LANE: u16 = 1;

/// What the vCPU is to run with.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Address of what is shared.
    pub shared: u64,
    /// Address of this CPU's own part.
    pub own: u64,
    /// Where its count of operations goes.
    pub count: u64,
    /// This CPU's turn, and the next one's: their nodes.
    pub turns: [u16; 2],
    /// For how long it runs, in microseconds.
    pub run_us: u64,
    /// Own work after each operation, in microseconds.
    pub work_us: u64,
}

/// The vCPU and its machine.
pub struct Guest {
    vcpu: Vcpu,
    /// After the vCPU, which uses it.
    _vm: Vm,
    host: HostCpu,
    bell: Arc<Bell>,
    transport: Arc<dyn Transport>,
    listener: Option<JoinHandle<()>>,
}

/// Rung from another node; stays rung until somebody has waited for it.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    rings: Condvar,
    stop: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.rings.notify_all();
    }

    fn wait(&self) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rung = self.rings.wait_while(rung, |rung| !*rung).unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }
}

impl Guest {
    /// A guest in `memory`, which must stay mapped until it is dropped. Wake-ups travel over [`LANE`].
    ///
    /// # Errors
    /// What KVM says, or the transport has no such lane.
    pub fn new(memory: &DualMemory, transport: Arc<dyn Transport>) -> Result<Guest> {
        let host = cpl3::host().map_err(anyhow::Error::msg)?;
        let vm = Vm::new(&caps::open()?)?;
        // SAFETY: the caller keeps the memory, and all accesses of this process to the guest view are atomic.
        unsafe { vm.add_memory(0, 0, memory.guest_view(), memory.len() as u64)? };
        let mut vcpu = vm.create_vcpu(0)?;
        cpl3::prepare(&host, &mut vcpu)?;
        let mut receiver = transport.take_receiver(LANE).context("there is no lane for wake-ups")?;
        let bell = Arc::new(Bell::default());
        let rung = bell.clone();
        let listener = std::thread::Builder::new().name("wake-ups".into()).spawn(move || {
            base::thread::make_urgent();
            while !rung.stop.load(Ordering::Acquire) && listen(&mut *receiver, &rung).is_ok() {}
        })?;
        Ok(Guest { vcpu, _vm: vm, host, bell, transport, listener: Some(listener) })
    }

    /// Runs the code until its time is over. `idle` is told when the vCPU has nothing to do until it is woken.
    ///
    /// # Errors
    /// The guest left for a reason that no program has.
    pub fn run(&mut self, job: &Job, idle: impl Fn()) -> Result<()> {
        let ticks = |us: u64| us * u64::from(self.host.tsc_khz) / 1000;
        let regs = kvm_regs {
            rip: CODE,
            rsi: job.shared,
            rdi: job.own,
            rbx: job.count,
            rbp: job.turns[0].into(),
            r8: job.turns[1].into(),
            r13: ticks(job.run_us),
            r14: ticks(job.work_us),
            ..Default::default()
        };
        let Guest { vcpu, bell, transport, .. } = self;
        cpl3::run(vcpu, &regs, |port| {
            match port {
                DONE => return Ok(false),
                SLEEP => {
                    idle();
                    bell.wait();
                }
                WAKE if job.turns[1] == transport.node().0 => bell.ring(),
                WAKE => transport.send(NodeId(job.turns[1]), LANE, &[b"wake"])?,
                _ => anyhow::bail!("the guest wrote to port {port:#x}"),
            }
            Ok(true)
        })
        .map(drop)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.bell.stop.store(true, Ordering::Release);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

/// Waits for wake-ups for a moment.
fn listen(receiver: &mut dyn Receiver, bell: &Bell) -> Result<()> {
    if !receiver.arm()? {
        poll(&mut [PollFd::new(receiver.fd(), PollFlags::POLLIN)], PollTimeout::from(100u8))
            .or_else(|error| if error == nix::errno::Errno::EINTR { Ok(0) } else { Err(error) })?;
    }
    receiver.poll(&mut |_, _| bell.ring())?;
    Ok(())
}
