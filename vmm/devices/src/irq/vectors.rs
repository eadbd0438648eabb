//! A set of interrupt vectors: the shape of IRR, ISR and TMR.

/// A set of the 256 interrupt vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors([u64; 4]);

impl Vectors {
    /// Adds `vector`; true if it was not there yet.
    pub fn insert(&mut self, vector: u8) -> bool {
        let word = &mut self.0[usize::from(vector >> 6)];
        let bit = 1 << (vector & 63);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Takes `vector` out; true if it was there.
    pub fn remove(&mut self, vector: u8) -> bool {
        let had = self.contains(vector);
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
        had
    }

    /// Whether `vector` is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] & (1 << (vector & 63)) != 0
    }

    /// The highest vector, which is the one of the highest priority.
    pub fn highest(&self) -> Option<u8> {
        let index = self.0.iter().rposition(|word| *word != 0)?;
        Some((index * 64 + 63 - self.0[index].leading_zeros() as usize) as u8)
    }

    /// Bits `32 * index ..` as the 32-bit register that the guest reads; `index` is taken modulo 8.
    pub fn register(&self, index: u32) -> u32 {
        (self.0[(index as usize >> 1) & 3] >> (32 * (index & 1))) as u32
    }

    /// Whether there is no vector in the set.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_is_its_own_and_shows_in_its_register() {
        for vector in 0..=255u8 {
            let mut set = Vectors::default();
            assert!(set.is_empty() && set.highest().is_none());
            assert!(set.insert(vector) && !set.insert(vector));
            assert_eq!(set.highest(), Some(vector));
            for index in 0..8 {
                let expected = if index == u32::from(vector) / 32 { 1 << (vector % 32) } else { 0 };
                assert_eq!(set.register(index), expected, "vector {vector}, register {index}");
            }
            assert!(set.remove(vector) && !set.remove(vector) && set.is_empty());
        }
    }
}
