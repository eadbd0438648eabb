//! A vCPU of a micro guest: 64-bit code at CPL 3, which KVM on PVM runs natively, with IOPL 3.
//!
//! Guest memory, by page number: 1 to 3 page tables, which map the first GiB one to one with their accessed and dirty
//! bits set: no CPU writes them, so that they do not pass from node to node.

use anyhow::Result;
use coherence::uffd::Uffd;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use vmm::kvm::{Exit, HostCpu, Vcpu, caps};
use vmm::vcpu::signal;

use crate::vectors;

/// Guest address of the page tables.
pub const TABLES: u64 = 0x1000;
/// First address behind them.
pub const BEHIND_TABLES: u64 = 0x4000;
/// Flags of a vCPU that begins: the reserved bit, and IOPL 3 for `out`.
pub const RFLAGS: u64 = 0x3002;

/// The bytes of 64-bit code in Intel syntax.
#[macro_export]
macro_rules! code64 {
    ($($line:expr),+ $(,)?) => {{
        let (start, end): (usize, usize);
        // SAFETY: the block only takes the addresses of its own labels and jumps over the guest's code, which
        // this process never executes.
        unsafe {
            core::arch::asm!(
                "lea {0}, [rip + 990f]",
                "lea {1}, [rip + 991f]",
                "jmp 991f",
                "990:",
                $($line,)+
                "991:",
                out(reg) start,
                out(reg) end,
                options(nomem, nostack),
            );
        }
        // SAFETY: the code lies between the two labels in this program's text.
        unsafe { core::slice::from_raw_parts(start as *const u8, end - start) }
    }};
}

/// This host, if guests and engines can run on it.
///
/// # Errors
/// Why they cannot.
pub fn host() -> Result<HostCpu, String> {
    Uffd::open()?;
    let kvm = caps::open().map_err(|error| error.to_string())?;
    caps::check(&kvm).map_err(|error| error.to_string())?;
    HostCpu::probe(&kvm).map_err(|error| error.to_string())
}

/// The page tables: words by guest address.
pub fn tables() -> impl Iterator<Item = (usize, u64)> {
    // Present, writable, user, accessed, dirty.
    const FLAGS: u64 = 0x67;
    const LARGE: u64 = 0x80;
    let directory = |i: u64| ((TABLES + 0x2000 + i * 8) as usize, i << 21 | FLAGS | LARGE);
    let above = [0, 0x1000].map(|at| ((TABLES + at) as usize, (TABLES + at + 0x1000) | FLAGS));
    above.into_iter().chain((0..512).map(directory))
}

/// 64-bit mode at CPL 3, with the page tables of this module and all vector registers there are.
///
/// # Errors
/// What KVM says.
pub fn prepare(host: &HostCpu, vcpu: &mut Vcpu) -> Result<()> {
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
    if let Some(value) = vectors::xcr0(host) {
        // OSXSAVE
        sregs.cr4 |= 1 << 18;
        vcpu.set_xcr0(value)?;
    }
    Ok(vcpu.set_sregs(&sregs)?)
}

/// Runs the guest from `regs` on; `port` does what the guest asks for by writing to a port, and says `false` when that
/// ends the run. Returns how often the guest was kicked.
///
/// # Errors
/// The guest left for another reason.
pub fn run(vcpu: &mut Vcpu, regs: &kvm_regs, mut port: impl FnMut(u16) -> Result<bool>) -> Result<u64> {
    vcpu.set_regs(&kvm_regs { rflags: RFLAGS, ..*regs })?;
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
            }
            other => anyhow::bail!("left the guest by {other:?} at {:#x}", vcpu.regs()?.rip),
        }
    }
    // The registers may be set only at an instruction's end.
    vcpu.complete()?;
    Ok(kicks)
}
