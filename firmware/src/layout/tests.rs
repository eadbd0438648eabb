//! Address ranges and APIC ids of machines of many shapes.

use super::*;
use crate::acpi;
use crate::e820::{self, Kind};
use crate::spec::{MIN_NODE_MEMORY, MIN_NODE0_MEMORY, NodeSpec};
use proptest::prelude::*;

fn machine(nodes: &[(u32, u64)]) -> MachineSpec {
    let nodes = nodes.iter().enumerate();
    let nodes =
        nodes.map(|(id, &(cpus, memory))| NodeSpec { name: format!("n{id}"), cpus, memory }).collect();
    MachineSpec { nodes, distances: Vec::new(), pci: false }
}

fn made(spec: &MachineSpec) -> Result<Layout, FirmwareError> {
    Layout::new(spec, acpi::size_bound(spec))
}

fn layout(nodes: &[(u32, u64)]) -> Layout {
    made(&machine(nodes)).unwrap()
}

#[test]
fn memory_below_the_hole_is_one_slot() {
    let layout = layout(&[(1, 1 << 30), (1, 1 << 30)]);
    assert_eq!(layout.ram_ranges(), [RamRange { gpa: 0, offset: 0, len: 2 << 30 }]);
    assert_eq!(layout.ram_end(), HOLE_END);
}

#[test]
fn node_across_the_hole_has_two_ranges() {
    let layout = layout(&[(1, 2 << 30), (1, 2 << 30), (1, 1 << 30)]);
    assert_eq!(
        layout.ram_ranges(),
        [
            RamRange { gpa: 0, offset: 0, len: 3 << 30 },
            RamRange { gpa: 4 << 30, offset: 3 << 30, len: 2 << 30 }
        ]
    );
    assert_eq!(layout.node_gpa_ranges(0), std::slice::from_ref(&(0..2 << 30)));
    assert_eq!(layout.node_gpa_ranges(1), [2 << 30..3 << 30, 4 << 30..5 << 30]);
    assert_eq!(layout.node_gpa_ranges(2), std::slice::from_ref(&(5 << 30..6 << 30)));
    assert_eq!(layout.node_gpa_ranges(3), []);
    assert_eq!(layout.ram_end(), 6 << 30);
}

#[test]
fn apic_ids_of_unequal_nodes_come_in_blocks_of_the_largest() {
    let layout = layout(&[(1, 1 << 30), (3, 1 << 30), (0, 1 << 30), (2, 1 << 30)]);
    assert_eq!(layout.apic_id_shift(), 2);
    let ids: Vec<_> = layout.cpus().iter().map(|cpu| (cpu.vcpu, cpu.node, cpu.apic_id, cpu.local)).collect();
    assert_eq!(ids, [(0, 0, 0, 0), (1, 1, 4, 0), (2, 1, 5, 1), (3, 1, 6, 2), (4, 3, 12, 0), (5, 3, 13, 1)]);
    assert_eq!(layout.node_cpus(1).len(), 3);
    assert_eq!(layout.node_cpus(2), []);
    assert_eq!(layout.cpus_on(3), 2);
    assert_eq!(layout.cpu_of_apic_id(12).unwrap().vcpu, 4);
    assert_eq!(layout.cpu_of_apic_id(7), None);
}

#[test]
fn single_cpu_nodes_need_no_low_apic_id_bits() {
    let layout = layout(&[(1, 1 << 30), (1, 1 << 30)]);
    assert_eq!(layout.apic_id_shift(), 0);
    assert_eq!(layout.cpus()[1].apic_id, 1);
}

#[test]
fn acpi_tables_of_a_huge_machine_lie_at_the_top_of_node_0() {
    let mut nodes = vec![(1, 1 << 30)];
    nodes.extend(vec![(0, 64 << 20); 511]);
    let layout = layout(&nodes);
    let acpi = layout.acpi_range();
    assert_eq!(acpi.end, 1 << 30);
    assert!(acpi.end - acpi.start >= 512 * 512, "the SLIT alone has a byte for each pair of nodes");
    let map = e820::map(&layout);
    assert!(map.iter().any(|entry| (entry.addr, entry.kind) == (acpi.start, Kind::Acpi)));
}

#[test]
fn wrong_machines_are_refused_with_the_reason() {
    let gib = 1 << 30;
    let mut twins = machine(&[(1, gib), (1, gib)]);
    twins.nodes[1].name = "n0".into();
    let mut ragged = machine(&[(1, gib), (1, gib)]);
    ragged.distances = vec![vec![10, 20], vec![20]];
    let mut near = machine(&[(1, gib), (1, gib)]);
    near.distances = vec![vec![10, 10], vec![20, 10]];
    let mut far_from_self = machine(&[(1, gib)]);
    far_from_self.distances = vec![vec![20]];
    for (spec, word) in [
        (machine(&[]), "no node"),
        (machine(&[(0, gib)]), "no CPU"),
        (machine(&[(1, gib), (1, 0)]), "no memory"),
        (machine(&[(1, gib + 1)]), "multiple of 4096"),
        (machine(&[(1, MIN_NODE0_MEMORY - 4096)]), "at least 128 MiB"),
        (machine(&[(1, gib), (1, MIN_NODE_MEMORY - 4096)]), "at least 4 MiB"),
        (machine(&[(1, gib); 513]), "at most 512"),
        (machine(&[(1, 1 << 52)]), "2048 TiB"),
        (machine(&[(1, u64::MAX - 4095), (1, u64::MAX - 4095)]), "2048 TiB"),
        (machine(&[(129, gib), (1, gib)]), "APIC id 256"),
        (machine(&[(256, gib)]), "APIC id 255"),
        (machine(&[(u32::MAX, gib), (u32::MAX, gib)]), "APIC id"),
        (twins, "both named \"n0\""),
        (ragged, "2 rows of 2"),
        (near, "from node 0 to node 1"),
        (far_from_self, "itself"),
    ] {
        let error = made(&spec).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(made(&machine(&[(255, gib)])).is_ok());
}

#[test]
fn distances_default_to_10_and_20() {
    let mut spec = machine(&[(1, 1 << 30), (1, 1 << 30)]);
    assert_eq!((spec.distance(0, 0), spec.distance(0, 1)), (10, 20));
    spec.distances = vec![vec![10, 33], vec![34, 10]];
    assert_eq!((spec.distance(0, 1), spec.distance(1, 0)), (33, 34));
}

fn any_nodes() -> impl Strategy<Value = Vec<(u32, u64)>> {
    let pages = prop_oneof![MIN_NODE_MEMORY / PAGE_SIZE..100_000, 700_000u64..3_000_000];
    let others = proptest::collection::vec((0u32..20, pages), 0..7);
    (1u32..20, 32_768u64..2_000_000, others).prop_map(|(cpus, pages, others)| {
        let mut nodes = vec![(cpus, pages)];
        nodes.extend(others);
        nodes.into_iter().map(|(cpus, pages)| (cpus, pages * PAGE_SIZE)).collect()
    })
}

proptest! {
    #[test]
    fn every_ram_page_has_one_gpa_and_comes_back(nodes in any_nodes(), pick in any::<proptest::sample::Index>()) {
        let layout = layout(&nodes);
        let page = pick.index(layout.pages() as usize) as u64;
        let gpa = layout.page_to_gpa(page).unwrap();
        prop_assert!(!(HOLE_START..HOLE_END).contains(&gpa));
        prop_assert_eq!(layout.gpa_to_page(gpa), Some(page));
        prop_assert_eq!(layout.gpa_to_page(gpa + PAGE_SIZE - 1), Some(page));
        let slots: Vec<_> = layout.ram_ranges().iter().filter(|r| (r.gpa..r.gpa + r.len).contains(&gpa)).collect();
        prop_assert_eq!(slots.len(), 1);
        prop_assert_eq!(gpa - slots[0].gpa + slots[0].offset, page * PAGE_SIZE);
        let home = usize::from(layout.home_of(page).unwrap());
        prop_assert!(layout.home_ranges()[home].contains(&page));
        let owners: Vec<_> =
            (0..layout.nodes()).filter(|&n| layout.node_gpa_ranges(n).iter().any(|r| r.contains(&gpa))).collect();
        prop_assert_eq!(owners, [home]);
    }

    #[test]
    fn homes_partition_ram(nodes in any_nodes()) {
        let layout = layout(&nodes);
        let mut next = 0;
        for (range, node) in layout.home_ranges().iter().zip(&nodes) {
            prop_assert_eq!(range.start, next);
            prop_assert_eq!((range.end - range.start) * PAGE_SIZE, node.1);
            next = range.end;
        }
        prop_assert_eq!(next, layout.pages());
        prop_assert_eq!(layout.home_of(next), None);
        prop_assert_eq!(layout.page_to_gpa(next), None);
        prop_assert_eq!(layout.gpa_to_page(HOLE_START), None);
        let slots: u64 = layout.ram_ranges().iter().map(|range| range.len).sum();
        prop_assert_eq!(slots, layout.ram_bytes());
    }

    #[test]
    fn memory_map_covers_ram_once_in_order(nodes in any_nodes()) {
        let layout = layout(&nodes);
        let map = e820::map(&layout);
        for pair in map.windows(2) {
            prop_assert!(pair[0].addr + pair[0].len <= pair[1].addr);
        }
        prop_assert_eq!(map.iter().map(|entry| entry.len).sum::<u64>(), layout.ram_bytes());
        for entry in map {
            prop_assert!(layout.gpa_to_page(entry.addr).is_some());
            prop_assert!(layout.gpa_to_page(entry.addr + entry.len - 1).is_some());
        }
    }

    #[test]
    fn apic_ids_are_unique_and_name_their_node(nodes in any_nodes()) {
        let layout = layout(&nodes);
        for pair in layout.cpus().windows(2) {
            prop_assert!(pair[0].apic_id < pair[1].apic_id);
        }
        for (index, cpu) in layout.cpus().iter().enumerate() {
            prop_assert_eq!(cpu.vcpu as usize, index);
            prop_assert_eq!(cpu.apic_id >> layout.apic_id_shift(), u32::from(cpu.node));
            prop_assert_eq!(layout.cpu_of_apic_id(cpu.apic_id), Some(cpu));
            prop_assert_eq!(layout.node_cpus(cpu.node.into())[cpu.local as usize], *cpu);
        }
    }
}
