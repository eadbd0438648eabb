//! What micro guests have in common, for tests and benches of this and other crates: their code in assembler,
//! and the host that they run on. How one begins at CPL 3 is [`crate::vcpu::user_mode`]'s. All of this is
//! there only with the feature `testing`.

use crate::kvm::{HostCpu, caps};
pub use crate::{code16, code64};

/// The bytes of 16-bit code in Intel syntax, which run at any address. Labels are numbers of two digits or
/// more, used as `20b`, `20f`.
#[macro_export]
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
#[macro_export]
macro_rules! code64 {
    ($($line:expr),+ $(,)?) => {
        $crate::code16!(".code64", $($line),+)
    };
}

/// Puts `value` in the place of 0x12345678, which the code has once.
///
/// # Panics
/// It does not have it.
pub fn patch(code: &mut [u8], value: u32) {
    let at = code.windows(4).position(|bytes| bytes == 0x1234_5678u32.to_le_bytes());
    let at = at.expect("the code has no place for the value");
    code[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// This host, if guests can run on it.
///
/// # Errors
/// Why they cannot.
pub fn host() -> Result<HostCpu, String> {
    let kvm = caps::open().map_err(|error| error.to_string())?;
    caps::check(&kvm).map_err(|error| error.to_string())?;
    HostCpu::probe(&kvm).map_err(|error| error.to_string())
}
