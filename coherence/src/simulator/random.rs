//! Random numbers that are the same for a seed on every machine: integers only, no library's internals.

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed; any will do.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// True so many times in a thousand.
    pub fn per_mille(&mut self, chance: u16) -> bool {
        self.below(1000) < u64::from(chance)
    }

    /// A length of time around `mean`: mostly shorter, now and then up to four times as long.
    pub fn around(&mut self, mean: u64) -> u64 {
        // The product of two even numbers in 0..2 has mean 1.
        let product = self.below(2048) * self.below(2048);
        ((u128::from(mean) * u128::from(product)) >> 20) as u64
    }
}

/// Numbers `0..n`, the one of rank `r` drawn in proportion to `1 / (r + 1)`: Zipf's law with exponent 1.
#[derive(Clone, Debug)]
pub struct Zipf {
    /// Sums of the weights.
    sums: Vec<u64>,
}

impl Zipf {
    /// Over `n` ranks, at least one.
    pub fn new(n: u64) -> Zipf {
        let mut sum = 0;
        let weight = |rank| (1 << 40) / (rank + 1);
        Zipf {
            sums: (0..n.max(1))
                .map(|rank| {
                    sum += weight(rank);
                    sum
                })
                .collect(),
        }
    }

    /// Draws a rank.
    pub fn draw(&self, random: &mut Random) -> u64 {
        let total = self.sums.last().copied().unwrap_or(1);
        let at = random.below(total);
        self.sums.partition_point(|&sum| sum <= at) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_numbers() {
        let mut random = Random::new(1);
        assert_eq!([random.bits(), random.bits()], [0x910a_2dec_8902_5cc1, 0xbeeb_8da1_658e_ec67]);
    }

    #[test]
    fn low_ranks_are_drawn_in_proportion() {
        let (zipf, mut random) = (Zipf::new(100), Random::new(7));
        let mut drawn = [0u32; 100];
        (0..100_000).for_each(|_| drawn[zipf.draw(&mut random) as usize] += 1);
        assert!(drawn[0] > 17_000 && drawn[0] < 21_500, "{}", drawn[0]);
        assert!(drawn[9] > 1_700 && drawn[9] < 2_200, "{}", drawn[9]);
    }

    #[test]
    fn times_vary_around_their_mean() {
        let mut random = Random::new(3);
        let times: Vec<u64> = (0..100_000).map(|_| random.around(1000)).collect();
        let mean = times.iter().sum::<u64>() / 100_000;
        assert!((950..1050).contains(&mean), "{mean}");
        assert!(times.iter().all(|&t| t < 4000) && times.iter().any(|&t| t > 3000));
    }
}
