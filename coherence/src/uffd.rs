//! userfaultfd: the few calls that the engine needs, behind safe types.
//!
//! Constants and structures are those of `linux/userfaultfd.h` (Linux 6.4 for `CONTINUE_MODE_WP`); Debian
//! 12's headers lack the newer ones, so they stand here, their sizes asserted.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

const API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_THREAD_ID: u64 = 1 << 8;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Everything the engine relies on.
pub const FEATURES: u64 = FEATURE_PAGEFAULT_FLAG_WP
    | FEATURE_MISSING_SHMEM
    | FEATURE_THREAD_ID
    | FEATURE_MINOR_SHMEM
    | FEATURE_WP_HUGETLBFS_SHMEM;

const EVENT_PAGEFAULT: u8 = 0x12;
const FLAG_WRITE: u64 = 1;
const FLAG_WP: u64 = 2;
const FLAG_MINOR: u64 = 4;

const fn iowr(nr: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | 0xaa << 8 | nr
}

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct RegisterArg {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct WriteProtectArg {
    start: u64,
    len: u64,
    mode: u64,
}
#[repr(C)]
struct ContinueArg {
    start: u64,
    len: u64,
    mode: u64,
    mapped: i64,
}
#[repr(C)]
struct WakeArg {
    start: u64,
    len: u64,
}
/// `struct uffd_msg`: an event, packed.
#[derive(Copy, Clone)]
#[repr(C)]
struct Msg {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u32,
    zero: u32,
}
const _: () = assert!(size_of::<Msg>() == 32);

/// The argument of a request to a userfaultfd.
///
/// # Safety
/// For `REQUEST` the kernel reads and writes this structure and no other memory of this process; addresses
/// inside it are of what the request is about, and the kernel checks them.
unsafe trait Argument {
    const REQUEST: u64;
}

// SAFETY: `struct uffdio_api`.
unsafe impl Argument for ApiArg {
    const REQUEST: u64 = iowr(0x3f, size_of::<ApiArg>());
}
// SAFETY: `struct uffdio_register`.
unsafe impl Argument for RegisterArg {
    const REQUEST: u64 = iowr(0x00, size_of::<RegisterArg>());
}
// SAFETY: `struct uffdio_range`, for UFFDIO_WAKE.
unsafe impl Argument for WakeArg {
    const REQUEST: u64 = 2 << 30 | (size_of::<WakeArg>() as u64) << 16 | 0xaa << 8 | 0x02;
}
// SAFETY: `struct uffdio_writeprotect`.
unsafe impl Argument for WriteProtectArg {
    const REQUEST: u64 = iowr(0x06, size_of::<WriteProtectArg>());
}
// SAFETY: `struct uffdio_continue`.
unsafe impl Argument for ContinueArg {
    const REQUEST: u64 = iowr(0x07, size_of::<ContinueArg>());
}
const _: () = assert!(
    ApiArg::REQUEST == 0xc018_aa3f && RegisterArg::REQUEST == 0xc020_aa00 && WakeArg::REQUEST == 0x8010_aa02
);

/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd`.
const IOC_NEW: u64 = 0xaa00;

/// Which accesses raise an event.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Mode {
    /// Pages that are in the file but not mapped, and write-protected ones. What is not in the file is the
    /// kernel's to fill: the home's own memory.
    Home,
    /// These, and pages that are not in the file: another node's memory.
    Remote,
}

/// A fault that waits for its page.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Fault {
    /// The address touched, in the guest view.
    pub address: u64,
    /// It was a write.
    pub write: bool,
    /// The page is mapped, write-protected.
    pub write_protected: bool,
    /// The page is in the file but not mapped.
    pub minor: bool,
    /// The thread that waits, as the kernel numbers it.
    pub thread: u32,
}

impl Fault {
    /// For the trace: 1 write, 2 write-protected, 4 minor.
    pub fn flags(&self) -> u64 {
        u64::from(self.write) | u64::from(self.write_protected) << 1 | u64::from(self.minor) << 2
    }
}

/// An open userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

/// Events read in one call.
const BATCH: usize = 16;

impl Uffd {
    /// Opens one that also reports faults of the kernel itself (KVM, `copy_to_user`).
    ///
    /// # Errors
    /// A sentence for the operator: no permission, or a kernel without the needed features.
    pub fn open() -> Result<Uffd, String> {
        let fd = open_fd().map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) | Some(libc::EACCES) => {
                "userfaultfd may not handle kernel faults for this user: run as \
                root, give the binary CAP_SYS_PTRACE, or set sysctl vm.unprivileged_userfaultfd=1"
                    .to_string()
            }
            Some(libc::ENOSYS) => {
                "this kernel has no userfaultfd: use one built with CONFIG_USERFAULTFD".to_string()
            }
            _ => format!("userfaultfd: {e}"),
        })?;
        let uffd = Uffd(fd);
        let mut arg = ApiArg { api: API, features: FEATURES, ioctls: 0 };
        uffd.ioctl(&mut arg).map_err(|_| {
            "this kernel's userfaultfd lacks minor faults or write protection on shared memory: Linux 6.4 or \
             newer is needed"
                .to_string()
        })?;
        Ok(uffd)
    }

    fn ioctl<T: Argument>(&self, arg: &mut T) -> io::Result<()> {
        // SAFETY: the structure belongs to the request, as its type promises, and is alive for the call.
        let rc = unsafe { libc::ioctl(self.0.as_raw_fd(), T::REQUEST, std::ptr::from_mut(arg)) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Watches a range of the guest view. Addresses and lengths are multiples of the page size.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn register(&self, start: u64, len: u64, mode: Mode) -> io::Result<()> {
        let mode = match mode {
            Mode::Home => 2 | 4,
            Mode::Remote => 1 | 2 | 4,
        };
        self.ioctl(&mut RegisterArg { start, len, mode, ioctls: 0 })
    }

    /// Maps pages that are in the file, and wakes who waits for them. Returns the bytes mapped: fewer than
    /// `len` when a page was mapped already.
    ///
    /// # Errors
    /// What the kernel says; a page that is mapped already is no error.
    pub fn map(&self, start: u64, len: u64, write_protect: bool) -> io::Result<u64> {
        let mut arg = ContinueArg { start, len, mode: if write_protect { 2 } else { 0 }, mapped: 0 };
        loop {
            arg.mapped = 0;
            match self.ioctl(&mut arg) {
                Ok(()) => return Ok(len),
                Err(e) if arg.mapped > 0 && e.raw_os_error() == Some(libc::EAGAIN) => {
                    // Interrupted half-way: the rest is still to do.
                    let done = arg.mapped as u64;
                    let rest = self.map(start + done, len - done, write_protect)?;
                    return Ok(done + rest);
                }
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => continue,
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => return Ok(arg.mapped.max(0) as u64),
                Err(e) => return Err(e),
            }
        }
    }

    /// Sets or lifts the write protection of a range; lifting it wakes who waits.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn protect(&self, start: u64, len: u64, on: bool) -> io::Result<()> {
        loop {
            match self.ioctl(&mut WriteProtectArg { start, len, mode: u64::from(on) }) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => continue,
                other => return other,
            }
        }
    }

    /// Wakes who waits for a page of the range.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(&mut WakeArg { start, len })
    }

    /// Hands the waiting faults to `sink`; how many there were. Does not block.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self, mut sink: impl FnMut(Fault)) -> io::Result<usize> {
        let mut msgs = [Msg { event: 0, reserved: [0; 7], flags: 0, address: 0, thread: 0, zero: 0 }; BATCH];
        // SAFETY: the buffer is as long as said, and every bit pattern is a valid Msg.
        let n = unsafe { libc::read(self.0.as_raw_fd(), msgs.as_mut_ptr().cast(), size_of_val(&msgs)) };
        if n < 0 {
            let e = io::Error::last_os_error();
            return if e.kind() == io::ErrorKind::WouldBlock { Ok(0) } else { Err(e) };
        }
        let count = n as usize / size_of::<Msg>();
        for msg in &msgs[..count] {
            if msg.event == EVENT_PAGEFAULT {
                sink(Fault {
                    address: msg.address,
                    write: msg.flags & (FLAG_WRITE | FLAG_WP) != 0,
                    write_protected: msg.flags & FLAG_WP != 0,
                    minor: msg.flags & FLAG_MINOR != 0,
                    thread: msg.thread,
                });
            }
        }
        Ok(count)
    }
}

impl Uffd {
    /// Waits until faults wait, at most `limit`: the first of them, as many as are read at once. None: the
    /// time is up.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&self, limit: Duration) -> io::Result<Vec<Fault>> {
        let deadline = Instant::now() + limit;
        loop {
            let mut faults = Vec::new();
            self.read(|fault| faults.push(fault))?;
            let left = deadline.saturating_duration_since(Instant::now());
            if !faults.is_empty() || left.is_zero() {
                return Ok(faults);
            }
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match ppoll(&mut ready, Some(TimeSpec::from_duration(left)), None) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// By system call, or through the device for who may open it but not call.
fn open_fd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags only; its result is checked before it is owned.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as RawFd;
    if fd >= 0 {
        // SAFETY: a fresh descriptor that nobody else owns.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let error = io::Error::last_os_error();
    let Ok(device) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") else {
        return Err(error);
    };
    // SAFETY: the request takes the flags as its argument; the result is checked.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
    if fd < 0 {
        return Err(error);
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
