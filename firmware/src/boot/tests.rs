//! What a kernel or a BIOS finds in memory and registers at its first instruction.

use super::*;
use crate::acpi;
use crate::spec::NodeSpec;
use linux_loader::loader::bootparam::XLF_KERNEL_64;
use std::path::PathBuf;
use tempfile::TempDir;
use vm_memory::ByteValued;

type Memory = vm_memory::GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;

fn machine(memory: &[u64]) -> MachineSpec {
    let nodes = memory.iter().enumerate();
    let nodes = nodes.map(|(id, &memory)| NodeSpec { name: format!("n{id}"), cpus: 1, memory }).collect();
    MachineSpec { nodes, distances: Vec::new(), pci: false }
}

/// Files to boot from, in a directory of their own.
struct Files(TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A file of `len` bytes that takes no room.
    fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.put(name, b"");
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        path
    }
}

fn good_header() -> setup_header {
    setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        jump: 0x6aeb, // the header ends at 0x202 + 0x6a
        header: image::BZIMAGE_MAGIC,
        version: 0x20f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        payload_length: 4096,
        pref_address: 16 * MIB,
        init_size: 48 * MIB as u32,
        ..Default::default()
    }
}

fn bzimage(header: setup_header) -> Vec<u8> {
    let mut bytes = vec![0xcc; 1024 + 4096];
    bytes[..1024].fill(0);
    bytes[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
    bytes
}

/// An ELF kernel with one segment of `len` bytes at `addr`.
fn elf(entry: u64, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend(entry.to_le_bytes());
    bytes.extend(64u64.to_le_bytes());
    bytes.extend([0; 8 + 4]);
    bytes.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120, addr, addr, len as u64, len as u64 + 8192, 4096] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(120 + len, 0x90);
    bytes
}

struct Booted {
    mem: Memory,
    layout: Layout,
    registers: BspRegisters,
    acpi: AcpiTables,
}

impl Booted {
    fn params(&self) -> boot_params {
        self.mem.read_obj(GuestAddress(self.registers.rsi)).unwrap()
    }

    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }
}

fn boot(spec: &MachineSpec, kernel: &Path, initrd: Option<&Path>) -> Result<Booted, FirmwareError> {
    let layout = Layout::new(spec, acpi::size_bound(spec)).unwrap();
    let ranges: Vec<_> = layout.ram_ranges().iter().map(|r| (GuestAddress(r.gpa), r.len as usize)).collect();
    let mem = Memory::from_ranges(&ranges).unwrap();
    let acpi = acpi::build(&layout, spec).unwrap();
    let source = BootSource { kernel, initrd, cmdline: "console=ttyS0 -- single" };
    check(&source, spec)?;
    let registers = load(&mem, &layout, &acpi, &source, 2_400_000)?;
    Ok(Booted { mem, layout, registers, acpi })
}

#[test]
fn bzimage_is_entered_in_64_bit_mode_with_its_parameters() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let initrd = files.put("initrd", b"an initrd");
    let booted = boot(&machine(&[256 * MIB]), &kernel, Some(&initrd)).unwrap();

    assert_eq!(booted.registers.rip, 16 * MIB + 0x200);
    assert_eq!(booted.bytes(16 * MIB, 4096), [0xcc; 4096]);
    let params = booted.params();
    assert_eq!({ params.acpi_rsdp_addr }, booted.acpi.rsdp_gpa);
    let header = params.hdr;
    assert_eq!((header.type_of_loader, { header.boot_flag }), (0xff, 0xaa55));
    assert_eq!({ header.pref_address }, 16 * MIB);
    let cmdline = b"tsc=reliable tsc_early_khz=2400000 reboot=acpi console=ttyS0 -- single\0";
    assert_eq!(booted.bytes(header.cmd_line_ptr.into(), cmdline.len()), cmdline);
    assert_eq!({ header.ramdisk_size }, 9);
    assert_eq!(u64::from(header.ramdisk_image), 256 * MIB - 4096, "as high as it fits, on a page");
    assert_eq!(booted.bytes(header.ramdisk_image.into(), 9), b"an initrd");
    assert_eq!(booted.bytes(booted.acpi.rsdp_gpa, 8), b"RSD PTR ");
    assert_eq!({ header.setup_data }, 0, "one node needs no further map");
}

#[test]
fn jump_to_the_bios_resets_the_machine() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let booted = boot(&machine(&[256 * MIB]), &kernel, None).unwrap();
    assert_eq!(booted.bytes(0xffff0, 9), [0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd]);
}

#[test]
fn page_tables_and_descriptors_are_where_the_registers_say() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let booted = boot(&machine(&[256 * MIB]), &kernel, None).unwrap();
    let word = |gpa: u64| u64::from_le_bytes(booted.bytes(gpa, 8).try_into().unwrap());
    let registers = booted.registers;
    for address in [0, 0x7000, 16 * MIB + 0x200, 255 * MIB, (4 << 30) - 1u64] {
        let pointers = word(registers.cr3) & !0xfff;
        let directory = word(pointers + (address >> 30) * 8) & !0xfff;
        let page = word(directory + (address >> 21 & 511) * 8);
        assert_eq!(page & 0x83, 0x83, "present, writable, large");
        assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff, "one to one");
    }
    assert_eq!(word(registers.gdt.base + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(word(registers.gdt.base + 0x18), 0x00cf_9300_0000_ffff);
    assert_eq!(word(registers.gdt.base + 0x20), 0x0000_8b00_0000_0067);
    assert_eq!(registers.gdt.limit, 47);
    assert_eq!((registers.cs.selector, registers.data.selector), (0x10, 0x18));
    assert!(registers.cs.l && !registers.data.l);
}

#[test]
fn memory_of_other_nodes_is_in_the_second_list() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let booted = boot(&machine(&[256 * MIB, 128 * MIB, 64 * MIB]), &kernel, None).unwrap();
    let params = booted.params();
    let table = params.e820_table;
    let first: Vec<_> =
        table[..params.e820_entries.into()].iter().map(|e| ({ e.addr }, { e.size }, { e.r#type })).collect();
    assert_eq!(first, [(0, 0x9fc00, 1), (0x9fc00, 0x60400, 2), (MIB, 255 * MIB, 1)]);
    let next = params.hdr.setup_data;
    let more = booted.bytes(next, 16 + 20);
    assert_eq!(more[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 20, 0, 0, 0]);
    assert_eq!(more[16..24], (256 * MIB).to_le_bytes());
    assert_eq!(more[24..32], (192 * MIB).to_le_bytes());
    assert_eq!(more[32..], [1, 0, 0, 0]);
}

#[test]
fn both_lists_together_are_the_machines_map() {
    for memory in
        [vec![6 << 30], vec![5 << 30, 1 << 30], vec![1 << 30, 4 << 30, 1 << 30], vec![3 << 30, 1 << 30]]
    {
        let spec = machine(&memory);
        let layout = Layout::new(&spec, acpi::size_bound(&spec)).unwrap();
        let (local, remote) = params::memory_map(&layout);
        let bytes = |entries: &[crate::e820::Entry]| entries.iter().map(|e| e.len).sum::<u64>();
        assert_eq!(bytes(&local), memory[0], "{memory:?}");
        assert_eq!(bytes(&local) + bytes(&remote), layout.ram_bytes());
        let home = layout.node_gpa_ranges(0);
        assert!(local.iter().all(|e| home.iter().any(|range| range.contains(&e.addr))));
        assert!(!remote.iter().any(|e| home.iter().any(|range| range.contains(&e.addr))));
    }
}

#[test]
fn elf_kernel_is_loaded_where_its_segments_say() {
    let files = Files::new();
    let kernel = files.put("vmlinux", &elf(16 * MIB + 64, 16 * MIB, 5000));
    let booted = boot(&machine(&[128 * MIB]), &kernel, None).unwrap();
    assert_eq!(booted.registers.rip, 16 * MIB + 64);
    assert_eq!(booted.bytes(16 * MIB, 5000), [0x90; 5000]);
    assert_eq!({ booted.params().hdr.header }, image::BZIMAGE_MAGIC);
}

#[test]
fn header_fields_beyond_its_end_are_not_taken_from_code() {
    let mut header = good_header();
    header.jump = 0x66eb; // ends before kernel_info_offset
    header.kernel_info_offset = 0x1234_5678;
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(header));
    let booted = boot(&machine(&[256 * MIB]), &kernel, None).unwrap();
    assert_eq!({ booted.params().hdr.kernel_info_offset }, 0);
}

#[test]
fn initrd_stays_below_tables_at_the_top_and_below_its_limit() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let initrd = files.put("initrd", &[7; 5000]);
    let mut spec = machine(&[256 * MIB]);
    let small = NodeSpec { name: String::new(), cpus: 0, memory: 4 * MIB };
    spec.nodes.extend((1..400).map(|id| NodeSpec { name: format!("n{id}"), ..small.clone() }));
    let booted = boot(&spec, &kernel, Some(&initrd)).unwrap();
    let addr = u64::from(booted.params().hdr.ramdisk_image);
    let acpi = booted.layout.acpi_range();
    assert!(acpi.start > MIB && addr + 5000 <= acpi.start && addr + 3 * 4096 > acpi.start);

    let low = setup_header { initrd_addr_max: 0x7ff_ffff, ..good_header() };
    let booted = boot(&machine(&[256 * MIB]), &files.put("low", &bzimage(low)), Some(&initrd)).unwrap();
    assert_eq!(u64::from(booted.params().hdr.ramdisk_image), 128 * MIB - 2 * 4096);
}

/// What is wrong with booting these files on a node of `memory` bytes.
fn refusal(memory: u64, kernel: &Path, initrd: Option<&Path>) -> String {
    let source = BootSource { kernel, initrd, cmdline: "" };
    let error = check(&source, &machine(&[memory])).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn wrong_kernels_are_refused_with_the_reason() {
    let files = Files::new();
    let mut short = bzimage(good_header());
    short.truncate(3000);
    let mut truncated_elf = elf(16 * MIB, 16 * MIB, 5000);
    truncated_elf.truncate(4000);
    let mut arm = elf(16 * MIB, 16 * MIB, 64);
    arm[18] = 183;
    let mut shared_library = elf(16 * MIB, 16 * MIB, 64);
    shared_library[16] = 3;
    let mut wrapping = elf(16 * MIB, 16 * MIB, 64);
    wrapping[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut many_segments = elf(16 * MIB, 16 * MIB, 64);
    many_segments[56..58].copy_from_slice(&[0xff, 0xff]);
    let old = setup_header { version: 0x20a, ..good_header() };
    let i386 = setup_header { xloadflags: 0, ..good_header() };
    let huge = setup_header { init_size: 300 * MIB as u32, ..good_header() };
    let high = setup_header { pref_address: u64::MAX, ..good_header() };
    let low = setup_header { pref_address: 4096, ..good_header() };
    for (name, bytes, word) in [
        ("empty", vec![], "is empty"),
        ("text", b"not a kernel at all".to_vec(), "neither a bzImage nor an ELF"),
        ("gzip", vec![0x1f, 0x8b, 8, 0], "gzip"),
        ("efi", b"MZ\0\0".to_vec(), "not an x86 kernel"),
        ("short", short, "cut off"),
        ("old", bzimage(old), "boot protocol 2.10"),
        ("i386", bzimage(i386), "32-bit"),
        ("huge", bzimage(huge), "give node 0 more memory"),
        ("high", bzimage(high), "give node 0 more memory"),
        ("low", bzimage(low), "below 1 MiB"),
        ("elf-header", b"\x7fELF\x02\x01".to_vec(), "cut off"),
        ("elf-short", truncated_elf, "cut off"),
        ("elf-arm", arm, "another CPU"),
        ("elf-library", shared_library, "not a kernel"),
        ("elf-wrapping", wrapping, "beyond all memory"),
        ("elf-many", many_segments, "65535 program headers"),
        ("elf-virtual", elf(0xffff_ffff_8100_0000, 16 * MIB, 64), "not a physical address"),
        ("elf-low", elf(4096, 4096, 64), "below 1 MiB"),
    ] {
        let error = refusal(256 * MIB, &files.put(name, &bytes), None);
        assert!(error.contains(word) && error.contains(name), "{error}");
    }
    assert!(refusal(256 * MIB, &files.0.path().join("absent"), None).contains("cannot be read"));
    assert!(refusal(256 * MIB, files.0.path(), None).contains("not a file"));
}

#[test]
fn wrong_initrds_are_refused_with_the_reason() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let huge = files.sparse("huge", 200 * MIB);
    let error = refusal(256 * MIB, &kernel, Some(&huge));
    assert!(
        error.contains("200 MiB") && error.contains("leaves 192 MiB") && error.contains("more memory"),
        "{error}"
    );
    check(&BootSource { kernel: &kernel, initrd: Some(&huge), cmdline: "" }, &machine(&[264 * MIB])).unwrap();
    let absurd = files.sparse("absurd", 1 << 40);
    assert!(refusal(4 << 30, &kernel, Some(&absurd)).contains("use a smaller initrd"));
    let empty = files.put("empty", b"");
    assert!(refusal(256 * MIB, &kernel, Some(&empty)).contains("is empty"));
    assert!(refusal(256 * MIB, &kernel, Some(&files.0.path().join("absent"))).contains("cannot be read"));
}

#[test]
fn command_line_that_the_kernel_would_cut_is_refused() {
    let files = Files::new();
    let kernel = files.put("vmlinuz", &bzimage(good_header()));
    let spec = machine(&[256 * MIB]);
    let ours = "tsc=reliable tsc_early_khz=4294967295 reboot=acpi ".len();
    let long = "x".repeat(2047 - ours);
    check(&BootSource { kernel: &kernel, initrd: None, cmdline: &long }, &spec).unwrap();
    let longer = long + "x";
    let error = check(&BootSource { kernel: &kernel, initrd: None, cmdline: &longer }, &spec).unwrap_err();
    assert!(error.to_string().contains("1998 characters"), "{error}");
    let error = check(&BootSource { kernel: &kernel, initrd: None, cmdline: "a\0b" }, &spec).unwrap_err();
    assert!(error.to_string().contains("NUL"), "{error}");
}

#[test]
fn damaged_headers_never_panic() {
    let files = Files::new();
    let spec = machine(&[256 * MIB]);
    for original in [bzimage(good_header()), elf(16 * MIB, 16 * MIB, 64)] {
        for at in (0..0x80).chain(0x1f0..0x270).filter(|at| *at < original.len()) {
            for value in [0, 0x7f, 0xff] {
                let mut bytes = original.clone();
                bytes[at] = value;
                let kernel = files.put("kernel", &bytes);
                let source = BootSource { kernel: &kernel, initrd: None, cmdline: "" };
                if let Err(error) = check(&source, &spec) {
                    assert!(!error.to_string().contains('\n'));
                }
            }
        }
    }
}
