//! The tables as a kernel reads them: found from the RSDP, whole, and saying what the machine is.

use super::*;
use crate::spec::NodeSpec;

fn machine(nodes: &[(u32, u64)]) -> MachineSpec {
    let nodes = nodes.iter().enumerate();
    let nodes =
        nodes.map(|(id, &(cpus, memory))| NodeSpec { name: format!("n{id}"), cpus, memory }).collect();
    MachineSpec { nodes, distances: Vec::new(), pci: false }
}

fn tables(spec: &MachineSpec) -> AcpiTables {
    build(&Layout::new(spec, size_bound(spec)).unwrap(), spec).unwrap()
}

fn find<'a>(tables: &'a AcpiTables, signature: &[u8; 4]) -> &'a [u8] {
    &tables.blocks.iter().find(|(_, bytes)| bytes.starts_with(signature)).unwrap().1
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The entries of a table whose entries begin with a type and a length.
fn entries(table: &[u8], from: usize) -> Vec<&[u8]> {
    let mut rest = &table[from..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(rest[1].into());
        found.push(entry);
        rest = after;
    }
    found
}

const GIB: u64 = 1 << 30;

#[test]
fn every_table_has_its_length_and_checksum() {
    let spec = machine(&[(2, 2 * GIB), (1, 2 * GIB), (0, GIB)]);
    let tables = tables(&spec);
    let (rsdp_gpa, rsdp) = &tables.blocks[0];
    assert_eq!(*rsdp_gpa, tables.rsdp_gpa);
    assert!(rsdp.starts_with(b"RSD PTR "));
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    for (_, bytes) in &tables.blocks[1..] {
        assert_eq!(u32_at(bytes, 4) as usize, bytes.len());
        assert_eq!(sum(bytes), 0);
    }
}

#[test]
fn kernel_finds_every_table_from_the_rsdp() {
    let spec = machine(&[(2, GIB), (2, GIB)]);
    let tables = tables(&spec);
    let at = |gpa: u64| &tables.blocks.iter().find(|(at, _)| *at == gpa).unwrap().1;
    let xsdt = at(u64_at(at(tables.rsdp_gpa), 24));
    assert!(xsdt.starts_with(b"XSDT"));
    let listed: Vec<_> = xsdt[36..].chunks(8).map(|pointer| at(u64_at(pointer, 0))[..4].to_vec()).collect();
    assert_eq!(listed, [b"FACP", b"APIC", b"SRAT", b"SLIT"]);
    assert!(at(u64_at(find(&tables, b"FACP"), 140)).starts_with(b"DSDT"));
}

#[test]
fn fadt_names_the_power_ports_and_no_legacy_hardware() {
    let tables = tables(&machine(&[(1, GIB)]));
    let fadt = find(&tables, b"FACP");
    assert_eq!(fadt.len(), 276);
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10, "hardware-reduced, with a reset register");
    let boot_arch = u16::from_le_bytes(fadt[109..111].try_into().unwrap());
    assert_eq!(boot_arch & (1 << 1 | 1 << 5), 0, "no keyboard controller, but a clock");
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0x02, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], 1);
    assert_eq!(fadt[244..256], [1, 8, 0, 1, 0x00, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[256..268], [1, 8, 0, 1, 0x01, 0x06, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn madt_lists_every_cpu_once_by_x2apic_id() {
    let tables = tables(&machine(&[(1, GIB), (3, GIB)]));
    let madt = find(&tables, b"APIC");
    let entries = entries(madt, 44);
    let cpus: Vec<_> =
        entries.iter().filter(|e| e[0] == 9).map(|e| (u32_at(e, 4), u32_at(e, 8), u32_at(e, 12))).collect();
    assert_eq!(cpus, [(0, 1, 0), (4, 1, 1), (5, 1, 2), (6, 1, 3)]);
    let ioapic: Vec<_> = entries.iter().filter(|e| e[0] == 1).map(|e| (u32_at(e, 4), u32_at(e, 8))).collect();
    assert_eq!(ioapic, [(0xfec0_0000, 0)]);
    assert_eq!(entries.iter().filter(|e| e[0] == 10 && e[8] == 1).count(), 1);
    assert!(!entries.iter().any(|e| e[0] == 0), "an xAPIC entry would make Linux ignore the x2APIC ones");
    assert_eq!(u32_at(madt, 36), 0xfee0_0000);
    assert_eq!(u32_at(madt, 40), 0, "no PIC");
}

#[test]
fn srat_gives_each_node_its_cpus_and_both_its_ranges() {
    let tables = tables(&machine(&[(2, 2 * GIB), (1, 2 * GIB)]));
    let entries = entries(find(&tables, b"SRAT"), 48);
    let cpus: Vec<_> = entries.iter().filter(|e| e[0] == 2).map(|e| (u32_at(e, 4), u32_at(e, 8))).collect();
    assert_eq!(cpus, [(0, 0), (0, 1), (1, 2)]);
    let memory: Vec<_> = entries
        .iter()
        .filter(|e| e[0] == 1)
        .map(|e| (u32_at(e, 2), u64_at(e, 8), u64_at(e, 16), u32_at(e, 28)))
        .collect();
    assert_eq!(memory, [(0, 0, 2 * GIB, 1), (1, 2 * GIB, GIB, 1), (1, 4 * GIB, GIB, 1)]);
}

#[test]
fn memory_only_node_between_others_keeps_its_number() {
    let tables = tables(&machine(&[(1, GIB), (0, GIB), (1, GIB), (0, GIB)]));
    let entries = entries(find(&tables, b"SRAT"), 48);
    let domains: Vec<_> =
        entries.iter().filter(|e| e[0] == 2).map(|e| (u32_at(e, 4), u32_at(e, 8))).collect();
    assert_eq!(domains, [(0, 0), (1, 1), (2, 2)]);
    let madt = find(&tables, b"APIC");
    assert_eq!(self::entries(madt, 44).iter().filter(|e| e[0] == 9).count(), 2);
}

#[test]
fn slit_shows_the_given_distances() {
    let mut spec = machine(&[(1, GIB), (1, GIB)]);
    spec.distances = vec![vec![10, 31], vec![32, 10]];
    let tables = tables(&spec);
    let slit = find(&tables, b"SLIT");
    assert_eq!(u64_at(slit, 36), 2);
    assert_eq!(slit[44..], [10, 31, 32, 10]);
}

#[test]
fn power_off_state_is_what_the_sleep_register_takes() {
    let tables = tables(&machine(&[(1, GIB)]));
    let dsdt = find(&tables, b"DSDT");
    // Name (_S5_, Package () { 5, 0 })
    let s5 = [0x08, b'_', b'S', b'5', b'_', 0x12, 5, 2, 0x0a, 5, 0];
    assert!(dsdt.windows(s5.len()).any(|window| window == s5), "{dsdt:02x?}");
}

#[test]
fn tables_fit_their_place_and_do_not_overlap_whatever_the_size() {
    let mut memory_servers = vec![(128, GIB), (3, GIB)];
    memory_servers.extend(vec![(0, 64 << 20); 510]);
    let mut single_cpus = vec![(1, GIB); 255];
    single_cpus.extend(vec![(0, 64 << 20); 257]);
    for nodes in [vec![(1, GIB)], vec![(255, GIB)], vec![(64, GIB); 3], memory_servers, single_cpus] {
        let spec = MachineSpec { pci: true, ..machine(&nodes) };
        let layout = Layout::new(&spec, size_bound(&spec)).unwrap();
        let tables = build(&layout, &spec).unwrap();
        for pair in tables.blocks.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0);
        }
        let (last, bytes) = tables.blocks.last().unwrap();
        assert!(last + bytes.len() as u64 <= layout.acpi_range().end);
        assert!(tables.rsdp_gpa >= layout.acpi_range().start);
        let used: u64 = tables.blocks.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        assert!(used <= size_bound(&spec));
    }
}

#[test]
fn without_pci_there_is_no_trace_of_it() {
    let tables = tables(&machine(&[(1, GIB)]));
    assert!(!tables.blocks.iter().any(|(_, bytes)| bytes.starts_with(b"MCFG")));
    assert!(!contains(find(&tables, b"DSDT"), b"PC00"));
}

#[test]
fn each_node_has_a_host_bridge_that_names_it() {
    let tables = tables(&MachineSpec { pci: true, ..machine(&[(1, GIB), (0, GIB), (1, GIB)]) });
    let mcfg = find(&tables, b"MCFG");
    assert_eq!(mcfg.len(), 60);
    assert_eq!((u64_at(mcfg, 44), mcfg[54], mcfg[55]), (0xe000_0000, 0, 2));
    let dsdt = find(&tables, b"DSDT");
    for bus in 0..3u8 {
        let bridge = [b"PC0", &[b'0' + bus][..]].concat();
        assert!(contains(dsdt, &bridge), "bus {bus}");
        for name in [b"_PXM", b"_BBN"] {
            // Zero and one have opcodes of their own; other bytes a prefix.
            let value = if bus < 2 { vec![bus] } else { vec![0x0a, bus] };
            assert!(contains(dsdt, &[&[8], &name[..], &value].concat()), "bus {bus}");
        }
    }
    assert!(!contains(dsdt, b"PC03"));
}

#[test]
fn devices_can_come_and_go_in_each_buss_first_slots() {
    let tables = tables(&MachineSpec { pci: true, ..machine(&[(1, GIB), (1, GIB)]) });
    let dsdt = find(&tables, b"DSDT");
    // OperationRegion (HPIO, SystemIO, 0x610, 8)
    assert!(contains(dsdt, &[&[0x5b, 0x80], &b"HPIO"[..], &[1, 0x0b, 0x10, 0x06, 0x0a, 8]].concat()));
    // Interrupt (consumer, level, active high, exclusive) {20}
    assert!(contains(dsdt, &[0x89, 6, 0, 1, 1, 20, 0, 0, 0]));
    for bus in 0..2u8 {
        // Name (_SUN, bus * 32 + 15); Method (_EJ0, 1) { Store (bus << 8 | 15, HPEJ) }
        let sun = [&b"\x08_SUN\x0a"[..], &[bus * 32 + 15], b"\x14"].concat();
        assert!(contains(dsdt, &sun), "bus {bus}");
        let which = if bus == 0 { vec![0x0a, 15] } else { vec![0x0b, 15, bus] };
        assert!(contains(dsdt, &[&b"_EJ0\x01\x70"[..], &which, b"HPEJ"].concat()), "bus {bus}");
    }
    assert!(contains(dsdt, b"SL0F") && !contains(dsdt, b"SL10"));
}

#[test]
fn a_buss_bytes_have_their_bound() {
    let size = |nodes: usize| {
        let tables = tables(&MachineSpec { pci: true, ..machine(&vec![(1, GIB); nodes]) });
        find(&tables, b"DSDT").len() as u64
    };
    let (two, many) = (size(2), size(200));
    assert!((many - two) / 198 < pci::BRIDGE_BOUND, "{}", (many - two) / 198);
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
