//! Faults of the emulator that kill kernels, told apart from panics that are somebody else's: stale code and flags that no
//! CPU has.
//!
//! # Stale code
//! A breakpoint that a CPU met although memory no longer held one.
//! Linux patches its own code while other CPUs run it: a breakpoint (`int3`) over the first byte, then the rest, then the
//! first byte, and after each step an interrupt to all CPUs. In QEMU's TCG a store to a page with translated code first
//! drops the translations and then changes memory (`notdirty_write`, then the store: versions 7.2 to 11.1 alike). Another
//! CPU may translate in between: it reads the breakpoint, and nothing ever drops that translation. When the patch is long
//! done its CPUs meet the breakpoint and the kernel dies: `Oops: int3`. The more the emulated CPUs wait for real ones, the
//! likelier. `cargo xtask emulator-check` shows it with a program of its own, without Linux or Gestalt: [`crate::emulator`].
//!
//! What is done about it: emulated hosts keep a virtual machine open ([`crate::keeper`]) and guests start with one CPU
//! ([`crate::machine`]), so that kernels patch themselves while nobody else runs. What is left is named, and such a boot
//! may be repeated on a fresh host; it never counts as passed.
//!
//! # Flags that no CPU has
//! Two guests over two nodes died in or just after a copy, with `EFLAGS: a09a8246` and `a0800682`: bits 22 to 31 of RFLAGS do
//! not exist (SDM volume 1, section 3.4.3). The bits look like a pointer's; QEMU keeps flags as the operands of the last
//! instruction, and may have taken those for flags. That is inferred, and not shown by a program of its own as stale code is.
//! And a kernel prints its flags from its stack, which is the guest's memory.
//!
//! With CPUs on several nodes neither sign clears Gestalt: a page that a node kept too long could look the same.

use std::fmt;

/// Whose kernel ran stale code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// That of the emulated host with this number.
    Host(usize),
    /// The guest's.
    Guest,
}

/// By what an emulator's fault is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// A CPU met a breakpoint that memory does not hold.
    StaleCode,
    /// A CPU had these flags, which no CPU can have.
    Flags(u64),
}

/// One death by a fault of the emulator. In an error's chain it says that the emulator is to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulatorFault {
    /// Whose kernel died.
    pub whose: Whose,
    /// By what it is known.
    pub sign: Sign,
    /// Where, as the kernel prints it: `__schedule+0x432/0x1430`. Behind the breakpoint, if it was one.
    pub at: String,
}

impl fmt::Display for EmulatorFault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = match self.whose {
            Whose::Host(index) => format!("the kernel of emulated host h{index}"),
            Whose::Guest => "the guest's kernel".into(),
        };
        let at = &self.at;
        match self.sign {
            Sign::StaleCode => {
                write!(
                    out,
                    "the emulator ran stale code: {whose} met an int3 at {at} that memory does not hold"
                )
            }
            Sign::Flags(flags) => {
                write!(
                    out,
                    "the emulator broke a CPU's flags: {whose} died at {at} with {flags:#x}, which no CPU has"
                )
            }
        }
    }
}

impl std::error::Error for EmulatorFault {}

/// The bits of RFLAGS that exist.
const FLAGS: u64 = 0x3f_7fd7;

/// What the emulator did to the kernel of which this is the console, and where; `None` if it is not known to be to blame.
pub fn find(console: &str) -> Option<(Sign, String)> {
    stale_code(console).map(|at| (Sign::StaleCode, at)).or_else(|| impossible_flags(console))
}

/// The flags that no CPU has with which a kernel died, and where.
fn impossible_flags(console: &str) -> Option<(Sign, String)> {
    let lines: Vec<&str> = console.lines().skip_while(|line| !line.contains("Oops: ")).collect();
    let after = |mark: &str| lines.iter().find_map(|line| Some(line.split_once(mark)?.1.trim()));
    let flags = u64::from_str_radix(after("EFLAGS: ")?, 16).ok()?;
    let at = after("RIP: ")?.split_once(':')?.1;
    (flags & !FLAGS != 0).then(|| (Sign::Flags(flags), at.to_owned()))
}

/// Where a kernel, of which this is the console, died of an int3 that memory does not hold; `None` if it did not, or if
/// the bytes in memory were not printed or do show one.
fn stale_code(console: &str) -> Option<String> {
    let mut lines = console.lines().skip_while(|line| !line.contains("Oops: int3"));
    lines.next()?;
    // Of this oops, not of one that follows.
    let lines: Vec<&str> = lines.take_while(|line| !line.contains("Oops: ")).collect();
    let after = |mark: &str| lines.iter().find_map(|line| Some(line.split_once(mark)?.1.trim()));
    let at = after("RIP: ")?.split_once(':')?.1;
    let code: Vec<&str> = after("Code: ")?.split_whitespace().collect();
    // The byte in brackets is the one that would have come next.
    let next = code.iter().position(|byte| byte.starts_with('<'))?;
    let met = code.get(next.checked_sub(1)?)?;
    let held = *met == "cc" || code[next] == "<cc>";
    (!held).then(|| at.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux 6.12 prints, shortened.
    fn oops(code: &str) -> String {
        format!(
            "[    1.250000] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\r\n\
             [    1.250000] CPU: 1 UID: 0 PID: 0 Comm: swapper/1 Not tainted 6.12.117+deb13-cloud-amd64\r\n\
             [    1.250000] RIP: 0010:sched_clock_cpu+0x9/0xd0\r\n\
             [    1.250000] Code: {code}\r\n\
             [    1.250000] RSP: 0018:ffffa5e1400a3ec8 EFLAGS: 00000046\r\n"
        )
    }

    #[test]
    fn an_int3_that_memory_does_not_hold_is_stale_code() {
        let at = Some((Sign::StaleCode, "sched_clock_cpu+0x9/0xd0".to_owned()));
        assert_eq!(find(&oops("90 90 f3 0f 1e fa eb <12> 66 90 48")), at);
        assert_eq!(find(&format!("Linux version 6.12\n{}", oops("66 <90> 48"))), at);
    }

    #[test]
    fn an_int3_in_memory_is_somebodys() {
        assert_eq!(find(&oops("90 90 cc <12> 66 90 48")), None);
        assert_eq!(find(&oops("90 90 48 <cc> 66 90 48")), None);
    }

    #[test]
    fn what_does_not_show_memory_is_no_proof() {
        for code in ["", "Unable to access opcode bytes at 0x12.", "<12> 66", "12 66"] {
            assert_eq!(find(&oops(code)), None, "{code}");
        }
        assert_eq!(find("Oops: int3"), None);
    }

    #[test]
    fn other_panics_are_not_taken_for_it() {
        assert_eq!(find(&oops("eb <12>").replace("int3", "general protection fault")), None);
        let other = "Oops: int3: 0000\nOops: 0002 [#2]\nRIP: 0010:f+0x1/0x2\nCode: 90 <90>";
        assert_eq!(find(other), None);
    }

    #[test]
    fn flags_that_no_cpu_has_are_the_emulators() {
        let oops = |flags| {
            format!(
                "[    2.1] RSP: 0018:ffff EFLAGS: ffffffff\r\n\
                 [   37.8] Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI\r\n\
                 [   37.9] RIP: 0010:prepare_creds+0x62/0x280\r\n\
                 [   37.9] RSP: 0018:ffffd02c801a3c40 EFLAGS: {flags}\r\n\
                 [   39.2] RSP: 0018:ffffd02c801a3c40 EFLAGS: a0800682\r\n"
            )
        };
        let at = "prepare_creds+0x62/0x280".to_owned();
        assert_eq!(find(&oops("a0800682")), Some((Sign::Flags(0xa080_0682), at)));
        for possible in ["00010286", "00000046", "003f7fd7", "what"] {
            assert_eq!(find(&oops(possible)), None, "{possible}");
        }
        assert_eq!(find("RSP: 0018:ffffd02c801a3c40 EFLAGS: a0800682"), None);
    }

    #[test]
    fn the_message_names_the_emulator_and_the_kernel() {
        let of = |whose| EmulatorFault { whose, sign: Sign::StaleCode, at: "f+0x1/0x2".into() }.to_string();
        assert!(
            of(Whose::Host(1)).starts_with("the emulator ran stale code: the kernel of emulated host h1 ")
        );
        assert!(of(Whose::Guest).contains("the guest's kernel met an int3 at f+0x1/0x2"));
    }
}
