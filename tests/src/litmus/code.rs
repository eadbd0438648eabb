//! The tests' machine code: 64-bit, for CPL 3 with IOPL 3.
//!
//! | register | holds |
//! |---|---|
//! | rbp | the thread's orders |
//! | rsi, rdi | address of this iteration's `x` and `y` |
//! | rbx | where this iteration's results go, 4 bytes |
//! | r11 | from one iteration's variables to the next's, in bytes |
//! | r12 | iterations left |
//! | r13, r14 | when the iteration begins, and the time between two, in ticks |
//! | r15 | random state |
//! | cl | 64 minus the bits of a random delay, in ticks |

use kvm_bindings::kvm_regs;

use super::catalogue::{Access, Var, Variant};
use crate::code64;

/// The port to which a thread writes when it has done its iterations.
pub const DONE: u16 = 0x80;
/// The port from which it reads whether it has orders; the read takes until it has.
pub const ORDERS: u16 = 0x84;

/// What a thread runs until it has orders, which are at the address in RSI: see [`orders`].
pub fn waiter() -> &'static [u8] {
    code64!(
        "mov rbp, rsi",
        "20:",
        "in eax, 0x84",
        "test eax, eax",
        "jz 20b",
        "mov rsi, [rbp]",
        "mov rdi, [rbp + 8]",
        "mov rbx, [rbp + 16]",
        "mov rcx, [rbp + 24]",
        "mov r11, [rbp + 32]",
        "mov r12, [rbp + 40]",
        "mov r13, [rbp + 48]",
        "mov r14, [rbp + 56]",
        "mov r15, [rbp + 64]",
        "mov r8, [rbp + 72]",
        "jmp [rbp + 80]",
    )
}

/// Orders: registers to begin with, where, and where to wait for the next; the waiter's address is that of its first
/// instruction.
pub fn orders(regs: &kvm_regs, rip: u64, waiter: u64) -> [u64; 12] {
    // Past `mov rbp, rsi`.
    let again = waiter + code64!("mov rbp, rsi").len() as u64;
    let r = regs;
    [r.rsi, r.rdi, r.rbx, r.rcx, r.r11, r.r12, r.r13, r.r14, r.r15, r.r8, rip, again]
}

/// Says that it is done, and waits for more.
fn done() -> &'static [u8] {
    code64!("out 0x80, al", "jmp [rbp + 88]")
}

/// Draws a random delay of 64 - cl bits into r10.
fn draw() -> &'static [u8] {
    code64!(
        "mov rax, 6364136223846793005",
        "imul r15, rax",
        "add r15, 1442695041",
        "mov r10, r15",
        "shr r10, cl",
    )
}

/// Spins until the time stamp counter is r10.
fn wait() -> &'static [u8] {
    code64!("20:", "rdtsc", "shl rdx, 32", "or rax, rdx", "cmp rax, r10", "jb 20b")
}

/// Waits until the iteration's time, and a random while longer.
fn begin() -> Vec<u8> {
    let clear = code64!("xor r8d, r8d", "xor r9d, r9d");
    [draw(), code64!("add r10, r13"), wait(), clear].concat()
}

/// Waits for a random while.
fn pause() -> Vec<u8> {
    [draw(), code64!("rdtsc", "shl rdx, 32", "or rax, rdx", "add r10, rax"), wait()].concat()
}

/// Keeps the results and goes on to the next iteration's variables.
fn end() -> &'static [u8] {
    code64!(
        "shl r9d, 8",
        "or r8d, r9d",
        "mov [rbx], r8d",
        "add rbx, 4",
        "add rsi, r11",
        "add rdi, r11",
        "add r13, r14",
        "dec r12",
    )
}

fn access(access: Access, variant: Variant, loads: &mut usize) -> Vec<u8> {
    let pick = |var, x: &'static [u8], y: &'static [u8]| if var == Var::X { x } else { y };
    match access {
        Access::R(var) => {
            *loads += 1;
            match loads {
                1 => pick(var, code64!("mov r8d, [rsi]"), code64!("mov r8d, [rdi]")).to_vec(),
                _ => pick(var, code64!("mov r9d, [rsi]"), code64!("mov r9d, [rdi]")).to_vec(),
            }
        }
        Access::W(var, value) if variant == Variant::Locked => {
            let exchange = pick(var, code64!("xchg [rsi], eax"), code64!("xchg [rdi], eax"));
            // mov eax, imm32
            [&[0xb8, value, 0, 0, 0], exchange].concat()
        }
        Access::W(var, value) => {
            // mov dword [rsi], imm32; mov dword [rdi], imm32
            let store: &[u8] = pick(var, &[0xc7, 0x06], &[0xc7, 0x07]);
            [store, &[value, 0, 0, 0]].concat()
        }
    }
}

/// The code of a thread that makes these accesses in every iteration. It runs at any address. With `pauses` it
/// waits for a random while between two accesses: nodes take so long to pass a page on that they would else
/// never meet within an iteration.
pub fn thread(accesses: &[Access], variant: Variant, pauses: bool) -> Vec<u8> {
    let mut code = begin();
    let mut loads = 0;
    for (i, &a) in accesses.iter().enumerate() {
        if i > 0 && pauses {
            code.extend(pause());
        }
        if i > 0 && variant == Variant::Fenced {
            code.extend_from_slice(code64!("mfence"));
        }
        code.extend(access(a, variant, &mut loads));
    }
    code.extend_from_slice(end());
    // jnz to the beginning: the displacement counts from the end of the instruction, which has 6 bytes.
    let back = -(code.len() as i32 + 6);
    code.extend_from_slice(&[0x0f, 0x85]);
    code.extend_from_slice(&back.to_le_bytes());
    code.extend_from_slice(done());
    code
}

/// The code of a thread that increments the counter at rsi until it is r12, and then leaves at rbx how often it
/// did.
pub fn counter() -> Vec<u8> {
    let count = code64!("30:", "mov eax, 1", "lock xadd [rsi], rax", "inc r8", "cmp rax, r12", "jb 30b");
    [count, code64!("mov [rbx], r8"), done()].concat()
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::ALL;
    use super::*;

    #[test]
    fn every_thread_fits_its_place_and_variants_differ() {
        for test in ALL {
            for accesses in test.threads {
                let slow = thread(accesses, Variant::Fenced, true);
                assert!(slow.len() < super::super::guest::CODE_SIZE);
                let plain = thread(accesses, Variant::Plain, false);
                let fenced = thread(accesses, Variant::Fenced, false);
                assert_eq!(fenced.len(), plain.len() + 3 * (accesses.len() - 1));
            }
        }
    }
}
