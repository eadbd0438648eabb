//! Vector registers of vCPUs: code that fills them, adds to them, and leaves what they hold in the end.
//!
//! | register | holds |
//! |---|---|
//! | rdi | the values to begin with: [`Width::registers`] of [`Width::bytes`] each, and 8 mask registers at [`MASKS`] |
//! | rbx | where the registers go in the end, in the same form |
//! | rsi | a counter on a page that the threads share |
//! | r8 | a place for one register on the same page, of this thread alone |
//! | r12 | turns |
//!
//! In each turn the last register is added to all others in lanes of 64 bits, the first goes to its place in
//! memory and comes back from there, and the counter is incremented; so what was lost or mixed up once shows
//! in the end. Every [`AWAY_EVERY`]th turn leaves the guest.

use vmm::kvm::HostCpu;
use vmm::testing::code64;

/// The code's [`AWAY`](crate::litmus::code::AWAY) comes every so many turns.
pub const AWAY_EVERY: u64 = 16;
/// Where the mask registers are behind the first register, in bytes.
pub const MASKS: usize = 2048;

/// Vector registers, from the narrowest.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Width {
    /// SSE: 16 of 128 bits.
    Xmm,
    /// AVX: 16 of 256 bits.
    Ymm,
    /// AVX-512: 32 of 512 bits, and 8 masks of 64.
    Zmm,
}

impl Width {
    /// Those that guests on this host can use: KVM has a place for them, and the CPU the instructions.
    pub fn all(host: &HostCpu) -> Vec<Width> {
        let state = xcr0(host).unwrap_or(0);
        let avx = state & AVX != 0 && is_x86_feature_detected!("avx2");
        let avx512 = state & AVX512 != 0
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw");
        [Some(Width::Xmm), avx.then_some(Width::Ymm), avx512.then_some(Width::Zmm)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Bytes of a register.
    pub fn bytes(self) -> usize {
        match self {
            Width::Xmm => 16,
            Width::Ymm => 32,
            Width::Zmm => 64,
        }
    }

    /// How many there are.
    pub fn registers(self) -> usize {
        if self == Width::Zmm { 32 } else { 16 }
    }

    /// A thread's code.
    pub fn code(self) -> Vec<u8> {
        let end = code64!("20:", "out 0x80, al", "jmp 20b");
        let code = match self {
            Width::Xmm => code64!(
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "movdqu xmm\\n, [rdi + 16*\\n]",
                ".endr",
                "30:",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14",
                "paddq xmm\\n, xmm15",
                ".endr",
                "movdqu [r8], xmm0",
                "lock inc qword ptr [rsi]",
                "movdqu xmm0, [r8]",
                "test r12b, 15",
                "jnz 31f",
                "out 0x81, al",
                "31:",
                "dec r12",
                "jnz 30b",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "movdqu [rbx + 16*\\n], xmm\\n",
                ".endr",
            ),
            Width::Ymm => code64!(
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "vmovdqu ymm\\n, [rdi + 32*\\n]",
                ".endr",
                "30:",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14",
                "vpaddq ymm\\n, ymm\\n, ymm15",
                ".endr",
                "vmovdqu [r8], ymm0",
                "lock inc qword ptr [rsi]",
                "vmovdqu ymm0, [r8]",
                "test r12b, 15",
                "jnz 31f",
                "out 0x81, al",
                "31:",
                "dec r12",
                "jnz 30b",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "vmovdqu [rbx + 32*\\n], ymm\\n",
                ".endr",
            ),
            Width::Zmm => code64!(
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "vmovdqu64 zmm\\n, [rdi + 64*\\n]",
                ".endr",
                ".irp n,0,1,2,3,4,5,6,7",
                "kmovq k\\n, [rdi + 2048 + 8*\\n]",
                ".endr",
                "30:",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30",
                "vpaddq zmm\\n, zmm\\n, zmm31",
                ".endr",
                "vmovdqu64 [r8], zmm0",
                "lock inc qword ptr [rsi]",
                "vmovdqu64 zmm0, [r8]",
                "test r12b, 15",
                "jnz 31f",
                "out 0x81, al",
                "31:",
                "dec r12",
                "jnz 30b",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
                "vmovdqu64 [rbx + 64*\\n], zmm\\n",
                ".endr",
                ".irp n,0,1,2,3,4,5,6,7",
                "kmovq [rbx + 2048 + 8*\\n], k\\n",
                ".endr",
            ),
        };
        [code, end].concat()
    }
}

const X87_AND_SSE: u64 = 3;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 7 << 5;

/// What a guest on this host can set XCR0 to for all vector registers; `None` where there is no XSAVE. KVM on
/// PVM hides XSAVE itself from guests, but has its registers, and code at CPL 3 runs as it does outside.
pub fn xcr0(host: &HostCpu) -> Option<u64> {
    let [eax, _, _, edx] = leaf(host, 0xd)?;
    let possible = u64::from(edx) << 32 | u64::from(eax);
    let all = |bits: u64| if possible & bits == bits { bits } else { 0 };
    let state = all(X87_AND_SSE) | all(AVX) | if all(AVX) != 0 { all(AVX512) } else { 0 };
    (state & X87_AND_SSE != 0).then_some(state)
}

/// EAX, EBX, ECX, EDX of a CPUID leaf, subleaf 0.
fn leaf(host: &HostCpu, leaf: u32) -> Option<[u32; 4]> {
    let entry = host.cpuid.iter().find(|entry| entry.leaf == leaf && entry.subleaf == 0)?;
    Some([entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// Clears this thread's own vector registers: had the guest's been left in them, they would be lost.
pub fn spoil() {
    if is_x86_feature_detected!("avx") {
        // SAFETY: AVX is there, and all registers that vzeroall clears are named as lost.
        unsafe {
            core::arch::asm!(
                "vzeroall",
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nomem, nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::litmus::guest::CODE_SIZE;

    #[test]
    fn every_code_fits_its_place() {
        for width in [Width::Xmm, Width::Ymm, Width::Zmm] {
            assert!(width.code().len() < CODE_SIZE, "{width:?}: {}", width.code().len());
        }
    }
}
