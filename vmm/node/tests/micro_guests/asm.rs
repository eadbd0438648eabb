//! Guest code in assembler, as bytes.

/// The bytes of 16-bit code in Intel syntax. Labels are numbers of two digits or more, used as `20b`, `20f`;
/// the code runs at any address, and `.org`-like layout is by [`super::harness::Guest::load`].
macro_rules! code16 {
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
                ".code16",
                $($line,)+
                ".code64",
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

/// The bytes of 64-bit code, likewise.
macro_rules! code64 {
    ($($line:expr),+ $(,)?) => {
        $crate::asm::code16!(".code64", $($line),+)
    };
}

pub(crate) use {code16, code64};
