//! One virtual CPU: entering the guest, and why it came back.

use firmware::cpuid::CpuidEntry;
use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_SYNC_X86_REGS, Msrs, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::{KvmError, cpuid, ioctls};

/// Why a vCPU left the guest (`kvm_run.exit_reason`, KVM API 5). The data of the exit stays in the [`Vcpu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `in` or `out`, or a piece of their string forms: `count` accesses of `size` bytes each, in
    /// [`Vcpu::pio_data`].
    Pio {
        /// The port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// How many accesses follow each other to the same port.
        count: u32,
        /// `out`.
        write: bool,
    },
    /// An access where there is no memory. A read is answered by [`Vcpu::set_mmio_data`].
    Mmio {
        /// Guest physical address.
        addr: u64,
        /// Bytes: 1..=8.
        len: u8,
        /// What is written, in the first `len` bytes; `None`: a read.
        data: Option<[u8; 8]>,
    },
    /// RDMSR that is ours to answer: [`Vcpu::finish_msr_read`] or [`Vcpu::refuse_msr`].
    ReadMsr {
        /// The register.
        index: u32,
    },
    /// WRMSR that is ours to act on; [`Vcpu::refuse_msr`] raises #GP.
    WriteMsr {
        /// The register.
        index: u32,
        /// What is written.
        value: u64,
    },
    /// HLT.
    Halt,
    /// Interrupts can be injected, as [`Vcpu::request_interrupt_window`] asked.
    WindowOpen,
    /// A signal came before or while the guest ran, or the entry was only to complete the last exit.
    Interrupted,
    /// The guest lowered CR8.
    TaskPriority,
    /// Triple fault.
    Shutdown,
    /// The CPU refused the guest's state.
    FailEntry {
        /// What the hardware says.
        reason: u64,
    },
    /// KVM gave up; details in [`Vcpu::internal_error_data`].
    InternalError {
        /// `KVM_INTERNAL_ERROR_*`: 1 emulation, 2 simultaneous exceptions, 3 event delivery, 4 unexpected
        /// exit.
        suberror: u32,
    },
    /// The guest asked KVM for power-off, reset or reported a crash.
    SystemEvent {
        /// `KVM_SYSTEM_EVENT_*`.
        kind: u32,
    },
    /// Anything else: the raw exit reason.
    Other(u32),
}

impl Exit {
    /// KVM's number for it, for traces.
    pub fn reason(&self) -> u32 {
        match *self {
            Exit::Pio { .. } => KVM_EXIT_IO,
            Exit::Mmio { .. } => KVM_EXIT_MMIO,
            Exit::ReadMsr { .. } => KVM_EXIT_X86_RDMSR,
            Exit::WriteMsr { .. } => KVM_EXIT_X86_WRMSR,
            Exit::Halt => KVM_EXIT_HLT,
            Exit::WindowOpen => KVM_EXIT_IRQ_WINDOW_OPEN,
            Exit::Interrupted => KVM_EXIT_INTR,
            Exit::TaskPriority => KVM_EXIT_SET_TPR,
            Exit::Shutdown => KVM_EXIT_SHUTDOWN,
            Exit::FailEntry { .. } => KVM_EXIT_FAIL_ENTRY,
            Exit::InternalError { .. } => KVM_EXIT_INTERNAL_ERROR,
            Exit::SystemEvent { .. } => KVM_EXIT_SYSTEM_EVENT,
            Exit::Other(reason) => reason,
        }
    }

    /// The most telling word of it (port, address, register), for traces.
    pub fn detail(&self) -> u64 {
        match *self {
            Exit::Pio { port, .. } => port.into(),
            Exit::Mmio { addr, .. } => addr,
            Exit::ReadMsr { index } | Exit::WriteMsr { index, .. } => index.into(),
            Exit::FailEntry { reason } => reason,
            Exit::InternalError { suberror } => suberror.into(),
            Exit::SystemEvent { kind } => kind.into(),
            _ => 0,
        }
    }

    /// Whether KVM finishes the instruction only at the next entry, so that the registers are not yet those
    /// of an instruction boundary.
    pub fn needs_completion(&self) -> bool {
        matches!(
            self,
            Exit::Pio { .. }
                | Exit::Mmio { .. }
                | Exit::ReadMsr { .. }
                | Exit::WriteMsr { .. }
                | Exit::Other(_)
        )
    }
}

/// A vCPU. Used by one thread at a time.
pub struct Vcpu {
    fd: VcpuFd,
    run_size: usize,
    tsc_offset: bool,
    sync_regs: bool,
}

impl Vcpu {
    pub(super) fn new(mut fd: VcpuFd, run_size: usize, attributes: bool, sync_regs: bool) -> Vcpu {
        if sync_regs {
            fd.set_sync_valid_reg(SyncReg::Register);
        }
        let tsc_offset = attributes && ioctls::has_tsc_offset(&fd);
        Vcpu { fd, run_size, tsc_offset, sync_regs }
    }

    /// Enters the guest until something is to be done. A pending exit is completed first.
    ///
    /// # Errors
    /// What KVM answers, but for a signal, which is [`Exit::Interrupted`].
    pub fn run(&mut self) -> Result<Exit, KvmError> {
        match self.fd.run() {
            Ok(_) => Ok(self.exit()),
            Err(errno) if errno.errno() == libc::EINTR => Ok(Exit::Interrupted),
            Err(errno) => Err(KvmError::call("run a vCPU")(errno)),
        }
    }

    /// Completes the instruction of the last exit without running another one: afterwards the registers and
    /// the interrupt flags are those of an instruction boundary. Returns the next exit if the instruction
    /// makes one more (string I/O, an access split in two).
    ///
    /// # Errors
    /// What KVM answers.
    pub fn complete(&mut self) -> Result<Option<Exit>, KvmError> {
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.run();
        self.fd.set_kvm_immediate_exit(0);
        Ok(Some(exit?).filter(|exit| *exit != Exit::Interrupted))
    }

    fn exit(&mut self) -> Exit {
        let run = self.fd.get_kvm_run();
        let data = &run.__bindgen_anon_1;
        // SAFETY: KVM filled in the member of the union that `exit_reason` names, and every member is made
        // of integers, so that any bytes are valid.
        unsafe {
            match run.exit_reason {
                KVM_EXIT_IO => Exit::Pio {
                    port: data.io.port,
                    size: data.io.size,
                    count: data.io.count,
                    write: u32::from(data.io.direction) == KVM_EXIT_IO_OUT,
                },
                KVM_EXIT_MMIO => Exit::Mmio {
                    addr: data.mmio.phys_addr,
                    len: data.mmio.len.min(8) as u8,
                    data: (data.mmio.is_write != 0).then_some(data.mmio.data),
                },
                KVM_EXIT_X86_RDMSR => Exit::ReadMsr { index: data.msr.index },
                KVM_EXIT_X86_WRMSR => Exit::WriteMsr { index: data.msr.index, value: data.msr.data },
                KVM_EXIT_HLT => Exit::Halt,
                KVM_EXIT_IRQ_WINDOW_OPEN => Exit::WindowOpen,
                KVM_EXIT_INTR => Exit::Interrupted,
                KVM_EXIT_SET_TPR => Exit::TaskPriority,
                KVM_EXIT_SHUTDOWN => Exit::Shutdown,
                KVM_EXIT_FAIL_ENTRY => {
                    Exit::FailEntry { reason: data.fail_entry.hardware_entry_failure_reason }
                }
                KVM_EXIT_INTERNAL_ERROR => Exit::InternalError { suberror: data.internal.suberror },
                KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent { kind: data.system_event.type_ },
                other => Exit::Other(other),
            }
        }
    }

    /// The bytes of the [`Exit::Pio`] at hand: what `out` wrote, or where to put what `in` reads. Empty when
    /// the last exit was another.
    pub fn pio_data(&mut self) -> &mut [u8] {
        let size = self.run_size;
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return &mut [];
        }
        // SAFETY: the exit reason names this member of the union.
        let io = unsafe { run.__bindgen_anon_1.io };
        let len = usize::from(io.size) * io.count as usize;
        let offset = io.data_offset as usize;
        if offset < size_of_val(run) || offset.checked_add(len).is_none_or(|end| end > size) {
            return &mut [];
        }
        // SAFETY: `kvm_run` is mapped for `run_size` bytes as long as the vCPU's file is open, the range was
        // checked to lie behind the struct and inside the mapping, and the result borrows `self` mutably.
        unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(offset), len) }
    }

    /// Answers the [`Exit::Mmio`] read at hand; only its `len` first bytes count.
    pub fn set_mmio_data(&mut self, data: [u8; 8]) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_MMIO {
            run.__bindgen_anon_1.mmio.data = data;
        }
    }

    /// Answers the [`Exit::ReadMsr`] at hand.
    pub fn finish_msr_read(&mut self, value: u64) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_X86_RDMSR {
            run.__bindgen_anon_1.msr.data = value;
            run.__bindgen_anon_1.msr.error = 0;
        }
    }

    /// Makes the MSR access at hand raise #GP(0).
    pub fn refuse_msr(&mut self) {
        let run = self.fd.get_kvm_run();
        if matches!(run.exit_reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) {
            run.__bindgen_anon_1.msr.error = 1;
        }
    }

    /// What KVM adds to an [`Exit::InternalError`]; meaning depends on the suberror.
    pub fn internal_error_data(&mut self) -> Vec<u64> {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return Vec::new();
        }
        // SAFETY: the exit reason names this member of the union.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        internal.data.iter().take(internal.ndata as usize).copied().collect()
    }

    /// Whether an interrupt may be injected now: an instruction boundary with interrupts enabled, none
    /// injected already, no shadow of STI or MOV SS.
    pub fn ready_for_interrupt(&mut self) -> bool {
        let run = self.fd.get_kvm_run();
        run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// RFLAGS.IF at the last exit.
    pub fn interrupt_flag(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }

    /// Makes the vCPU leave the guest with [`Exit::WindowOpen`] as soon as interrupts can be injected. KVM
    /// looks at this at each entry only.
    pub fn request_interrupt_window(&mut self, wanted: bool) {
        self.fd.get_kvm_run().request_interrupt_window = wanted.into();
    }

    /// CR8 at the last exit.
    pub fn cr8(&mut self) -> u64 {
        self.fd.get_kvm_run().cr8
    }

    /// CR8 from the next entry on, `0..=15`.
    pub fn set_cr8(&mut self, cr8: u64) {
        self.fd.get_kvm_run().cr8 = cr8 & 0xf;
    }

    /// Injects an external interrupt; only when [`Vcpu::ready_for_interrupt`], since KVM does not check.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        ioctls::interrupt(&self.fd, vector)?;
        // One at a time: KVM says at the next exit whether it takes another.
        self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
        Ok(())
    }

    /// Queues a non-maskable interrupt; KVM injects it when the guest may take it.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn nmi(&mut self) -> Result<(), KvmError> {
        self.fd.nmi().map_err(KvmError::call("inject an NMI"))
    }

    /// The general registers at the last exit, where KVM copies them out (`KVM_CAP_SYNC_REGS`). Cheap, and
    /// not yet those of an instruction boundary if the exit [`Exit::needs_completion`].
    pub fn regs_at_exit(&mut self) -> Option<kvm_regs> {
        let run = self.fd.get_kvm_run();
        let synced = run.kvm_valid_regs & u64::from(KVM_SYNC_X86_REGS) != 0;
        // SAFETY: the registers are the union's only member with a meaning, and made of integers.
        synced.then_some(unsafe { run.s.regs.regs })
    }

    /// Makes `blocked` the thread's signal mask inside [`Vcpu::run`] (bit n - 1: signal n).
    ///
    /// # Errors
    /// What KVM answers.
    pub fn set_signal_mask(&self, blocked: u64) -> Result<(), KvmError> {
        ioctls::set_signal_mask(&self.fd, blocked)
    }

    /// Whether [`Vcpu::set_tsc_offset`] works here.
    pub fn has_tsc_offset(&self) -> bool {
        self.tsc_offset
    }

    /// Sets what is added to the host's (scaled) TSC, modulo 2^64, to make the guest's.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<(), KvmError> {
        ioctls::set_tsc_offset(&self.fd, offset)
    }

    /// The guest's TSC frequency in kHz.
    ///
    /// # Errors
    /// What KVM answers: the host's TSC is unstable.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.fd.get_tsc_khz().map_err(KvmError::call("tell the TSC frequency"))
    }

    /// Sets the guest's TSC frequency in kHz.
    ///
    /// # Errors
    /// What KVM answers: scaling is not supported ([`super::caps::has_tsc_control`]).
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        self.fd.set_tsc_khz(khz).map_err(KvmError::call("scale the TSC"))
    }

    /// Sets what CPUID answers.
    ///
    /// # Errors
    /// What KVM answers: more entries than it takes, an unsupported extended state.
    pub fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), KvmError> {
        let table = cpuid::table(entries)?;
        self.fd.set_cpuid2(&table).map_err(KvmError::call("set the CPUID of a vCPU"))
    }

    /// The general registers; see [`Vcpu::complete`].
    ///
    /// # Errors
    /// What KVM answers.
    pub fn regs(&mut self) -> Result<kvm_regs, KvmError> {
        if let Some(regs) = self.regs_to_come() {
            return Ok(regs);
        }
        self.fd.get_regs().map_err(KvmError::call("read registers"))
    }

    /// Sets the general registers; see [`Vcpu::complete`].
    ///
    /// # Errors
    /// What KVM answers.
    pub fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.clear_sync_dirty_reg(SyncReg::Register);
        self.fd.set_regs(regs).map_err(KvmError::call("write registers"))?;
        // Those of the last exit are not the vCPU's any more.
        if self.sync_regs {
            self.fd.sync_regs_mut().regs = *regs;
        }
        Ok(())
    }

    /// As [`Vcpu::set_regs`], but KVM takes them on only at the next entry, where it can, which saves a call.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn set_regs_at_entry(&mut self, regs: &kvm_regs) -> Result<(), KvmError> {
        if !self.sync_regs {
            return self.set_regs(regs);
        }
        self.fd.sync_regs_mut().regs = *regs;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        Ok(())
    }

    /// What [`Vcpu::set_regs_at_entry`] set and KVM has not taken on yet.
    fn regs_to_come(&mut self) -> Option<kvm_regs> {
        let run = self.fd.get_kvm_run();
        let dirty = run.kvm_dirty_regs & u64::from(KVM_SYNC_X86_REGS) != 0;
        // SAFETY: the registers are the union's only member with a meaning, and made of integers.
        dirty.then_some(unsafe { run.s.regs.regs })
    }

    /// Debug register 7.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn dr7(&self) -> Result<u64, KvmError> {
        Ok(self.fd.get_debug_regs().map_err(KvmError::call("read debug registers"))?.dr7)
    }

    /// The system registers.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(KvmError::call("read system registers"))
    }

    /// Sets the system registers. IA32_APIC_BASE among them may say x2APIC only after [`Vcpu::set_cpuid`].
    ///
    /// # Errors
    /// What KVM answers: an impossible combination.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).map_err(KvmError::call("write system registers"))
    }

    /// Enables the register state of XCR0's bits, as XSETBV does (Intel's manual, volume 1, section 13.3).
    /// After [`Vcpu::set_cpuid`], which says what there is.
    ///
    /// # Errors
    /// What `KVM_SET_XCRS` answers.
    pub fn set_xcr0(&self, value: u64) -> Result<(), KvmError> {
        let mut registers = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        registers.xcrs[0].value = value;
        self.fd.set_xcrs(&registers).map_err(KvmError::call("write XCR0"))
    }

    /// Exceptions, interrupts and NMIs on their way.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn events(&self) -> Result<kvm_vcpu_events, KvmError> {
        self.fd.get_vcpu_events().map_err(KvmError::call("read pending events"))
    }

    /// Replaces exceptions, interrupts and NMIs on their way.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), KvmError> {
        self.fd.set_vcpu_events(events).map_err(KvmError::call("write pending events"))
    }

    /// One model-specific register, `None` if KVM does not know it.
    ///
    /// # Errors
    /// What KVM answers.
    pub fn msr(&self, index: u32) -> Result<Option<u64>, KvmError> {
        let mut msrs = msr_list(&[(index, 0)])?;
        let got = self.fd.get_msrs(&mut msrs).map_err(KvmError::call("read a model-specific register"))?;
        Ok((got == 1).then(|| msrs.as_slice()[0].data))
    }

    /// Sets model-specific registers, past the filter that the guest's own accesses meet.
    ///
    /// # Errors
    /// [`KvmError::Msr`] for one that KVM does not know, or what it answers.
    pub fn set_msrs(&self, values: &[(u32, u64)]) -> Result<(), KvmError> {
        let msrs = msr_list(values)?;
        let done = self.fd.set_msrs(&msrs).map_err(KvmError::call("write model-specific registers"))?;
        match values.get(done) {
            None => Ok(()),
            Some((next, _)) => Err(KvmError::Msr { done, asked: values.len(), next: *next }),
        }
    }
}

fn msr_list(values: &[(u32, u64)]) -> Result<Msrs, KvmError> {
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::Call {
        what: "hold that many model-specific registers",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}
