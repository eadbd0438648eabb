//! Leaf 0xd, and features that need the register state it describes (SDM volume 1, chapter 13).

use super::Table;

const SSE: u64 = 1 << 0 | 1 << 1;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 1 << 5 | 1 << 6 | 1 << 7;
const PKRU: u64 = 1 << 9;
const AMX: u64 = 1 << 17 | 1 << 18;
/// Components that the guest may have in XCR0; the two of MPX are not among them.
const USER: u64 = SSE | AVX | AVX512 | PKRU | AMX;
/// Components that the guest may have in IA32_XSS: CET's two. Processor trace, PASID, UINTR, LBR are off.
const SUPERVISOR: u64 = 1 << 11 | 1 << 12;
/// XSAVE's legacy area and header: what the first two components take.
const LEGACY_LEN: u32 = 512 + 64;
/// Leaf 1 ECX.
const XSAVE: u32 = 1 << 26;

/// Features that go when their state component does: leaf, subleaf, and masks for EAX, EBX, ECX, EDX.
type Dependents = &'static [(u32, u32, [u32; 4])];

const NEED_AVX: Dependents = &[
    // FMA, AVX, F16C
    (1, 0, [0, 0, 1 << 12 | 1 << 28 | 1 << 29, 0]),
    // AVX2; VAES, VPCLMULQDQ
    (7, 0, [0, 1 << 5, 1 << 9 | 1 << 10, 0]),
    // SHA512, SM3, SM4, AVX-VNNI, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16
    (7, 1, [1 << 0 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 23, 0, 0, 1 << 4 | 1 << 5 | 1 << 10]),
    // XOP, FMA4
    (0x8000_0001, 0, [0, 0, 1 << 11 | 1 << 16, 0]),
];

const NEED_AVX512: Dependents = &[
    (
        7,
        0,
        [
            0,
            // F, DQ, IFMA, PF, ER, CD, BW, VL
            1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31,
            // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
            1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14,
            // 4VNNIW, 4FMAPS, VP2INTERSECT, FP16
            1 << 2 | 1 << 3 | 1 << 8 | 1 << 23,
        ],
    ),
    // BF16
    (7, 1, [1 << 5, 0, 0, 0]),
];

const NEED_PKRU: Dependents = &[(7, 0, [0, 0, 1 << 3, 0])];

const NEED_AMX: Dependents = &[
    // BF16, TILE, INT8
    (7, 0, [0, 0, 0, 1 << 22 | 1 << 24 | 1 << 25]),
    // FP16; COMPLEX
    (7, 1, [1 << 21, 0, 0, 1 << 8]),
];

/// Makes leaf 0xd and the features that depend on it agree.
pub(super) fn settle(table: &mut Table) {
    let has_xsave = table.get(1, 0).is_some_and(|entry| entry.ecx & XSAVE != 0);
    let (mut xcr0, mut xss) = (0, 0);
    if has_xsave {
        xcr0 = table.get(0xd, 0).map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax)) & USER;
        xss = table.get(0xd, 1).map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.ecx))
            & SUPERVISOR;
    }
    // Only components whose place is known and alike on all nodes; the first two have theirs by definition.
    let described = |bit: &u32| table.get(0xd, *bit).is_some();
    let known = (2..63).filter(described).fold(SSE, |known, bit| known | 1 << bit);
    (xcr0, xss) = (xcr0 & known, xss & known);
    if table.get(0x1d, 1).is_none() || table.get(0x1e, 0).is_none() {
        xcr0 &= !AMX;
    }
    for (whole, needs) in [(AVX, AVX), (AVX512, AVX512 | AVX), (PKRU, PKRU), (AMX, AMX)] {
        if xcr0 & needs != needs {
            xcr0 &= !whole;
        }
    }

    for (component, dependents) in
        [(AVX, NEED_AVX), (AVX512, NEED_AVX512), (PKRU, NEED_PKRU), (AMX, NEED_AMX)]
    {
        if xcr0 & component == 0 {
            clear(table, dependents);
        }
    }
    if xcr0 & AMX == 0 {
        table.remove(0x1d);
        table.remove(0x1e);
    }
    if !has_xsave {
        table.remove(0xd);
        return;
    }

    let end = |bit: &u32| table.get(0xd, *bit).map_or(0, |entry| entry.ebx.saturating_add(entry.eax));
    let size =
        (2..63).filter(|bit| xcr0 >> bit & 1 == 1).map(|bit| end(&bit)).max().unwrap_or(0).max(LEGACY_LEN);
    let main = table.entry(0xd, 0);
    (main.eax, main.edx) = (xcr0 as u32, (xcr0 >> 32) as u32);
    // EBX is the size for what the guest has enabled: KVM keeps it, starting from x87 and SSE.
    (main.ebx, main.ecx) = (LEGACY_LEN, size);
    if let Some(more) = table.get_mut(0xd, 1) {
        (more.ebx, more.ecx, more.edx) = (0, xss as u32, (xss >> 32) as u32);
    }
    let kept = xcr0 | xss;
    table.entries.retain(|entry| {
        entry.leaf != 0xd || entry.subleaf < 2 || entry.subleaf < 63 && kept >> entry.subleaf & 1 == 1
    });
}

fn clear(table: &mut Table, dependents: Dependents) {
    for (leaf, subleaf, [eax, ebx, ecx, edx]) in dependents {
        if let Some(entry) = table.get_mut(*leaf, *subleaf) {
            entry.eax &= !eax;
            entry.ebx &= !ebx;
            entry.ecx &= !ecx;
            entry.edx &= !edx;
        }
    }
}
