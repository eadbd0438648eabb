//! The route of an interrupt: the CPUs that a destination means.

use super::{Destination, Mode};

/// The logical x2APIC id of the CPU with x2APIC id `apic_id` (SDM vol. 3, 11.12.10.2): cluster in bits
/// 31..16, one bit of 15..0.
pub fn logical_id(apic_id: u32) -> u32 {
    ((apic_id >> 4) & 0xffff) << 16 | 1 << (apic_id & 0xf)
}

/// Whether `dest` means the CPU `apic_id`, for a message sent by CPU `from` (`None`: by a device).
pub fn matches(dest: &Destination, from: Option<u32>, apic_id: u32) -> bool {
    match *dest {
        Destination::Physical(id) => id == apic_id,
        Destination::Logical(mask) => {
            let own = logical_id(apic_id);
            own >> 16 == mask >> 16 && own & mask & 0xffff != 0
        }
        Destination::All => true,
        Destination::AllButSelf => from != Some(apic_id),
    }
}

/// The CPUs that get a message, as ascending indices into `apic_ids`.
///
/// A lowest-priority message goes to exactly one CPU that `dest` means, if there is any: the vector picks it,
/// so the choice is the same on every node and different vectors land on different CPUs.
pub fn resolve(dest: &Destination, mode: &Mode, from: Option<u32>, apic_ids: &[u32]) -> Vec<usize> {
    let matching = || (0..apic_ids.len()).filter(|index| matches(dest, from, apic_ids[*index]));
    match *mode {
        Mode::LowestPriority { vector, .. } => match matching().count() {
            0 => Vec::new(),
            candidates => matching().nth(usize::from(vector) % candidates).into_iter().collect(),
        },
        _ => matching().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIXED: Mode = Mode::Fixed { vector: 0x30, level: false };
    /// Two nodes of three CPUs, the second one's ids in other clusters.
    const IDS: [u32; 6] = [0, 1, 2, 0x10, 0x11, 0x12];

    #[test]
    fn a_physical_destination_is_one_cpu_and_an_absent_one_is_nobody() {
        assert_eq!(resolve(&Destination::Physical(0x11), &FIXED, None, &IDS), [4]);
        assert!(resolve(&Destination::Physical(7), &FIXED, Some(0), &IDS).is_empty());
    }

    #[test]
    fn a_logical_destination_is_a_mask_inside_one_cluster() {
        assert_eq!(resolve(&Destination::Logical(0x0001_0005), &FIXED, None, &IDS), [3, 5]);
        assert_eq!(resolve(&Destination::Logical(0x0000_0006), &FIXED, None, &IDS), [1, 2]);
        assert!(resolve(&Destination::Logical(0x0002_ffff), &FIXED, None, &IDS).is_empty());
    }

    #[test]
    fn broadcasts_reach_all_and_spare_the_sender_when_told() {
        assert_eq!(resolve(&Destination::All, &FIXED, Some(1), &IDS), [0, 1, 2, 3, 4, 5]);
        assert_eq!(resolve(&Destination::AllButSelf, &Mode::Nmi, Some(0x10), &IDS), [0, 1, 2, 4, 5]);
    }

    #[test]
    fn lowest_priority_spreads_vectors_over_the_candidates() {
        let pick = |vector| {
            resolve(&Destination::Logical(7), &Mode::LowestPriority { vector, level: false }, None, &IDS)
        };
        assert_eq!((pick(0x30), pick(0x31), pick(0x32)), (vec![0], vec![1], vec![2]));
    }

    fn destination() -> impl Strategy<Value = Destination> {
        prop_oneof![
            any::<u32>().prop_map(Destination::Physical),
            (0u32..64).prop_map(Destination::Physical),
            any::<u32>().prop_map(Destination::Logical),
            (0u32..4, any::<u16>()).prop_map(|(c, m)| Destination::Logical(c << 16 | u32::from(m))),
            Just(Destination::All),
            Just(Destination::AllButSelf),
        ]
    }

    proptest! {
        #[test]
        fn a_cpu_answers_to_its_own_logical_id_and_no_other_small_id_does(id in 0u32..0x10_0000, other in 0u32..0x10_0000) {
            prop_assert!(matches(&Destination::Logical(logical_id(id)), None, id));
            prop_assert_eq!(matches(&Destination::Logical(logical_id(id)), None, other), id == other);
        }

        #[test]
        fn lowest_priority_picks_one_of_those_that_fixed_would_reach(
            dest in destination(), vector in any::<u8>(), from in proptest::option::of(0u32..64),
            ids in proptest::collection::btree_set(0u32..64, 0..20),
        ) {
            let ids: Vec<u32> = ids.into_iter().collect();
            let all = resolve(&dest, &FIXED, from, &ids);
            let one = resolve(&dest, &Mode::LowestPriority { vector, level: false }, from, &ids);
            prop_assert_eq!(one.len(), all.len().min(1));
            prop_assert!(one.iter().all(|cpu| all.contains(cpu)));
        }
    }
}
