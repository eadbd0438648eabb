//! One emulated host: the QEMU process that is its hardware.
//!
//! TCG emulates AMD's SVM with nested paging, so the Debian inside has a real KVM. The command line keeps to
//! what both QEMU 7.2 (Debian 12) and 10.0 (Debian 13) understand.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::exec;
use crate::image::HostImage;

/// Name of the virtio-serial port that the agent uses.
pub const AGENT_PORT: &str = "org.gestalt.agent";

/// Last lines of a host's console that an error carries.
const CONSOLE_LINES: usize = 25;

/// What one emulated host has.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// CPUs that programs run on, at least 1. The host has one more, CPU 0, which is kept from them: see
    /// `files/host-init.sh`. With 1 a guest of two CPUs has them wait for each other's time slices: on a busy
    /// machine boots that take half a minute with 2 took minutes, and processes were silent for seconds
    /// (`docs/testing.md`).
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// MTU of its network in bytes.
    pub mtu: u32,
    /// How many networks it is on: the first, and rails for the fabric beside it.
    pub networks: usize,
    /// Whether it has an RDMA device on each network: soft-RoCE on its interface.
    pub rdma: bool,
    /// Raw images that it has as disks `/dev/vdb`, `/dev/vdc`, ... What it writes to them is forgotten at its
    /// end.
    pub disks: Vec<PathBuf>,
}

/// A running QEMU. Dropped, it is killed.
pub struct Qemu {
    child: Child,
    console: PathBuf,
}

impl Qemu {
    /// Starts host number `index`. `console` gets what its kernel prints; each of `networks` is one end of a
    /// stream socket pair whose other end is on a switch. Returns the stream to its agent too.
    ///
    /// # Errors
    /// QEMU is not installed, or no socket pair can be made.
    pub fn start(
        image: &HostImage,
        hardware: &Hardware,
        index: usize,
        stage: &Path,
        console: PathBuf,
        networks: Vec<OwnedFd>,
    ) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair().context("making a socket pair")?;
        let agent = OwnedFd::from(theirs);
        let append = format!(
            "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off audit=0 tsc=reliable \
             random.trust_cpu=on gestalt.host={index} gestalt.mtu={} gestalt.rdma={}",
            hardware.mtu,
            u8::from(hardware.rdma)
        );
        let program = program();
        let mut command = Command::new(&program);
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"])
            // Five-level paging would only make every emulated page walk longer. CMPXCHG16B breaks the flags
            // of a CPU in QEMU 7.2, which kills kernels now and then: see `files/broken-flags.c` and
            // `docs/testing.md`.
            .args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off,cx16=off"])
            .args(["-smp", &(hardware.cpus + 1).to_string(), "-m", &hardware.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&image.vmlinuz)
            .arg("-initrd")
            .arg(&image.initramfs)
            .args(["-append", &append])
            .arg("-drive")
            .arg(format!("if=none,id=root,format=raw,readonly=on,file={}", comma(&image.root)))
            .args(["-device", "virtio-blk-pci,drive=root"]);
        for (number, disk) in hardware.disks.iter().enumerate() {
            let drive = format!("if=none,id=disk{number},format=raw,snapshot=on,file={}", comma(disk));
            let device = format!("virtio-blk-pci,drive=disk{number}");
            command.args(["-drive", &drive, "-device", &device]);
        }
        command
            .arg("-fsdev")
            .arg(format!("local,id=stage,security_model=none,multidevs=remap,path={}", comma(stage)))
            .args(["-device", "virtio-9p-pci,fsdev=stage,mount_tag=stage"])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", comma(&console)))
            .args(["-serial", "chardev:console", "-device", "virtio-serial-pci", "-chardev"])
            .arg(format!("socket,id=agent,fd={}", agent.as_raw_fd()))
            .args(["-device", &format!("virtserialport,chardev=agent,name={AGENT_PORT}")])
            .args(["-device", "virtio-rng-pci"])
            // For a look at the emulated hardware from outside: `info registers -a`, `info cpus`.
            .arg("-monitor")
            .arg(format!("unix:{},server=on,wait=off", comma(&console.with_extension("monitor"))));
        let mut inherited = vec![agent.as_raw_fd()];
        for (card, network) in networks.iter().enumerate() {
            let fd = network.as_raw_fd();
            inherited.push(fd);
            command.arg("-netdev").arg(format!("stream,id=net{card},server=off,addr.type=fd,addr.str={fd}"));
            // No option ROM: nobody boots from it, and its package may be absent.
            let mac = mac(index, card);
            command.arg("-device").arg(format!("virtio-net-pci,netdev=net{card},romfile=,mac={mac}"));
        }
        let log = File::options().create(true).append(true).open(&console)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        inherit(&mut command, inherited);
        let child = exec::spawn_tethered(command)
            .with_context(|| format!("cannot start {program}: is the package qemu-system-x86 installed?"))?;
        // QEMU has its own copies of `agent` and `networks` now; ours close here, so that its end shows as
        // EOF.
        Ok((Self { child, console }, ours))
    }

    /// What the host's kernel, and QEMU itself, said last.
    pub fn console_tail(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for QEMU to end by itself; kills it when `limit` passes.
    pub fn finish(mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The emulator: `$GESTALT_QEMU`, else the installed one.
pub fn program() -> String {
    std::env::var("GESTALT_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into())
}

/// A locally administered address for a network card of host number `index`.
fn mac(index: usize, card: usize) -> String {
    format!("52:54:00:{:02x}:{:02x}:{:02x}", (0x77 + card) & 0xff, (index >> 8) & 0xff, index & 0xff)
}

/// A path inside a QEMU option, where a comma is written twice.
fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Lets the child inherit these descriptors under the same numbers.
fn inherit(command: &mut Command, descriptors: Vec<RawFd>) {
    // SAFETY: fcntl and building an io::Error from a code are async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            for &fd in &descriptors {
                if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}
