//! The ratio of the guest's TSC frequency to the host's, as KVM and the hardware apply it.

/// Relative difference of frequencies, in parts per million, that stepping corrects. It is also the default
/// of KVM's `tsc_tolerance_ppm`: KVM does not scale for less, whatever it is told.
pub const STEPPABLE_PPM: u64 = 250;

/// `guest = host * multiplier >> shift`, before the offset is added (SDM vol. 3, 26.6.5; APM vol. 2,
/// 15.30.5).
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Scale {
    multiplier: u64,
    shift: u32,
}

/// A node's TSC differs from the machine's by more than can be corrected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host's TSC runs at {host} kHz and node 0's at {guest} kHz, and this host's CPUs cannot scale it: \
     use servers whose TSCs differ by at most {STEPPABLE_PPM} parts per million, or CPUs with TSC scaling"
)]
pub struct Unalignable {
    /// This host's frequency in kHz.
    pub host: u64,
    /// The machine's.
    pub guest: u64,
}

impl Scale {
    /// No scaling.
    pub const ONE: Scale = Scale { multiplier: 1, shift: 0 };

    /// What a host of `host` kHz has to do in a machine of `guest` kHz: nothing where they are so near that
    /// stepping will do; else it scales, if its CPUs can (`control`; `amd` says whose they are).
    ///
    /// # Errors
    /// [`Unalignable`].
    pub fn choose(host: u64, guest: u64, control: bool, amd: bool) -> Result<Scale, Unalignable> {
        // As KVM computes it (kvm_set_tsc_khz), so that both decide alike.
        let within = |ppm: u64| (u128::from(host) * u128::from(ppm) / 1_000_000) as u64;
        if (within(1_000_000 - STEPPABLE_PPM)..=within(1_000_000 + STEPPABLE_PPM)).contains(&guest) {
            return Ok(Scale::ONE);
        }
        match control && host != 0 {
            true => Ok(Scale::ratio(host, guest, amd)),
            false => Err(Unalignable { host, guest }),
        }
    }

    /// The ratio with as many fraction bits as the vendor's hardware has: AMD 32, Intel 48. KVM computes the
    /// same when told the guest's frequency.
    pub fn ratio(host: u64, guest: u64, amd: bool) -> Scale {
        let shift = if amd { 32 } else { 48 };
        let multiplier = (u128::from(guest) << shift) / u128::from(host.max(1));
        Scale { multiplier: u64::try_from(multiplier).unwrap_or(u64::MAX), shift }
    }

    /// Whether KVM must be told to scale.
    pub fn is_one(self) -> bool {
        self == Scale::ONE
    }

    /// A host TSC in the machine's frequency.
    pub fn apply(self, host: u64) -> u64 {
        if self.shift == 0 {
            return host;
        }
        ((u128::from(host) * u128::from(self.multiplier)) >> self.shift) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_frequencies_need_nothing() {
        assert_eq!(Scale::choose(2_100_000, 2_100_000, false, true), Ok(Scale::ONE));
        assert_eq!(Scale::ONE.apply(u64::MAX), u64::MAX);
    }

    #[test]
    fn near_frequencies_are_left_to_stepping_and_far_ones_refused_without_scaling() {
        for control in [false, true] {
            assert_eq!(Scale::choose(2_100_500, 2_100_000, control, false), Ok(Scale::ONE));
        }
        let refused = Scale::choose(2_101_000, 2_100_000, false, false);
        assert_eq!(refused, Err(Unalignable { host: 2_101_000, guest: 2_100_000 }));
    }

    #[test]
    fn a_second_of_host_ticks_is_a_second_of_guest_ticks() {
        for amd in [false, true] {
            let scale = Scale::choose(2_500_000, 2_100_000, true, amd).unwrap();
            let second = scale.apply(2_500_000_000);
            assert!(second.abs_diff(2_100_000_000) <= 1, "{second}");
            // A host that has been up for ten years does not overflow.
            assert!(scale.apply(2_500_000_000 * 3600 * 24 * 3650) > scale.apply(2_500_000_000 * 3600 * 24));
        }
    }
}
