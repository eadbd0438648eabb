//! Features that stay on and that go, on one host and on several that differ.

use super::*;
use crate::spec::{MachineSpec, NodeSpec};
use proptest::prelude::*;

const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

fn entry(leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry { leaf, subleaf, significant_index: has_subleaves(leaf), eax, ebx, ecx, edx }
}

/// A CPU that claims every feature there is, so that whatever is missing afterwards was taken away.
fn boastful([ebx, ecx, edx]: [u32; 3]) -> Vec<CpuidEntry> {
    let all = u32::MAX;
    let mut entries = vec![
        entry(0, 0, [0x24, ebx, ecx, edx]),
        entry(1, 0, [0x806f8, 0xff10_0800, all, all]),
        entry(4, 0, [0xfc01_c121, 0x02c0_003f, 63, 0]),
        entry(4, 1, [0xfc01_c143, 0x03c0_003f, 2047, 0]),
        entry(4, 2, [0xfc0f_c163, 0x0380_003f, 0xffff, 4]),
        entry(4, 3, [0; 4]),
        entry(5, 0, [64, 64, 3, 0x2020]),
        entry(6, 0, [all; 4]),
        entry(7, 0, [5, all, all, all]),
        entry(7, 1, [all; 4]),
        entry(7, 2, [0, 0, 0, 0x3f]),
        entry(7, 3, [all; 4]),
        entry(0xa, 0, [0x0830_0805, 0, 0xf, 0x8604]),
        entry(0xb, 0, [1, 2, 0x100, 99]),
        entry(0xb, 1, [7, 128, 0x201, 99]),
        entry(0xd, 0, [0x602e7, 576, 11008, 0]),
        entry(0xd, 1, [0x1f, 11008, 0x1900, 0]),
        entry(0xd, 2, [256, 576, 0, 0]),
        entry(0xd, 5, [64, 1088, 0, 0]),
        entry(0xd, 6, [512, 1152, 0, 0]),
        entry(0xd, 7, [1024, 1664, 0, 0]),
        entry(0xd, 8, [128, 0, 1, 0]),
        entry(0xd, 9, [8, 2688, 0, 0]),
        entry(0xd, 11, [16, 0, 1, 0]),
        entry(0xd, 12, [24, 0, 1, 0]),
        entry(0xd, 17, [64, 2752, 2, 0]),
        entry(0xd, 18, [8192, 2816, 6, 0]),
        entry(0x12, 0, [all; 4]),
        entry(0x14, 0, [1, all, all, 0]),
        entry(0x1d, 0, [1, 0, 0, 0]),
        entry(0x1d, 1, [0x0400_2000, 0x8_0040, 0x10, 0]),
        entry(0x1e, 0, [0, 0x4010, 0, 0]),
        entry(0x23, 0, [all; 4]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [all, 0, 0, all]),
        entry(0x4000_0010, 0, [all; 4]),
        entry(0x8000_0000, 0, [0x8000_0026, ebx, ecx, edx]),
        entry(0x8000_0001, 0, [0, 0, all, all]),
        entry(0x8000_0002, 0, [0x4555_5043; 4]),
        entry(0x8000_0007, 0, [0, 0, 0, all]),
        entry(0x8000_0008, 0, [0x3034, all, 0x707f, all]),
        entry(0x8000_000a, 0, [all; 4]),
        entry(0x8000_001d, 0, [0x4121, 0x1c0_003f, 63, 0]),
        entry(0x8000_001d, 3, [0x3c163, 0x3c0_003f, 0x7fff, 1]),
        entry(0x8000_001e, 0, [77, 0x105, 0x103, 0]),
        entry(0x8000_001f, 0, [all; 4]),
        entry(0x8000_0021, 0, [all; 4]),
        entry(0x8000_0022, 0, [all; 4]),
        entry(0x8000_0026, 0, [all; 4]),
    ];
    entries.retain(|e| ebx == INTEL[0] || !matches!(e.leaf, 4 | 0x12 | 0x14 | 0x1d | 0x1e));
    entries.retain(|e| ebx == AMD[0] || !matches!(e.leaf, 0x8000_000a | 0x8000_001d..));
    entries
}

fn find(entries: &[CpuidEntry], leaf: u32, subleaf: u32) -> CpuidEntry {
    *entries
        .iter()
        .find(|e| (e.leaf, e.subleaf) == (leaf, subleaf))
        .unwrap_or_else(|| panic!("no leaf {leaf:#x}.{subleaf}"))
}

fn has(entries: &[CpuidEntry], leaf: u32) -> bool {
    entries.iter().any(|e| e.leaf == leaf)
}

fn layout(cpus: &[u32]) -> Layout {
    let nodes = cpus.iter().enumerate();
    let nodes = nodes.map(|(id, &cpus)| NodeSpec { name: format!("n{id}"), cpus, memory: 1 << 30 }).collect();
    Layout::new(&MachineSpec { nodes, distances: Vec::new(), pci: false }, 0).unwrap()
}

#[test]
fn what_needs_one_host_is_off() {
    for vendor in [INTEL, AMD] {
        let base = intersect(&[boastful(vendor)]).unwrap();
        let features = find(&base, 1, 0);
        for (name, bit) in [("MONITOR", 3), ("VMX", 5), ("PDCM", 15), ("OSXSAVE", 27)] {
            assert_eq!(features.ecx >> bit & 1, 0, "{name}");
        }
        assert_eq!(features.edx >> 21 & 1, 0, "DS");
        let more = find(&base, 7, 0);
        for (name, bit) in [("TSC_ADJUST", 1), ("SGX", 2), ("HLE", 4), ("RTM", 11), ("MPX", 14), ("PT", 25)] {
            assert_eq!(more.ebx >> bit & 1, 0, "{name}");
        }
        assert_eq!(more.ecx >> 5 & 1, 0, "WAITPKG");
        let amd = find(&base, 0x8000_0001, 0);
        for (name, bit) in [("SVM", 2), ("IBS", 10), ("PERFCTR_CORE", 23), ("MWAITX", 29)] {
            assert_eq!(amd.ecx >> bit & 1, 0, "{name}");
        }
        assert_eq!(find(&base, 0x8000_0008, 0).ebx >> 3 & 1, 0, "INVLPGB");
        for leaf in
            [5, 0xa, 0x12, 0x14, 0x23, 0x4000_0010, 0x8000_000a, 0x8000_001f, 0x8000_0022, 0x8000_0026]
        {
            assert!(!has(&base, leaf), "leaf {leaf:#x}");
        }
        assert_eq!(find(&base, 0x4000_0001, 0), entry(0x4000_0001, 0, [1 << 1, 0, 0, 0]));
    }
}

#[test]
fn what_the_machine_provides_is_on_even_if_kvm_does_not_say_so() {
    let mut silent = boastful(AMD);
    for entry in &mut silent {
        match entry.leaf {
            1 => (entry.ecx, entry.edx) = (0, 0),
            6 | 0x8000_0007 => *entry = self::entry(entry.leaf, 0, [0; 4]),
            _ => {}
        }
    }
    let base = intersect(&[silent]).unwrap();
    let features = find(&base, 1, 0);
    for (name, bit) in [("x2APIC", 21), ("hypervisor", 31)] {
        assert_eq!(features.ecx >> bit & 1, 1, "{name}");
    }
    assert_eq!(features.ecx >> 24 & 1, 0, "the TSC deadline timer only where its register reaches us");
    assert_eq!(features.edx >> 9 & 1, 1, "APIC");
    assert_eq!(find(&base, 6, 0).eax, 1 << 2, "the APIC timer always runs");
    assert_eq!(find(&base, 0x8000_0007, 0).edx, 1 << 8, "invariant TSC");
    let signature = find(&base, 0x4000_0000, 0);
    assert_eq!(signature.ebx.to_le_bytes(), *b"KVMK");
    assert_eq!(signature.ecx.to_le_bytes(), *b"VMKV");
    assert_eq!(signature.edx.to_le_bytes(), *b"M\0\0\0");
    assert_eq!(signature.eax, 0x4000_0001);
}

#[test]
fn useful_features_of_all_nodes_stay() {
    let base = intersect(&[boastful(INTEL), boastful(INTEL)]).unwrap();
    let features = find(&base, 1, 0);
    for (name, bit) in [("SSSE3", 9), ("PCID", 17), ("MOVBE", 22), ("POPCNT", 23), ("XSAVE", 26), ("AVX", 28)]
    {
        assert_eq!(features.ecx >> bit & 1, 1, "{name}");
    }
    let more = find(&base, 7, 0);
    for (name, bit) in [("FSGSBASE", 0), ("AVX2", 5), ("INVPCID", 10), ("AVX512F", 16), ("SHA", 29)] {
        assert_eq!(more.ebx >> bit & 1, 1, "{name}");
    }
    assert_eq!(more.ecx & (1 << 3 | 1 << 16), 1 << 3 | 1 << 16, "PKU, LA57");
    assert_eq!(more.edx & (1 << 29 | 1 << 24), 1 << 29 | 1 << 24, "ARCH_CAPABILITIES, AMX-TILE");
    assert_eq!(find(&base, 0, 0).eax, 0x1f);
    assert_eq!(find(&base, 0x8000_0002, 0).eax, 0x4555_5043, "brand");
}

#[test]
fn one_node_without_a_feature_takes_it_from_all() {
    let mut old = boastful(INTEL);
    for entry in &mut old {
        match (entry.leaf, entry.subleaf) {
            (0, _) => entry.eax = 0x14,
            (7, 0) => (entry.eax, entry.ecx) = (0, entry.ecx & !(1 << 16)),
            (0x8000_0008, _) => entry.eax = 0x302e,
            _ => {}
        }
    }
    old.retain(|e| e.leaf != 7 || e.subleaf == 0);
    let base = intersect(&[boastful(INTEL), old]).unwrap();
    assert_eq!(find(&base, 7, 0).ecx >> 16 & 1, 0, "LA57");
    assert_eq!(find(&base, 7, 0).eax, 0);
    assert!(!base.iter().any(|e| e.leaf == 7 && e.subleaf > 0));
    assert_eq!(find(&base, 0x8000_0008, 0).eax, 0x302e, "46 physical bits");
    assert_eq!(find(&base, 0, 0).eax, 0x16);
}

#[test]
fn node_without_avx512_shrinks_the_register_state() {
    let mut old = boastful(INTEL);
    for entry in old.iter_mut().filter(|e| e.leaf == 0xd && e.subleaf == 0) {
        entry.eax = 0x207;
    }
    let base = intersect(&[boastful(INTEL), old]).unwrap();
    let state = find(&base, 0xd, 0);
    assert_eq!((state.eax, state.edx), (0x207, 0));
    assert_eq!(state.ecx, 2696, "up to the end of PKRU");
    let more = find(&base, 7, 0);
    assert_eq!(more.ebx & (1 << 16 | 1 << 30 | 1 << 31), 0, "AVX-512 goes with its registers");
    assert_eq!(more.edx & (1 << 22 | 1 << 24 | 1 << 25 | 1 << 23), 0, "AMX too");
    assert_ne!(more.ebx & 1 << 5, 0, "AVX2 stays");
    for subleaf in [5, 6, 7, 17, 18] {
        assert!(!base.iter().any(|e| e.leaf == 0xd && e.subleaf == subleaf));
    }
    assert!(!has(&base, 0x1d));
}

#[test]
fn component_at_different_places_is_not_offered() {
    let mut other = boastful(INTEL);
    for entry in other.iter_mut().filter(|e| e.leaf == 0xd && e.subleaf == 9) {
        entry.ebx = 832;
    }
    let base = intersect(&[boastful(INTEL), other]).unwrap();
    assert_eq!(find(&base, 0xd, 0).eax >> 9 & 1, 0);
    assert_eq!(find(&base, 7, 0).ecx >> 3 & 1, 0, "PKU");
}

#[test]
fn trace_state_is_not_offered_but_shadow_stacks_are() {
    let base = intersect(&[boastful(INTEL)]).unwrap();
    assert_eq!(find(&base, 0xd, 1).ecx, 1 << 11 | 1 << 12);
    assert!(!base.iter().any(|e| e.leaf == 0xd && e.subleaf == 8));
}

#[test]
fn cpu_without_xsave_has_no_avx() {
    let mut old = boastful(AMD);
    for entry in old.iter_mut().filter(|e| e.leaf == 1) {
        entry.ecx &= !(1 << 26);
    }
    let base = intersect(&[old]).unwrap();
    assert!(!has(&base, 0xd));
    assert_eq!(find(&base, 1, 0).ecx & (1 << 28 | 1 << 12 | 1 << 29), 0);
}

#[test]
fn different_vendors_are_refused_by_name() {
    let error = intersect(&[boastful(INTEL), Vec::new(), boastful(AMD)]).unwrap_err().to_string();
    assert!(
        error.contains("node 0 has GenuineIntel") && error.contains("node 2 has AuthenticAMD"),
        "{error}"
    );
    assert!(intersect(&[Vec::new()]).unwrap_err().to_string().contains("no node"));
    assert!(intersect(&[]).is_err());
}

#[test]
fn bit_that_says_a_cpu_lacks_something_is_kept_if_one_says_it() {
    let mut modern = boastful(INTEL);
    let mut old = boastful(INTEL);
    for entries in [&mut modern, &mut old] {
        for entry in entries.iter_mut().filter(|e| (e.leaf, e.subleaf) == (7, 0)) {
            entry.ebx = 1 << 5;
        }
    }
    modern.iter_mut().find(|e| (e.leaf, e.subleaf) == (7, 0)).unwrap().ebx |= 1 << 13 | 1 << 9;
    let base = intersect(&[old, modern]).unwrap();
    assert_eq!(find(&base, 7, 0).ebx, 1 << 13 | 1 << 5);
}

#[test]
fn each_cpu_knows_its_id_and_package() {
    let layout = layout(&[1, 3, 0, 2]);
    for vendor in [INTEL, AMD] {
        let base = intersect(&[boastful(vendor)]).unwrap();
        for place in layout.cpus() {
            let cpuid = for_vcpu(&base, &layout, place, 2_500_000);
            assert_eq!(find(&cpuid, 1, 0).ebx, place.apic_id << 24 | 4 << 16 | 0x800);
            assert_eq!(find(&cpuid, 1, 0).edx >> 28 & 1, 1);
            for leaf in [0xb, 0x1f] {
                assert_eq!(find(&cpuid, leaf, 0), entry(leaf, 0, [0, 1, 0x100, place.apic_id]));
                let cpus = layout.cpus_on(place.node.into());
                assert_eq!(find(&cpuid, leaf, 1), entry(leaf, 1, [2, cpus, 0x201, place.apic_id]));
                assert_eq!(find(&cpuid, leaf, 2), entry(leaf, 2, [0, 0, 2, place.apic_id]));
            }
            assert_eq!(cpuid.iter().filter(|e| e.leaf == 0xb).count(), 3);
        }
    }
}

#[test]
fn amd_leaves_agree_with_the_layout() {
    let layout = layout(&[1, 3]);
    let base = intersect(&[boastful(AMD)]).unwrap();
    let place = layout.cpus()[2];
    let cpuid = for_vcpu(&base, &layout, &place, 2_500_000);
    assert_eq!(find(&cpuid, 0x8000_001e, 0), entry(0x8000_001e, 0, [5, 1, 1, 0]));
    assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 2);
    assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx >> 1 & 1, 1);
    assert_eq!(find(&cpuid, 0x8000_001d, 0).eax >> 14, 0, "level 1 is the core's own");
    assert_eq!(find(&cpuid, 0x8000_001d, 3).eax >> 14, 3, "level 3 is the node's");
    assert!(!has(&cpuid, 0x15));
    let alone = for_vcpu(&base, &layout, &layout.cpus()[0], 2_500_000);
    assert_eq!(find(&alone, 0x8000_0001, 0).ecx >> 1 & 1, 0, "one CPU is not many");
}

#[test]
fn intel_caches_and_frequency() {
    let layout = layout(&[4, 3]);
    let base = intersect(&[boastful(INTEL)]).unwrap();
    let cpuid = for_vcpu(&base, &layout, &layout.cpus()[5], 2_494_237);
    for subleaf in [0, 1] {
        assert_eq!(find(&cpuid, 4, subleaf).eax >> 14, 3 << 12);
    }
    assert_eq!(find(&cpuid, 4, 2).eax >> 14, 3 << 12 | 3);
    assert_eq!(find(&cpuid, 4, 3).eax, 0);
    assert_eq!(find(&cpuid, 0x15, 0), entry(0x15, 0, [1, 2_494_237, 1000, 0]));
    assert_eq!(find(&cpuid, 0x16, 0).eax, 2494);
}

#[test]
fn single_cpu_nodes_are_packages_of_their_own() {
    let layout = layout(&[1, 1]);
    let base = intersect(&[boastful(AMD)]).unwrap();
    let cpuid = for_vcpu(&base, &layout, &layout.cpus()[1], 1_000_000);
    assert_eq!(find(&cpuid, 1, 0).ebx >> 24, 1);
    assert_eq!(find(&cpuid, 1, 0).edx >> 28 & 1, 0);
    assert_eq!(find(&cpuid, 0xb, 1), entry(0xb, 1, [0, 1, 0x201, 1]));
}

#[test]
fn memory_beyond_the_cpus_reach_is_refused() {
    let layout = layout(&[1, 1, 1, 1]);
    let mut base = intersect(&[boastful(AMD)]).unwrap();
    assert!(check_memory(&base, &layout).is_ok());
    base.iter_mut().find(|e| e.leaf == 0x8000_0008).unwrap().eax = 0x3020;
    let error = check_memory(&base, &layout).unwrap_err().to_string();
    assert!(error.contains("32 bits"), "{error}");
}

#[test]
fn arch_capabilities_promise_only_what_all_keep() {
    assert_eq!(arch_capabilities(&[0b1_0001, 0b1_0011]), 0b1_0001);
    assert_eq!(
        arch_capabilities(&[1, 1 << 2 | 1 | 1 << 7]),
        1 << 2 | 1,
        "one vulnerable CPU counts, no control does"
    );
    assert_eq!(arch_capabilities(&[]), 0);
}

fn any_cpu() -> impl Strategy<Value = Vec<CpuidEntry>> {
    let words = proptest::collection::vec((0u32..64, any::<[u32; 4]>()), 8);
    words.prop_map(|words| {
        let mut entries = boastful(INTEL);
        for (at, [a, b, c, d]) in words {
            let index = at as usize % entries.len();
            let entry = &mut entries[index];
            match entry.leaf {
                0 | 0x8000_0000 => entry.eax = entry.leaf + a % 0x30,
                1 => (entry.ecx, entry.edx) = (c, d),
                7 | 0x8000_0001 => (entry.ebx, entry.ecx, entry.edx) = (b, c, d),
                0xd if entry.subleaf == 0 => entry.eax &= a,
                _ => {}
            }
        }
        entries
    })
}

proptest! {
    #[test]
    fn features_do_not_depend_on_the_order_of_nodes(a in any_cpu(), b in any_cpu(), c in any_cpu()) {
        let one = intersect(&[a.clone(), b.clone(), c.clone()]).unwrap();
        let two = intersect(&[c, a, b]).unwrap();
        for (leaf, subleaf) in [(0, 0), (1, 0), (6, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)] {
            let pick = |entries: &[CpuidEntry]| {
                let mut found = entries.iter().find(|e| (e.leaf, e.subleaf) == (leaf, subleaf)).copied()?;
                if matches!(leaf, 1 | 0x8000_0001) {
                    // The model is the first node's.
                    (found.eax, found.ebx) = (0, 0);
                }
                Some(found)
            };
            prop_assert_eq!(pick(&one), pick(&two));
        }
    }

    #[test]
    fn intersection_never_adds_a_feature_and_is_stable(a in any_cpu(), b in any_cpu()) {
        let both = intersect(&[a.clone(), b]).unwrap();
        let before = find(&a, 7, 0);
        if let Some(after) = both.iter().find(|e| (e.leaf, e.subleaf) == (7, 0)) {
            prop_assert_eq!(after.ebx & !before.ebx & !(1 << 6 | 1 << 13), 0);
            prop_assert_eq!(after.ecx & !before.ecx, 0);
            prop_assert_eq!(after.edx & !before.edx, 0);
        }
        let again = intersect(std::slice::from_ref(&both)).unwrap();
        prop_assert_eq!(again, both);
    }
}
