//! A stopped vCPU's state, as far as one instruction's meaning and translation depend on it.

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};

use super::walk::{Paging, Privilege};

/// The state of a stopped vCPU whose RIP is on an instruction that has not been carried out.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Cpu {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: by their numbers in encodings.
    pub general: [u64; 16],
    /// Where the instruction begins, as a linear address.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// Whether the code segment is a 64-bit one (CS.L).
    pub code64: bool,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// DR7.
    pub dr7: u64,
    /// PKRU; `None` if nobody has read it. Only looked at with CR4.PKE.
    pub pkru: Option<u32>,
    /// IA32_PKRS; `None` if nobody has read it. Only looked at with CR4.PKS.
    pub pkrs: Option<u32>,
    /// An exception, interrupt or NMI is being delivered, or must be before the instruction.
    pub event: bool,
    /// Interrupts wait for the end of this instruction, as STI or MOV SS was the one before.
    pub interrupt_shadow: bool,
    /// Bits of a physical address: CPUID 0x8000_0008, EAX bits 7:0.
    pub physical_bits: u8,
    /// Whether there are pages of 1 GiB: CPUID 0x8000_0001, EDX bit 26.
    pub gigabyte_pages: bool,
}

/// RFLAGS: alignment check, and at CPL 0 to 2 the leave to access user pages.
const AC: u64 = 1 << 18;

impl Cpu {
    /// From what KVM tells of a stopped vCPU. `dr7` is from its debug registers; the guest's CPUID says what
    /// addresses it has. PKRU and IA32_PKRS are left unknown.
    pub fn from_kvm(
        regs: &kvm_regs,
        sregs: &kvm_sregs,
        events: &kvm_vcpu_events,
        dr7: u64,
        physical_bits: u8,
    ) -> Cpu {
        let r = regs;
        let (exception, interrupt, nmi) = (&events.exception, &events.interrupt, &events.nmi);
        let event = [exception.injected, exception.pending, interrupt.injected, nmi.injected, nmi.pending];
        Cpu {
            general: [
                r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            code64: sregs.cs.l != 0,
            cpl: sregs.ss.dpl,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            dr7,
            pkru: None,
            pkrs: None,
            event: event.iter().any(|&flag| flag != 0)
                || sregs.interrupt_bitmap.iter().any(|&bits| bits != 0),
            interrupt_shadow: interrupt.shadow != 0,
            physical_bits,
            gigabyte_pages: true,
        }
    }

    /// The registers as KVM takes them.
    pub fn to_kvm(&self) -> kvm_regs {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = self.general;
        let (rip, rflags) = (self.rip, self.rflags);
        kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }

    /// How it translates the addresses of its instructions and of what they access.
    pub fn paging(&self) -> Paging {
        let privilege = match self.cpl {
            3 => Privilege::User,
            _ => Privilege::Supervisor { may_access_user_pages: self.rflags & AC != 0 },
        };
        Paging {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            pkru: self.pkru,
            pkrs: self.pkrs,
            physical_bits: self.physical_bits,
            gigabyte_pages: self.gigabyte_pages,
            privilege,
        }
    }

    /// Whether an access must be aligned, or else is an alignment-check exception (SDM vol. 3, 6.15, #AC).
    pub(super) fn checks_alignment(&self) -> bool {
        const CR0_AM: u64 = 1 << 18;
        self.cpl == 3 && self.cr0 & CR0_AM != 0 && self.rflags & AC != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_come_from_kvm_by_their_numbers_and_go_back() {
        let regs = kvm_regs {
            rax: 100,
            rcx: 101,
            rdx: 102,
            rbx: 103,
            rsp: 104,
            rbp: 105,
            rsi: 106,
            rdi: 107,
            r8: 108,
            r9: 109,
            r10: 110,
            r11: 111,
            r12: 112,
            r13: 113,
            r14: 114,
            r15: 115,
            rip: 116,
            rflags: 2,
        };
        let (mut sregs, mut events) = (kvm_sregs::default(), kvm_vcpu_events::default());
        (sregs.fs.base, sregs.gs.base, sregs.cs.l, sregs.ss.dpl) = (117, 118, 1, 3);
        let cpu = Cpu::from_kvm(&regs, &sregs, &events, 0x400, 46);
        assert_eq!(cpu.general, std::array::from_fn(|n| 100 + n as u64));
        assert_eq!((cpu.rip, cpu.fs_base, cpu.gs_base, cpu.code64, cpu.cpl), (116, 117, 118, true, 3));
        assert_eq!(cpu.to_kvm(), regs);
        assert!(!cpu.event && !cpu.interrupt_shadow);
        events.interrupt.shadow = 1;
        events.interrupt.injected = 1;
        let cpu = Cpu::from_kvm(&regs, &sregs, &events, 0x400, 46);
        assert!(cpu.event && cpu.interrupt_shadow, "an event under way");
    }
}
