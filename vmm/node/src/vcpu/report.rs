//! The report on a vCPU that cannot go on, or that somebody asks about.

use std::fmt::Write;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};

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

/// The last exits of a vCPU, and its registers then, where KVM tells them.
#[derive(Debug, Default)]
pub(super) struct LastExits {
    ring: [Option<(Exit, Option<u64>)>; REMEMBERED],
    next: usize,
    /// At the last exit and at the one before.
    regs: [Option<kvm_regs>; 2],
}

impl LastExits {
    pub(super) fn push(&mut self, exit: Exit, regs: Option<kvm_regs>) {
        self.ring[self.next % REMEMBERED] = Some((exit, regs.map(|regs| regs.rip)));
        self.next = self.next.wrapping_add(1);
        self.regs = [regs, self.regs[0]];
    }

    fn oldest_first(&self) -> impl Iterator<Item = &(Exit, Option<u64>)> {
        (0..REMEMBERED).filter_map(move |i| self.ring[(self.next + i) % REMEMBERED].as_ref())
    }

    /// The registers at the exit before the last, if that was a triple fault: on AMD CPUs nothing is left of
    /// those that led to it (APM vol. 2, 15.14.3), and KVM shows a CPU after reset.
    fn before_shutdown(&self) -> Option<&kvm_regs> {
        let last = self.ring[self.next.wrapping_sub(1) % REMEMBERED].as_ref();
        self.regs[1].as_ref().filter(|_| last.is_some_and(|(exit, _)| *exit == Exit::Shutdown))
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
        Ok(regs) => write_regs(&mut text, &regs),
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
    for (exit, rip) in last.oldest_first() {
        let _ = match rip {
            Some(rip) => writeln!(text, "    rip {rip:016x} {exit:x?}"),
            None => writeln!(text, "    {exit:x?}"),
        };
    }
    if let Some(regs) = last.before_shutdown() {
        text.push_str("  registers at the exit before the triple fault:\n");
        write_regs(&mut text, regs);
    }
    text
}

fn write_regs(text: &mut String, r: &kvm_regs) {
    let mut line = |names: [&str; 4], values: [u64; 4]| {
        for (name, value) in names.into_iter().zip(values) {
            let _ = write!(text, "  {name:3} {value:016x}");
        }
        text.push('\n');
    };
    line(["rip", "rfl", "rsp", "rbp"], [r.rip, r.rflags, r.rsp, r.rbp]);
    line(["rax", "rbx", "rcx", "rdx"], [r.rax, r.rbx, r.rcx, r.rdx]);
    line(["rsi", "rdi", "r8", "r9"], [r.rsi, r.rdi, r.r8, r.r9]);
    line(["r10", "r11", "r12", "r13"], [r.r10, r.r11, r.r12, r.r13]);
    let _ = writeln!(text, "  r14 {:016x}  r15 {:016x}", r.r14, r.r15);
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

    fn at(rip: u64) -> Option<kvm_regs> {
        Some(kvm_regs { rip, ..Default::default() })
    }

    #[test]
    fn the_last_exits_are_remembered_in_order() {
        let mut last = LastExits::default();
        for reason in 0..REMEMBERED as u32 + 5 {
            last.push(Exit::Other(reason), at(reason.into()));
        }
        let seen: Vec<_> = last.oldest_first().copied().collect();
        let wanted: Vec<_> =
            (5..REMEMBERED as u32 + 5).map(|reason| (Exit::Other(reason), Some(reason.into()))).collect();
        assert_eq!(seen, wanted);
        assert_eq!(last.before_shutdown(), None);
    }

    #[test]
    fn registers_before_a_triple_fault_are_kept() {
        let mut last = LastExits::default();
        last.push(Exit::Interrupted, at(0x1234));
        last.push(Exit::Shutdown, at(0xfff0));
        assert_eq!(last.before_shutdown().unwrap().rip, 0x1234);
    }
}
