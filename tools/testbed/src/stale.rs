//! Stale code: a breakpoint that a CPU met although memory no longer held one. A fault of the emulator, told
//! apart from panics that are somebody else's.
//!
//! Linux patches its own code while other CPUs run it: a breakpoint (`int3`) over the first byte, then the
//! rest, then the first byte, and after each step an interrupt to all CPUs. In QEMU's TCG a store to a page
//! with translated code first drops the translations and then changes memory (`notdirty_write`, then the
//! store: versions 7.2 to 11.1 alike). Another CPU may translate in between: it reads the breakpoint, and
//! nothing ever drops that translation. When the patch is long done its CPUs meet the breakpoint and the
//! kernel dies: `Oops: int3`. The more the emulated CPUs wait for real ones, the likelier. `cargo xtask
//! emulator-check` shows it with a program of its own, without Linux or Gestalt: [`crate::emulator`].
//!
//! What is done about it: emulated hosts keep a virtual machine open ([`crate::keeper`]) and guests start
//! with one CPU ([`crate::machine`]), so that kernels patch themselves while nobody else runs. What is left
//! is named, and such a boot may be repeated on a fresh host; it never counts as passed.

use std::fmt;

/// Whose kernel ran stale code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// That of the emulated host with this number.
    Host(usize),
    /// The guest's.
    Guest,
}

/// One death by stale code. In an error's chain it says that the emulator is to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleCode {
    /// Whose kernel died.
    pub whose: Whose,
    /// The instruction behind the breakpoint, as the kernel prints it: `__schedule+0x432/0x1430`.
    pub at: String,
}

impl fmt::Display for StaleCode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = match self.whose {
            Whose::Host(index) => format!("the kernel of emulated host h{index}"),
            Whose::Guest => "the guest's kernel".into(),
        };
        write!(
            out,
            "the emulator ran stale code: {whose} met an int3 at {} that memory does not hold",
            self.at
        )
    }
}

impl std::error::Error for StaleCode {}

/// Where a kernel, of which this is the console, died of an int3 that memory does not hold; `None` if it did
/// not, or if the bytes in memory were not printed or do show one.
pub fn find(console: &str) -> Option<String> {
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
        let at = Some("sched_clock_cpu+0x9/0xd0".to_owned());
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
    fn the_message_names_the_emulator_and_the_kernel() {
        let of = |whose| StaleCode { whose, at: "f+0x1/0x2".into() }.to_string();
        assert!(
            of(Whose::Host(1)).starts_with("the emulator ran stale code: the kernel of emulated host h1 ")
        );
        assert!(of(Whose::Guest).contains("the guest's kernel met an int3 at f+0x1/0x2"));
    }
}
