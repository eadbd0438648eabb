//! A virtual machine that stays open on a host, so that the host's kernel need not patch itself.
//!
//! KVM switches two code paths of the whole kernel on with the first virtual machine and off with the last:
//! the scheduler's notifiers (`preempt_notifier_key`, in the middle of `__schedule`) and CPUs without a local
//! APIC in the kernel (`kvm_has_noapic_vcpu`). Both by patching code that all CPUs run, which an emulator may
//! get wrong: see [`crate::stale`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `KVM_CREATE_VM` and `KVM_CREATE_VCPU`: `_IO(0xae, number)`.
const CREATE_VM: libc::c_ulong = 0xae01;
const CREATE_VCPU: libc::c_ulong = 0xae41;

/// An open virtual machine with one CPU, which never runs.
pub struct Keeper {
    _cpu: OwnedFd,
    _vm: OwnedFd,
}

impl Keeper {
    /// Opens it.
    ///
    /// # Errors
    /// There is no KVM, or no right to use it.
    pub fn open() -> io::Result<Self> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let vm = create(&kvm, CREATE_VM)?;
        let cpu = create(&vm, CREATE_VCPU)?;
        Ok(Self { _cpu: cpu, _vm: vm })
    }
}

/// Makes the virtual machine of the default type, or its CPU 0.
fn create(of: &impl AsRawFd, request: libc::c_ulong) -> io::Result<OwnedFd> {
    // SAFETY: both requests take an integer, here 0, touch no memory of ours, and return a new descriptor or
    // -1.
    let fd = unsafe { libc::ioctl(of.as_raw_fd(), request, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_can_be_kept_open_beside_another() {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("skipped: /dev/kvm: {error}");
            return;
        }
        let _two = [Keeper::open().unwrap(), Keeper::open().unwrap()];
    }
}
