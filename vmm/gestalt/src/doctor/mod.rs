//! `gestalt doctor`: whether a node can run on this host, line by line, and how to mend what is not right.
//!
//! - [`facts`]: what there is to know of a host. [`probe`]: finding it out, the only part that touches one.
//! - `emulation`: whether times measured on a host say anything.
//! - [`evaluate`]: the judgement, a pure function.
//! - [`check_can_run`]: the same judgement for `gestalt run` and `gestalt node`, which refuse in its words.

mod emulation;
pub mod facts;
pub mod probe;
mod rdma;
mod trial;

use std::fmt;

use facts::{HostFacts, Trouble};

/// The oldest kernel that has all of `UFFDIO_CONTINUE_MODE_WP`.
const OLDEST_KERNEL: (u32, u32) = (6, 4);
/// Below this the fabric's 4 KiB pages travel in several packets each.
const PAGE_MTU: u32 = 4500;
/// Open files that suffice for a machine of eight nodes, with room to spare.
const ENOUGH_FILES: u64 = 1024;
/// The line for modprobe that makes page walks read the guest's page tables and not write them.
const EPTAD_OFF: &str = "options kvm_intel eptad=0";
/// The kernel's own default for `vm.max_map_count`.
const USUAL_MAPS: u64 = 65530;

/// What is to run here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// vCPUs of the largest node.
    pub cpus: u32,
    /// Guest memory of all nodes on this host, in bytes; 0 if it is not known.
    pub memory: u64,
}

/// How bad a finding is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// A machine runs, but slower or less safely than it could.
    Warn,
    /// No machine can run here.
    Fail,
}

/// One line of the doctor's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it; empty if nothing.
    pub mend: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        write!(f, "{level} {}", self.sentence())
    }
}

impl Finding {
    /// The finding and its mending in one sentence.
    pub fn sentence(&self) -> String {
        if self.mend.is_empty() { self.what.clone() } else { format!("{}: {}", self.what, self.mend) }
    }
}

fn ok(what: impl Into<String>) -> Finding {
    Finding { level: Level::Ok, what: what.into(), mend: String::new() }
}

fn warn(what: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { level: Level::Warn, what: what.into(), mend: mend.into() }
}

fn fail(what: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding { level: Level::Fail, what: what.into(), mend: mend.into() }
}

/// Judges a host: one finding for each thing that matters, in the order in which they are best mended.
pub fn evaluate(facts: &HostFacts, needs: &Needs) -> Vec<Finding> {
    let mut findings = vec![virtualization(facts)];
    kvm(facts, needs, &mut findings);
    findings.push(kernel(facts));
    userfaultfd(facts, &mut findings);
    findings.push(memory(facts, needs));
    findings.push(huge_pages(facts));
    findings.push(tsc(facts));
    network(facts, &mut findings);
    rdma::judge(&facts.rdma, &mut findings);
    limits(facts, &mut findings);
    findings
}

/// Whether what is needed can run here.
///
/// # Errors
/// The first `FAIL` of [`evaluate`], as one sentence.
pub fn check_can_run(needs: &Needs) -> Result<(), String> {
    can_run(&evaluate(&probe::host(), needs))
}

fn can_run(findings: &[Finding]) -> Result<(), String> {
    match findings.iter().find(|finding| finding.level == Level::Fail) {
        None => Ok(()),
        Some(finding) => Err(finding.sentence()),
    }
}

fn virtualization(facts: &HostFacts) -> Finding {
    match facts.virtualization {
        Some(flag) => ok(format!("the CPUs have hardware virtualization ({flag})")),
        None if facts.guest => fail(
            "this host's CPUs offer neither VMX nor SVM, and it is a virtual machine itself",
            "let its hypervisor pass nested virtualization on, or use a physical host; `cargo xtask quickstart` \
             emulates one",
        ),
        None => fail(
            "this host's CPUs offer neither VMX nor SVM",
            "switch virtualization on in the firmware's set-up (VT-x or SVM mode), or use another host",
        ),
    }
}

fn kvm(facts: &HostFacts, needs: &Needs, findings: &mut Vec<Finding>) {
    let module = if facts.virtualization == Some("svm") { "kvm_amd" } else { "kvm_intel" };
    let kvm = match &facts.kvm {
        Ok(kvm) => kvm,
        Err(Trouble::Absent) => {
            return findings
                .push(fail("there is no /dev/kvm", format!("load KVM with `modprobe {module}` as root")));
        }
        Err(Trouble::Denied) => {
            let mend =
                "run as root, or add this user to the group that owns it (usually kvm) and log in again";
            return findings.push(fail("/dev/kvm may not be opened by this user", mend));
        }
        Err(Trouble::Other(why)) => {
            let mend = format!("see `dmesg | grep -i kvm`, and whether {module} is loaded");
            return findings.push(fail(format!("/dev/kvm does not work ({why})"), mend));
        }
    };
    if !kvm.missing.is_empty() {
        let what = format!("KVM lacks {}", kvm.missing.join(", "));
        findings.push(fail(what, "boot a Linux kernel of version 6.4 or newer"));
    }
    match &kvm.runs {
        Ok(()) => findings.push(ok("/dev/kvm makes and runs a virtual machine, and has what is needed")),
        Err(why) => findings.push(fail(
            format!("KVM cannot run a virtual machine ({why})"),
            "see `dmesg | grep -i kvm`, and whether another hypervisor holds the CPUs",
        )),
    }
    if u64::from(needs.cpus) > kvm.max_vcpus {
        findings.push(fail(
            format!("a node of {} CPUs is asked for, and KVM allows {}", needs.cpus, kvm.max_vcpus),
            "give the node fewer CPUs",
        ));
    } else if needs.cpus > facts.cpus {
        findings.push(warn(
            format!("a node of {} CPUs is asked for, and this host has {}", needs.cpus, facts.cpus),
            "vCPUs will wait for each other: give the node no more CPUs than its host has",
        ));
    }
    if !kvm.tsc_offset {
        findings.push(warn(
            "KVM cannot set a vCPU's TSC offset exactly (KVM_VCPU_TSC_CTRL)",
            "clocks of different nodes agree less well: boot a Linux kernel of version 5.16 or newer",
        ));
    }
    if !kvm.tsc_control {
        findings
            .push(warn("KVM cannot scale the TSC", "all hosts of a machine must have TSCs of one frequency"));
    }
    if !kvm.deadline_timer {
        findings.push(warn(
            "KVM drops the guest's TSC-deadline timer before we see it",
            "nothing to do: guests use the one-shot timer, which exits a little more often",
        ));
    }
    // Where no virtual machine runs, or userfaultfd does not serve, that is what is to be mended.
    if kvm.runs.is_ok() && facts.userfaultfd.is_ok() {
        findings.push(match &kvm.called_out {
            Ok(took) => {
                let us = took.as_micros();
                ok(format!("a vCPU that waits for a page can be called out of its wait (in {us} us)"))
            }
            Err(why) => warn(
                format!("a vCPU that waits for a page cannot be called out of its wait ({why})"),
                "its interrupts wait as well, and all else works: boot a Linux kernel of version 6.4 or newer",
            ),
        });
    }
    if kvm.nested_paging == Some(false) {
        findings.push(fail(
            "KVM runs without EPT or NPT, and so would not see another node's writes to the guest's page tables",
            format!("load {module} with ept=1 or npt=1"),
        ));
    }
    match kvm.ept_accessed_dirty {
        Some(true) => findings.push(warn(
            "every page walk counts as a write to the guest's page tables (EPT accessed and dirty bits)",
            format!(
                "nodes cannot share page tables, which costs more than any other setting: write `{EPTAD_OFF}` to \
                 /etc/modprobe.d/gestalt.conf and load kvm_intel again"
            ),
        )),
        Some(false) => findings.push(ok("page walks leave the guest's page tables alone (eptad is off)")),
        None => {}
    }
}

fn kernel(facts: &HostFacts) -> Finding {
    let mut numbers = facts.kernel.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_KERNEL => {
            ok(format!("Linux {}", facts.kernel))
        }
        (Some(_), Some(_)) => fail(
            format!("Linux {} is too old: userfaultfd cannot map pages write-protected", facts.kernel),
            "boot 6.4 or newer (Debian 13 has 6.12; Debian 12 has newer kernels in backports)",
        ),
        _ => warn(format!("the kernel's version {:?} says nothing", facts.kernel), "6.4 or newer is needed"),
    }
}

fn userfaultfd(facts: &HostFacts, findings: &mut Vec<Finding>) {
    match (&facts.userfaultfd, &facts.continue_protected) {
        // The reason says how to mend it.
        (Err(why), _) => findings.push(fail(why, "")),
        (Ok(()), Err(why)) => findings.push(fail(
            format!("userfaultfd cannot map a page write-protected ({why})"),
            "boot a Linux kernel of version 6.4 or newer",
        )),
        (Ok(()), Ok(())) => findings.push(ok(
            "userfaultfd handles the kernel's own faults, minor faults and write protection on shared memory",
        )),
    }
}

fn memory(facts: &HostFacts, needs: &Needs) -> Finding {
    let available = mib(facts.memory_available);
    if needs.memory == 0 {
        return ok(format!("{available} of memory are available"));
    }
    let asked = mib(needs.memory);
    if needs.memory > facts.memory_available {
        return fail(
            format!("{asked} of guest memory are asked for here, and {available} are available"),
            "give the nodes on this host less memory, or end something else",
        );
    }
    ok(format!("{available} of memory are available, and {asked} are asked for"))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn huge_pages(facts: &HostFacts) -> Finding {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    match facts.shmem_huge.as_deref() {
        Some(value @ ("advise" | "always" | "within_size" | "force")) => {
            ok(format!("guest memory may use huge pages (shmem_enabled is {value})"))
        }
        Some(value) => warn(
            format!("guest memory may not use huge pages (shmem_enabled is {value})"),
            format!("memory that stays at home is slower to touch: `echo advise > {FILE}`"),
        ),
        None => warn("the kernel has no huge pages for shared memory", "nothing breaks; it is slower"),
    }
}

fn tsc(facts: &HostFacts) -> Finding {
    let tsc = &facts.tsc;
    let source = tsc.clocksource.as_deref().unwrap_or("unknown");
    if !tsc.constant || !tsc.nonstop {
        return warn(
            format!("the TSC is not said to be constant and nonstop (the host's clock is {source})"),
            "the guest's clock may drift: switch deep sleep and frequency changes off, or use newer CPUs",
        );
    }
    if source != "tsc" {
        return warn(
            format!("the host's own clock is {source}, not the TSC"),
            "its kernel may have found the TSC unstable: see `dmesg | grep -i tsc`",
        );
    }
    ok("the TSC is constant, nonstop, and the host's own clock")
}

fn network(facts: &HostFacts, findings: &mut Vec<Finding>) {
    if facts.interfaces.is_empty() {
        findings.push(warn(
            "no network interface is up",
            "only machines whose nodes are all on this host can run",
        ));
    }
    for interface in &facts.interfaces {
        let (name, mtu) = (&interface.name, interface.mtu);
        findings.push(if mtu >= PAGE_MTU {
            ok(format!("{name} has an MTU of {mtu}"))
        } else {
            warn(
                format!("{name} has an MTU of {mtu}, so a page travels in several packets"),
                format!(
                    "if nodes talk over it and its switches can, `ip link set {name} mtu 9000` on all hosts"
                ),
            )
        });
    }
}

fn limits(facts: &HostFacts, findings: &mut Vec<Finding>) {
    if let Some(maps) = facts.max_map_count.filter(|maps| *maps < USUAL_MAPS) {
        findings.push(warn(
            format!("vm.max_map_count is {maps}"),
            format!("guest memory may run out of mappings: `sysctl vm.max_map_count={USUAL_MAPS}`"),
        ));
    }
    let (soft, hard) = (facts.open_files, facts.open_files_hard);
    findings.push(if soft >= ENOUGH_FILES {
        ok(format!("{soft} files may be open in a process"))
    } else {
        warn(
            format!("only {soft} files may be open in a process (at most {hard})"),
            format!("machines of many nodes need more: `ulimit -n {ENOUGH_FILES}`"),
        )
    });
}

#[cfg(test)]
mod tests;
