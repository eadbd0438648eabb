//! A node's part of a micro guest: a virtual machine over the node's memory, and one vCPU of production's,
//! which asks for its next job whenever it has done one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ::tests::cpl3;
use anyhow::{Context, Result, bail, ensure};
use coherence::engine::Engine;
use coherence::engine::vcpus::Vcpus as ShippingVcpus;
use coherence::memory::DualMemory;
use coherence::protocol::{self, Rules};
use crossbeam::channel::{Receiver as Inbox, Sender, unbounded};
use devices::irq::Ipi;
use fabric::{NodeId, Receiver, Transport};
use firmware::layout::RamRange;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vmm::clock::GuestClock;
use vmm::kvm::{Vm, caps};
use vmm::node::shipping::{Desk, Shipping};
use vmm::vcpu::{
    Devices, Environment, Interrupts, Shipper, Space, Start, Table, VcpuConfig, Vcpus, user_mode, waiting,
};

use super::code::{DONE, JOB, SLEEP, WAKE, WORDS};

/// Guest address of the code.
pub const CODE: u64 = cpl3::BEHIND_TABLES;
/// The lane of wake-ups; the engine's only shard has lane 0.
pub const LANE: u16 = 1;
/// Far more than a job takes beyond its time.
const PATIENCE: Duration = Duration::from_secs(30);

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

impl Job {
    /// As the program reads it.
    fn words(&self, tsc_khz: u32) -> Result<[u32; WORDS]> {
        let ticks = |us: u64| us * u64::from(tsc_khz) / 1000;
        let [turn, next] = self.turns.map(u64::from);
        let words = [self.shared, self.own, self.count, turn, next, ticks(self.run_us), ticks(self.work_us)];
        let narrow = words.map(u32::try_from);
        ensure!(narrow.iter().all(Result::is_ok), "{self:?} does not fit words of 32 bits");
        Ok(narrow.map(Result::unwrap_or_default))
    }
}

/// The vCPU and its machine.
pub struct Guest {
    vcpus: Vcpus,
    /// After the vCPU, which uses it.
    _vm: Vm,
    tsc_khz: u32,
    jobs: Option<Sender<[u32; WORDS]>>,
    ends: Inbox<Result<(), String>>,
    bell: Arc<Bell>,
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

/// What the vCPU's accesses to ports do.
struct Ports {
    jobs: Inbox<[u32; WORDS]>,
    /// What is left of the job that the vCPU is reading, and which node is next in it.
    reading: Mutex<(Vec<u32>, u16)>,
    ends: Sender<Result<(), String>>,
    bell: Arc<Bell>,
    transport: Arc<dyn Transport>,
    engine: Arc<Engine>,
}

impl Ports {
    /// The next word of a job; waits for one. 0 after the last job.
    fn next_word(&self) -> u32 {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if reading.0.is_empty()
            && let Ok(words) = self.jobs.recv()
        {
            *reading = (words.into_iter().rev().collect(), words[4] as u16);
        }
        reading.0.pop().unwrap_or(0)
    }

    fn wake(&self) -> Result<(), String> {
        let next = self.reading.lock().unwrap_or_else(PoisonError::into_inner).1;
        if next == self.transport.node().0 {
            self.bell.ring();
            return Ok(());
        }
        self.transport.send(NodeId(next), LANE, &[b"wake"]).map_err(|error| error.to_string())
    }
}

impl Devices for Ports {
    fn read(&self, _cpu: u32, _space: Space, addr: u64, data: &mut [u8]) {
        let word = if addr == u64::from(JOB) { self.next_word() } else { u32::MAX }.to_le_bytes();
        data.iter_mut().zip(word).for_each(|(to, byte)| *to = byte);
    }

    fn write(&self, _cpu: u32, _space: Space, addr: u64, _data: &[u8]) {
        let ended = match addr as u16 {
            DONE => Some(Ok(())),
            SLEEP => {
                self.engine.idle(base::thread::id() as u32);
                self.bell.wait();
                None
            }
            WAKE => self.wake().err().map(Err),
            _ => Some(Err(format!("the guest wrote to port {addr:#x}"))),
        };
        if let Some(ended) = ended {
            // Nobody may be waiting any more.
            let _ = self.ends.send(ended);
        }
    }
}

/// The vCPUs have no interrupts.
struct NoInterrupts;

impl Interrupts for NoInterrupts {
    fn ipi(&self, _: Ipi) {}

    fn eoi(&self, _: u8) {}
}

impl Guest {
    /// A guest in `memory`, whose pages `engine` brings, or to which its instructions go if it is to `ship`.
    /// Wake-ups travel over [`LANE`].
    ///
    /// # Errors
    /// What KVM says, the transport has no such lane, or this host cannot ship.
    pub fn new(
        engine: &Arc<Engine>,
        memory: &Arc<DualMemory>,
        transport: Arc<dyn Transport>,
        ship: bool,
    ) -> Result<Guest> {
        let host = cpl3::host().map_err(anyhow::Error::msg)?;
        let kvm = caps::open()?;
        let vm = Vm::new(&kvm)?;
        // SAFETY: the worker keeps the memory, and all accesses of this process to the guest view are atomic.
        unsafe { vm.add_memory(0, 0, memory.guest_view(), memory.len() as u64)? };
        let table = Arc::new(Table::new(1));
        let shipper = if ship {
            waiting::can_be_called_out(&kvm, &host)
                .map_err(|why| anyhow::anyhow!("nothing is shipped: {why}"))?;
            let desk = Arc::new(Desk::new(table.clone(), true));
            engine
                .ship(&(desk.clone() as Arc<dyn ShippingVcpus>), protocol::Shipping::Auto(Rules::default()));
            let ranges = [RamRange { gpa: 0, offset: 0, len: memory.len() as u64 }];
            let sizes = host.cpuid.iter().find(|entry| entry.leaf == 0x8000_0008);
            let bits = sizes.context("CPUID does not say how wide addresses are")?.eax as u8;
            Some(Arc::new(Shipping::new(engine.clone(), memory.clone(), &ranges, bits, desk))
                as Arc<dyn Shipper>)
        } else {
            None
        };
        let bell = Arc::new(Bell::default());
        let (jobs, to_do) = unbounded();
        let (end, ends) = unbounded();
        let failed = end.clone();
        let mut receiver = transport.take_receiver(LANE).context("there is no lane for wake-ups")?;
        let ports = Ports {
            jobs: to_do,
            reading: Mutex::default(),
            ends: end,
            bell: bell.clone(),
            transport,
            engine: engine.clone(),
        };
        let env = Environment {
            devices: Arc::new(ports),
            interrupts: Arc::new(NoInterrupts),
            clock: Arc::new(GuestClock::fixed(host.tsc_khz.into())),
            on_idle: Arc::new(|_| {}),
            timer_rest: 0,
            shipper,
            on_failure: Arc::new(move |failure| drop(failed.send(Err(failure.to_string())))),
        };
        let config = VcpuConfig {
            vcpu: 0,
            apic_id: 0,
            cpuid: host.cpuid.clone(),
            msrs: Vec::new(),
            start: Start::Boot(Box::new(user_mode::registers(cpl3::TABLES, CODE))),
        };
        let vcpus = Vcpus::create(&vm, table, &[config], &env)?;
        vcpus.resume();
        let rung = bell.clone();
        let listener = std::thread::Builder::new().name("wake-ups".into()).spawn(move || {
            base::thread::make_urgent();
            // It sleeps in `listen`.
            while !rung.stop.load(Ordering::Acquire) {
                if listen(&mut *receiver, &rung).is_err() {
                    break;
                }
            }
        })?;
        let (jobs, listener) = (Some(jobs), Some(listener));
        Ok(Guest { vcpus, _vm: vm, tsc_khz: host.tsc_khz, jobs, ends, bell, listener })
    }

    /// Runs the code until its time is over.
    ///
    /// # Errors
    /// The guest left for a reason that no program has, or does not come to its end.
    pub fn run(&mut self, job: &Job) -> Result<()> {
        let words = job.words(self.tsc_khz)?;
        self.jobs.as_ref().context("the guest has ended")?.send(words)?;
        match self.ends.recv_timeout(PATIENCE + Duration::from_micros(job.run_us)) {
            Ok(ended) => ended.map_err(anyhow::Error::msg),
            Err(_) => bail!("the guest came to no end: {}", self.vcpus.dump(Duration::from_secs(1))),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // What waits for a job, or to be woken, goes on with nothing.
        self.jobs = None;
        self.bell.ring();
        drop(self.vcpus.stop(PATIENCE));
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
