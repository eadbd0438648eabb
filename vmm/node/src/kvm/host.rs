//! The abilities of this host's CPUs and KVM, found by asking and by trying.

use firmware::cpuid::CpuidEntry;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use vm_memory::MmapRegion;

use super::vcpu::{Exit, Vcpu};
use super::vm::Vm;
use super::{KvmError, caps, cpuid, msr};

/// One host's CPUs, as far as the guest's CPUs depend on them.
#[derive(Clone, Debug)]
pub struct HostCpu {
    /// What KVM can offer. CPUID.1 ECX bit 24 (TSC-deadline timer) is set exactly if `deadline_exits`.
    pub cpuid: Vec<CpuidEntry>,
    /// The host's TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Whether a guest TSC can have another frequency.
    pub tsc_control: bool,
    /// Whether a vCPU's TSC offset can be set exactly, and the guest's RDTSC obeys it. Under KVM on PVM it
    /// does not: guests read the host's TSC, and the clock must be left at offset 0.
    pub tsc_offset: bool,
    /// IA32_ARCH_CAPABILITIES as KVM would give it to a guest; 0 if it has none.
    pub arch_capabilities: u64,
    /// Whether a guest's write to IA32_TSC_DEADLINE reaches us.
    ///
    /// KVM has a fast path for that write which looks neither at the MSR filter nor at whether there is an
    /// in-kernel local APIC: it drops the write, and the guest would wait for its timer. Linux has
    /// it on Intel CPUs with a preemption timer since 5.8, and on every CPU since 6.18. Such hosts must not
    /// offer the mode; the guest then uses the one-shot mode, whose register always exits.
    pub deadline_exits: bool,
}

impl HostCpu {
    /// Asks KVM, and runs a guest of a few instructions to see what becomes of its RDTSC and of a deadline.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn probe(kvm: &Kvm) -> Result<HostCpu, KvmError> {
        let mut cpuid = cpuid::supported(kvm)?;
        let page = MmapRegion::<()>::new(4096).map_err(|error| KvmError::Call {
            what: "have a page of memory",
            source: std::io::Error::other(error.to_string()),
        })?;
        let vm = Vm::new(kvm)?;
        // SAFETY: `page` was mapped before `vm` and is dropped after it and its vCPU; nothing refers to it.
        unsafe { vm.add_memory(0, 0, page.as_ptr(), 4096)? };
        let mut vcpu = vm.create_vcpu(0)?;
        let before = base::trace::now();
        if vcpu.has_tsc_offset() {
            vcpu.set_tsc_offset(0u64.wrapping_sub(before))?;
        }
        let Tried { deadline_exits, tsc } = try_out(&page, &mut vcpu)?;
        let elapsed = base::trace::now() - before;
        for leaf in cpuid.iter_mut().filter(|leaf| leaf.leaf == 1) {
            leaf.ecx &= !cpuid::TSC_DEADLINE_BIT;
            leaf.ecx |= if deadline_exits { cpuid::TSC_DEADLINE_BIT } else { 0 };
        }
        Ok(HostCpu {
            cpuid,
            tsc_khz: vcpu.tsc_khz()?,
            tsc_control: caps::has_tsc_control(kvm),
            tsc_offset: vcpu.has_tsc_offset() && tsc <= elapsed,
            arch_capabilities: arch_capabilities(kvm),
            deadline_exits,
        })
    }
}

fn arch_capabilities(kvm: &Kvm) -> u64 {
    let wanted = kvm_msr_entry { index: msr::ARCH_CAPABILITIES, ..Default::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[wanted]) else { return 0 };
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice()[0].data,
        _ => 0,
    }
}

/// What a guest of a few instructions showed.
struct Tried {
    deadline_exits: bool,
    tsc: u64,
}

/// Runs `rdtsc; wrmsr(IA32_TSC_DEADLINE, 0); hlt` in real mode at address 0 of `page`.
fn try_out(page: &MmapRegion<()>, vcpu: &mut Vcpu) -> Result<Tried, KvmError> {
    #[rustfmt::skip]
    const CODE: [u8; 23] = [
        0x0f, 0x31,                         // rdtsc
        0x66, 0x89, 0xc3,                   // mov ebx, eax
        0x66, 0x89, 0xd6,                   // mov esi, edx
        0x66, 0xb9, 0xe0, 0x06, 0x00, 0x00, // mov ecx, 0x6e0
        0x66, 0x31, 0xc0,                   // xor eax, eax
        0x66, 0x31, 0xd2,                   // xor edx, edx
        0x0f, 0x30,                         // wrmsr
        0xf4,                               // hlt
    ];
    const { assert!(msr::TSC_DEADLINE == 0x6e0) };
    // SAFETY: the page is 4096 bytes long, ours alone, and no vCPU runs yet.
    unsafe { page.as_ptr().copy_from_nonoverlapping(CODE.as_ptr(), CODE.len()) };
    let mut sregs = vcpu.sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.regs()?;
    regs.rip = 0;
    vcpu.set_regs(&regs)?;
    // A signal to this thread, one at most for each of a few turns, only delays the answer.
    let mut exit = Exit::Interrupted;
    for _ in 0..100 {
        exit = vcpu.run()?;
        if exit != Exit::Interrupted {
            break;
        }
    }
    let regs = vcpu.regs()?;
    Ok(Tried {
        deadline_exits: matches!(exit, Exit::WriteMsr { index: msr::TSC_DEADLINE, .. }),
        tsc: regs.rsi << 32 | regs.rbx & 0xffff_ffff,
    })
}
