//! Starting, pausing, stopping and dumping all vCPUs of a node.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::run::Cpu;
use super::table::{Idle, State, Table, Wish};
use super::{Counters, Environment, VcpuConfig, signal};
use crate::kvm::{KvmError, Vm};
use crate::node_msg::Signal;

/// What can go wrong with a node's vCPUs as a whole.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    /// KVM's answer.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host's answer.
    #[error("a vCPU thread cannot be started: {0}; raise the limit of threads (ulimit -u)")]
    Thread(#[from] std::io::Error),
    /// More or fewer vCPUs than the table has slots.
    #[error("{configs} vCPUs were described for a node with {slots}")]
    Count {
        /// Descriptions.
        configs: usize,
        /// Slots.
        slots: usize,
    },
    /// Some vCPUs did not leave the guest in time.
    #[error(
        "vCPUs {stuck:?} did not leave the guest within {seconds:.1} s: they wait for pages that nobody brings"
    )]
    Stuck {
        /// Their numbers within this node.
        stuck: Vec<u32>,
        /// How long they had.
        seconds: f32,
    },
}

/// All vCPUs of this node. Dropping it stops them, waiting for a second at most.
pub struct Vcpus {
    table: Arc<Table>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Makes the vCPUs and their threads; they wait for [`Vcpus::resume`]. `configs` is by number within this
    /// node. Set the clock ([`crate::clock::GuestClock::set`]) and load the guest's memory before they run;
    /// the clock may still be set until then.
    ///
    /// # Errors
    /// What KVM or the host answer.
    pub fn create(
        vm: &Vm,
        table: Arc<Table>,
        configs: &[VcpuConfig],
        env: &Environment,
    ) -> Result<Vcpus, VcpusError> {
        if configs.len() != table.len() {
            return Err(VcpusError::Count { configs: configs.len(), slots: table.len() });
        }
        signal::install_handler()?;
        let mut vcpus = Vcpus { table: table.clone(), threads: Vec::new() };
        for (local, config) in (0..).zip(configs) {
            let cpu = Cpu::new(local, vm.create_vcpu(local)?, config, table.clone(), env.clone())?;
            let name = format!("vcpu{}", config.vcpu);
            vcpus.threads.push(std::thread::Builder::new().name(name).spawn(move || cpu.thread())?);
        }
        let step = table.clone();
        env.clock.set_on_step(Box::new(move || step.call_out()));
        Ok(vcpus)
    }

    /// The vCPUs' shared side.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Leaves `signal` for vCPU `cpu` of this node.
    pub fn post(&self, cpu: u32, signal: Signal) {
        self.table.post(cpu, signal);
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.table.set_wish(Wish::Run);
    }

    /// Brings all vCPUs to an instruction boundary outside the guest and keeps them there.
    ///
    /// # Errors
    /// [`VcpusError::Stuck`]; those vCPUs stop as soon as they can, and none runs.
    pub fn pause(&self, timeout: Duration) -> Result<(), VcpusError> {
        self.table.set_wish(Wish::Park);
        self.wait(timeout, |idle| idle.parked + idle.gone)
    }

    /// Ends all vCPU threads.
    ///
    /// # Errors
    /// [`VcpusError::Stuck`]; their threads are left behind and end as soon as they can.
    pub fn stop(&mut self, timeout: Duration) -> Result<(), VcpusError> {
        self.table.set_wish(Wish::Stop);
        self.wait(timeout, |idle| idle.gone)?;
        for thread in self.threads.drain(..) {
            // A panic has been reported by the thread itself, as a failure of its vCPU.
            let _ = thread.join();
        }
        Ok(())
    }

    /// Each vCPU's counters.
    pub fn counters(&self) -> Vec<Counters> {
        self.table.counters()
    }

    /// [`Table::dump`].
    pub fn dump(&self, timeout: Duration) -> String {
        self.table.dump(timeout)
    }

    /// Waits until `count` says that every vCPU is where it should be.
    fn wait(&self, timeout: Duration, count: impl Fn(&Idle) -> usize) -> Result<(), VcpusError> {
        let deadline = Instant::now() + timeout;
        let mut idle = self.table.idle();
        while count(&idle) < self.threads.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let inside = |slot: &&super::table::Slot| slot.in_guest.load(Ordering::SeqCst);
                let slots = (0..).zip(self.table.slots());
                let stuck = slots.filter(|(_, slot)| inside(slot)).map(|(index, _)| index).collect();
                return Err(VcpusError::Stuck { stuck, seconds: timeout.as_secs_f32() });
            }
            let waited = self.table.changed.wait_timeout(idle, left);
            idle = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        Ok(())
    }
}

impl Table {
    /// Registers and last exits of every vCPU; of those that do not answer in time it says so.
    pub fn dump(&self, timeout: Duration) -> String {
        let slots = self.slots();
        for slot in slots {
            *base::lock(&slot.dump) = None;
            slot.dump_wanted.store(true, Ordering::SeqCst);
            slot.mailbox.kick();
        }
        let take = |index: usize| base::lock(&slots[index].dump).take();
        let mut texts: Vec<Option<String>> = vec![None; slots.len()];
        let deadline = Instant::now() + timeout;
        let mut idle = self.idle();
        self.changed.notify_all();
        loop {
            for (index, text) in texts.iter_mut().enumerate().filter(|(_, text)| text.is_none()) {
                *text = take(index);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let answers = |index: usize| slots[index].state() != State::Gone;
            if left.is_zero() || (0..slots.len()).all(|index| texts[index].is_some() || !answers(index)) {
                break;
            }
            let waited = self.changed.wait_timeout(idle, left);
            idle = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        drop(idle);
        let mut all = String::new();
        for (index, text) in texts.into_iter().enumerate() {
            all.push_str(&text.unwrap_or_else(|| {
                let state = slots[index].state();
                format!(
                    "local vCPU {index} does not answer (state {state:?}): it may be waiting for a page\n"
                )
            }));
        }
        all
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        let _ = self.stop(Duration::from_secs(1));
    }
}
