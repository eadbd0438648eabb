//! The walk through a guest's page tables from a linear address to a physical one, with all the CPU's checks.
//!
//! 4 and 5 levels, pages of 4 KiB, 2 MiB and 1 GiB (SDM vol. 3, 5.5 to 5.8; AMD's manual vol. 2, 5.3 to 5.6).
//! The walk is pure: it sets no Accessed or Dirty bit, but tells whether they are set. A walk from memory is
//! as good as the CPU's own: a CPU may forget a translation at any time, and must not use a stale one after a
//! shootdown, which a stopped vCPU has not answered.

use thiserror::Error;

/// Guest-physical memory, as far as this node may read it now.
pub trait GuestPhysical {
    /// The 8 bytes at an address, a multiple of 8, in one load. `None` if they are not RAM or this node may
    /// not read them now.
    fn read_u64(&self, address: u64) -> Option<u64>;

    /// Fills `bytes`, which lie in one page, from `address` on. False if they are not RAM or this node may
    /// not read them now.
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool;
}

/// Who accesses.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Privilege {
    /// An instruction at CPL 3.
    User,
    /// An instruction at CPL 0 to 2, or an implicit access: to a descriptor table or the TSS, at whatever
    /// CPL.
    Supervisor {
        /// RFLAGS.AC, which lifts SMAP. Never for an implicit access.
        may_access_user_pages: bool,
    },
}

/// What for.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub enum Access {
    /// To read data.
    Read,
    /// To write data, or to read and write it.
    Write,
    /// To fetch an instruction.
    Fetch,
}

/// What a CPU's translations depend on, beside the page tables.
#[derive(Clone, Debug)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// PKRU, if it is known.
    pub pkru: Option<u32>,
    /// IA32_PKRS, if it is known.
    pub pkrs: Option<u32>,
    /// Bits of a physical address, 52 at most.
    pub physical_bits: u8,
    /// Whether there are pages of 1 GiB.
    pub gigabyte_pages: bool,
    /// Who accesses.
    pub privilege: Privilege,
}

/// Where a linear address leads.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub struct Translation {
    /// The guest-physical address.
    pub address: u64,
    /// Bytes that are translated alike: 4 KiB, 2 MiB or 1 GiB.
    pub page_bytes: u64,
    /// Whether all entries on the way are marked Accessed, as the CPU's own walk would have marked them.
    pub accessed: bool,
    /// Whether the last entry is marked Dirty, as the CPU's own walk for a write would have marked it.
    pub dirty: bool,
}

/// Why there is no translation. All but the last four are page faults or general-protection faults on the
/// CPU.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Hash, Error)]
pub enum Fault {
    /// The address's upper bits are not copies of its highest valid one.
    #[error("the address is not canonical")]
    NotCanonical,
    /// An entry has not its Present bit.
    #[error("an entry of the page tables is not present")]
    NotPresent,
    /// An entry has a bit that must be 0.
    #[error("an entry of the page tables has a reserved bit")]
    Reserved,
    /// A write to a read-only page.
    #[error("the page is read-only")]
    ReadOnly,
    /// User code and a supervisor's page.
    #[error("the page is the supervisor's")]
    SupervisorPage,
    /// A fetch from a page that is not for code.
    #[error("the page is not executable")]
    NoExecute,
    /// A supervisor's fetch from a user page (SMEP).
    #[error("the supervisor may not execute user pages")]
    Smep,
    /// A supervisor's access to a user page (SMAP).
    #[error("the supervisor may not access user pages")]
    Smap,
    /// The page's protection key forbids the access.
    #[error("the page's protection key forbids it")]
    ProtectionKey,
    /// The page has a protection key, and nobody has read what keys allow.
    #[error("the rights of protection keys are not known")]
    UnknownKeys,
    /// No paging, or that of 32-bit modes.
    #[error("the CPU is not in long mode")]
    Mode,
    /// CR4 or EFER switches something on that may have a say and that this walker does not know: LASS, AMD's
    /// segment limits in long mode, or newer.
    #[error("the CPU has rules for addresses that are not known here")]
    Control,
    /// This node may not read an entry now, or it is not RAM.
    #[error("the page tables cannot be read here")]
    TableAbsent,
}

/// CR0: paging is on.
const PG: u64 = 1 << 31;
/// CR0: the supervisor, too, may not write read-only pages.
const WP: u64 = 1 << 16;
/// CR4: entries of 8 bytes.
const PAE: u64 = 1 << 5;
/// CR4: 5 levels.
const LA57: u64 = 1 << 12;
/// CR4: the supervisor does not execute user pages.
const SMEP: u64 = 1 << 20;
/// CR4: the supervisor does not access user pages.
const SMAP: u64 = 1 << 21;
/// CR4: user pages have protection keys.
const PKE: u64 = 1 << 22;
/// CR4: supervisor pages have protection keys.
const PKS: u64 = 1 << 24;
/// CR4: the bits above, and those that have no say in what data an address without metadata leads to: up to
/// SMXE, FSGSBASE, PCIDE, OSXSAVE, KL, CET (shadow stacks are read-only to all but calls), UINTR, LAM_SUP,
/// FRED.
const KNOWN: u64 = 0x1_13ff_7fff;
/// EFER: long mode is active.
const LMA: u64 = 1 << 10;
/// EFER: pages may be not executable.
const NXE: u64 = 1 << 11;
/// EFER: segments have limits in 64-bit mode, on some of AMD's CPUs.
const LMSLE: u64 = 1 << 13;

/// In an entry: present.
const PRESENT: u64 = 1;
/// In an entry: writable.
const WRITABLE: u64 = 1 << 1;
/// In an entry: the user's.
const USER: u64 = 1 << 2;
/// In an entry: used in a translation.
const ACCESSED: u64 = 1 << 5;
/// In the last entry: used for a write.
const DIRTY: u64 = 1 << 6;
/// In an entry above the last level: it maps a large page.
const LARGE: u64 = 1 << 7;
/// In an entry: not executable.
const NO_EXECUTE: u64 = 1 << 63;
/// In an entry: the bits that may hold a physical address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Paging {
    /// Translates one address for one access.
    ///
    /// # Errors
    /// Where the CPU would fault, or where this walker cannot tell.
    pub fn translate(
        &self,
        linear: u64,
        access: Access,
        memory: &impl GuestPhysical,
    ) -> Result<Translation, Fault> {
        if self.cr0 & PG == 0 || self.cr4 & PAE == 0 || self.efer & LMA == 0 {
            return Err(Fault::Mode);
        }
        if self.cr4 & !KNOWN != 0 || self.efer & LMSLE != 0 {
            return Err(Fault::Control);
        }
        if !self.is_canonical(linear) {
            return Err(Fault::NotCanonical);
        }
        let beyond = ADDRESS & !((1 << self.physical_bits.min(52)) - 1);
        let no_execute = if self.efer & NXE != 0 { NO_EXECUTE } else { 0 };
        let mut table = self.cr3 & ADDRESS & !beyond;
        let (mut all, mut any) = (u64::MAX, 0);
        let mut level = self.levels();
        let (last, shift) = loop {
            let shift = 12 + 9 * (level - 1);
            let entry = memory.read_u64(table | (linear >> shift & 511) << 3).ok_or(Fault::TableAbsent)?;
            if entry & PRESENT == 0 {
                return Err(Fault::NotPresent);
            }
            let is_last = level == 1 || level <= 3 && entry & LARGE != 0;
            if entry & (beyond | (NO_EXECUTE & !no_execute) | self.reserved(level, is_last)) != 0 {
                return Err(Fault::Reserved);
            }
            (all, any) = (all & entry, any | entry);
            if is_last {
                break (entry, shift);
            }
            table = entry & ADDRESS;
            level -= 1;
        };
        self.check(access, all, any & no_execute != 0, (last >> 59 & 15) as u32)?;
        let inside = (1 << shift) - 1;
        Ok(Translation {
            address: last & ADDRESS & !inside | linear & inside,
            page_bytes: 1 << shift,
            accessed: all & ACCESSED != 0,
            dirty: last & DIRTY != 0,
        })
    }

    /// Whether an address is one that can be translated at all.
    pub fn is_canonical(&self, linear: u64) -> bool {
        let unused = 64 - (12 + 9 * self.levels());
        ((linear << unused) as i64 >> unused) as u64 == linear
    }

    fn levels(&self) -> u32 {
        if self.cr4 & LA57 != 0 { 5 } else { 4 }
    }

    /// The bits that must be 0 in an entry, beside those beyond the physical addresses.
    fn reserved(&self, level: u32, is_last: bool) -> u64 {
        match (level, is_last) {
            // A large page's address is aligned to it; bit 12 is a PAT bit.
            (3, true) if self.gigabyte_pages => 0x3fff_e000,
            (3, true) => LARGE,
            (2, true) => 0x001f_e000,
            // Bit 8 is ignored by Intel's CPUs and reserved by AMD's; nobody sets it.
            (4.., _) => LARGE | 1 << 8,
            _ => 0,
        }
    }

    /// The rights of a page whose entries all have the bits of `all`.
    fn check(&self, access: Access, all: u64, no_execute: bool, key: u32) -> Result<(), Fault> {
        let (user_page, writable) = (all & USER != 0, all & WRITABLE != 0);
        let supervisor_obeys_write = self.cr0 & WP != 0;
        let obeys_write = match self.privilege {
            Privilege::User => true,
            Privilege::Supervisor { .. } => supervisor_obeys_write,
        };
        match self.privilege {
            Privilege::User if !user_page => return Err(Fault::SupervisorPage),
            Privilege::Supervisor { .. } if user_page && access == Access::Fetch && self.cr4 & SMEP != 0 => {
                return Err(Fault::Smep);
            }
            Privilege::Supervisor { may_access_user_pages: false }
                if user_page && access != Access::Fetch && self.cr4 & SMAP != 0 =>
            {
                return Err(Fault::Smap);
            }
            _ => {}
        }
        match access {
            Access::Fetch if no_execute => return Err(Fault::NoExecute),
            Access::Write if obeys_write && !writable => return Err(Fault::ReadOnly),
            _ => {}
        }
        let (keys_on, rights) = if user_page { (PKE, self.pkru) } else { (PKS, self.pkrs) };
        if access != Access::Fetch && self.cr4 & keys_on != 0 {
            let rights = rights.ok_or(Fault::UnknownKeys)? >> (2 * key);
            let (no_access, no_write) = (rights & 1 != 0, rights & 2 != 0);
            if no_access || no_write && access == Access::Write && obeys_write {
                return Err(Fault::ProtectionKey);
            }
        }
        Ok(())
    }
}
