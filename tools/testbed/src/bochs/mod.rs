//! An emulated host in Bochs: with Intel's VMX and EPT, which QEMU cannot emulate, or with AMD's SVM.
//!
//! - [`program`] is Bochs itself. [`disk`] is what it boots, and [`initramfs`] what is on it: the whole host.
//! - [`BochsHost`] is one running host.
//!
//! Time there follows instructions: one tick for each instruction of a CPU, whatever this machine is busy
//! with. So results repeat, and two runs can be compared by the host's own clock. There is no virtio: the
//! agent's stream is a serial line, and the host has copies of what is on the stage when it starts.
//!
//! ```text
//! Host -> TCP on loopback -> Bochs's COM2 -> /dev/ttyS1 -> `testbed agent --serial /dev/ttyS1`
//! ```

pub mod disk;
pub mod initramfs;
pub mod program;

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cache::Cache;
use crate::exec;
use crate::host::Host;
use crate::image;
use crate::kernels::{self, Kernel};
use crate::progress::Step;
use crate::qemu::Hardware;
use crate::stage::{IN_HOST, Stage};

/// Instructions of a CPU in a second of the host's time. This machine takes about three seconds for one such
/// second.
const HZ: u32 = 200_000_000;
/// Until Bochs opens its serial lines, which it does at its start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// A host boots in half a minute on an idle machine; a loaded one gets this much.
const BOOT_LIMIT: Duration = Duration::from_secs(900);
/// Time that a host gets to power off before it is killed.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(60);
/// Last lines of a host's console that an error carries.
const CONSOLE_LINES: usize = 25;

/// The processor of an emulated host, and what KVM is told there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processor {
    /// Intel's, with VMX and EPT.
    Intel {
        /// Whether EPT keeps accessed and dirty bits, for which walks of the guest's page tables count as
        /// writes.
        accessed_dirty: bool,
    },
    /// AMD's, with SVM and nested paging, whose walks always count as writes.
    Amd,
}

impl Processor {
    /// Bochs's name of the model.
    fn model(self) -> &'static str {
        match self {
            Self::Intel { .. } => "corei7_skylake_x",
            Self::Amd => "ryzen",
        }
    }

    /// KVM's modules in the order to load them, below `kernel/`, with their parameters.
    fn modules(self) -> Vec<(&'static str, String)> {
        let mut modules: Vec<(&str, String)> =
            ["virt/lib/irqbypass", "arch/x86/kvm/kvm"].map(|path| (path, String::new())).into();
        // Nested virtualization inside the emulated one would only cost time.
        match self {
            Self::Intel { accessed_dirty } => {
                let parameters = format!("nested=0 eptad={}", u8::from(accessed_dirty));
                modules.push(("arch/x86/kvm/kvm-intel", parameters));
            }
            Self::Amd => {
                modules.push(("drivers/crypto/ccp/ccp", String::new()));
                modules.push(("arch/x86/kvm/kvm-amd", "nested=0".into()));
            }
        }
        modules
    }
}

/// A running host. Dropped, it is switched off.
pub struct BochsHost {
    /// Taken when it is switched off.
    host: Option<Host>,
    machine: Bochs,
}

impl BochsHost {
    /// Boots a host with copies of what is on `stage`, and waits until it takes jobs. The stage's `bin/` must
    /// hold the `testbed` binary, which is its agent.
    ///
    /// # Errors
    /// `hardware` asks for what there is not; something cannot be fetched or built; the host does not come
    /// up, and then the error carries the end of its console.
    pub fn start(cache: &Cache, processor: Processor, hardware: &Hardware, stage: &Stage) -> Result<Self> {
        ensure!(
            hardware.networks <= 1 && !hardware.rdma && hardware.disks.is_empty(),
            "a host in Bochs has no RDMA, no disks and no networks: leave these to --emulate amd"
        );
        let program = program::build(cache)?;
        let kernel = kernels::fetch(cache, Kernel::Trixie)?;
        let modules = kernel.modules.ok_or_else(|| anyhow!("the host kernel came without modules"))?;
        let busybox = image::busybox(cache)?;
        let step = Step::start("booting an emulated host in Bochs");
        step.note("making its disk");
        let disk = stage.path().join("bochs-disk");
        let archive = initramfs::make(&busybox, &modules, processor, stage.path())?;
        let append = format!(
            "console=ttyS0,115200 quiet loglevel=4 panic=-1 oops=panic mitigations=off audit=0 random.trust_cpu=on \
             tsc=reliable tsc_early_khz={}",
            HZ / 1000
        );
        disk::make(&disk, &kernel.vmlinuz, &archive, &append)?;
        step.note("starting it");
        let (machine, agent) = Bochs::start(&program, processor, hardware, &disk, stage.path())?;
        let host = Host::attach("h0".into(), IN_HOST.into(), Path::new(IN_HOST).join("bin"), None, agent)?;
        host.wait_ready(BOOT_LIMIT)
            .with_context(|| format!("emulated host; its console ends:\n{}", machine.console_tail()))?;
        step.done();
        Ok(Self { host: Some(host), machine })
    }

    /// The host, alone in a slice.
    pub fn hosts(&self) -> &[Host] {
        self.host.as_slice()
    }

    /// What the host's kernel, and Bochs, said last.
    pub fn console_tail(&self) -> String {
        self.machine.console_tail()
    }
}

impl Drop for BochsHost {
    fn drop(&mut self) {
        // Asks it to power off.
        self.host = None;
        self.machine.finish(POWER_OFF_LIMIT);
    }
}

/// A running Bochs. Dropped, it is killed.
struct Bochs {
    child: Child,
    /// Files that the host's kernel and Bochs write to.
    logs: [PathBuf; 2],
}

impl Bochs {
    /// Starts it with its files in `dir`; returns the stream to the host's agent too.
    fn start(
        program: &program::Program,
        processor: Processor,
        hardware: &Hardware,
        disk: &Path,
        dir: &Path,
    ) -> Result<(Self, UnixStream)> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listening for the host's serial line")?;
        let console = dir.join("console-h0.log");
        let settings = dir.join("bochsrc");
        let port = listener.local_addr()?.port();
        std::fs::write(&settings, configuration(program, processor, hardware, disk, &console, port))?;
        let log = dir.join("bochs.log");
        let output = File::create(&log)?;
        let mut command = Command::new(&program.bochs);
        command.arg("-q").arg("-f").arg(&settings);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = exec::spawn_tethered(command).context("starting Bochs")?;
        let mut this = Self { child, logs: [log, console] };
        let line = this.accept(&listener)?;
        // Reading, writing and timeouts are the same for every kind of stream socket.
        Ok((this, UnixStream::from(OwnedFd::from(line))))
    }

    /// Waits for Bochs to open the serial line.
    fn accept(&mut self, listener: &TcpListener) -> Result<TcpStream> {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            // Now and then it is checked that Bochs still runs.
            if poll(&mut ready, PollTimeout::from(200u8))? > 0 {
                return Ok(listener.accept()?.0);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("Bochs ended ({}); it said:\n{}", exec::describe(status), self.console_tail());
            }
        }
        bail!("Bochs did not open its serial line within {START_LIMIT:?}\n{}", self.console_tail())
    }

    fn console_tail(&self) -> String {
        let mut text = String::new();
        for log in &self.logs {
            text += &String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default());
        }
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }

    /// Waits for it to end by itself, for so long.
    fn finish(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Bochs {
    fn drop(&mut self) {
        // Both fail only if it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The most memory that Bochs may have of its host, in MiB: the upper bound of its option `host`.
const MOST_RESIDENT_MIB: u32 = 2048;

/// Bochs's configuration file.
fn configuration(
    program: &program::Program,
    processor: Processor,
    hardware: &Hardware,
    disk: &Path,
    console: &Path,
    agent_port: u16,
) -> String {
    let (bios, vga_bios) = (program.bios.display(), program.vga_bios.display());
    let (model, cpus, memory) = (processor.model(), hardware.cpus, hardware.memory_mib);
    // Bochs takes no more from its host. What does not fit goes to a file, and hardly anything is touched
    // that would not.
    let resident = memory.min(MOST_RESIDENT_MIB);
    let (disk, console) = (disk.display(), console.display());
    format!(
        "display_library: nogui\n\
         cpu: model={model}, count={cpus}, ips={HZ}, reset_on_triple_fault=0\n\
         clock: sync=none, time0=local, rtc_sync=0\n\
         memory: guest={memory}, host={resident}\n\
         romimage: file=\"{bios}\"\n\
         vgaromimage: file=\"{vga_bios}\"\n\
         pci: enabled=1, chipset=i440fx\n\
         ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=disk, path=\"{disk}\", mode=volatile\n\
         boot: disk\n\
         com1: enabled=1, mode=file, dev=\"{console}\"\n\
         com2: enabled=1, mode=socket-client, dev=127.0.0.1:{agent_port}\n\
         log: /dev/stderr\n\
         panic: action=fatal\n\
         error: action=ignore\n\
         info: action=ignore\n\
         debug: action=ignore\n\
         mouse: enabled=0\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_that_page_walks_count_is_told_to_kvm() {
        let last = |processor: Processor| processor.modules().pop().unwrap();
        assert_eq!(last(Processor::Intel { accessed_dirty: false }).1, "nested=0 eptad=0");
        assert_eq!(last(Processor::Intel { accessed_dirty: true }).1, "nested=0 eptad=1");
        assert_eq!(last(Processor::Amd).0, "arch/x86/kvm/kvm-amd");
    }

    #[test]
    fn a_host_with_more_memory_than_bochs_may_have_keeps_what_it_may() {
        let program = program::Program { bochs: "b".into(), bios: "i".into(), vga_bios: "v".into() };
        let of = |memory_mib| {
            let hardware =
                Hardware { cpus: 1, memory_mib, mtu: 1500, networks: 1, rdma: false, disks: vec![] };
            configuration(&program, Processor::Amd, &hardware, Path::new("d"), Path::new("c"), 1)
        };
        assert!(of(1000).contains("memory: guest=1000, host=1000\n"));
        assert!(of(2224).contains("memory: guest=2224, host=2048\n"));
    }

    #[test]
    fn a_bochs_that_ends_at_once_is_an_error_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let nothing = || dir.path().join("nothing");
        let program = program::Program { bochs: "/bin/false".into(), bios: nothing(), vga_bios: nothing() };
        let hardware =
            Hardware { cpus: 1, memory_mib: 64, mtu: 1500, networks: 1, rdma: false, disks: vec![] };
        let started = Bochs::start(&program, Processor::Amd, &hardware, &nothing(), dir.path());
        let error = started.err().expect("false opens no serial line");
        assert!(error.to_string().contains("exit code 1"), "{error}");
    }
}
