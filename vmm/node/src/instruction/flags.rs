//! The six status flags, as additions, subtractions and logic set them (SDM vol. 1, 3.4.3.1 and appendix A).

/// Carry.
pub const CF: u64 = 1;
/// Parity of the lowest byte.
pub const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Signed overflow.
pub const OF: u64 = 1 << 11;
/// All six.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
/// Resume: the next instruction breakpoint is passed over. Every instruction clears it.
pub const RF: u64 = 1 << 16;

/// `a + b + carry` in `bits` bits: the sum and the status flags. `a` and `b` have no bits beyond those,
/// `carry` is 0 or 1.
pub fn add(bits: u32, a: u64, b: u64, carry: u64) -> (u64, u64) {
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let sum = wide as u64 & mask(bits);
    let overflow = (a ^ sum) & (b ^ sum);
    (sum, arithmetic(bits, wide >> bits != 0, a ^ b ^ sum, overflow) | of_result(bits, sum))
}

/// `a - b - borrow` in `bits` bits: the difference and the status flags.
pub fn subtract(bits: u32, a: u64, b: u64, borrow: u64) -> (u64, u64) {
    let difference = a.wrapping_sub(b).wrapping_sub(borrow) & mask(bits);
    let borrows = u128::from(a) < u128::from(b) + u128::from(borrow);
    let overflow = (a ^ b) & (a ^ difference);
    (difference, arithmetic(bits, borrows, a ^ b ^ difference, overflow) | of_result(bits, difference))
}

/// The status flags of a bitwise operation's result: CF and OF are 0, and so is AF, which manuals leave
/// undefined.
pub fn of_result(bits: u32, result: u64) -> u64 {
    let sign = if result >> (bits - 1) & 1 != 0 { SF } else { 0 };
    let zero = if result == 0 { ZF } else { 0 };
    let parity = if (result as u8).count_ones().is_multiple_of(2) { PF } else { 0 };
    sign | zero | parity
}

/// Ones in `bits` bits, 64 at most.
pub fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

fn arithmetic(bits: u32, carry: bool, carries: u64, overflow: u64) -> u64 {
    let auxiliary = if carries >> 4 & 1 != 0 { AF } else { 0 };
    let overflow = if overflow >> (bits - 1) & 1 != 0 { OF } else { 0 };
    u64::from(carry) | auxiliary | overflow
}
