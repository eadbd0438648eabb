//! What is said of a vCPU that cannot go on, or that somebody asks about.

use std::fmt::Write;

use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::kvm::{Exit, Vcpu};

/// A vCPU that cannot go on: the machine ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {vcpu} cannot go on: {why}")]
pub struct VcpuFailure {
    /// Its number in the machine.
    pub vcpu: u32,
    /// What happened and what it hints at, as a clause.
    pub why: String,
    /// Registers and last exits, many lines.
    pub dump: String,
}

/// How many exits are remembered.
pub(super) const REMEMBERED: usize = 16;

/// The last exits of a vCPU.
#[derive(Debug, Default)]
pub(super) struct LastExits {
    ring: [Option<Exit>; REMEMBERED],
    next: usize,
}

impl LastExits {
    pub(super) fn push(&mut self, exit: Exit) {
        self.ring[self.next % REMEMBERED] = Some(exit);
        self.next = self.next.wrapping_add(1);
    }

    fn oldest_first(&self) -> impl Iterator<Item = &Exit> {
        (0..REMEMBERED).filter_map(move |i| self.ring[(self.next + i) % REMEMBERED].as_ref())
    }
}

/// Why an exit ends the machine.
pub(super) fn reason(exit: &Exit, vcpu: &mut Vcpu) -> String {
    match *exit {
        Exit::Shutdown => "it ran into a triple fault (an exception while delivering a double fault)".into(),
        Exit::FailEntry { reason } => {
            format!(
                "the CPU refused to enter the guest (hardware reason {reason:#x}): its register state is invalid"
            )
        }
        Exit::InternalError { suberror } => {
            let data = vcpu.internal_error_data();
            let what = match suberror {
                1 => "it cannot emulate an instruction",
                2 => "exceptions came on top of each other",
                3 => "an exit came while an event was being delivered",
                4 => "an exit came that it does not know",
                _ => "of an unknown kind",
            };
            format!("KVM reports internal error {suberror} ({what}), data {data:x?}")
        }
        Exit::SystemEvent { kind } => format!("the guest raised KVM system event {kind}"),
        ref other => format!("it left the guest for an unknown reason, {}", other.reason()),
    }
}

/// Registers and last exits of a vCPU, for the operator.
pub(super) fn dump(vcpu: &mut Vcpu, name: &str, state: &str, last: &LastExits) -> String {
    let mut text = format!("{name} ({state})\n");
    // Writing to a String cannot fail.
    match vcpu.regs() {
        Ok(r) => {
            let _ = writeln!(text, "  rip {:016x} rflags {:08x}", r.rip, r.rflags);
            let _ = writeln!(
                text,
                "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
                r.rax, r.rbx, r.rcx, r.rdx
            );
            let _ = writeln!(
                text,
                "  rsi {:016x} rdi {:016x} rsp {:016x} rbp {:016x}",
                r.rsi, r.rdi, r.rsp, r.rbp
            );
            let _ =
                writeln!(text, "  r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}", r.r8, r.r9, r.r10, r.r11);
            let _ = writeln!(
                text,
                "  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}",
                r.r12, r.r13, r.r14, r.r15
            );
        }
        Err(error) => {
            let _ = writeln!(text, "  no registers: {error}");
        }
    }
    match vcpu.sregs() {
        Ok(s) => {
            for (name, segment) in [
                ("cs", s.cs),
                ("ds", s.ds),
                ("es", s.es),
                ("fs", s.fs),
                ("gs", s.gs),
                ("ss", s.ss),
                ("tr", s.tr),
            ] {
                write_segment(&mut text, name, &segment);
            }
            write_table(&mut text, "gdt", &s.gdt);
            write_table(&mut text, "idt", &s.idt);
            let _ = writeln!(
                text,
                "  cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} cr8 {:x} efer {:x} apic_base {:x}",
                s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base
            );
        }
        Err(error) => {
            let _ = writeln!(text, "  no system registers: {error}");
        }
    }
    if let Ok(events) = vcpu.events() {
        let _ = writeln!(text, "  events {:?} {:?} {:?}", events.exception, events.interrupt, events.nmi);
    }
    let _ = writeln!(text, "  last exits, oldest first:");
    for exit in last.oldest_first() {
        let _ = writeln!(text, "    {exit:x?}");
    }
    text
}

fn write_segment(text: &mut String, name: &str, s: &kvm_segment) {
    let _ = writeln!(
        text,
        "  {name} {:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} p {} l {} db {} g {}",
        s.selector, s.base, s.limit, s.type_, s.s, s.dpl, s.present, s.l, s.db, s.g
    );
}

fn write_table(text: &mut String, name: &str, table: &kvm_dtable) {
    let _ = writeln!(text, "  {name} base {:016x} limit {:04x}", table.base, table.limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_exits_are_remembered_in_order() {
        let mut last = LastExits::default();
        for reason in 0..REMEMBERED as u32 + 5 {
            last.push(Exit::Other(reason));
        }
        let seen: Vec<_> = last.oldest_first().copied().collect();
        let wanted: Vec<_> = (5..REMEMBERED as u32 + 5).map(Exit::Other).collect();
        assert_eq!(seen, wanted);
    }
}
