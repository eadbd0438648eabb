//! Finding out about this host. Nothing here judges; what cannot be found out is absent from the facts.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::emulation::Signs;
use super::facts::{HostFacts, Interface, KvmFacts, RdmaFacts, RdmaPort, Trouble, TscFacts};
use super::trial;
use vmm::kvm;
use vmm::vcpu::waiting;

/// Looks at this host; takes a few milliseconds, and runs guests of a few instructions.
pub fn host() -> HostFacts {
    let flags = cpu_flags();
    let has = |flag: &str| flags.iter().any(|known| known == flag);
    let (open_files, open_files_hard) = limit("Max open files");
    HostFacts {
        kernel: kernel_release(),
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        virtualization: ["vmx", "svm"].into_iter().find(|flag| has(flag)),
        guest: has("hypervisor"),
        kvm: kvm_facts(),
        userfaultfd: coherence::uffd::Uffd::open().map(drop),
        continue_protected: trial::continue_protected(),
        memory_available: meminfo("MemAvailable"),
        shmem_huge: chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        tsc: TscFacts {
            constant: has("constant_tsc"),
            nonstop: has("nonstop_tsc"),
            clocksource: line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        },
        interfaces: interfaces(),
        rdma: rdma(),
        max_map_count: line("/proc/sys/vm/max_map_count").and_then(|text| text.parse().ok()),
        open_files,
        open_files_hard,
    }
}

/// Whether this host's CPUs are emulated or without hardware virtualization, so that timings say nothing
/// about real servers.
pub fn emulated() -> bool {
    let flags = cpu_flags();
    let has = |flag: &str| flags.iter().any(|known| known == flag);
    const DMI: [&str; 6] =
        ["sys_vendor", "product_name", "board_vendor", "chassis_vendor", "bios_vendor", "bios_version"];
    let signs = Signs {
        virtualization: has("vmx") || has("svm"),
        cpu_vendor: cpuinfo("vendor_id").unwrap_or_default(),
        cpu_model: cpuinfo("model name").unwrap_or_default(),
        hypervisor: has("hypervisor").then(hypervisor),
        machine: DMI.iter().filter_map(|name| line(&format!("/sys/class/dmi/id/{name}"))).collect(),
    };
    signs.emulated()
}

/// The signature that a hypervisor leaves in CPUID.
fn hypervisor() -> String {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The kernel's release, as `uname -r` says.
pub fn kernel_release() -> String {
    line("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// This host's name.
pub fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.unwrap_or_else(|| "?".into())
}

fn kvm_facts() -> Result<KvmFacts, Trouble> {
    // Opened by hand first: KVM's own error does not tell these apart.
    match fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(Trouble::Absent),
        // ENXIO or ENODEV: a device node without a driver.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            return Err(Trouble::Absent);
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(Trouble::Denied),
        Err(error) => return Err(Trouble::Other(error.to_string())),
    }
    let kvm = kvm::caps::open().map_err(|error| Trouble::Other(error.to_string()))?;
    let cpu = kvm::HostCpu::probe(&kvm);
    Ok(KvmFacts {
        missing: kvm::caps::missing(&kvm).into_iter().map(str::to_string).collect(),
        max_vcpus: kvm.get_max_vcpus() as u64,
        tsc_offset: cpu.as_ref().is_ok_and(|cpu| cpu.tsc_offset),
        tsc_control: cpu.as_ref().is_ok_and(|cpu| cpu.tsc_control),
        deadline_timer: cpu.as_ref().is_ok_and(|cpu| cpu.deadline_exits),
        called_out: match &cpu {
            Ok(cpu) => waiting::can_be_called_out(&kvm, cpu),
            Err(error) => Err(error.to_string()),
        },
        runs: cpu.map(drop).map_err(|error| error.to_string()),
        nested_paging: parameter("kvm_intel", "ept").or_else(|| parameter("kvm_amd", "npt")),
        ept_accessed_dirty: parameter("kvm_intel", "eptad"),
    })
}

/// A switch of a loaded kernel module.
fn parameter(module: &str, name: &str) -> Option<bool> {
    line(&format!("/sys/module/{module}/parameters/{name}")).map(|value| value == "Y" || value == "1")
}

fn interfaces() -> Vec<Interface> {
    let mut found = Vec::new();
    for name in names_in("/sys/class/net") {
        let of = |what: &str| line(&format!("/sys/class/net/{name}/{what}"));
        let Some(mtu) = of("mtu").and_then(|text| text.parse().ok()) else { continue };
        if name != "lo" && of("operstate").as_deref() == Some("up") {
            found.push(Interface { name, mtu });
        }
    }
    found
}

fn rdma() -> RdmaFacts {
    let port = |port: fabric::rdma::RdmaPort| RdmaPort {
        name: format!("{}/{}", port.device, port.port),
        address: port.best_gid().filter(|gid| gid.v2).map(|gid| gid.ip().to_string()),
        mtu: fabric::rdma::active_mtu(&port.device, port.port),
        state: port.state,
        ethernet: port.ethernet,
    };
    let (lockable, _) = limit("Max locked memory");
    RdmaFacts {
        library: fabric::rdma::check_library(),
        ports: fabric::rdma::ports().into_iter().map(port).collect(),
        lockable: (lockable != u64::MAX && !may_lock()).then_some(lockable),
    }
}

/// Whether this process may lock memory whatever its limit (CAP_IPC_LOCK, capabilities(7)).
fn may_lock() -> bool {
    const IPC_LOCK: u64 = 1 << 14;
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = text.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set & IPC_LOCK != 0)
}

fn names_in(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(folder)).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn cpuinfo(key: &str) -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.split(':').next().map(str::trim) == Some(key))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

fn cpu_flags() -> Vec<String> {
    cpuinfo("flags").unwrap_or_default().split_whitespace().map(str::to_string).collect()
}

/// Soft and hard limit of this process; `unlimited` counts as the largest number.
fn limit(name: &str) -> (u64, u64) {
    let text = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let mut limits = line.split_whitespace().map(|word| word.parse().unwrap_or(u64::MAX));
    (limits.next().unwrap_or(0), limits.next().unwrap_or(0))
}

/// A value of /proc/meminfo, in bytes; 0 if it is not there.
fn meminfo(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_string())
}

/// The word in brackets.
fn chosen(path: &str) -> Option<String> {
    let text = line(path)?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_string())
}
