//! A virtual machine for each node, and vCPUs that begin at CPL 3 in 64-bit mode.
//!
//! Guest memory, by page number: 1 to 3 page tables, 4 the code, from 16 the variables; each thread's results
//! are in memory of its own node.

use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coherence::engine::vcpus::Vcpus;
use coherence::page::{PAGE_SIZE, Page};
use coherence::protocol::{Class, Shipping};
use coherence::testing;
use kvm_bindings::kvm_regs;
use vmm::kvm::{HostCpu, Vm, caps};
use vmm::vcpu::signal;

use super::code::{AWAY, DONE};
use super::ship::{Desk, Shipper};
use crate::cpl3;
use crate::engines::Engines;

/// Pages of each node.
pub const NODE_PAGES: u64 = 512;
/// Bytes for each thread's code.
pub const CODE_SIZE: usize = 1024;
const CODE: u64 = cpl3::BEHIND_TABLES;

/// How often a thread left the guest before it was done.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// By writing to [`AWAY`].
    pub ports: u64,
    /// By a kick.
    pub kicks: u64,
}

/// What the vCPUs are told: registers to run with, until they are done.
struct Task {
    cpu: mpsc::Sender<kvm_regs>,
    thread: Option<JoinHandle<()>>,
    /// The thread's id, for kicks.
    id: i32,
}

/// A machine of one or more nodes with a vCPU for each thread.
pub struct Machine {
    tasks: Vec<Task>,
    done: mpsc::Receiver<Result<Exits, String>>,
    /// By thread.
    nodes: Vec<usize>,
    /// After the vCPUs, which use them.
    _vms: Vec<Vm>,
    engines: Engines,
}

/// This host, if guests and engines can run on it; says why not.
pub fn host() -> Option<HostCpu> {
    cpl3::host().inspect_err(|why| println!("skipped: {why}")).ok()
}

/// Longer than any batch takes; a machine that needs longer has failed.
const PATIENCE: Duration = Duration::from_secs(120);

impl Machine {
    /// `nodes[i]` is the node on which thread `i` runs. All pages move.
    ///
    /// # Errors
    /// What KVM or userfaultfd say.
    pub fn start(host: &HostCpu, nodes: &[usize], hold: Duration) -> Result<Machine> {
        Machine::with_delegated(host, nodes, hold, 0..0)
    }

    /// As [`Machine::start`], but these pages, which have one home, are delegated to whoever owns them, and
    /// others' instructions are shipped there.
    ///
    /// # Errors
    /// What KVM or userfaultfd say.
    pub fn with_delegated(
        host: &HostCpu,
        nodes: &[usize],
        hold: Duration,
        delegated: Range<u64>,
    ) -> Result<Machine> {
        let count = nodes.iter().max().map_or(1, |most| most + 1);
        let engines = Engines::start(&vec![NODE_PAGES; count], 1, hold)?;
        let desks: Vec<_> = (0..count).map(|_| Arc::new(Desk::new(nodes.len()))).collect();
        for (node, desk) in desks.iter().enumerate().filter(|_| !delegated.is_empty()) {
            engines.engine(node).ship(&(desk.clone() as Arc<dyn Vcpus>), Shipping::Manual);
        }
        for page in delegated.clone() {
            engines.engine((page / NODE_PAGES) as usize).set_class(Page(page), Class::Delegated);
        }
        let kvm = caps::open()?;
        let mut vms = Vec::new();
        for node in 0..count {
            let vm = Vm::new(&kvm)?;
            let memory = engines.memory(node);
            // SAFETY: the machine keeps the memory after the VM, and all accesses of this process are atomic.
            unsafe { vm.add_memory(0, 0, memory.guest_view(), memory.len() as u64)? };
            vms.push(vm);
        }
        signal::install_handler()?;
        let (tell, done) = mpsc::channel();
        let mut tasks = Vec::new();
        for (thread, &node) in nodes.iter().enumerate() {
            let index = nodes[..thread].iter().filter(|&&other| other == node).count();
            let mut vcpu = vms[node].create_vcpu(index as u32)?;
            cpl3::prepare(host, &mut vcpu)?;
            let (cpu, registers) = mpsc::channel::<kvm_regs>();
            let tell = tell.clone();
            let (introduce, ids) = mpsc::channel();
            let (desk, engine, memory) =
                (desks[node].clone(), engines.engine(node).clone(), engines.memory(node).clone());
            let (host, ships) = (host.clone(), !delegated.is_empty());
            let thread = std::thread::Builder::new().name(format!("litmus{thread}")).spawn(move || {
                let ready = signal::block_all().map_err(anyhow::Error::from);
                let ready = ready.and_then(|mask| Ok(vcpu.set_signal_mask(mask)?));
                let shipper = ready.and_then(|()| Shipper::new(&host, desk, index, engine, memory));
                let (ready, mut shipper) = match shipper {
                    Ok(shipper) => (Ok(base::thread::id()), Some(shipper).filter(|_| ships)),
                    Err(error) => (Err(error), None),
                };
                if introduce.send(ready).is_err() {
                    return;
                }
                for regs in registers {
                    let mut ports = 0;
                    let port = |port| {
                        ports += u64::from(port == AWAY);
                        Ok(port != DONE)
                    };
                    let result = cpl3::run(&mut vcpu, &regs, port, |vcpu| match &mut shipper {
                        Some(shipper) => shipper.look(vcpu),
                        None => Ok(()),
                    });
                    let result = result.map(|kicks| Exits { ports, kicks });
                    let result = result.map_err(|error| format!("{error:#}"));
                    if tell.send(result).is_err() {
                        break;
                    }
                }
            })?;
            let id = ids.recv().context("a vCPU's thread is gone")??;
            tasks.push(Task { cpu, thread: Some(thread), id });
        }
        let machine = Machine { tasks, done, nodes: nodes.to_vec(), _vms: vms, engines };
        cpl3::write_tables(machine.engines.memory(0));
        Ok(machine)
    }

    /// The nodes' memory.
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    /// The vCPUs' threads, for [`signal::send`], which kicks them out of the guest.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.tasks.iter().map(|task| task.id).collect()
    }

    /// Where a thread's results are, in bytes.
    pub fn results(&self, thread: usize) -> usize {
        (self.nodes[thread] * NODE_PAGES as usize + 256 + 32 * thread) * PAGE_SIZE
    }

    /// Writes each thread's code.
    pub fn load(&self, threads: &[Vec<u8>]) {
        for (thread, code) in threads.iter().enumerate() {
            testing::write(self.engines.memory(0), CODE as usize + thread * CODE_SIZE, code);
        }
    }

    /// Runs every thread with its registers from its code's beginning, until all are done; how often they
    /// left the guest before, together.
    ///
    /// # Errors
    /// A vCPU left the guest for another reason, or not at all.
    pub fn run(&self, registers: &[kvm_regs]) -> Result<Exits> {
        for (thread, (task, regs)) in self.tasks.iter().zip(registers).enumerate() {
            let rip = CODE + (thread * CODE_SIZE) as u64;
            task.cpu.send(kvm_regs { rip, ..*regs }).context("a vCPU's thread is gone")?;
        }
        let mut all = Exits::default();
        for _ in registers {
            match self.done.recv_timeout(PATIENCE) {
                Ok(result) => {
                    let exits = result.map_err(anyhow::Error::msg)?;
                    (all.ports, all.kicks) = (all.ports + exits.ports, all.kicks + exits.kicks);
                }
                Err(_) => bail!("a vCPU is not done after {PATIENCE:?}: {}", self.engines.describe()),
            }
        }
        self.engines.check()?;
        Ok(all)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for task in self.tasks.drain(..) {
            drop(task.cpu);
            // One that hangs in the guest would hang this thread too; the process is about to fail then.
            if let Some(thread) = task.thread.filter(|_| !std::thread::panicking()) {
                let _ = thread.join();
            }
        }
    }
}
