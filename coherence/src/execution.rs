//! Execution of an operation on a frame, as one instruction of this CPU.
//!
//! It is atomic with every other CPU's accesses to the same frame, through whatever mapping: this is what an
//! owner's shard does for an instruction that was shipped to it.

use std::arch::asm;

use crate::page::PAGE_SIZE;
use crate::protocol::{Action, Operation, Width};

/// Carries the operation out on the frame, and tells what the bytes were before; 0 of a store, which does not
/// read them.
///
/// A load and a store are one `mov`; exchange, compare-exchange and add are one `xchg`, `lock cmpxchg` and
/// `lock xadd`. The others have no instruction that tells the old value: they are a `lock cmpxchg` that is
/// repeated while other CPUs change the bytes between its load and itself, each time because one of them got
/// on. Not core's atomics, which would be the same instructions, since those must be aligned to their width:
/// an x86 guest's need not be. Bytes that cross a cache line are operated on correctly too, but as split
/// locks, which a host may punish: the requester does not ask for them.
///
/// # Safety
/// `frame` is the address of a page that can be read, and written unless the action is [`Action::Load`], for
/// the duration of the call. Others may read and write it at the same time, but none through a Rust
/// reference.
pub unsafe fn execute(frame: *mut [u8; PAGE_SIZE], operation: &Operation) -> u128 {
    // SAFETY: inside the page, which `Operation::new` has checked.
    let at = unsafe { frame.cast::<u8>().add(usize::from(operation.offset())) };
    // SAFETY: `at` and the bytes of the width after it are in the page, and 16 bytes are aligned, which
    // `Operation::new` has checked; the rest is the caller's promise.
    unsafe {
        match operation.width() {
            Width::One => byte(at, operation).into(),
            Width::Two => word(at, operation).into(),
            Width::Four => double(at, operation).into(),
            Width::Eight => quad(at, operation).into(),
            Width::Sixteen => compare_exchange_sixteen(at, operation),
        }
    }
}

/// The instructions for one width: its integer, the size as the assembler calls it, the class and the name of
/// its registers, the accumulator.
macro_rules! instructions {
    ($name:ident, $integer:ty, $size:literal, $class:ident, $register:literal, $accumulator:tt) => {
        /// # Safety
        /// As [`execute`]'s, for the bytes from `at` on.
        unsafe fn $name(at: *mut u8, operation: &Operation) -> $integer {
            let operand = operation.operand() as $integer;
            let compare_exchange = |expected: $integer, new: $integer| {
                let old: $integer;
                // SAFETY: by the contract above.
                unsafe {
                    asm!(
                        concat!("lock cmpxchg ", $size, " ptr [{at}], ", $register),
                        at = in(reg) at, value = in($class) new, inout($accumulator) expected => old,
                        options(nostack)
                    );
                }
                old
            };
            let load = || {
                let old: $integer;
                // SAFETY: by the contract above.
                unsafe {
                    asm!(
                        concat!("mov ", $register, ", ", $size, " ptr [{at}]"),
                        at = in(reg) at, value = out($class) old,
                        options(nostack, preserves_flags, readonly)
                    );
                }
                old
            };
            let update = |new: &dyn Fn($integer) -> $integer| {
                let mut old = load();
                loop {
                    let seen = compare_exchange(old, new(old));
                    if seen == old {
                        return old;
                    }
                    old = seen;
                }
            };
            match operation.action() {
                Action::Load => load(),
                Action::Store => {
                    // SAFETY: by the contract above.
                    unsafe {
                        asm!(
                            concat!("mov ", $size, " ptr [{at}], ", $register),
                            at = in(reg) at, value = in($class) operand,
                            options(nostack, preserves_flags)
                        );
                    }
                    0
                }
                Action::Exchange => {
                    let old: $integer;
                    // SAFETY: by the contract above.
                    unsafe {
                        asm!(
                            concat!("xchg ", $size, " ptr [{at}], ", $register),
                            at = in(reg) at, value = inout($class) operand => old,
                            options(nostack, preserves_flags)
                        );
                    }
                    old
                }
                Action::Add => {
                    let old: $integer;
                    // SAFETY: by the contract above.
                    unsafe {
                        asm!(
                            concat!("lock xadd ", $size, " ptr [{at}], ", $register),
                            at = in(reg) at, value = inout($class) operand => old,
                            options(nostack)
                        );
                    }
                    old
                }
                Action::CompareExchange => compare_exchange(operation.expected() as $integer, operand),
                Action::And => update(&|old| old & operand),
                Action::Or => update(&|old| old | operand),
                Action::Xor => update(&|old| old ^ operand),
                Action::Negate => update(&|old: $integer| old.wrapping_neg()),
            }
        }
    };
}

instructions!(byte, u8, "byte", reg_byte, "{value}", "al");
instructions!(word, u16, "word", reg, "{value:x}", "ax");
instructions!(double, u32, "dword", reg, "{value:e}", "eax");
instructions!(quad, u64, "qword", reg, "{value:r}", "rax");

/// # Safety
/// As [`execute`]'s, for the 16 bytes from `at` on, which are aligned.
unsafe fn compare_exchange_sixteen(at: *mut u8, operation: &Operation) -> u128 {
    let (mut low, mut high) = (operation.expected() as u64, (operation.expected() >> 64) as u64);
    // SAFETY: by the contract above. The compiler keeps RBX for itself: it is given back as it was.
    unsafe {
        asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b xmmword ptr [rdi]",
            "mov rbx, rsi",
            in("rdi") at, inout("rsi") operation.operand() as u64 => _, in("rcx") (operation.operand() >> 64) as u64,
            inout("rax") low, inout("rdx") high,
            options(nostack)
        );
    }
    u128::from(low) | u128::from(high) << 64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::DualMemory;
    use crate::page::Page;

    /// Any operation, of which one in four crosses a cache line, where it may, and one in eight ends with the
    /// page.
    fn possible() -> impl Strategy<Value = Operation> {
        let offset = prop_oneof![4 => 0..PAGE_SIZE as u16, 2 => (1..64u16).prop_map(|n| 64 * n - 1), 1 => Just(PAGE_SIZE as u16)];
        let number = || prop_oneof![any::<u128>(), 0..4u128, Just(u128::MAX), Just(1 << 63)];
        (0..9usize, 0..5, offset, number(), number()).prop_map(
            |(action, width, offset, operand, expected)| {
                let width = Width::of(1usize << width).unwrap();
                let (action, alignment) = match width {
                    Width::Sixteen => (Action::CompareExchange, 16),
                    _ => (Action::ALL[action], 1),
                };
                let offset = offset.min((PAGE_SIZE - width.bytes()) as u16) / alignment * alignment;
                let operand =
                    if matches!(action, Action::Load | Action::Negate) { 0 } else { operand & width.mask() };
                let expected = if action == Action::CompareExchange { expected & width.mask() } else { 0 };
                Operation::new(action, width, offset, operand, expected).unwrap()
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn the_cpu_does_what_the_result_says(
            operation in possible(), old in any::<u128>(), as_expected in any::<bool>(), around in any::<u8>(),
        ) {
            let (start, width) = (usize::from(operation.offset()), operation.width().bytes());
            let old = if as_expected { operation.expected() } else { old & operation.width().mask() };
            let mut page = [around; PAGE_SIZE];
            page[start..start + width].copy_from_slice(&old.to_le_bytes()[..width]);
            let memory = DualMemory::new(3).unwrap();
            memory.overwrite(Page(1), &page);
            let told = if operation.action() == Action::Store { 0 } else { old };
            prop_assert_eq!(memory.operate(Page(1), &operation), told);
            let new = operation.result(old).unwrap_or(old);
            page[start..start + width].copy_from_slice(&new.to_le_bytes()[..width]);
            prop_assert!(memory.read(Page(1)) == page, "other bytes than the operand's changed, or not as told");
            prop_assert_eq!(memory.read(Page(0)), [0; PAGE_SIZE]);
            prop_assert_eq!(memory.read(Page(2)), [0; PAGE_SIZE]);
        }
    }

    /// Two threads, one through each view, each of them with its own bits of the same bytes.
    #[test]
    fn operations_through_one_view_are_atomic_with_instructions_through_the_other() {
        use std::sync::atomic::{AtomicU64, Ordering};
        const TIMES: u64 = 200_000;
        let memory = DualMemory::new(1).unwrap();
        // SAFETY: aligned, inside the guest view, which lives as long as `memory`, and only accessed
        // atomically.
        let word = unsafe { AtomicU64::from_ptr(memory.guest_view().add(64).cast()) };
        let operation = |action, operand| Operation::new(action, Width::Eight, 64, operand, 0).unwrap();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for _ in 0..TIMES {
                    word.fetch_add(1 << 32, Ordering::Relaxed);
                }
            });
            for n in 0..TIMES {
                memory.operate(Page(0), &operation(Action::Add, 2));
                let bit = operation(if n % 2 == 0 { Action::Or } else { Action::Xor }, 1);
                assert_eq!(memory.operate(Page(0), &bit) & 1, u128::from(n % 2 != 0));
            }
        });
        assert_eq!(word.load(Ordering::Relaxed), TIMES << 32 | TIMES << 1);
    }
}
