//! The tests' machine code: 64-bit, for CPL 3 with IOPL 3.
//!
//! | register | holds |
//! |---|---|
//! | rsi, rdi | address of this iteration's `x` and `y` |
//! | rbx | where this iteration's results go, 4 bytes |
//! | r11 | from one iteration's variables to the next's, in bytes |
//! | r12 | iterations left |
//! | r13, r14 | when the iteration begins, and the time between two, in ticks |
//! | r15 | random state |
//! | cl | 64 minus the bits of a random delay, in ticks |

use vmm::testing::code64;

use super::catalogue::{Access, Var, Variant};

/// The port to which a thread writes when it has done its iterations.
pub const DONE: u16 = 0x80;

/// A port to which a thread writes to leave the guest and come back.
pub const AWAY: u16 = 0x81;

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

/// The code of a thread that makes these accesses in every iteration. It runs at any address. With `pauses`
/// it waits for a random while between two accesses: nodes take so long to pass a page on that they would
/// else never meet within an iteration.
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
    // Done. The host sets the registers again before the vCPU goes on.
    code.extend_from_slice(code64!("20:", "out 0x80, al", "jmp 20b"));
    code
}

/// The code of a thread that increments the counter at rsi until it is r12, and then leaves at rbx how often
/// it did.
pub fn counter() -> Vec<u8> {
    let count = code64!("30:", "mov eax, 1", "lock xadd [rsi], rax", "inc r8", "cmp rax, r12", "jb 30b");
    [count, code64!("mov [rbx], r8"), code64!("20:", "out 0x80, al", "jmp 20b")].concat()
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
