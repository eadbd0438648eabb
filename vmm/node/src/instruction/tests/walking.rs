//! The walk against tables by hand, and against an oracle that goes about it another way.

use std::collections::BTreeMap;

use super::random::Random;
use crate::instruction::walk::{Access, Fault, GuestPhysical, Paging, Privilege, Translation};

/// Words by address.
#[derive(Clone, Default)]
pub struct Words(pub BTreeMap<u64, u64>);

impl GuestPhysical for Words {
    fn read_u64(&self, address: u64) -> Option<u64> {
        assert!(address.is_multiple_of(8));
        self.0.get(&address).copied()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        assert!(bytes.len() as u64 <= 4096 - address % 4096, "a read that crosses a page");
        for (n, byte) in bytes.iter_mut().enumerate() {
            let at = address + n as u64;
            let Some(word) = self.0.get(&(at & !7)) else { return false };
            *byte = word.to_le_bytes()[(at % 8) as usize];
        }
        true
    }
}

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 1 << 5;
pub const D: u64 = 1 << 6;
pub const LARGE: u64 = 1 << 7;
pub const NX: u64 = 1 << 63;

pub const CR0: u64 = 1 << 31 | 1 << 16 | 1;
pub const PAE: u64 = 1 << 5;
pub const LA57: u64 = 1 << 12;
pub const SMEP: u64 = 1 << 20;
pub const SMAP: u64 = 1 << 21;
pub const PKE: u64 = 1 << 22;
pub const PKS: u64 = 1 << 24;
pub const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// The linear address of indices, the highest level's first, and an offset.
fn linear(indices: &[u64], offset: u64) -> u64 {
    let bits = 12 + 9 * indices.len();
    let address = indices.iter().fold(0, |address, index| address << 9 | index) << 12 | offset;
    ((address << (64 - bits)) as i64 >> (64 - bits)) as u64
}

/// Tables at 0x1000, 0x2000, ... with an entry each, and CR3 that names the first.
fn tables(entries: &[(u64, u64)]) -> Words {
    let entry = |(n, &(index, entry)): (usize, &(u64, u64))| (0x1000 * (n as u64 + 1) + 8 * index, entry);
    Words(entries.iter().enumerate().map(entry).collect())
}

fn user() -> Paging {
    Paging {
        cr0: CR0,
        cr3: 0x1000,
        cr4: PAE | SMEP | SMAP,
        efer: EFER,
        pkru: None,
        pkrs: None,
        physical_bits: 46,
        gigabyte_pages: true,
        privilege: Privilege::User,
    }
}

fn kernel() -> Paging {
    Paging { privilege: Privilege::Supervisor { may_access_user_pages: false }, ..user() }
}

/// Four levels down to a page at 0x5000 with the last entry's bits as told.
fn four(last: u64) -> Words {
    let upper = P | W | U | A;
    tables(&[(1, 0x2000 | upper), (2, 0x3000 | upper), (3, 0x4000 | upper), (4, last)])
}

fn at() -> u64 {
    linear(&[1, 2, 3, 4], 0x678)
}

#[test]
fn four_and_five_levels_lead_to_the_page_and_tell_its_marks() {
    let found =
        |address, page_bytes, accessed, dirty| Ok(Translation { address, page_bytes, accessed, dirty });
    let page = 0x3ff_ffff_5000;
    assert_eq!(
        user().translate(at(), Access::Read, &four(page | P | W | U)),
        found(page | 0x678, 4096, false, false)
    );
    let marked = four(page | P | W | U | A | D);
    assert_eq!(user().translate(at(), Access::Write, &marked), found(page | 0x678, 4096, true, true));
    let upper = P | W | U | A;
    let five = tables(&[
        (300, 0x2000 | upper),
        (1, 0x3000 | upper),
        (2, 0x4000 | P | W | U),
        (3, 0x5000 | upper),
        (4, 0x7000 | upper | D),
    ]);
    let paging = Paging { cr4: PAE | LA57, ..user() };
    let address = linear(&[300, 1, 2, 3, 4], 5);
    assert_eq!(address >> 56, 0xff);
    assert_eq!(paging.translate(address, Access::Read, &five), found(0x7005, 4096, false, true));
    let cut = Paging { cr4: PAE, ..user() };
    assert_eq!(cut.translate(address, Access::Read, &five), Err(Fault::NotCanonical));
}

#[test]
fn large_pages_end_the_walk_and_their_low_address_bits_are_reserved() {
    let upper = P | W | U | A;
    let walk = |words: &Words, address| user().translate(address, Access::Write, words);
    let pat = 1 << 12;
    let two = |entry| tables(&[(511, 0x2000 | upper), (2, 0x3000 | upper), (3, entry | LARGE | upper | D)]);
    let address = linear(&[511, 2, 3, 0x1ab], 0xcde);
    let found = walk(&two(0x4000_0000 | pat), address).unwrap();
    assert_eq!((found.address, found.page_bytes), (0x401a_bcde, 2 << 20));
    for bit in 13..21 {
        assert_eq!(walk(&two(0x4000_0000 | 1 << bit), address), Err(Fault::Reserved), "bit {bit}");
    }
    let one = |entry| tables(&[(0, 0x2000 | upper), (2, entry | LARGE | upper | D)]);
    let address = linear(&[0, 2, 0x155, 0x1ab], 0xcde);
    let found = walk(&one(0x8000_0000 | pat), address).unwrap();
    assert_eq!((found.address, found.page_bytes), (0xaaba_bcde, 1 << 30));
    for bit in 13..30 {
        assert_eq!(walk(&one(0x8000_0000 | 1 << bit), address), Err(Fault::Reserved), "bit {bit}");
    }
    let without = Paging { gigabyte_pages: false, ..user() };
    assert_eq!(without.translate(address, Access::Read, &one(0x8000_0000)), Err(Fault::Reserved));
    let root = tables(&[(0, 0x2000 | upper | LARGE)]);
    assert_eq!(walk(&root, address), Err(Fault::Reserved));
}

#[test]
fn what_is_absent_reserved_or_unknown_is_no_translation() {
    let walk = |paging: Paging, words: &Words| paging.translate(at(), Access::Read, words);
    let good = four(0x5000 | P | U | A);
    assert!(walk(user(), &good).is_ok());
    assert_eq!(walk(user(), &four(0x5000 | U | A)), Err(Fault::NotPresent));
    assert_eq!(walk(user(), &four(0x5000 | 1 << 46 | P | U)), Err(Fault::Reserved));
    assert!(
        walk(user(), &four(0x5000 | 1 << 45 | 0x7f << 52 | P | U)).is_ok(),
        "ignored bits and a protection key"
    );
    assert_eq!(walk(Paging { efer: 1 << 10, ..user() }, &four(0x5000 | P | U | NX)), Err(Fault::Reserved));
    assert_eq!(walk(Paging { efer: 0, ..user() }, &good), Err(Fault::Mode));
    assert_eq!(walk(Paging { cr0: 1, ..user() }, &good), Err(Fault::Mode));
    assert_eq!(walk(Paging { cr4: PAE | 1 << 27, ..user() }, &good), Err(Fault::Control));
    assert_eq!(walk(Paging { efer: EFER | 1 << 13, ..user() }, &good), Err(Fault::Control));
    assert_eq!(walk(Paging { cr3: 0x9000, ..user() }, &good), Err(Fault::TableAbsent));
    // PCIDs, and the bits that switch masks for addresses on.
    assert!(walk(Paging { cr3: 0x1000 | 0xfff | 3 << 61, ..user() }, &good).is_ok());
    for missing in good.0.keys() {
        let mut words = good.clone();
        words.0.remove(missing);
        assert_eq!(walk(user(), &words), Err(Fault::TableAbsent));
    }
}

#[test]
fn rights_are_those_of_the_whole_way() {
    let all = P | W | U | A;
    let cut = |level: usize, without: u64, with: u64| {
        let mut words = four(0x5000 | all);
        let entry = words.0.values_mut().nth(level).unwrap();
        *entry = *entry & !without | with;
        words
    };
    for level in 0..4 {
        let walk = |paging: Paging, access, words: &Words| paging.translate(at(), access, words).map(|_| ());
        let read_only = cut(level, W, 0);
        assert_eq!(walk(user(), Access::Write, &read_only), Err(Fault::ReadOnly));
        assert_eq!(walk(user(), Access::Read, &read_only), Ok(()));
        let privileged = cut(level, U, 0);
        assert_eq!(walk(user(), Access::Read, &privileged), Err(Fault::SupervisorPage));
        assert_eq!(walk(kernel(), Access::Write, &privileged), Ok(()));
        assert_eq!(walk(kernel(), Access::Fetch, &privileged), Ok(()));
        let data = cut(level, 0, NX);
        assert_eq!(walk(user(), Access::Fetch, &data), Err(Fault::NoExecute));
        assert_eq!(walk(user(), Access::Write, &data), Ok(()));
        let privileged_read_only = cut(level, U | W, 0);
        assert_eq!(walk(kernel(), Access::Write, &privileged_read_only), Err(Fault::ReadOnly));
        let loose = Paging { cr0: CR0 & !(1 << 16), ..kernel() };
        assert_eq!(walk(loose, Access::Write, &privileged_read_only), Ok(()));
        let loose = Paging { cr0: CR0 & !(1 << 16), ..user() };
        assert_eq!(walk(loose, Access::Write, &read_only), Err(Fault::ReadOnly));
    }
}

#[test]
fn the_supervisor_stays_off_user_pages_unless_it_may() {
    let words = four(0x5000 | P | W | U | A | D);
    let walk = |paging: Paging, access| paging.translate(at(), access, &words).map(|_| ());
    assert_eq!(walk(kernel(), Access::Read), Err(Fault::Smap));
    assert_eq!(walk(kernel(), Access::Write), Err(Fault::Smap));
    assert_eq!(walk(kernel(), Access::Fetch), Err(Fault::Smep));
    let lifted = Paging { privilege: Privilege::Supervisor { may_access_user_pages: true }, ..kernel() };
    assert_eq!(walk(lifted.clone(), Access::Write), Ok(()));
    assert_eq!(walk(lifted, Access::Fetch), Err(Fault::Smep));
    let plain = Paging { cr4: PAE, ..kernel() };
    assert_eq!(walk(plain.clone(), Access::Write), Ok(()));
    assert_eq!(walk(plain, Access::Fetch), Ok(()));
}

#[test]
fn protection_keys_forbid_data_and_not_code() {
    let page = |key: u64, user: u64| four(0x5000 | P | W | user | A | D | key << 59);
    let walk = |paging: &Paging, access, words: &Words| paging.translate(at(), access, words).map(|_| ());
    let rights = |access: u32, write: u32| Some((access | write << 1) << (2 * 7));
    let keyed =
        |paging: Paging, rights| Paging { cr4: PAE | PKE | PKS, pkru: rights, pkrs: rights, ..paging };
    for (paging, bit) in [(user(), U), (kernel(), 0)] {
        let (seven, six) = (page(7, bit), page(6, bit));
        let none = keyed(paging.clone(), rights(1, 0));
        assert_eq!(walk(&none, Access::Read, &seven), Err(Fault::ProtectionKey));
        assert_eq!(walk(&none, Access::Fetch, &seven), Ok(()));
        assert_eq!(walk(&none, Access::Write, &six), Ok(()));
        let reads = keyed(paging.clone(), rights(0, 1));
        assert_eq!(walk(&reads, Access::Read, &seven), Ok(()));
        assert_eq!(walk(&reads, Access::Write, &seven), Err(Fault::ProtectionKey));
        let unknown = keyed(paging.clone(), None);
        assert_eq!(walk(&unknown, Access::Read, &six), Err(Fault::UnknownKeys));
        assert_eq!(walk(&unknown, Access::Fetch, &six), Ok(()));
        assert_eq!(walk(&Paging { cr4: PAE, ..none }, Access::Read, &seven), Ok(()));
    }
    // The supervisor obeys a user page's key, the ban on writing only with CR0.WP.
    let kernel = keyed(kernel(), rights(0, 1));
    assert_eq!(walk(&kernel, Access::Write, &page(7, U)), Err(Fault::ProtectionKey));
    let loose = Paging { cr0: CR0 & !(1 << 16), ..kernel };
    assert_eq!(walk(&loose, Access::Write, &page(7, U)), Ok(()));
    assert_eq!(
        walk(&Paging { pkru: rights(1, 0), ..loose }, Access::Read, &page(7, U)),
        Err(Fault::ProtectionKey)
    );
}

/// Whether the CPU would allow it, by rules written down one by one from the SDM, vol. 3, 5.6 and 5.7: a
/// different order and other words than the walker's.
fn oracle(p: &Paging, entries: &[u64], levels: u32, access: Access) -> bool {
    let has = |register: u64, bit: u32| register >> bit & 1 == 1;
    let (read, write, fetch) = (access == Access::Read, access == Access::Write, access == Access::Fetch);
    for (n, &entry) in entries.iter().enumerate() {
        let level = levels - n as u32;
        if !has(entry, 0) {
            return false;
        }
        let large = has(entry, 7);
        let reserved = (u32::from(p.physical_bits)..52).any(|bit| has(entry, bit))
            || has(entry, 63) && !has(p.efer, 11)
            || level >= 4 && (large || has(entry, 8))
            || level == 3 && large && (!p.gigabyte_pages || (13..30).any(|bit| has(entry, bit)))
            || level == 2 && large && (13..21).any(|bit| has(entry, bit));
        if reserved {
            return false;
        }
    }
    let everywhere = |bit| entries.iter().all(|&entry| has(entry, bit));
    let user_mode_address = everywhere(2);
    let (supervisor, ac) = match p.privilege {
        Privilege::User => (false, false),
        Privilege::Supervisor { may_access_user_pages } => (true, may_access_user_pages),
    };
    let disabled = entries.iter().any(|&entry| has(entry, 63)) && has(p.efer, 11);
    let (wp, smep, smap) = (has(p.cr0, 16), has(p.cr4, 20), has(p.cr4, 21));
    let by_mode = match (supervisor, user_mode_address) {
        (true, false) => read || write && (!wp || everywhere(1)) || fetch && !disabled,
        (true, true) => {
            (read || write) && (!smap || ac) && (read || !wp || everywhere(1)) || fetch && !smep && !disabled
        }
        (false, true) => read || write && everywhere(1) || fetch && !disabled,
        (false, false) => false,
    };
    let key = entries.last().unwrap() >> 59 & 15;
    let by_key = match (user_mode_address, has(p.cr4, 22), has(p.cr4, 24)) {
        _ if fetch => true,
        (true, true, _) => {
            let (ad, wd) = (
                has(p.pkru.unwrap().into(), 2 * key as u32),
                has(p.pkru.unwrap().into(), 2 * key as u32 + 1),
            );
            !(ad || write && wd && (!supervisor || wp))
        }
        (false, _, true) => {
            let (ad, wd) = (
                has(p.pkrs.unwrap().into(), 2 * key as u32),
                has(p.pkrs.unwrap().into(), 2 * key as u32 + 1),
            );
            !(ad || write && wd && wp)
        }
        _ => true,
    };
    by_mode && by_key
}

#[test]
fn random_tables_allow_what_the_oracle_allows_and_lead_where_they_say() {
    let mut random = Random(13);
    let (mut allowed, mut denied) = (0, 0);
    for _ in 0..400_000 {
        let mut cr4 = PAE;
        for bit in [LA57, SMEP, SMAP, PKE, PKS] {
            cr4 |= if random.once_in(2) { bit } else { 0 };
        }
        let levels: u32 = if cr4 & LA57 != 0 { 5 } else { 4 };
        let paging = Paging {
            cr0: if random.once_in(2) { CR0 } else { CR0 & !(1 << 16) },
            cr3: 0x1000,
            cr4,
            efer: if random.once_in(4) { 1 << 10 } else { EFER },
            pkru: Some(random.any() as u32),
            pkrs: Some(random.any() as u32),
            physical_bits: random.pick(&[36, 46, 52]),
            gigabyte_pages: !random.once_in(4),
            privilege: match random.below(3) {
                0 => Privilege::User,
                n => Privilege::Supervisor { may_access_user_pages: n == 1 },
            },
        };
        let indices: Vec<u64> = (0..levels).map(|_| random.below(512)).collect();
        let offset = random.below(4096);
        let mut words = Words::default();
        let mut entries = Vec::new();
        let mut table = 0x1000;
        let (mut address, mut covered) = (0, 0);
        for level in (1..=levels).rev() {
            let large = (level == 2 || level == 3) && random.once_in(4);
            let last = level == 1 || large;
            let shift = 12 + 9 * (level - 1);
            let to = if last { random.any() & 0xf_ffff_f000 & !((1 << shift) - 1) } else { table + 0x1000 };
            // Mostly allowing bits, so that much is allowed.
            let mut entry = to | random.any() & (A | D);
            for (bit, chance) in [(P, 40), (W, 6), (U, 6)] {
                entry |= if random.once_in(chance) { 0 } else { bit };
            }
            entry |= if random.once_in(10) { NX } else { 0 };
            entry |= if large { LARGE } else { 0 };
            entry |= if random.once_in(30) { 1 << random.below(63) } else { 0 };
            entry |= random.any() & 0x7800_0000_0000_0e00;
            let entry = if level == 1 { entry | random.any() & (LARGE | 0x100) } else { entry };
            words.0.insert(table + 8 * indices[(levels - level) as usize], entry);
            entries.push(entry);
            let really_last = level == 1 || level <= 3 && entry & LARGE != 0;
            if really_last {
                let inside = (1 << shift) - 1;
                covered = 1 << shift;
                address = entry & 0xf_ffff_ffff_f000 & !inside | linear(&indices, offset) & inside;
                break;
            }
            // A bit more in the address leads to a table that is not there.
            table = entry & 0xf_ffff_ffff_f000;
        }
        let access = random.pick(&[Access::Read, Access::Write, Access::Fetch]);
        let found = paging.translate(linear(&indices, offset), access, &words);
        let expected = oracle(&paging, &entries, levels, access);
        assert_eq!(found.is_ok(), expected, "{found:?} {access:?} {paging:x?} {entries:x?}");
        match found {
            Ok(found) => {
                let accessed = entries.iter().all(|entry| entry & A != 0);
                let dirty = entries.last().unwrap() & D != 0;
                assert_eq!(found, Translation { address, page_bytes: covered, accessed, dirty });
                allowed += 1;
            }
            Err(_) => denied += 1,
        }
    }
    println!("{allowed} allowed, {denied} denied");
    assert!(allowed > 50_000 && denied > 50_000);
}
