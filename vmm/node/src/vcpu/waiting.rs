//! The trial, on a guest of two instructions, whether a vCPU that waits for a page can be called out of its
//! wait.
//!
//! A guest's access to a page that is not here waits inside KVM_RUN until userfaultfd's handler brings the
//! page. Since Linux 6.2 a signal ends that wait: KVM_RUN returns EINTR, and the instruction has not
//! happened. So interrupts, a stop, a dump or a step of the clock need not wait for pages. (Accesses that
//! KVM's own emulator makes still wait.)

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use coherence::memory::DualMemory;
use coherence::page::{PAGE_SIZE, Page};
use coherence::uffd::{Fault, Mode, Uffd};
use kvm_ioctls::Kvm;

use super::{registers, signal, user_mode};
use crate::kvm::{Exit, HostCpu, Vcpu, Vm};

/// How long each step may take; a working host takes microseconds.
const PATIENCE: Duration = Duration::from_secs(2);

const PAGES: u64 = 6;
const TABLES: u64 = 0x1000;
const CODE: Page = Page(4);
/// The page that is withheld.
const WITHHELD: Page = Page(5);
/// `mov eax, [0x5000]; out 0x80, eax`
const INSTRUCTIONS: [u8; 9] = [0x8b, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00, 0xe7, 0x80];
/// What the page holds when it comes at last.
const MARK: u32 = 0x7761_6974;

/// Lets a vCPU touch a page that does not come, kicks it, sees that it left the guest with nothing done, and
/// that it goes on when it is entered again and the page comes. How long the kick took.
///
/// # Errors
/// What did not go as it must, as a clause.
pub fn can_be_called_out(kvm: &Kvm, cpu: &HostCpu) -> Result<Duration, String> {
    signal::install_handler().map_err(|error| error.to_string())?;
    let memory = Arc::new(DualMemory::new(PAGES).map_err(|error| format!("memory: {error}"))?);
    write(&memory);
    let uffd = Uffd::open()?;
    let address = memory.guest_address(WITHHELD);
    uffd.register(address, PAGE_SIZE as u64, Mode::Remote)
        .map_err(|error| format!("registering: {error}"))?;
    let vm = Vm::new(kvm).map_err(|error| error.to_string())?;
    // SAFETY: the vCPU's thread keeps the memory longer than the virtual machine, and nothing refers to its
    // bytes.
    unsafe { vm.add_memory(0, 0, memory.guest_view(), memory.len() as u64) }.map_err(|e| e.to_string())?;
    let vcpu = vm.create_vcpu(0).map_err(|error| error.to_string())?;
    let (tell, told) = channel();
    let guest = Guest { vcpu, _vm: vm, _memory: memory.clone(), cpuid: cpu.cpuid.clone() };
    std::thread::Builder::new()
        .name("trial".into())
        .spawn(move || guest.run(&tell))
        .map_err(|error| error.to_string())?;
    // Whatever happens, the thread ends: without the watch its access finds a page of zeroes.
    call_out(&memory, &uffd, &told)
}

/// What the vCPU's thread says of itself.
enum News {
    /// Its id; it is about to enter the guest.
    Starts(i32),
    /// It left the guest for this reason, with the instruction pointer there, and EAX.
    Left {
        exit: Exit,
        rip: u64,
        eax: u32,
        at: Instant,
    },
    Failed(String),
}

fn call_out(memory: &DualMemory, uffd: &Uffd, told: &Receiver<News>) -> Result<Duration, String> {
    let News::Starts(thread) = next(told)? else { return Err("the vCPU did not start".into()) };
    fault(memory, uffd)?;
    let kicked = Instant::now();
    signal::send(thread);
    let News::Left { exit: Exit::Interrupted, rip, at, .. } = next(told)? else {
        return Err("the vCPU left its wait for another reason than the signal".into());
    };
    if rip != CODE.offset() as u64 {
        return Err(format!("the instruction pointer is {rip:#x} after the signal, past the instruction"));
    }
    // It touches the page again, as if for the first time.
    fault(memory, uffd)?;
    let mut bytes = [0; PAGE_SIZE];
    bytes[..4].copy_from_slice(&MARK.to_le_bytes());
    // SAFETY: the page is not mapped, and this is the only thread that writes it.
    unsafe { memory.fill(WITHHELD, Some(&bytes)) };
    uffd.map(memory.guest_address(WITHHELD), PAGE_SIZE as u64, false)
        .map_err(|error| format!("UFFDIO_CONTINUE: {error}"))?;
    match next(told)? {
        News::Left { exit: Exit::Pio { port: 0x80, .. }, eax: MARK, .. } => Ok(at - kicked),
        News::Left { exit, eax, .. } => Err(format!("the vCPU then went astray ({exit:x?}, EAX {eax:#x})")),
        News::Starts(_) | News::Failed(_) => Err("the vCPU did not go on".into()),
    }
}

fn next(told: &Receiver<News>) -> Result<News, String> {
    match told.recv_timeout(PATIENCE) {
        Ok(News::Failed(why)) => Err(why),
        Ok(news) => Ok(news),
        Err(_) => Err("the signal did not end the wait".into()),
    }
}

/// Waits for the fault of the withheld page.
fn fault(memory: &DualMemory, uffd: &Uffd) -> Result<Fault, String> {
    let faults = uffd.wait(PATIENCE).map_err(|error| format!("reading a fault: {error}"))?;
    let here = |fault: &Fault| memory.page_at(fault.address) == Some(WITHHELD);
    faults.into_iter().find(here).ok_or_else(|| "the access to a missing page raised no fault".into())
}

fn write(memory: &DualMemory) {
    let mut code = [0; PAGE_SIZE];
    code[..INSTRUCTIONS.len()].copy_from_slice(&INSTRUCTIONS);
    memory.overwrite(CODE, &code);
    let tables = user_mode::page_tables(TABLES);
    for (index, table) in tables.chunks_exact(PAGE_SIZE).enumerate() {
        let mut page = [0; PAGE_SIZE];
        page.copy_from_slice(table);
        memory.overwrite(Page(TABLES / PAGE_SIZE as u64 + index as u64), &page);
    }
}

/// What the vCPU's thread owns. Fields are dropped in this order: the memory last.
struct Guest {
    vcpu: Vcpu,
    _vm: Vm,
    _memory: Arc<DualMemory>,
    cpuid: Vec<firmware::cpuid::CpuidEntry>,
}

impl Guest {
    fn run(mut self, tell: &Sender<News>) {
        if let Err(why) = self.try_run(tell) {
            // Who asked may have given up.
            let _ = tell.send(News::Failed(why));
        }
    }

    fn try_run(&mut self, tell: &Sender<News>) -> Result<(), String> {
        let error = |error: crate::kvm::KvmError| error.to_string();
        let mask = signal::block_all().map_err(|error| error.to_string())?;
        let vcpu = &mut self.vcpu;
        vcpu.set_signal_mask(mask).map_err(error)?;
        vcpu.set_cpuid(&self.cpuid).map_err(error)?;
        let sregs = vcpu.sregs().map_err(error)?;
        let start = user_mode::registers(TABLES, CODE.offset() as u64);
        registers::begin(vcpu, &start, &sregs).map_err(error)?;
        let _ = tell.send(News::Starts(base::thread::id()));
        loop {
            let exit = vcpu.run().map_err(error)?;
            let at = Instant::now();
            let regs = vcpu.regs().map_err(error)?;
            let _ = tell.send(News::Left { exit, rip: regs.rip, eax: regs.rax as u32, at });
            if exit != Exit::Interrupted {
                return Ok(());
            }
            signal::take_pending();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::caps;

    #[test]
    fn a_vcpu_that_waits_for_a_page_is_called_out_where_kvm_and_userfaultfd_can_be_used() {
        let probe = || {
            Uffd::open()?;
            let kvm = caps::open().map_err(|error| error.to_string())?;
            let cpu = HostCpu::probe(&kvm).map_err(|error| error.to_string())?;
            Ok::<_, String>((kvm, cpu))
        };
        match probe() {
            Err(why) => eprintln!("skipped: {why}"),
            // By the kernel's source this works from Linux 6.2 on, and the engine needs 6.4 anyway.
            Ok((kvm, cpu)) => drop(can_be_called_out(&kvm, &cpu).unwrap()),
        }
    }
}
