//! Message-signalled interrupts (SDM vol. 3, 11.11), decoded.

use super::{Destination, Message, Mode};

/// The message that a write of `data` to `address` means; none if that is no interrupt this machine can take
/// (not 0xfee?????, remappable format, SMI, ExtINT, a level de-assert).
///
/// Bits 11..5 of the address are bits 14..8 of the destination id, which a guest uses that knows the
/// hypervisor's extended destination ids (KVM_FEATURE_MSI_EXT_DEST_ID). A destination of 255 means CPU 255,
/// as everywhere in x2APIC mode.
pub fn decode(address: u64, data: u32) -> Option<Message> {
    const REMAPPABLE: u64 = 1 << 4;
    const REDIRECTION_HINT: u64 = 1 << 3;
    const LOGICAL: u64 = 1 << 2;
    if address >> 20 != 0xfee || address & REMAPPABLE != 0 {
        return None;
    }
    let level = data & 1 << 15 != 0;
    if level && data & 1 << 14 == 0 {
        return None;
    }
    let id = (address >> 12 & 0xff | (address >> 5 & 0x7f) << 8) as u32;
    let logical = address & LOGICAL != 0;
    let vector = data as u8;
    let mode = match delivery_mode(data >> 8, vector, level)? {
        // "Redirect to one of them" in a logical destination is lowest priority by another name.
        Mode::Fixed { .. } if logical && address & REDIRECTION_HINT != 0 => {
            Mode::LowestPriority { vector, level }
        }
        mode => mode,
    };
    Some(Message { dest: destination(id, logical), mode })
}

/// The three delivery-mode bits (the lowest of `code`) that MSI data and I/O APIC entries share; none for
/// SMI, ExtINT and the reserved ones.
pub(super) fn delivery_mode(code: u32, vector: u8, level: bool) -> Option<Mode> {
    match code & 7 {
        0 => Some(Mode::Fixed { vector, level }),
        1 => Some(Mode::LowestPriority { vector, level }),
        4 => Some(Mode::Nmi),
        5 => Some(Mode::Init),
        _ => None,
    }
}

/// A device's destination id and mode.
pub(super) fn destination(id: u32, logical: bool) -> Destination {
    if logical { Destination::Logical(id) } else { Destination::Physical(id) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_plain_msi_is_a_fixed_edge_at_one_cpu() {
        let message = decode(0xfee0_3000, 0x0041).expect("a valid MSI");
        let mode = Mode::Fixed { vector: 0x41, level: false };
        assert_eq!(message, Message { dest: Destination::Physical(3), mode });
    }

    #[test]
    fn extended_destination_ids_reach_cpus_above_255() {
        let message = decode(0xfee0_0000 | 0x34 << 12 | 0x12 << 5, 0x41).expect("a valid MSI");
        assert_eq!(message.dest, Destination::Physical(0x1234));
    }

    #[test]
    fn a_redirected_logical_msi_is_lowest_priority() {
        let message = decode(0xfee0_300c, 0x41).expect("a valid MSI");
        let mode = Mode::LowestPriority { vector: 0x41, level: false };
        assert_eq!(message, Message { dest: Destination::Logical(3), mode });
    }

    #[test]
    fn what_is_no_interrupt_is_none() {
        assert_eq!(decode(0xfed0_0000, 0x41), None, "not the interrupt page");
        assert_eq!(decode(0x1_fee0_0000, 0x41), None, "above 4 GiB");
        assert_eq!(decode(0xfee0_0010, 0x41), None, "remappable format");
        assert_eq!(decode(0xfee0_0000, 0x8041), None, "level de-assert");
        assert_eq!(decode(0xfee0_0000, 0x0700), None, "ExtINT");
    }

    proptest! {
        #[test]
        fn any_address_and_data_decode_without_panic(address in any::<u64>(), low in 0u64..1 << 20, data in any::<u32>()) {
            decode(address, data);
            if let Some(message) = decode(0xfee0_0000 | low, data)
                && let Destination::Physical(id) = message.dest {
                prop_assert!(id < 1 << 15);
            }
        }
    }
}
