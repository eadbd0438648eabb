//! Any state of a vCPU, any page tables and any code: what is shipped is one access to the page that was
//! asked for.
#![no_main]
use vmm::instruction::decode::{LONGEST, decode};
use vmm::instruction::walk::Access;
use vmm::instruction::{Cpu, GuestPhysical, ship};

/// Guest-physical memory that is the same bytes again and again.
struct Memory<'a>(&'a [u8]);

impl GuestPhysical for Memory<'_> {
    fn read_u64(&self, address: u64) -> Option<u64> {
        assert!(address.is_multiple_of(8));
        let mut bytes = [0; 8];
        self.read(address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        assert!(bytes.len() as u64 <= 4096 - address % 4096);
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = self.0[((address + n as u64) % self.0.len() as u64) as usize];
        }
        address < 1 << 51
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((code, rest)) = data.split_first_chunk::<LONGEST>() else { return };
    let Some((state, rest)) = rest.split_first_chunk::<{ 8 * 25 }>() else { return };
    if rest.is_empty() {
        return;
    }
    let word = |n: usize| u64::from_le_bytes(std::array::from_fn(|byte| state[8 * n + byte]));
    let cpu = Cpu {
        general: std::array::from_fn(word),
        rip: word(16),
        rflags: word(17) & !(1 << 8),
        fs_base: word(18),
        gs_base: word(19),
        cr0: word(20) | 1 << 31,
        cr3: word(21),
        cr4: word(22) & 0x1_13ff_7fff | 1 << 5,
        efer: word(23) | 1 << 10,
        code64: true,
        cpl: state[8 * 24] & 3,
        pkru: Some(state[8 * 24 + 1].into()),
        pkrs: None,
        physical_bits: state[8 * 24 + 2] % 64,
        gigabyte_pages: state[8 * 24 + 3] & 1 != 0,
        ..Cpu::default()
    };
    let memory = Memory(rest);
    if let Ok(decoded) = decode(code, &cpu) {
        assert_eq!(u64::from(decoded.operation.offset()), decoded.address % 4096);
        assert!(usize::from(decoded.operation.offset()) + decoded.operation.width().bytes() <= 4096);
        decoded.completion.finish(u128::from(word(0)) << 64 | u128::from(word(1)), &mut cpu.clone());
    }
    let page = word(24) & !0xfff;
    for access in [Access::Read, Access::Write, Access::Fetch] {
        let Ok(found) = cpu.paging().translate(cpu.rip, access, &memory) else { continue };
        assert_eq!(found.address % 4096, cpu.rip % 4096);
        // The code's own page: what it accesses there is shipped too.
        let page = found.address & !0xfff;
        if let Ok(shipment) = ship(&cpu, &memory, page) {
            let length = shipment.completion.next().wrapping_sub(cpu.rip);
            assert!((2..=LONGEST as u64).contains(&length));
        }
    }
    let _ = ship(&cpu, &memory, page);
});
