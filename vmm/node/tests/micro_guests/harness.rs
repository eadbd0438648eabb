//! One node of a machine of micro guests: memory, vCPUs, a router, and devices that the test plays.

use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use coherence::uffd::{Fault, Mode, Uffd};
use fabric::{NodeId, Transport, sim};
use firmware::boot::{BspRegisters, DescriptorTable, Segment};
use firmware::cpuid::CpuidEntry;
use firmware::layout::CpuPlace;
use vmm::clock::{GuestClock, Scale};
use vmm::kvm::{HostCpu, Vm, caps};
use vmm::node_msg::Signal;
use vmm::router::peers::Peers;
use vmm::router::{LinkFailure, Router};
use vmm::testing;
use vmm::vcpu::table::State;
use vmm::vcpu::{Devices, Environment, Shipper, Space, Start, Table, VcpuConfig, VcpuFailure, Vcpus};

/// Long enough for a slow, busy host; a test that waits so long has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Guest memory: the first 640 KiB, like a PC's.
pub const MEMORY: usize = 0xa_0000;
/// Where the boot processor's code is, and page of other start-up code.
pub const CODE: u16 = 0x1000;
/// Top of the boot processor's stack.
const STACK: u64 = 0x8000;

/// Ports of the test's devices: 32-bit values the guest reports, and one it asks for.
pub const REPORT: u64 = 0x80;
pub const ASK: u64 = 0x84;
/// Memory that nothing backs.
pub const DEVICE_MEMORY: u64 = 0xd_0000;

/// What this host can do; `None` (and a line that says so) where there is no KVM.
pub fn host() -> Option<&'static HostCpu> {
    static HOST: OnceLock<Result<HostCpu, String>> = OnceLock::new();
    let host = HOST.get_or_init(testing::host);
    host.as_ref().inspect_err(|why| eprintln!("skipped: {why}")).ok()
}

/// One access that the guest made to a device of the test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub cpu: u32,
    pub space: Space,
    pub addr: u64,
    pub value: u64,
    pub size: usize,
}

type OnWrite = Box<dyn Fn(&Write) + Send + Sync>;

/// Devices that report writes to the test and answer reads with `answer` (or address and size if unset).
pub struct TestDevices {
    writes: Mutex<mpsc::Sender<Write>>,
    pub answer: Mutex<Option<u64>>,
    pub on_write: OnceLock<OnWrite>,
}

impl Devices for TestDevices {
    fn read(&self, _cpu: u32, _space: Space, addr: u64, data: &mut [u8]) {
        let value = self.answer.lock().unwrap().unwrap_or(addr << 8 | data.len() as u64);
        let len = data.len();
        data.copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&self, cpu: u32, space: Space, addr: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let write = Write { cpu, space, addr, value: u64::from_le_bytes(bytes), size: data.len() };
        if let Some(on_write) = self.on_write.get() {
            on_write(&write);
        }
        // The test may have ended.
        let _ = self.writes.lock().unwrap().send(write);
    }
}

/// The parts of a guest that exist before its vCPUs.
pub struct Parts {
    pub devices: Arc<TestDevices>,
    pub router: Arc<Router>,
    pub clock: Arc<GuestClock>,
    pub table: Arc<Table>,
    pub failures: mpsc::Receiver<VcpuFailure>,
    pub links: mpsc::Receiver<LinkFailure>,
    writes: mpsc::Receiver<Write>,
    on_failure: mpsc::Sender<VcpuFailure>,
    places: Vec<CpuPlace>,
    memory: Arc<DualMemory>,
    /// Who carries instructions out elsewhere, if a test has one.
    pub shipper: Option<Arc<dyn Shipper>>,
    /// How the boot processor begins: in real mode at [`CODE`], unless a test says otherwise.
    pub start: BspRegisters,
    /// Whether all processors begin as the boot processor does, each with its number in RSI.
    pub all_start: bool,
    khz: u32,
    cpuid: Vec<CpuidEntry>,
}

/// CPUs of a machine with `nodes` nodes of so many CPUs; APIC ids are `node << 4 | local`.
pub fn places(nodes: &[u32]) -> Vec<CpuPlace> {
    let mut all = Vec::new();
    for (node, cpus) in (0u16..).zip(nodes) {
        for local in 0..*cpus {
            all.push(CpuPlace { vcpu: all.len() as u32, node, apic_id: u32::from(node) << 4 | local, local });
        }
    }
    all
}

impl Parts {
    /// This node's parts; `transport` is its place in the machine.
    pub fn new(host: &HostCpu, places: &[CpuPlace], transport: Arc<dyn Transport>) -> Parts {
        let memory = Arc::new(DualMemory::new((MEMORY / PAGE_SIZE) as u64).unwrap());
        Parts::with_memory(host, places, transport, memory)
    }

    /// The same, with this memory.
    pub fn with_memory(
        host: &HostCpu,
        places: &[CpuPlace],
        transport: Arc<dyn Transport>,
        memory: Arc<DualMemory>,
    ) -> Parts {
        let node = transport.node();
        let here: Vec<_> = places.iter().filter(|cpu| cpu.node == node.0).copied().collect();
        let (write, writes) = mpsc::channel();
        let (on_failure, failures) = mpsc::channel();
        let (on_link, links) = mpsc::channel();
        let on_link = Mutex::new(on_link);
        let devices = Arc::new(TestDevices {
            writes: Mutex::new(write),
            answer: Mutex::new(None),
            on_write: OnceLock::new(),
        });
        let table = Arc::new(Table::new(here.len()));
        let peers = Arc::new(Peers::new(
            node,
            transport.nodes(),
            Duration::from_secs(30),
            Box::new(move |failure| drop(on_link.lock().unwrap().send(failure))),
        ));
        let router = Arc::new(Router::new(places, table.clone(), transport, peers));
        let clock = Arc::new(match host.tsc_offset {
            true => GuestClock::new(host.tsc_khz.into(), Scale::ONE),
            false => GuestClock::fixed(host.tsc_khz.into()),
        });
        let cpuid = cpuid(host);
        Parts {
            devices,
            router,
            clock,
            table,
            failures,
            links,
            writes,
            on_failure,
            places: here,
            memory,
            shipper: None,
            start: real_mode(),
            all_start: false,
            khz: host.tsc_khz,
            cpuid,
        }
    }

    /// The only node of a machine with `cpus` CPUs.
    pub fn alone(host: &HostCpu, cpus: u32) -> Parts {
        let transport = sim::cluster(1, 1).unwrap().pop().unwrap();
        Parts::new(host, &places(&[cpus]), Arc::new(transport))
    }

    /// Writes `bytes` to guest memory.
    pub fn load(&self, gpa: u16, bytes: &[u8]) {
        assert!(usize::from(gpa) + bytes.len() <= MEMORY);
        // SAFETY: the range was checked, and no guest runs while the test loads.
        unsafe { self.memory.guest_view().add(gpa.into()).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    /// Makes real-mode vector `vector` run the code at `gpa`.
    pub fn handler(&self, vector: u8, gpa: u16) {
        self.load(u16::from(vector) * 4, &[gpa as u8, (gpa >> 8) as u8, 0, 0]);
    }

    /// From now on `page` is missing: who touches it waits until the test gives it.
    pub fn withhold(&self, page: u64) -> Withheld {
        let uffd = Uffd::open().unwrap();
        let address = self.memory.guest_address(Page(page));
        uffd.register(address, PAGE_SIZE as u64, Mode::Remote).unwrap();
        Withheld { memory: self.memory.clone(), uffd, page: Page(page) }
    }

    /// Makes the vCPUs, node 0's first one starting at [`CODE`], and lets them run. `devices` are theirs.
    pub fn run_with(self, devices: Arc<dyn Devices>) -> Guest {
        let kvm = caps::open().unwrap();
        let vm = Vm::new(&kvm).unwrap();
        // SAFETY: the guest keeps the memory after its VM, and the test touches it by copies only.
        unsafe { vm.add_memory(0, 0, self.memory.guest_view(), self.memory.len() as u64).unwrap() };
        let configs: Vec<_> = self
            .places
            .iter()
            .map(|place| VcpuConfig {
                vcpu: place.vcpu,
                apic_id: place.apic_id,
                cpuid: self.cpuid.clone(),
                msrs: Vec::new(),
                start: match place.vcpu {
                    vcpu if vcpu == 0 || self.all_start => {
                        Start::Boot(Box::new(BspRegisters { rsi: vcpu.into(), ..self.start }))
                    }
                    _ => Start::WaitForSipi,
                },
            })
            .collect();
        let on_failure = Mutex::new(self.on_failure.clone());
        let env = Environment {
            devices,
            interrupts: self.router.clone(),
            clock: self.clock.clone(),
            on_idle: Arc::new(|_| {}),
            timer_rest: 0,
            shipper: self.shipper.clone(),
            on_failure: Arc::new(move |failure| drop(on_failure.lock().unwrap().send(failure))),
        };
        let vcpus = Vcpus::create(&vm, self.table.clone(), &configs, &env).unwrap();
        vcpus.resume();
        Guest { vcpus, parts: self, _vm: vm }
    }

    /// [`Parts::run_with`] the test's devices.
    pub fn run(self) -> Guest {
        let devices = self.devices.clone();
        self.run_with(devices)
    }

    /// Ticks of the guest's TSC in a second.
    pub fn hz(&self) -> u64 {
        u64::from(self.khz) * 1000
    }
}

/// A page that the test plays the engine for.
pub struct Withheld {
    memory: Arc<DualMemory>,
    uffd: Uffd,
    page: Page,
}

impl Withheld {
    /// Waits until a vCPU waits for the page.
    pub fn fault(&self) -> Fault {
        self.fault_within(PATIENCE).expect("no vCPU touched the page in time")
    }

    /// Waits for so long at most until a vCPU waits for the page.
    pub fn fault_within(&self, time: Duration) -> Option<Fault> {
        self.uffd.wait(time).unwrap().first().copied()
    }

    /// Whether no vCPU begins to wait for the page for so long.
    pub fn is_quiet_for(&self, time: Duration) -> bool {
        self.uffd.wait(time).unwrap().is_empty()
    }

    /// The page comes, with `word` at its beginning; who waits goes on.
    pub fn give(&self, word: u64) {
        let mut bytes = [0; PAGE_SIZE];
        bytes[..8].copy_from_slice(&word.to_le_bytes());
        // SAFETY: the page is not mapped: it was missing, and only this gives it.
        unsafe { self.memory.fill(self.page, Some(&bytes)) };
        self.uffd.map(self.memory.guest_address(self.page), PAGE_SIZE as u64, false).unwrap();
    }

    /// The page goes away again. Its first word.
    pub fn take(&self) -> u64 {
        self.memory.unmap(self.page, 1).unwrap();
        let word = self.memory.read(self.page)[..8].try_into().unwrap();
        self.memory.free(self.page, 1).unwrap();
        u64::from_le_bytes(word)
    }
}

/// A running guest. Its vCPUs stop when it is dropped, before its memory goes.
pub struct Guest {
    pub vcpus: Vcpus,
    _vm: Vm,
    pub parts: Parts,
}

impl Guest {
    /// One vCPU that runs `code`.
    pub fn start(host: &HostCpu, code: &[u8]) -> Guest {
        let parts = Parts::alone(host, 1);
        parts.load(CODE, code);
        parts.run()
    }

    /// The next device write of the guest.
    pub fn next_write(&self) -> Write {
        self.parts.writes.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let failure =
                self.parts.failures.try_recv().map(|failure| format!("{failure}\n{}", failure.dump));
            let dump = self.vcpus.dump(Duration::from_secs(1));
            panic!("the guest wrote nothing in time; failure: {failure:?}\n{dump}")
        })
    }

    /// The next value that the guest writes to [`REPORT`].
    pub fn report(&self) -> u64 {
        let write = self.next_write();
        assert_eq!((write.space, write.addr), (Space::Port, REPORT), "{write:x?}");
        write.value
    }

    /// Nothing has been written that the test has not seen.
    pub fn is_quiet(&self) -> bool {
        self.parts.writes.try_recv().is_err()
    }

    /// Changes what the guest reads: a number that it has not seen, with `word` in its low byte.
    pub fn tell(&self, word: u8) {
        let mut answer = self.parts.devices.answer.lock().unwrap();
        let count = answer.unwrap_or(0) >> 8;
        *answer = Some((count + 1) << 8 | u64::from(word));
    }

    pub fn post(&self, cpu: u32, vector: u8) {
        self.vcpus.post(cpu, Signal::Vector { vector, level: false });
    }

    pub fn wait_state(&self, cpu: usize, state: State) {
        let deadline = Instant::now() + PATIENCE;
        while self.vcpus.table().slots()[cpu].state() != state {
            assert!(Instant::now() < deadline, "vCPU {cpu} is not {state:?}: {}", self.dump());
            std::thread::yield_now();
        }
    }

    pub fn dump(&self) -> String {
        self.vcpus.dump(Duration::from_secs(5))
    }
}

/// What the host can do, in a form that lets a guest be in x2APIC mode with a deadline timer.
fn cpuid(host: &HostCpu) -> Vec<CpuidEntry> {
    let mut entries = host.cpuid.clone();
    for entry in entries.iter_mut().filter(|entry| entry.leaf == 1) {
        entry.ecx |= 1 << 21 | 1 << 24;
    }
    entries
}

/// Real mode at [`CODE`], with a stack.
fn real_mode() -> BspRegisters {
    let data = Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        type_: 3,
        present: true,
        dpl: 0,
        db: false,
        s: true,
        l: false,
        g: false,
    };
    BspRegisters {
        rip: CODE.into(),
        rsp: STACK,
        rsi: 0,
        rflags: 2,
        cr0: 0x6000_0010,
        cr3: 0,
        cr4: 0,
        efer: 0,
        cs: Segment { type_: 0xb, ..data },
        data,
        tr: Segment { type_: 0xb, s: false, ..data },
        gdt: DescriptorTable { base: 0, limit: 0xffff },
        idt: DescriptorTable { base: 0, limit: 0x3ff },
    }
}

/// A node id, for tests of several nodes.
pub fn node(index: u16) -> NodeId {
    NodeId(index)
}
