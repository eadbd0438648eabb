//! Loading the kernel: from files on the host to guest memory and the first CPU's registers.
//!
//! There is no BIOS: the kernel is entered as a 64-bit boot loader would (Linux
//! `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol"). [`check`] finds what is wrong with the files
//! before any guest exists; [`load`] writes them, the ACPI tables and the boot parameters.
//!
//! ```text
//!  GPA  0x500       GDT
//!       0x6000      stack (grows down from 0x7000)
//!       0x7000      boot parameters ("zero page")
//!       0x8000      further memory map: other nodes' memory
//!       0x9000      page tables: the first 4 GiB, one to one
//!       0x20000     command line
//!       0xe0000     ACPI tables
//!       0xffff0     code that resets the machine
//!       16 MiB ...  kernel (where it asks to be)
//!       ... top     initrd, as high as it may be in node 0's low memory
//! ```

use crate::FirmwareError;
use crate::acpi::{self, AcpiTables};
use crate::addresses::BIOS_RESET_ENTRY;
use crate::layout::Layout;
use crate::spec::MachineSpec;
use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::{KernelLoader, bzimage::BzImage, elf::Elf};
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

mod image;
mod params;
mod place;
mod registers;
mod reset;

pub use registers::{BspRegisters, DescriptorTable, Segment};

use image::{Format, Image};
use place::Plan;

/// GPA of the boot parameters.
const ZERO_PAGE_ADDR: u64 = 0x7000;
/// GPA of the memory map's extension; one page.
const SETUP_DATA_ADDR: u64 = 0x8000;
/// GPA of the command line; it may reach up to [`crate::addresses::LOW_MEMORY_END`].
const CMDLINE_ADDR: u64 = 0x2_0000;

/// What the operator wants booted.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// The kernel: a bzImage or an x86-64 ELF (vmlinux).
    pub kernel: &'a Path,
    /// The initial RAM file system, if any.
    pub initrd: Option<&'a Path>,
    /// The operator's part of the command line; ours goes before it.
    pub cmdline: &'a str,
}

/// Whether `source` can be booted on the machine `spec`, judged by the files alone.
///
/// # Errors
/// [`FirmwareError::Spec`] for a machine that cannot be, [`FirmwareError::Boot`] for files that are missing,
/// not what they should be, or too large, and for a command line that the kernel would cut off.
pub fn check(source: &BootSource, spec: &MachineSpec) -> Result<(), FirmwareError> {
    let layout = Layout::new(spec, acpi::size_bound(spec))?;
    let image = Image::open(source.kernel)?;
    // The clock's frequency is not known yet; no other gives a longer line.
    command_line(source.cmdline, u32::MAX, &image)?;
    Plan::new(&image, source.initrd, &layout)?;
    Ok(())
}

/// Writes kernel, initrd, command line, boot parameters, page tables and ACPI tables to guest memory, which
/// must read as zeros where nothing has been written, and says how the first CPU starts.
///
/// Everything lands in node 0's memory below 3 GiB. `tsc_khz` is the guest's TSC frequency.
///
/// # Errors
/// As [`check`], and [`FirmwareError::Boot`] if guest memory cannot be written.
pub fn load<M: GuestMemoryBackend>(
    mem: &M,
    layout: &Layout,
    acpi: &AcpiTables,
    source: &BootSource,
    tsc_khz: u32,
) -> Result<BspRegisters, FirmwareError> {
    let mut image = Image::open(source.kernel)?;
    let cmdline = command_line(source.cmdline, tsc_khz, &image)?;
    let mut plan = Plan::new(&image, source.initrd, layout)?;

    load_kernel(mem, &mut image, &plan)?;
    if let Some(initrd) = &mut plan.initrd {
        mem.read_exact_volatile_from(GuestAddress(initrd.addr), &mut initrd.file, initrd.len as usize)
            .map_err(|error| unreadable("initrd", &initrd.path, &error))?;
    }
    write(mem, BIOS_RESET_ENTRY, &reset::CODE)?;
    write(mem, CMDLINE_ADDR, cmdline.as_bytes())?;
    write(mem, CMDLINE_ADDR + cmdline.len() as u64, &[0])?;
    for (gpa, bytes) in &acpi.blocks {
        write(mem, *gpa, bytes)?;
    }

    let (local, remote) = params::memory_map(layout);
    let mut zero_page = boot_params {
        hdr: header(&image, &plan, cmdline.len()),
        acpi_rsdp_addr: acpi.rsdp_gpa,
        ..Default::default()
    };
    params::set_memory_map(&mut zero_page, &local);
    if !remote.is_empty() {
        write(mem, SETUP_DATA_ADDR, &params::memory_map_extension(&remote))?;
        zero_page.hdr.setup_data = SETUP_DATA_ADDR;
    }
    mem.write_obj(zero_page, GuestAddress(ZERO_PAGE_ADDR))
        .map_err(|error| unwritable(ZERO_PAGE_ADDR, &error))?;

    for (gpa, bytes) in registers::tables() {
        write(mem, gpa, &bytes)?;
    }
    Ok(registers::at_entry(plan.entry, ZERO_PAGE_ADDR))
}

fn load_kernel<M: GuestMemoryBackend>(mem: &M, image: &mut Image, plan: &Plan) -> Result<(), FirmwareError> {
    let result = match &image.format {
        Format::BzImage(_) => BzImage::load(mem, Some(GuestAddress(plan.kernel)), &mut image.file, None),
        Format::Elf(_) => Elf::load(mem, None, &mut image.file, None),
    };
    result.map(drop).map_err(|error| unreadable("kernel", &image.path, &error))
}

/// The setup header as the boot loader hands it on.
fn header(image: &Image, plan: &Plan, cmdline_len: usize) -> setup_header {
    let mut header = match &image.format {
        Format::BzImage(bzimage) => bzimage.header,
        Format::Elf(_) => setup_header {
            boot_flag: 0xaa55,
            header: image::BZIMAGE_MAGIC,
            version: image::MIN_PROTOCOL,
            kernel_alignment: 0x20_0000,
            cmdline_size: cmdline_len as u32,
            ..Default::default()
        },
    };
    header.type_of_loader = 0xff; // a boot loader without a number of its own
    header.cmd_line_ptr = CMDLINE_ADDR as u32;
    if let Some(initrd) = &plan.initrd {
        header.ramdisk_image = initrd.addr as u32;
        header.ramdisk_size = initrd.len as u32;
    }
    header
}

/// The whole command line. Ours stands first, so that the operator's may override it and may end in arguments
/// for init after `--`. Without `reboot=acpi` Linux does not reboot by ACPI's register where ACPI is
/// hardware-reduced and there is no EFI, but by a jump to the BIOS.
fn command_line(theirs: &str, tsc_khz: u32, image: &Image) -> Result<String, FirmwareError> {
    if theirs.contains('\0') {
        return Err(FirmwareError::Boot("the command line contains a NUL character: remove it".into()));
    }
    let ours = format!("tsc=reliable tsc_early_khz={tsc_khz} reboot=acpi ");
    let room = image.cmdline_max().saturating_sub(ours.len());
    if theirs.len() > room {
        return Err(FirmwareError::Boot(format!(
            "the command line has {} characters and this kernel takes {room}: shorten it",
            theirs.len()
        )));
    }
    Ok(ours + theirs)
}

fn write<M: GuestMemoryBackend>(mem: &M, gpa: u64, bytes: &[u8]) -> Result<(), FirmwareError> {
    mem.write_slice(bytes, GuestAddress(gpa)).map_err(|error| unwritable(gpa, &error))
}

fn unwritable(gpa: u64, error: &dyn std::error::Error) -> FirmwareError {
    FirmwareError::Boot(format!(
        "guest memory at {gpa:#x} cannot be written while loading the kernel: {error}"
    ))
}

fn unreadable(what: &str, path: &Path, error: &dyn std::error::Error) -> FirmwareError {
    FirmwareError::Boot(format!("the {what} {} cannot be loaded: {error}", path.display()))
}

#[cfg(test)]
mod tests;
