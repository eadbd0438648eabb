//! The judgement on hosts that are made up.

use std::time::Duration;

use super::facts::{Interface, KvmFacts, RdmaFacts, TscFacts};
use super::*;

fn good() -> HostFacts {
    HostFacts {
        kernel: "6.12.41+deb13-amd64".into(),
        cpus: 8,
        virtualization: Some("svm"),
        guest: false,
        kvm: Ok(KvmFacts {
            missing: Vec::new(),
            max_vcpus: 1024,
            runs: Ok(()),
            tsc_offset: true,
            tsc_control: true,
            called_out: Ok(Duration::from_micros(40)),
            deadline_timer: true,
            nested_paging: Some(true),
            ept_accessed_dirty: None,
        }),
        userfaultfd: Ok(()),
        continue_protected: Ok(()),
        memory_available: 8 << 30,
        shmem_huge: Some("advise".into()),
        tsc: TscFacts { constant: true, nonstop: true, clocksource: Some("tsc".into()) },
        interfaces: vec![Interface { name: "eth0".into(), mtu: 9000 }],
        rdma: RdmaFacts { library: Ok(()), ports: Vec::new(), lockable: None },
        max_map_count: Some(USUAL_MAPS),
        open_files: 1024,
        open_files_hard: 1 << 20,
    }
}

fn with_kvm(change: impl FnOnce(&mut KvmFacts)) -> HostFacts {
    let mut facts = good();
    if let Ok(kvm) = &mut facts.kvm {
        change(kvm);
    }
    facts
}

fn judge(facts: &HostFacts) -> Vec<Finding> {
    evaluate(facts, &Needs { cpus: 2, memory: 1 << 30 })
}

#[test]
fn a_good_host_has_nothing_to_mend() {
    for finding in judge(&good()) {
        assert_eq!((finding.level, finding.mend.as_str()), (Level::Ok, ""), "{finding}");
    }
    assert_eq!(can_run(&judge(&good())), Ok(()));
}

#[test]
fn what_makes_a_machine_impossible_fails_with_its_mending() {
    let cases = [
        (HostFacts { virtualization: None, ..good() }, "neither VMX nor SVM", "firmware"),
        (HostFacts { virtualization: None, guest: true, ..good() }, "virtual machine itself", "nested"),
        (HostFacts { kvm: Err(Trouble::Absent), ..good() }, "no /dev/kvm", "modprobe kvm_amd"),
        (HostFacts { kvm: Err(Trouble::Denied), ..good() }, "may not be opened", "group"),
        (HostFacts { kvm: Err(Trouble::Other("EIO".into())), ..good() }, "EIO", "dmesg"),
        (with_kvm(|kvm| kvm.missing = vec!["KVM_CAP_X86_MSR_FILTER".into()]), "X86_MSR_FILTER", "6.4"),
        (with_kvm(|kvm| kvm.runs = Err("EBUSY".into())), "EBUSY", "another hypervisor"),
        (with_kvm(|kvm| kvm.max_vcpus = 1), "KVM allows 1", "fewer CPUs"),
        (with_kvm(|kvm| kvm.nested_paging = Some(false)), "without EPT or NPT", "npt=1"),
        (HostFacts { kernel: "6.1.0-38-amd64".into(), ..good() }, "6.1.0-38-amd64 is too old", "backports"),
        (HostFacts { userfaultfd: Err("not allowed: run as root".into()), ..good() }, "not allowed", "root"),
        (HostFacts { continue_protected: Err("EINVAL".into()), ..good() }, "EINVAL", "6.4"),
        (HostFacts { memory_available: 1 << 20, ..good() }, "1024 MiB of guest memory", "less memory"),
    ];
    for (facts, what, mend) in cases {
        let said = can_run(&judge(&facts)).unwrap_err();
        assert!(said.contains(what) && said.contains(mend), "{said:?} lacks {what:?} or {mend:?}");
        assert!(!said.contains('\n'), "{said:?}");
    }
}

#[test]
fn what_is_only_slow_or_risky_warns() {
    let cases = [
        (with_kvm(|kvm| kvm.tsc_offset = false), "TSC offset"),
        (with_kvm(|kvm| kvm.tsc_control = false), "scale the TSC"),
        (with_kvm(|kvm| kvm.deadline_timer = false), "TSC-deadline"),
        (
            with_kvm(|kvm| kvm.called_out = Err("it stays".into())),
            "cannot be called out of its wait (it stays)",
        ),
        (with_kvm(|kvm| kvm.ept_accessed_dirty = Some(true)), "eptad=0"),
        (HostFacts { cpus: 1, ..good() }, "this host has 1"),
        (HostFacts { shmem_huge: Some("never".into()), ..good() }, "echo advise >"),
        (HostFacts { shmem_huge: None, ..good() }, "huge pages"),
        (HostFacts { tsc: TscFacts::default(), ..good() }, "may drift"),
        (
            HostFacts {
                tsc: TscFacts { constant: true, nonstop: true, clocksource: Some("hpet".into()) },
                ..good()
            },
            "hpet",
        ),
        (HostFacts { interfaces: Vec::new(), ..good() }, "no network"),
        (
            HostFacts { interfaces: vec![Interface { name: "eth1".into(), mtu: 1500 }], ..good() },
            "ip link set eth1 mtu 9000",
        ),
        (HostFacts { max_map_count: Some(1000), ..good() }, "max_map_count"),
        (HostFacts { open_files: 64, ..good() }, "ulimit -n"),
        (HostFacts { kernel: "custom".into(), ..good() }, "custom"),
    ];
    for (facts, part) in cases {
        let findings = judge(&facts);
        assert_eq!(can_run(&findings), Ok(()), "{part}");
        let warned = |finding: &Finding| finding.level == Level::Warn && finding.sentence().contains(part);
        assert!(findings.iter().any(warned), "no warning says {part:?}: {findings:?}");
    }
}

#[test]
fn whether_eptad_is_off_is_said_of_intel_hosts_only() {
    let said = |eptad| {
        let judged = judge(&with_kvm(|kvm| kvm.ept_accessed_dirty = eptad));
        judged.into_iter().find(|finding| finding.sentence().contains("eptad"))
    };
    assert_eq!(said(None), None);
    let off = said(Some(false)).unwrap();
    assert!(off.level == Level::Ok && off.what.contains("eptad is off") && off.mend.is_empty(), "{off}");
    let on = said(Some(true)).unwrap();
    assert_eq!(on.level, Level::Warn);
    for part in ["`options kvm_intel eptad=0`", "/etc/modprobe.d/"] {
        assert!(on.mend.contains(part), "{on}");
    }
}

#[test]
fn the_first_thing_to_mend_is_named_first() {
    let facts = HostFacts {
        virtualization: None,
        kvm: Err(Trouble::Absent),
        userfaultfd: Err("userfaultfd: run as root".into()),
        ..good()
    };
    assert!(can_run(&judge(&facts)).unwrap_err().contains("neither VMX nor SVM"));
}

#[test]
fn probing_this_host_ends_with_a_judgement_on_everything() {
    let facts = probe::host();
    assert!(!facts.kernel.is_empty() && facts.cpus > 0 && facts.memory_available > 0, "{facts:?}");
    assert!(evaluate(&facts, &Needs::default()).len() >= 8);
}
