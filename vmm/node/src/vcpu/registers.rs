//! The states in which a vCPU begins: power-on, INIT, start-up, boot.

use firmware::boot::{BspRegisters, Segment};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_dtable, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events,
};

use crate::kvm::{KvmError, Vcpu, msr};

/// Where a vCPU begins.
#[derive(Clone, Debug)]
pub enum Start {
    /// It waits for a start-up message.
    WaitForSipi,
    /// It runs from these registers: the boot processor.
    Boot(Box<BspRegisters>),
}

/// Fast strings on, as firmware leaves them.
const MISC_ENABLE: u64 = 1;
/// MTRRs on, fixed ones too, everything write-back: what firmware would have set.
const MTRR_DEF_TYPE: u64 = 1 << 11 | 1 << 10 | 6;
/// Cache disabled and not write-through, which INIT keeps from power-on (SDM vol. 3, table 10-1), and ET.
const CR0_AFTER_INIT: u64 = 0x6000_0010;

/// A vCPU's registers after power-on, to which INIT returns.
pub(super) struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl PowerOn {
    /// Sets what firmware would have set, and remembers the rest as KVM made it. CPUID must be set before.
    pub(super) fn new(vcpu: &mut Vcpu, apic_base: u64, msrs: &[(u32, u64)]) -> Result<PowerOn, KvmError> {
        vcpu.set_msrs(&[(msr::MISC_ENABLE, MISC_ENABLE), (msr::MTRR_DEF_TYPE, MTRR_DEF_TYPE)])?;
        vcpu.set_msrs(msrs)?;
        let regs = vcpu.regs()?;
        let mut sregs = vcpu.sregs()?;
        sregs.cr0 = CR0_AFTER_INIT;
        sregs.apic_base = apic_base;
        vcpu.set_sregs(&sregs)?;
        Ok(PowerOn { regs, sregs })
    }

    /// INIT: registers as after power-on, nothing on its way to the guest.
    pub(super) fn init(&self, vcpu: &mut Vcpu) -> Result<(), KvmError> {
        let none = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        vcpu.set_events(&none)?;
        vcpu.set_sregs(&self.sregs)?;
        vcpu.set_regs(&self.regs)
    }

    /// Start-up: real mode at the beginning of page `vector` (SDM vol. 3, 9.4.4).
    pub(super) fn sipi(&self, vcpu: &mut Vcpu, vector: u8) -> Result<(), KvmError> {
        let mut sregs = self.sregs;
        sregs.cs.selector = u16::from(vector) << 8;
        sregs.cs.base = u64::from(vector) << 12;
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs { rip: 0, ..self.regs })
    }

    /// The kernel's entry.
    pub(super) fn boot(&self, vcpu: &mut Vcpu, boot: &BspRegisters) -> Result<(), KvmError> {
        begin(vcpu, boot, &self.sregs)
    }
}

/// Sets the state that `boot` describes, and of `rest` what it says nothing of.
///
/// # Errors
/// What KVM answers.
pub fn begin(vcpu: &mut Vcpu, boot: &BspRegisters, rest: &kvm_sregs) -> Result<(), KvmError> {
    let data = segment(&boot.data);
    vcpu.set_sregs(&kvm_sregs {
        cs: segment(&boot.cs),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(&boot.tr),
        gdt: kvm_dtable { base: boot.gdt.base, limit: boot.gdt.limit, ..Default::default() },
        idt: kvm_dtable { base: boot.idt.base, limit: boot.idt.limit, ..Default::default() },
        cr0: boot.cr0,
        cr3: boot.cr3,
        cr4: boot.cr4,
        efer: boot.efer,
        ..*rest
    })?;
    vcpu.set_regs(&kvm_regs {
        rip: boot.rip,
        rsp: boot.rsp,
        rsi: boot.rsi,
        rflags: boot.rflags,
        ..Default::default()
    })
}

fn segment(from: &Segment) -> kvm_segment {
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.type_,
        present: from.present.into(),
        dpl: from.dpl,
        db: from.db.into(),
        s: from.s.into(),
        l: from.l.into(),
        g: from.g.into(),
        avl: 0,
        unusable: (!from.present).into(),
        padding: 0,
    }
}
