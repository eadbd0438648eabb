//! This CPU, one instruction at a time: registers in, registers out.

use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::encoding::Registers;

const PAGE: usize = 4096;
/// Where the instruction stands in the page of code.
const INSTRUCTION: usize = 1024;
const PAGES: usize = 6;
/// The first page of memory for operands: the middle one of three.
const MEMORY: usize = 3;

/// What the code in front of the instruction loads, and what the code behind it saves. All 8 bytes.
#[repr(C)]
struct Context {
    before: [u64; 16],
    after: [u64; 16],
    fs_base: u64,
    gs_base: u64,
    flags: u64,
    /// Address of `flags`, and of what comes after it: a stack of one word.
    flags_address: u64,
    flags_end: u64,
    host_stack: u64,
    host_fs_base: u64,
    host_gs_base: u64,
}

/// A page of code, one of values, three of memory, all below 2 GiB.
pub struct Processor {
    region: NonNull<u8>,
    /// Whether the bases of FS and GS can be set.
    pub bases: bool,
}

impl Processor {
    /// Needs memory that can be written and executed.
    pub fn new() -> Result<Processor, String> {
        let size = (PAGES * PAGE).try_into().map_err(|_| "no pages")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE | ProtFlags::PROT_EXEC;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let region = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_PRIVATE | MapFlags::MAP_32BIT) }
            .map_err(|e| format!("no memory below 2 GiB that can be written and executed: {e}"))?;
        // SAFETY: getauxval reads what the kernel left in the process's memory.
        let fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0;
        let mut processor = Processor { region: region.cast(), bases: fsgsbase };
        processor.lay_out();
        Ok(processor)
    }

    /// Where instructions stand.
    pub fn instruction(&self) -> u64 {
        self.region.as_ptr() as u64 + INSTRUCTION as u64
    }

    /// Where the page for operands begins.
    pub fn memory(&self) -> u64 {
        self.region.as_ptr() as u64 + (MEMORY * PAGE) as u64
    }

    /// That page.
    pub fn page(&mut self) -> &mut [u8; PAGE] {
        // SAFETY: inside our mapping, and borrowed as `self` is.
        unsafe { &mut *self.region.as_ptr().add(MEMORY * PAGE).cast() }
    }

    /// Whether the pages before and after it are as they were.
    pub fn surroundings_are_untouched(&self) -> bool {
        [MEMORY - 1, MEMORY + 1].iter().all(|page| {
            // SAFETY: inside our mapping; nobody writes while `self` is borrowed.
            let page: &[u8; PAGE] = unsafe { &*self.region.as_ptr().add(page * PAGE).cast() };
            page.iter().all(|&byte| byte == 0)
        })
    }

    /// Puts an instruction in its place.
    pub fn set_instruction(&mut self, bytes: &[u8]) {
        let leave = INSTRUCTION + 64;
        let mut code = bytes.to_vec();
        code.push(0xe9);
        code.extend((leave as i32 - (INSTRUCTION + bytes.len() + 5) as i32).to_le_bytes());
        self.write(INSTRUCTION, &code);
    }

    /// Runs the instruction. `flags` are RFLAGS before and after, of which only status flags may be set.
    ///
    /// # Safety
    /// The instruction must access nothing but the pages for operands, must go on at its end, and must be one
    /// of user code.
    pub unsafe fn run(&mut self, registers: &mut Registers, flags: &mut u64) {
        let context: *mut Context = self.at(PAGE).cast();
        let entry = self.at(0);
        // SAFETY: the context is inside our mapping, aligned, and only accessed here and by the code; the
        // code saves what the ABI says that a function must, and restores the bases of FS and GS; the rest is
        // the caller's promise.
        unsafe {
            (*context).before = registers.general;
            (*context).fs_base = registers.fs_base;
            (*context).gs_base = registers.gs_base;
            (*context).flags = *flags;
            let run: extern "C" fn() = std::mem::transmute(entry);
            run();
            registers.general = (*context).after;
            *flags = (*context).flags;
        }
    }

    fn at(&mut self, offset: usize) -> *mut u8 {
        assert!(offset < PAGES * PAGE);
        // SAFETY: inside our mapping.
        unsafe { self.region.as_ptr().add(offset) }
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE);
        let to = self.at(offset);
        // SAFETY: inside our mapping, which `bytes` is not part of.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Writes the code around the instruction.
    fn lay_out(&mut self) {
        let context: *mut Context = self.at(PAGE).cast();
        // SAFETY: inside our mapping, and aligned.
        unsafe {
            (*context).flags_address = &raw const (*context).flags as u64;
            (*context).flags_end = &raw const (*context).flags as u64 + 8;
        }
        let mut enter = Code { bytes: Vec::new(), start: 0 };
        // push rbx, rbp, r12 to r15
        enter.bytes.extend([0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        enter.store(4, std::mem::offset_of!(Context, host_stack));
        if self.bases {
            // rdfsbase, rdgsbase, wrfsbase, wrgsbase rax
            enter.bytes.extend([0xf3, 0x48, 0x0f, 0xae, 0xc0]);
            enter.store(0, std::mem::offset_of!(Context, host_fs_base));
            enter.bytes.extend([0xf3, 0x48, 0x0f, 0xae, 0xc8]);
            enter.store(0, std::mem::offset_of!(Context, host_gs_base));
            enter.load(0, std::mem::offset_of!(Context, fs_base));
            enter.bytes.extend([0xf3, 0x48, 0x0f, 0xae, 0xd0]);
            enter.load(0, std::mem::offset_of!(Context, gs_base));
            enter.bytes.extend([0xf3, 0x48, 0x0f, 0xae, 0xd8]);
        }
        enter.load(4, std::mem::offset_of!(Context, flags_address));
        // popfq
        enter.bytes.push(0x9d);
        for register in 0..16 {
            enter.load(register, std::mem::offset_of!(Context, before) + 8 * usize::from(register));
        }
        enter.bytes.push(0xe9);
        let after_jump = enter.bytes.len() + 4;
        enter.bytes.extend((INSTRUCTION as i32 - after_jump as i32).to_le_bytes());
        assert!(enter.bytes.len() <= INSTRUCTION);
        self.write(0, &enter.bytes);

        let mut leave = Code { bytes: Vec::new(), start: INSTRUCTION + 64 };
        for register in 0..16 {
            leave.store(register, std::mem::offset_of!(Context, after) + 8 * usize::from(register));
        }
        leave.load(4, std::mem::offset_of!(Context, flags_end));
        // pushfq
        leave.bytes.push(0x9c);
        if self.bases {
            leave.load(0, std::mem::offset_of!(Context, host_fs_base));
            leave.bytes.extend([0xf3, 0x48, 0x0f, 0xae, 0xd0]);
            leave.load(0, std::mem::offset_of!(Context, host_gs_base));
            leave.bytes.extend([0xf3, 0x48, 0x0f, 0xae, 0xd8]);
        }
        leave.load(4, std::mem::offset_of!(Context, host_stack));
        // pop r15 to r12, rbp, rbx; ret
        leave.bytes.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        self.write(leave.start, &leave.bytes);
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference outlives the value.
        let _ = unsafe { munmap(self.region.cast(), PAGES * PAGE) };
    }
}

/// Code that begins `start` bytes into the page of code; the context is in the page behind.
struct Code {
    bytes: Vec<u8>,
    start: usize,
}

impl Code {
    /// mov register, [rip + ...]
    fn load(&mut self, register: u8, field: usize) {
        self.mov(0x8b, register, field);
    }

    /// mov [rip + ...], register
    fn store(&mut self, register: u8, field: usize) {
        self.mov(0x89, register, field);
    }

    fn mov(&mut self, opcode: u8, register: u8, field: usize) {
        self.bytes.extend([0x48 | register >> 3 << 2, opcode, (register & 7) << 3 | 5]);
        let next = self.start + self.bytes.len() + 4;
        self.bytes.extend(((PAGE + field) as i32 - next as i32).to_le_bytes());
    }
}
