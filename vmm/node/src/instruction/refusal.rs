//! Reasons for which an instruction is not shipped. Its page moves instead, and the CPU itself carries it
//! out.

use thiserror::Error;

use super::walk::Fault;

/// Why an instruction is not shipped.
///
/// A refusal is never a failure: the page moves, and the instruction, with whatever exception it raises, is
/// the CPU's own.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash, Error)]
pub enum Refusal {
    /// The CPU is in real, protected or compatibility mode: other segments, other defaults.
    #[error("the CPU is not in 64-bit mode")]
    Mode,
    /// An event is being delivered, or comes before the instruction. What was accessed may be the IDT, the
    /// GDT, the TSS or a stack, not the instruction's operand.
    #[error("an exception, interrupt or NMI is being delivered")]
    Event,
    /// RFLAGS.TF: a debug exception follows the instruction, with DR6 and the shadow of MOV SS as the CPU
    /// alone knows them.
    #[error("the guest steps through its instructions")]
    SingleStep,
    /// A breakpoint is enabled in DR7. Whether it is on this code or data is not looked at: debuggers are
    /// rare.
    #[error("the guest has set hardware breakpoints")]
    Breakpoint,
    /// The instruction's own address is not translated.
    #[error("the instruction cannot be fetched: {0}")]
    Fetch(Fault),
    /// This node has not the bytes of the instruction, or they are not RAM.
    #[error("the instruction's bytes cannot be read here")]
    CodeAbsent,
    /// No instruction begins so: the CPU will raise #UD, or knows more than the decoder.
    #[error("the bytes are no instruction")]
    Undecodable,
    /// An instruction longer than the bytes at hand, or than 15 bytes.
    #[error("the instruction goes beyond the bytes at hand")]
    Truncated,
    /// Not in the table of what can be shipped: vectors, strings, stacks, descriptors, control registers, and
    /// all that is rare.
    #[error("an instruction that is not shipped")]
    Unknown,
    /// It accesses no memory: what was missing was the instruction itself.
    #[error("the instruction accesses no memory")]
    NoOperand,
    /// The operand lies in two pages.
    #[error("the operand crosses a page")]
    CrossesPage,
    /// The operand lies in two cache lines and is changed in place. An atomic operation on it at the owner
    /// would lock the bus, for which hosts punish a thread (split lock detection).
    #[error("the operand crosses a cache line")]
    SplitLock,
    /// The operand is not aligned, and this instruction, or this CPU's state, demands it: #GP or #AC.
    #[error("the operand is not aligned as it must be")]
    Misaligned,
    /// The operand's address is not translated.
    #[error("the operand's address is not translated: {0}")]
    Operand(Fault),
    /// The operand is in another page than the one that is waited for: that one is a page table, or holds the
    /// instruction.
    #[error("the operand is not in the page that is waited for")]
    OtherPage,
    /// The translation would set Accessed or Dirty bits. That is left to the CPU, which does it when the page
    /// moves; the next time they are set.
    #[error("the page tables' accessed and dirty bits are not set yet")]
    Marks,
}
