//! The conditions of cmov and set.

use iced_x86::Mnemonic;

use super::flags::{CF, OF, PF, SF, ZF};

/// Whether the condition of a cmov or set holds; `None` for another mnemonic.
pub(super) fn condition(mnemonic: Mnemonic, rflags: u64) -> Option<bool> {
    use Mnemonic as M;
    let set = |flag| rflags & flag != 0;
    let less = set(SF) != set(OF);
    Some(match mnemonic {
        M::Cmovo | M::Seto => set(OF),
        M::Cmovno | M::Setno => !set(OF),
        M::Cmovb | M::Setb => set(CF),
        M::Cmovae | M::Setae => !set(CF),
        M::Cmove | M::Sete => set(ZF),
        M::Cmovne | M::Setne => !set(ZF),
        M::Cmovbe | M::Setbe => set(CF) || set(ZF),
        M::Cmova | M::Seta => !set(CF) && !set(ZF),
        M::Cmovs | M::Sets => set(SF),
        M::Cmovns | M::Setns => !set(SF),
        M::Cmovp | M::Setp => set(PF),
        M::Cmovnp | M::Setnp => !set(PF),
        M::Cmovl | M::Setl => less,
        M::Cmovge | M::Setge => !less,
        M::Cmovle | M::Setle => less || set(ZF),
        M::Cmovg | M::Setg => !less && !set(ZF),
        _ => return None,
    })
}
