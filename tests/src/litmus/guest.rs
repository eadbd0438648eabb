//! A virtual machine for each node, and vCPUs that begin at CPL 3 in 64-bit mode.
//!
//! Guest memory, by page number: 1 to 3 page tables, 4 the code, from 16 the variables; each thread's results
//! are in memory of its own node. The tables map the first GiB one to one, with their accessed and dirty bits set:
//! no CPU writes them, so that they do not pass from node to node.

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coherence::page::PAGE_SIZE;
use coherence::uffd::Uffd;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use vmm::kvm::{Exit, HostCpu, Vcpu, Vm, caps};
use vmm::vcpu::signal;

use super::code::{AWAY, DONE};
use crate::engines::Engines;
use crate::vectors;

/// Pages of each node.
pub const NODE_PAGES: u64 = 512;
/// Bytes for each thread's code.
pub const CODE_SIZE: usize = 1024;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x4000;

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
    let probe = || {
        Uffd::open()?;
        let kvm = caps::open().map_err(|error| error.to_string())?;
        caps::check(&kvm).map_err(|error| error.to_string())?;
        HostCpu::probe(&kvm).map_err(|error| error.to_string())
    };
    probe().inspect_err(|why: &String| println!("skipped: {why}")).ok()
}

/// Longer than any batch takes; a machine that needs longer has failed.
const PATIENCE: Duration = Duration::from_secs(120);

impl Machine {
    /// `nodes[i]` is the node on which thread `i` runs.
    ///
    /// # Errors
    /// What KVM or userfaultfd say.
    pub fn start(host: &HostCpu, nodes: &[usize], hold: Duration) -> Result<Machine> {
        let count = nodes.iter().max().map_or(1, |most| most + 1);
        let engines = Engines::start(&vec![NODE_PAGES; count], 1, hold)?;
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
            prepare(host, &mut vcpu)?;
            let (cpu, registers) = mpsc::channel::<kvm_regs>();
            let tell = tell.clone();
            let (introduce, ids) = mpsc::channel();
            let thread = std::thread::Builder::new().name(format!("litmus{thread}")).spawn(move || {
                let ready = signal::block_all().map_err(anyhow::Error::from);
                let ready = ready.and_then(|mask| Ok(vcpu.set_signal_mask(mask)?));
                if introduce.send(ready.map(|()| signal::thread_id())).is_err() {
                    return;
                }
                for regs in registers {
                    let result = run(&mut vcpu, &regs).map_err(|error| format!("{error:#}"));
                    if tell.send(result).is_err() {
                        break;
                    }
                }
            })?;
            let id = ids.recv().context("a vCPU's thread is gone")??;
            tasks.push(Task { cpu, thread: Some(thread), id });
        }
        let machine = Machine { tasks, done, nodes: nodes.to_vec(), _vms: vms, engines };
        machine.write_tables();
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
            for (i, bytes) in code.chunks(8).enumerate() {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                self.store(CODE as usize + thread * CODE_SIZE + i * 8, u64::from_le_bytes(word));
            }
        }
    }

    /// Runs every thread with its registers from its code's beginning, until all are done; how often they left the guest
    /// before, together.
    ///
    /// # Errors
    /// A vCPU left the guest for another reason, or not at all.
    pub fn run(&self, registers: &[kvm_regs]) -> Result<Exits> {
        for (thread, (task, regs)) in self.tasks.iter().zip(registers).enumerate() {
            let rip = CODE + (thread * CODE_SIZE) as u64;
            // Reserved bit, and IOPL 3 for the last `out`.
            task.cpu.send(kvm_regs { rip, rflags: 0x3002, ..*regs }).context("a vCPU's thread is gone")?;
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

    fn store(&self, offset: usize, value: u64) {
        self.engines.word(0, offset).store(value, std::sync::atomic::Ordering::Relaxed);
    }

    fn write_tables(&self) {
        // Present, writable, user, accessed, dirty.
        const FLAGS: u64 = 0x67;
        const LARGE: u64 = 0x80;
        self.store(TABLES as usize, (TABLES + 0x1000) | FLAGS);
        self.store(TABLES as usize + 0x1000, (TABLES + 0x2000) | FLAGS);
        for i in 0..512u64 {
            self.store(TABLES as usize + 0x2000 + i as usize * 8, i << 21 | FLAGS | LARGE);
        }
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

fn run(vcpu: &mut Vcpu, regs: &kvm_regs) -> Result<Exits> {
    vcpu.set_regs(regs)?;
    let mut exits = Exits::default();
    loop {
        match vcpu.run()? {
            Exit::Pio { port: DONE, write: true, .. } => break,
            Exit::Pio { port: AWAY, write: true, .. } => {
                exits.ports += 1;
                vectors::spoil();
            }
            Exit::Interrupted => {
                exits.kicks += u64::from(signal::take_pending());
                vectors::spoil();
            }
            other => bail!("left the guest by {other:?} at {:#x}", vcpu.regs()?.rip),
        }
    }
    // The registers may be set only at an instruction's end.
    vcpu.complete()?;
    Ok(exits)
}

/// 64-bit mode at CPL 3, with the page tables of this module and all vector registers there are.
fn prepare(host: &HostCpu, vcpu: &mut Vcpu) -> Result<()> {
    vcpu.set_cpuid(&host.cpuid)?;
    let mut sregs = vcpu.sregs()?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = kvm_segment { selector: 0x33, type_: 0xb, db: 0, l: 1, ..data };
    sregs.tr = kvm_segment { selector: 0x40, limit: 0x67, type_: 0xb, dpl: 0, db: 0, s: 0, g: 0, ..data };
    (sregs.gdt, sregs.idt) = (kvm_dtable::default(), kvm_dtable::default());
    // Protection, numeric errors, write protection, paging; PAE and SSE; long mode, active.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0033, TABLES, 0x220, 0x500);
    let xcr0 = vectors::xcr0(host);
    if let Some(value) = xcr0 {
        // OSXSAVE
        sregs.cr4 |= 1 << 18;
        vcpu.set_xcr0(value)?;
    }
    Ok(vcpu.set_sregs(&sregs)?)
}
