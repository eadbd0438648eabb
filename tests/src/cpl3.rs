//! A vCPU of a micro guest: 64-bit code at CPL 3, which KVM on PVM runs natively, with IOPL 3.
//!
//! Guest memory, by page number: 1 to 3 page tables, which map the first GiB one to one. No CPU writes them,
//! so that they do not pass from node to node.

use anyhow::Result;
use coherence::memory::DualMemory;
use coherence::uffd::Uffd;
use kvm_bindings::kvm_regs;
use vmm::kvm::{Exit, HostCpu, Vcpu};
use vmm::testing;
use vmm::vcpu::{registers, signal, user_mode};

use crate::vectors;

/// Guest address of the page tables.
pub const TABLES: u64 = 0x1000;
/// First address behind them.
pub const BEHIND_TABLES: u64 = 0x4000;

/// This host, if guests and engines can run on it.
///
/// # Errors
/// Why they cannot.
pub fn host() -> Result<HostCpu, String> {
    Uffd::open()?;
    testing::host()
}

/// Writes the page tables.
pub fn write_tables(memory: &DualMemory) {
    coherence::testing::write(memory, TABLES as usize, &user_mode::page_tables(TABLES));
}

/// 64-bit mode at CPL 3, with the page tables of this module and all vector registers there are.
///
/// # Errors
/// What KVM says.
pub fn prepare(host: &HostCpu, vcpu: &mut Vcpu) -> Result<()> {
    vcpu.set_cpuid(&host.cpuid)?;
    let mut start = user_mode::registers(TABLES, BEHIND_TABLES);
    if let Some(value) = vectors::xcr0(host) {
        // OSXSAVE
        start.cr4 |= 1 << 18;
        vcpu.set_xcr0(value)?;
    }
    let rest = vcpu.sregs()?;
    Ok(registers::begin(vcpu, &start, &rest)?)
}

/// Runs the guest from `regs` on; `port` does what the guest asks for by writing to a port, and says `false`
/// when that ends the run; `kicked` is told of each kick, with the vCPU between two instructions. Returns how
/// often the guest was kicked.
///
/// # Errors
/// The guest left for another reason.
pub fn run(
    vcpu: &mut Vcpu,
    regs: &kvm_regs,
    mut port: impl FnMut(u16) -> Result<bool>,
    mut kicked: impl FnMut(&mut Vcpu) -> Result<()>,
) -> Result<u64> {
    vcpu.set_regs(&kvm_regs { rflags: user_mode::RFLAGS, ..*regs })?;
    let mut kicks = 0;
    loop {
        let exit = vcpu.run()?;
        vectors::spoil();
        match exit {
            Exit::Pio { port: number, write: true, .. } if !port(number)? => break,
            Exit::Pio { write: true, .. } => {}
            Exit::Interrupted => {
                // Else it would end the next run at once, and all after it.
                signal::take_pending();
                kicks += 1;
                kicked(vcpu)?;
            }
            other => anyhow::bail!("left the guest by {other:?} at {:#x}", vcpu.regs()?.rip),
        }
    }
    // The registers may be set only at an instruction's end.
    vcpu.complete()?;
    Ok(kicks)
}
