//! A virtual machine for each node, and vCPUs that run their code at CPL 3 in 64-bit mode, in the node's own vCPU threads.
//!
//! Guest memory, by page number: 1 to 3 page tables, 4 the code, 5 what waits for work, from 16 the variables; each thread's
//! orders and results are in memory of its own node. The tables map the first GiB one to one, with their accessed and dirty
//! bits set: no CPU writes them, so that they do not pass from node to node.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coherence::engine::ship::Vcpus as ShippingVcpus;
use coherence::page::{PAGE_SIZE, Page};
use coherence::protocol::{Class, Shipping as How};
use coherence::uffd::Uffd;
use devices::irq::Ipi;
use firmware::layout::RamRange;
use kvm_bindings::kvm_regs;
use vmm::clock::GuestClock;
use vmm::kvm::{HostCpu, Vm, caps};
use vmm::node::shipping::{Desk, Shipping};
use vmm::vcpu::{
    Devices, Environment, Interrupts, Shipper, Space, Start, Table, VcpuConfig, VcpuFailure, Vcpus, user_mode,
};

use super::code::{self, DONE, ORDERS};
use crate::engines::Engines;

/// Pages of each node.
pub const NODE_PAGES: u64 = 512;
/// Bytes for each thread's code.
pub const CODE_SIZE: usize = 512;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x4000;
const WAITER: u64 = 0x5000;

/// How the nodes share memory.
#[derive(Copy, Clone, Debug)]
pub struct Sharing {
    /// How long a page that was won is kept.
    pub hold: Duration,
    /// Whether instructions are shipped.
    pub how: How,
}

impl Sharing {
    /// All pages move.
    pub fn moving(hold: Duration) -> Sharing {
        Sharing { hold, how: How::Off }
    }
}

/// A machine of one or more nodes with a vCPU for each thread.
pub struct Machine {
    /// By thread: lets it work once.
    orders: Vec<mpsc::Sender<()>>,
    done: mpsc::Receiver<Result<(), String>>,
    /// By thread.
    nodes: Vec<usize>,
    /// By node. Before the virtual machines and the engines, which they use.
    vcpus: Vec<Vcpus>,
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

/// The test as a device of one node: hands out orders, and is told when they are done.
struct Desktop {
    orders: Vec<Mutex<mpsc::Receiver<()>>>,
    done: Mutex<mpsc::Sender<Result<(), String>>>,
}

impl Devices for Desktop {
    fn read(&self, cpu: u32, _space: Space, addr: u64, data: &mut [u8]) {
        let order = || self.orders.get(cpu as usize)?.lock().ok()?.recv().ok();
        let go = addr == u64::from(ORDERS) && order().is_some();
        data.fill(0);
        data[0] = go.into();
    }

    fn write(&self, _cpu: u32, _space: Space, addr: u64, _data: &[u8]) {
        let result =
            if addr == u64::from(DONE) { Ok(()) } else { Err(format!("the guest wrote to port {addr:#x}")) };
        if let Ok(done) = self.done.lock() {
            // Who waited may have given up.
            let _ = done.send(result);
        }
    }
}

/// There are no interrupts.
struct Nobody;

impl Interrupts for Nobody {
    fn ipi(&self, _: Ipi) {}
    fn eoi(&self, _: u8) {}
}

impl Machine {
    /// `nodes[i]` is the node on which thread `i` runs.
    ///
    /// # Errors
    /// What KVM or userfaultfd say.
    pub fn start(host: &HostCpu, nodes: &[usize], sharing: Sharing) -> Result<Machine> {
        let count = nodes.iter().max().map_or(1, |most| most + 1);
        let engines = Engines::start(&vec![NODE_PAGES; count], 1, sharing.hold)?;
        let kvm = caps::open()?;
        let (tell, done) = mpsc::channel();
        let mut machine =
            Machine { orders: vec![], done, nodes: nodes.to_vec(), vcpus: vec![], _vms: vec![], engines };
        machine.write_tables();
        machine.write(WAITER, code::waiter());
        let mut receivers: Vec<Vec<Mutex<mpsc::Receiver<()>>>> = (0..count).map(|_| Vec::new()).collect();
        for &node in nodes {
            let (order, orders) = mpsc::channel();
            machine.orders.push(order);
            receivers[node].push(Mutex::new(orders));
        }
        for (node, orders) in receivers.into_iter().enumerate() {
            let vm = Vm::new(&kvm)?;
            let memory = machine.engines.memory(node);
            // SAFETY: the machine keeps the memory after the VM, and all accesses of this process are atomic.
            unsafe { vm.add_memory(0, 0, memory.guest_view(), memory.len() as u64)? };
            let devices = Desktop { orders, done: Mutex::new(tell.clone()) };
            let vcpus = machine.start_vcpus(host, node, &vm, devices, &tell, sharing.how)?;
            vcpus.resume();
            machine.vcpus.push(vcpus);
            machine._vms.push(vm);
        }
        Ok(machine)
    }

    /// The vCPUs of a node. Each has the address of its orders in RSI.
    fn start_vcpus(
        &self,
        host: &HostCpu,
        node: usize,
        vm: &Vm,
        devices: Desktop,
        tell: &mpsc::Sender<Result<(), String>>,
        how: How,
    ) -> Result<Vcpus> {
        let threads: Vec<usize> =
            (0..self.nodes.len()).filter(|&thread| self.nodes[thread] == node).collect();
        let table = Arc::new(Table::new(threads.len()));
        let start = user_mode::registers(TABLES, WAITER);
        let config = |thread: &usize| {
            let start = firmware::boot::BspRegisters { rsi: self.orders_at(*thread) as u64, ..start };
            VcpuConfig {
                vcpu: *thread as u32,
                apic_id: *thread as u32,
                cpuid: host.cpuid.clone(),
                msrs: Vec::new(),
                start: Start::Boot(Box::new(start)),
            }
        };
        let configs: Vec<VcpuConfig> = threads.iter().map(config).collect();
        let failed = Mutex::new(tell.clone());
        let env = Environment {
            devices: Arc::new(devices),
            interrupts: Arc::new(Nobody),
            clock: Arc::new(GuestClock::fixed(host.tsc_khz.into())),
            on_idle: Arc::new(|_| {}),
            shipper: self.shipper(host, node, &table, how),
            on_failure: Arc::new(move |failure: VcpuFailure| {
                if let Ok(failed) = failed.lock() {
                    let _ = failed.send(Err(format!("{failure}\n{}", failure.dump)));
                }
            }),
        };
        Ok(Vcpus::create(vm, table, &configs, &env)?)
    }

    fn shipper(&self, host: &HostCpu, node: usize, table: &Arc<Table>, how: How) -> Option<Arc<dyn Shipper>> {
        if how == How::Off {
            return None;
        }
        let desk = Arc::new(Desk::new(table.clone(), true));
        let (engine, memory) = (self.engines.engine(node), self.engines.memory(node));
        engine.ship(&(desk.clone() as Arc<dyn ShippingVcpus>), how);
        let sizes = host.cpuid.iter().find(|entry| entry.leaf == 0x8000_0008);
        let ranges = [RamRange { gpa: 0, offset: 0, len: memory.len() as u64 }];
        let physical_bits = sizes.map_or(36, |entry| entry.eax as u8);
        Some(Arc::new(Shipping::new(engine.clone(), memory.clone(), &ranges, physical_bits, desk)))
    }

    /// The nodes' memory.
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    /// Has instructions on these pages shipped, where [`How::Manual`] says that it is done at all.
    pub fn delegate(&self, pages: Range<u64>) {
        for page in pages {
            self.engines.engine((page / NODE_PAGES) as usize).set_class(Page(page), Class::Delegated);
        }
    }

    /// Where a thread's results are, in bytes.
    pub fn results(&self, thread: usize) -> usize {
        (self.nodes[thread] * NODE_PAGES as usize + 256 + 32 * thread) * PAGE_SIZE
    }

    /// Where a thread finds what to do, in bytes.
    fn orders_at(&self, thread: usize) -> usize {
        (self.nodes[thread] * NODE_PAGES as usize + 240 + thread) * PAGE_SIZE
    }

    /// Writes each thread's code.
    pub fn load(&self, threads: &[Vec<u8>]) {
        for (thread, code) in threads.iter().enumerate() {
            self.write(CODE + (thread * CODE_SIZE) as u64, code);
        }
    }

    fn write(&self, at: u64, code: &[u8]) {
        for (i, bytes) in code.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.engines.word(0, at as usize + i * 8).store(u64::from_le_bytes(word), Relaxed);
        }
    }

    /// Runs every thread with its registers from its code's beginning, until all are done.
    ///
    /// # Errors
    /// A vCPU failed, or is not done in time.
    pub fn run(&self, registers: &[kvm_regs]) -> Result<()> {
        for (thread, regs) in registers.iter().enumerate() {
            let rip = CODE + (thread * CODE_SIZE) as u64;
            let words = code::orders(regs, rip, WAITER);
            for (i, word) in words.into_iter().enumerate() {
                let at = self.orders_at(thread) + i * 8;
                self.engines.word(self.nodes[thread], at).store(word, Relaxed);
            }
            self.orders[thread].send(()).context("a vCPU's thread is gone")?;
        }
        for _ in registers {
            match self.done.recv_timeout(PATIENCE) {
                Ok(result) => result.map_err(anyhow::Error::msg)?,
                Err(_) => bail!("a vCPU is not done after {PATIENCE:?}: {}", self.engines.describe()),
            }
        }
        self.engines.check()
    }

    fn write_tables(&self) {
        self.write(TABLES, &user_mode::page_tables(TABLES));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Those that wait for orders wait no more, and then stop.
        self.orders.clear();
        for vcpus in &mut self.vcpus {
            // One that hangs in the guest stays behind; the process is about to fail then.
            let _ = vcpus.stop(Duration::from_secs(10));
        }
    }
}
