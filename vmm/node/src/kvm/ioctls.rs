//! The ioctls of linux/kvm.h that kvm-ioctls 0.25 does not offer on x86-64.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;

use super::KvmError;

/// `_IOW(KVMIO, nr, size bytes)`.
const fn iow(nr: u64, size: usize) -> u64 {
    1 << 30 | (size as u64) << 16 | 0xae << 8 | nr
}

const KVM_INTERRUPT: u64 = iow(0x86, size_of::<u32>());
/// The size is that of the struct without its flexible array.
const KVM_SET_SIGNAL_MASK: u64 = iow(0x8b, size_of::<u32>());
const KVM_SET_DEVICE_ATTR: u64 = iow(0xe1, size_of::<kvm_device_attr>());
const KVM_HAS_DEVICE_ATTR: u64 = iow(0xe3, size_of::<kvm_device_attr>());

/// The kernel's `sigset_t`: one bit a signal, signal 1 in bit 0.
const KERNEL_SIGSET_BYTES: u32 = 8;

/// `struct kvm_signal_mask` with its array filled in.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: u64,
}
const _: () = assert!(size_of::<SignalMask>() == 12);

/// Injects an external interrupt at the next entry (`KVM_INTERRUPT`).
pub(super) fn interrupt(fd: &VcpuFd, vector: u8) -> Result<(), KvmError> {
    let vector = u32::from(vector);
    // SAFETY: the ioctl reads one u32, which lives until it returns.
    match unsafe { libc::ioctl(fd.as_raw_fd(), KVM_INTERRUPT, &vector) } {
        0 => Ok(()),
        _ => Err(KvmError::last("inject an interrupt")),
    }
}

/// Makes `blocked` the thread's signal mask while it is inside `KVM_RUN` (bit n - 1: signal n).
pub(super) fn set_signal_mask(fd: &VcpuFd, blocked: u64) -> Result<(), KvmError> {
    let mask = SignalMask { len: KERNEL_SIGSET_BYTES, set: blocked };
    // SAFETY: the ioctl reads `len` and then `len` bytes, both inside `mask`.
    match unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_SIGNAL_MASK, &mask) } {
        0 => Ok(()),
        _ => Err(KvmError::last("set the signal mask of a vCPU")),
    }
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// Whether the vCPU's TSC offset can be set (`KVM_VCPU_TSC_OFFSET`, Linux 5.16).
pub(super) fn has_tsc_offset(fd: &VcpuFd) -> bool {
    let mut unused = 0;
    let attr = tsc_offset_attr(&mut unused);
    // SAFETY: the ioctl reads the attribute's name and touches nothing at `addr`.
    unsafe { libc::ioctl(fd.as_raw_fd(), KVM_HAS_DEVICE_ATTR, &attr) == 0 }
}

/// Sets what KVM adds to the (scaled) host TSC, modulo 2^64.
pub(super) fn set_tsc_offset(fd: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: the ioctl reads `attr` and 8 bytes at its `addr`, which is `offset`.
    match unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_DEVICE_ATTR, &attr) } {
        0 => Ok(()),
        _ => Err(KvmError::last("set the TSC offset of a vCPU")),
    }
}
