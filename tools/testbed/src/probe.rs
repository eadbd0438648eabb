//! The probe: whether this machine can run Linux guests itself, or needs the emulated rack.

use std::fs;

/// Why Linux guests cannot run directly here, or `None` when they can.
///
/// An openable `/dev/kvm` is not enough: where KVM has no VMX or SVM below it (KVM on PVM), it interprets the
/// guest's kernel instruction by instruction and Linux never gets through its boot.
pub fn needs_rack() -> Option<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualization(&cpuinfo) {
        return Some("/proc/cpuinfo shows neither vmx nor svm".into());
    }
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .err()
        .map(|error| format!("/dev/kvm cannot be opened: {error}"))
}

/// Whether the flags of `/proc/cpuinfo` name Intel's or AMD's virtualization.
fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.flat_map(str::split_whitespace).any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_flag_counts() {
        assert!(has_virtualization("flags\t\t: fpu vmx sse2"));
        assert!(has_virtualization("processor: 0\nflags : fpu svm"));
        assert!(!has_virtualization("flags\t\t: fpu svm_lock sse2\nvmx flags : vnmi"));
    }
}
