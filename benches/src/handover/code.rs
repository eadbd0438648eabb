//! The programs of the vCPUs: 64-bit code at CPL 3.
//!
//! | register | holds |
//! |---|---|
//! | rsi | address of what is shared |
//! | rdi | address of this CPU's own part |
//! | rbp, r8 | this CPU's turn, and the next one's |
//! | r13 | for how long to run, in ticks |
//! | r14 | own work after each operation, in ticks |
//! | r15 | when the time is over |
//! | rbx | where the count goes |
//! | r12 | where the program begins, and asks for its next job |
//! | r9 | operations so far; of a lock only those that had it after another CPU |
//!
//! Who waits for its turn finds a negative one when the time of another is over.

use serde::{Deserialize, Serialize};
use vmm::testing::code64;

/// The port to which a CPU writes when its time is over.
pub const DONE: u16 = 0x80;
/// The port to which a CPU writes to sleep until it is woken.
pub const SLEEP: u16 = 0x81;
/// The port to which a CPU writes to wake the next one.
pub const WAKE: u16 = 0x82;

/// The port from which a CPU reads its next job, a word for each register: rsi, rdi, rbx, rbp, r8, r13, r14.
pub const JOB: u16 = 0x83;
/// Words of a job.
pub const WORDS: usize = 7;

/// A program.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    /// Turns, taken by compare-and-exchange: who waits asks for the page to write it.
    Exchange,
    /// Turns, awaited by reading: who waits asks for a copy, and then to write it.
    Turn,
    /// The same; who waits for long sleeps, and is woken by the one before it.
    Wake,
    /// A lock of two counters; who has it says so in a word beside them.
    Ticket,
    /// Mellor-Crummey and Scott's queue; each CPU waits on a page of its own.
    Mcs,
    /// A locked increment of the word at rdi.
    Count,
    /// An increment of a word in each of [`PAGES`] pages from rdi on, one after the other.
    Walk,
}

/// Pages of [`Program::Walk`].
pub const PAGES: u64 = 64;

impl Program {
    /// Its code, which runs at any address.
    pub fn code(self) -> Vec<u8> {
        let begin = code64!(
            "20:",
            "lea r12, [rip + 20b]",
            "in eax, 0x83",
            "mov esi, eax",
            "in eax, 0x83",
            "mov edi, eax",
            "in eax, 0x83",
            "mov ebx, eax",
            "in eax, 0x83",
            "mov ebp, eax",
            "in eax, 0x83",
            "mov r8d, eax",
            "in eax, 0x83",
            "mov r13d, eax",
            "in eax, 0x83",
            "mov r14d, eax",
            "rdtsc",
            "shl rdx, 32",
            "or rax, rdx",
            "lea r15, [rax + r13]",
            "xor r9d, r9d"
        );
        let end = code64!("mov [rbx], r9", "out 0x80, al", "jmp r12");
        [begin, self.body(), end].concat()
    }

    /// Ends when the time is over.
    fn body(self) -> &'static [u8] {
        match self {
            Program::Exchange => code64!(
                "2:",
                "mov rax, rbp",
                "lock cmpxchg [rsi], r8",
                "je 3f",
                "test rax, rax",
                "js 9f",
                "pause",
                "jmp 2b",
                "3:",
                "inc r9",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "cmp rax, r15",
                "jb 2b",
                "9:",
                "mov qword ptr [rsi], -1",
            ),
            Program::Turn => code64!(
                "2:",
                "mov rax, [rsi]",
                "cmp rax, rbp",
                "je 3f",
                "test rax, rax",
                "js 9f",
                "pause",
                "jmp 2b",
                "3:",
                "inc r9",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "cmp rax, r15",
                "jae 9f",
                "mov [rsi], r8",
                "jmp 2b",
                "9:",
                "mov qword ptr [rsi], -1",
            ),
            Program::Wake => code64!(
                "2:",
                "mov ecx, 100",
                "4:",
                "mov rax, [rsi]",
                "cmp rax, rbp",
                "je 3f",
                "test rax, rax",
                "js 9f",
                "pause",
                "dec ecx",
                "jnz 4b",
                "out 0x81, al",
                "jmp 2b",
                "3:",
                "inc r9",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "cmp rax, r15",
                "jae 9f",
                "mov [rsi], r8",
                "out 0x82, al",
                "jmp 2b",
                "9:",
                "mov qword ptr [rsi], -1",
                "out 0x82, al",
            ),
            Program::Ticket => code64!(
                "2:",
                "mov eax, 1",
                "lock xadd [rsi], rax",
                "3:",
                "cmp [rsi + 64], rax",
                "je 4f",
                "pause",
                "jmp 3b",
                "4:",
                "cmp [rsi + 128], rbp",
                "je 5f",
                "mov [rsi + 128], rbp",
                "inc r9",
                "5:",
                "inc qword ptr [rsi + 64]",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "cmp rax, r15",
                "jb 2b",
            ),
            Program::Mcs => code64!(
                "2:",
                "mov qword ptr [rdi], 0",
                "mov qword ptr [rdi + 8], 1",
                "mov rax, rdi",
                "xchg [rsi], rax",
                "test rax, rax",
                "jz 4f",
                "mov [rax], rdi",
                "3:",
                "cmp qword ptr [rdi + 8], 0",
                "je 4f",
                "pause",
                "jmp 3b",
                "4:",
                "cmp [rsi + 128], rbp",
                "je 8f",
                "mov [rsi + 128], rbp",
                "inc r9",
                "8:",
                "cmp qword ptr [rdi], 0",
                "jne 6f",
                "mov rax, rdi",
                "xor edx, edx",
                "lock cmpxchg [rsi], rdx",
                "je 7f",
                "5:",
                "cmp qword ptr [rdi], 0",
                "jne 6f",
                "pause",
                "jmp 5b",
                "6:",
                "mov rax, [rdi]",
                "mov qword ptr [rax + 8], 0",
                "7:",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "cmp rax, r15",
                "jb 2b",
            ),
            Program::Count => code64!(
                "2:",
                "lock inc qword ptr [rdi]",
                "inc r9",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "lea r10, [rax + r14]",
                "3:",
                "cmp rax, r15",
                "jae 9f",
                "cmp rax, r10",
                "jae 2b",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "jmp 3b",
                "9:",
            ),
            Program::Walk => code64!(
                "2:",
                "mov rcx, rdi",
                "lea r10, [rdi + 64 * 4096]",
                "3:",
                "inc qword ptr [rcx]",
                "inc r9",
                "add rcx, 4096",
                "cmp rcx, r10",
                "jb 3b",
                "rdtsc",
                "shl rdx, 32",
                "or rax, rdx",
                "cmp rax, r15",
                "jb 2b",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_fits_a_page() {
        for program in [Program::Exchange, Program::Turn, Program::Wake, Program::Ticket, Program::Mcs] {
            assert!(program.code().len() < 4096, "{program:?}");
        }
    }
}
