//! Kernel files: which format, what they ask for, and whether they can be entered in 64-bit mode.

use crate::FirmwareError;
use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use vm_memory::ByteValued;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// "HdrS", the setup header's magic.
pub(super) const BZIMAGE_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12: the first that says whether there is a 64-bit entry.
pub(super) const MIN_PROTOCOL: u16 = 0x20c;
/// Offset of the setup header in a bzImage.
const HEADER_OFFSET: usize = 0x1f1;
/// Offset of the byte that says how long the header is, counted from 0x202.
const HEADER_LEN_OFFSET: usize = 0x201;
/// Longest command line of an x86 kernel, without its NUL (`COMMAND_LINE_SIZE` - 1).
const CMDLINE_MAX: usize = 2047;
/// The 64-bit entry of a bzImage, counted from where it is loaded.
const ENTRY_64: u64 = 0x200;
/// Highest address of an initrd for a kernel that does not say.
const INITRD_ADDR_MAX: u64 = 0x7fff_ffff;
/// More program headers than any kernel has.
const MAX_SEGMENTS: u16 = 64;

/// An open kernel file.
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) format: Format,
}

/// What kind of kernel file it is.
pub(super) enum Format {
    BzImage(BzImage),
    Elf(ElfImage),
}

/// A compressed kernel with its setup header.
pub(super) struct BzImage {
    pub(super) header: setup_header,
    /// Bytes to load.
    len: u64,
}

/// An uncompressed kernel.
pub(super) struct ElfImage {
    entry: u64,
    /// Physical addresses that it takes, uninitialized data included.
    span: Range<u64>,
}

/// An ELF file's header (System V ABI, chapter 4, 64-bit).
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C, packed)]
struct ElfHeader {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    segments_at: U64,
    sections_at: U64,
    flags: U32,
    header_len: U16,
    segment_len: U16,
    segments: U16,
    section_len: U16,
    sections: U16,
    names: U16,
}
const _: () = assert!(size_of::<ElfHeader>() == 64);

/// A program header of an ELF file.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C, packed)]
struct ElfSegment {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_addr: U64,
    physical_addr: U64,
    file_len: U64,
    memory_len: U64,
    align: U64,
}
const _: () = assert!(size_of::<ElfSegment>() == 56);

impl Image {
    /// Opens the kernel at `path` and finds out what it is.
    pub(super) fn open(path: &Path) -> Result<Image, FirmwareError> {
        let wrong = |why: String| FirmwareError::Boot(format!("the kernel {} {why}", path.display()));
        let (mut file, len) = open(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let mut start = Vec::new();
        let result = Read::by_ref(&mut file).take(0x400).read_to_end(&mut start);
        result.map_err(|error| wrong(format!("cannot be read: {error}")))?;

        let format = if start.starts_with(b"\x7fELF") {
            Format::Elf(ElfImage::parse(&start, &mut file, len).map_err(&wrong)?)
        } else if start.get(0x202..0x206) == Some(&BZIMAGE_MAGIC.to_le_bytes()) {
            Format::BzImage(BzImage::parse(&start, len).map_err(&wrong)?)
        } else {
            let what = match start.as_slice() {
                [] => "is empty",
                [0x1f, 0x8b, ..] => "is a gzip file, not a kernel image",
                [b'M', b'Z', ..] => "is not an x86 kernel image",
                _ => "is neither a bzImage nor an ELF kernel",
            };
            return Err(wrong(format!("{what}: give the vmlinuz of an x86-64 Linux")));
        };
        Ok(Image { path: path.into(), file, format })
    }

    /// Where it has to lie, and how much memory it needs from there on before it runs on its own.
    pub(super) fn span(&self) -> Range<u64> {
        match &self.format {
            Format::BzImage(image) => {
                let start = image.header.pref_address;
                // What the decompressor works in, measured from an address it may first align.
                let need = u64::from(image.header.init_size).max(image.len);
                start..start.saturating_add(need)
            }
            Format::Elf(image) => image.span.clone(),
        }
    }

    /// The instruction to start at.
    pub(super) fn entry(&self) -> u64 {
        match &self.format {
            Format::BzImage(image) => image.header.pref_address + ENTRY_64,
            Format::Elf(image) => image.entry,
        }
    }

    /// The last address an initrd may occupy.
    pub(super) fn initrd_addr_max(&self) -> u64 {
        match &self.format {
            Format::BzImage(image) if image.header.initrd_addr_max != 0 => {
                image.header.initrd_addr_max.into()
            }
            _ => INITRD_ADDR_MAX,
        }
    }

    /// The longest command line, without its NUL.
    pub(super) fn cmdline_max(&self) -> usize {
        match &self.format {
            Format::BzImage(image) => (image.header.cmdline_size as usize).min(CMDLINE_MAX),
            Format::Elf(_) => CMDLINE_MAX,
        }
    }
}

/// Opens a regular file and says how long it is.
pub(super) fn open(path: &Path) -> std::io::Result<(File, u64)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("it is not a file"));
    }
    Ok((file, metadata.len()))
}

impl BzImage {
    fn parse(start: &[u8], file_len: u64) -> Result<BzImage, String> {
        // The header ends where its jump instruction says; what follows is code, not fields.
        let end = 0x202 + usize::from(start[HEADER_LEN_OFFSET]);
        let fields = start.get(HEADER_OFFSET..end.min(start.len())).unwrap_or(&[]);
        let mut header = setup_header::default();
        let room = header.as_mut_slice();
        let known = fields.len().min(room.len());
        room[..known].copy_from_slice(&fields[..known]);

        let version = header.version;
        if version < MIN_PROTOCOL {
            return Err(format!(
                "speaks boot protocol {}.{}, and 2.12 is the first with a 64-bit entry: use Linux 3.8 or newer",
                version >> 8,
                version & 0xff
            ));
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err("is a 32-bit kernel: give the vmlinuz of an x86-64 Linux".into());
        }
        let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
        let setup_len = (u64::from(sectors) + 1) * 512;
        let payload_end = setup_len + u64::from(header.payload_offset) + u64::from(header.payload_length);
        if file_len < payload_end || file_len <= setup_len {
            return Err(format!(
                "is cut off: it has {file_len} bytes and should have at least {payload_end}"
            ));
        }
        if header.pref_address < 0x10_0000 {
            return Err("asks to be loaded below 1 MiB: it is damaged".into());
        }
        Ok(BzImage { header, len: file_len - setup_len })
    }
}

impl ElfImage {
    fn parse(start: &[u8], file: &mut File, file_len: u64) -> Result<ElfImage, String> {
        const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
        const EXECUTABLE: u16 = 2;
        const X86_64: u16 = 62;
        const LOAD: u32 = 1;

        let (header, _) =
            ElfHeader::read_from_prefix(start).map_err(|_| "is cut off within its ELF header")?;
        if header.ident[4..6] != CLASS_64_LITTLE_ENDIAN || header.machine.get() != X86_64 {
            return Err("is an ELF file for another CPU: give an x86-64 vmlinux".into());
        }
        if header.kind.get() != EXECUTABLE || header.segment_len.get() as usize != size_of::<ElfSegment>() {
            return Err("is an ELF file, but not a kernel: give an x86-64 vmlinux".into());
        }
        let segments = header.segments.get();
        if segments > MAX_SEGMENTS {
            return Err(format!("has {segments} program headers, more than any kernel: it is damaged"));
        }
        let mut table = vec![0; usize::from(segments) * size_of::<ElfSegment>()];
        file.seek(SeekFrom::Start(header.segments_at.get()))
            .and_then(|_| file.read_exact(&mut table))
            .map_err(|_| "is cut off within its program headers")?;

        let entry = header.entry.get();
        let mut span: Option<Range<u64>> = None;
        let mut entry_is_loaded = false;
        for bytes in table.chunks_exact(size_of::<ElfSegment>()) {
            let segment = ElfSegment::read_from_bytes(bytes).map_err(|_| "has damaged program headers")?;
            if segment.kind.get() != LOAD {
                continue;
            }
            let (file_len_here, memory_len) = (segment.file_len.get(), segment.memory_len.get());
            let from = segment.physical_addr.get();
            let end = from.checked_add(memory_len).ok_or("has a segment beyond all memory: it is damaged")?;
            let file_end = segment.offset.get().checked_add(file_len_here);
            if file_len_here > memory_len || file_end.is_none_or(|file_end| file_end > file_len) {
                return Err("is cut off: a segment reaches beyond its end".into());
            }
            entry_is_loaded |= (from..from + file_len_here).contains(&entry);
            span = Some(span.map_or(from..end, |span| span.start.min(from)..span.end.max(end)));
        }
        match span {
            Some(span) if entry_is_loaded => Ok(ElfImage { entry, span }),
            _ => Err("is an ELF file, but its entry is not a physical address in it: give a vmlinux".into()),
        }
    }
}
