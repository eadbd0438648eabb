//! Pseudo-random numbers by seed.

/// SplitMix64: each seed gives the same numbers everywhere.
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number at which arithmetic turns over, as often as one that means nothing.
    pub fn edgy(&mut self) -> u64 {
        let edge = self.pick(&[0, 0x80, 0x8000, 0x8000_0000, 0x8000_0000_0000_0000, u64::MAX]);
        match self.below(4) {
            0 => edge.wrapping_add(self.below(5)).wrapping_sub(2),
            1 => 1 << self.below(64),
            _ => self.any(),
        }
    }
}
