//! An instruction that is shipped: carried out where its operand is, instead of where its CPU is.
//!
//! # The way of one shipped instruction
//! ```text
//! a vCPU waits for a page, is called out of KVM_RUN, RIP on the instruction, nothing done
//!   Cpu::from_kvm       registers, and what they say about addresses
//!   ship
//!    1  state           64-bit mode; no event, single step or breakpoint           or Refusal
//!    2  fetch           walk for RIP, read up to 15 bytes; the next page only if    or Refusal
//!                       the instruction goes on there
//!    3  decode          the operation on memory, its linear address, a Completion   or Refusal
//!    4  walk            for the operand: allowed, Accessed (and Dirty) set          or Refusal
//!    5  compare         it ends in the page that is waited for                      or Refusal
//!   Operate ──────────> owner: execute, one instruction on the frame
//!           <────────── the old value
//!   Completion::finish  registers, flags, RIP; RF and the interrupt shadow end
//!   Cpu::to_kvm         and the end of a shadow with KVM_SET_VCPU_EVENTS; KVM_RUN goes on with the next instruction
//! ```
//! A refusal leaves everything as it was: the page moves, and the CPU carries the instruction out itself.
//! Between the walk and the end of the operation the vCPU stands still, so that no TLB shootdown or stop is
//! answered in between: to the others the operation happens where the CPU would have done it.
//!
//! | module | what it does |
//! |---|---|
//! | [`cpu`] | the state of a stopped CPU |
//! | [`mod@decode`] | the table of what can be shipped, and addresses |
//! | [`completion`] | what an instruction does to the CPU |
//! | [`walk`] | page tables and their rights |
//! | [`refusal`] | why an instruction is not shipped |

pub mod completion;
mod condition;
pub mod cpu;
pub mod decode;
mod flags;
pub mod refusal;
mod register;
pub mod walk;

#[cfg(test)]
mod tests;

use coherence::page::PAGE_SIZE;
use coherence::protocol::Operation;

pub use self::completion::Completion;
pub use self::cpu::Cpu;
use self::decode::{Decoded, LONGEST, decode};
pub use self::refusal::Refusal;
pub use self::walk::GuestPhysical;
use self::walk::{Access, Fault, Translation};

/// A shipped instruction: what travels, and what is done when the answer is here.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Shipment {
    /// For the page's owner.
    pub operation: Operation,
    /// For the CPU, with the old value that the owner tells.
    pub completion: Completion,
}

/// RFLAGS: a debug exception follows each instruction.
const TF: u64 = 1 << 8;
/// DR7: any of the four breakpoints is enabled, locally or globally.
const BREAKPOINTS: u64 = 0xff;

/// Plans how the instruction at the CPU's RIP is shipped, of which the page at guest-physical address `page`
/// is waited for.
///
/// # Errors
/// Why the page must move instead.
pub fn ship(cpu: &Cpu, memory: &impl GuestPhysical, page: u64) -> Result<Shipment, Refusal> {
    if !cpu.code64 {
        return Err(Refusal::Mode);
    }
    if cpu.event {
        return Err(Refusal::Event);
    }
    if cpu.rflags & TF != 0 {
        return Err(Refusal::SingleStep);
    }
    if cpu.dr7 & BREAKPOINTS != 0 {
        return Err(Refusal::Breakpoint);
    }
    let Decoded { address, operation, completion } = fetch(cpu, memory)?;
    if !cpu.paging().is_canonical(completion.next()) {
        return Err(Refusal::Fetch(Fault::NotCanonical));
    }
    let access = if operation.action().writes() { Access::Write } else { Access::Read };
    let operand = cpu.paging().translate(address, access, memory).map_err(Refusal::Operand)?;
    if operand.address / PAGE_SIZE as u64 * PAGE_SIZE as u64 != page {
        return Err(Refusal::OtherPage);
    }
    if !operand.accessed || access == Access::Write && !operand.dirty {
        return Err(Refusal::Marks);
    }
    Ok(Shipment { operation, completion })
}

/// Reads and decodes the instruction at RIP.
fn fetch(cpu: &Cpu, memory: &impl GuestPhysical) -> Result<Decoded, Refusal> {
    let mut code = [0; LONGEST];
    let in_page = PAGE_SIZE - (cpu.rip % PAGE_SIZE as u64) as usize;
    let (first, next) = code.split_at_mut(in_page.min(LONGEST));
    read_code(cpu, memory, cpu.rip, first)?;
    match decode(first, cpu) {
        Err(Refusal::Truncated) if !next.is_empty() => {
            read_code(cpu, memory, cpu.rip.wrapping_add(in_page as u64), next)?;
            decode(&code, cpu)
        }
        decoded => decoded,
    }
}

/// Reads bytes of one page from a linear address on, as code.
fn read_code(cpu: &Cpu, memory: &impl GuestPhysical, linear: u64, bytes: &mut [u8]) -> Result<(), Refusal> {
    let Translation { address, accessed, .. } =
        cpu.paging().translate(linear, Access::Fetch, memory).map_err(Refusal::Fetch)?;
    if !accessed {
        return Err(Refusal::Marks);
    }
    if memory.read(address, bytes) { Ok(()) } else { Err(Refusal::CodeAbsent) }
}
