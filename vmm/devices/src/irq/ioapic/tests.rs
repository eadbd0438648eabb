//! The I/O APIC, told as Linux drives it, and checked against a naive model of each pin.

use super::*;
use crate::irq::Destination;
use proptest::prelude::*;

fn write_register(ioapic: &mut IoApic, register: u8, value: u32) -> Vec<Message> {
    assert!(ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes()).is_empty());
    ioapic.write(IOWIN, &value.to_le_bytes())
}

fn read_register(ioapic: &mut IoApic, register: u8) -> u32 {
    assert!(ioapic.write(IOREGSEL, &[register]).is_empty());
    let mut data = [0; 4];
    ioapic.read(IOWIN, &mut data);
    u32::from_le_bytes(data)
}

/// Programs a pin as Linux does, destination first.
fn program(ioapic: &mut IoApic, pin: u8, apic_id: u32, low: u32) -> Vec<Message> {
    assert!(write_register(ioapic, REG_ENTRIES + 2 * pin + 1, apic_id << 24).is_empty());
    write_register(ioapic, REG_ENTRIES + 2 * pin, low)
}

fn fixed(apic_id: u32, vector: u8, level: bool) -> Message {
    Message { dest: Destination::Physical(apic_id), mode: Mode::Fixed { vector, level } }
}

const LEVEL32: u32 = LEVEL as u32;
const MASKED32: u32 = MASKED as u32;

#[test]
fn power_on_masks_every_pin_and_the_version_has_an_eoi_register() {
    let mut ioapic = IoApic::new(3);
    assert_eq!(read_register(&mut ioapic, REG_ID), 3 << 24);
    assert_eq!(read_register(&mut ioapic, REG_VERSION), 0x0017_0020);
    for pin in 0..PINS {
        assert_eq!(read_register(&mut ioapic, REG_ENTRIES + 2 * pin), MASKED32);
        assert_eq!(ioapic.set_pin(pin, true), None);
    }
    assert_eq!(ioapic.set_pin(PINS, true), None);
    assert_eq!(ioapic.set_pin(255, true), None);
}

#[test]
fn an_edge_pin_delivers_each_rising_edge_once() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 4, 2, 0x31).is_empty());
    assert_eq!(ioapic.set_pin(4, true), Some(fixed(2, 0x31, false)));
    assert_eq!(ioapic.set_pin(4, true), None);
    assert_eq!(ioapic.set_pin(4, false), None);
    assert_eq!(ioapic.pulse(4), Some(fixed(2, 0x31, false)));
    assert_eq!(ioapic.pulse(4), Some(fixed(2, 0x31, false)));
}

#[test]
fn a_level_pin_waits_for_eoi_and_delivers_again_while_asserted() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 9, 1, 0x41 | LEVEL32).is_empty());
    assert_eq!(ioapic.set_pin(9, true), Some(fixed(1, 0x41, true)));
    assert_eq!(read_register(&mut ioapic, REG_ENTRIES + 18) & REMOTE_IRR as u32, REMOTE_IRR as u32);
    assert_eq!(ioapic.set_pin(9, false), None);
    assert_eq!(ioapic.set_pin(9, true), None);
    assert!(ioapic.eoi(0x40).is_empty());
    assert_eq!(ioapic.eoi(0x41), [fixed(1, 0x41, true)]);
    assert_eq!(ioapic.set_pin(9, false), None);
    assert!(ioapic.eoi(0x41).is_empty());
    assert_eq!(read_register(&mut ioapic, REG_ENTRIES + 18) & REMOTE_IRR as u32, 0);
}

#[test]
fn the_eoi_register_finishes_a_vector_as_the_broadcast_does() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 9, 1, 0x41 | LEVEL32).is_empty());
    assert_eq!(ioapic.set_pin(9, true), Some(fixed(1, 0x41, true)));
    assert_eq!(ioapic.write(EOI, &0x41u32.to_le_bytes()), [fixed(1, 0x41, true)]);
}

#[test]
fn pins_that_share_a_vector_are_finished_together() {
    let mut ioapic = IoApic::new(0);
    for pin in [9, 10] {
        assert!(program(&mut ioapic, pin, u32::from(pin), 0x41 | LEVEL32).is_empty());
        assert!(ioapic.set_pin(pin, true).is_some());
    }
    assert_eq!(ioapic.eoi(0x41), [fixed(9, 0x41, true), fixed(10, 0x41, true)]);
}

#[test]
fn unmasking_delivers_a_level_but_not_a_past_edge() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 9, 0, 0x41 | LEVEL32 | MASKED32).is_empty());
    assert_eq!(ioapic.set_pin(9, true), None);
    assert_eq!(program(&mut ioapic, 9, 0, 0x41 | LEVEL32), [fixed(0, 0x41, true)]);
    assert!(program(&mut ioapic, 4, 0, 0x31 | MASKED32).is_empty());
    assert_eq!(ioapic.set_pin(4, true), None);
    assert!(program(&mut ioapic, 4, 0, 0x31).is_empty());
}

#[test]
fn switching_to_edge_and_back_clears_remote_irr() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 9, 0, 0x41 | LEVEL32).is_empty());
    assert!(ioapic.set_pin(9, true).is_some());
    assert!(program(&mut ioapic, 9, 0, 0x41 | MASKED32).is_empty());
    assert_eq!(program(&mut ioapic, 9, 0, 0x41 | LEVEL32), [fixed(0, 0x41, true)]);
}

#[test]
fn read_only_and_reserved_bits_stay_and_polarity_turns_nothing_round() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 4, 0, 0x31 | 1 << 12 | 1 << 13 | 1 << 14 | 0xfff << 17).is_empty());
    assert_eq!(read_register(&mut ioapic, REG_ENTRIES + 8), 0x31 | 1 << 13);
    assert_eq!(ioapic.set_pin(4, true), Some(fixed(0, 0x31, false)));
}

#[test]
fn an_nmi_pin_is_an_edge_whatever_its_trigger_bit_says() {
    let mut ioapic = IoApic::new(0);
    assert!(program(&mut ioapic, 2, 1, 4 << 8 | LEVEL32).is_empty());
    let nmi = Message { dest: Destination::Physical(1), mode: Mode::Nmi };
    assert_eq!((ioapic.pulse(2), ioapic.pulse(2)), (Some(nmi), Some(nmi)));
}

#[test]
fn extended_and_logical_destinations_are_decoded() {
    let mut ioapic = IoApic::new(0);
    assert!(write_register(&mut ioapic, REG_ENTRIES + 1, 0x34 << 24 | 0x12 << 17).is_empty());
    assert!(write_register(&mut ioapic, REG_ENTRIES, 0x31).is_empty());
    assert_eq!(ioapic.pulse(0), Some(fixed(0x1234, 0x31, false)));
    assert!(program(&mut ioapic, 1, 3, 0x32 | 1 << 8 | 1 << 11).is_empty());
    let mode = Mode::LowestPriority { vector: 0x32, level: false };
    assert_eq!(ioapic.pulse(1), Some(Message { dest: Destination::Logical(3), mode }));
}

#[derive(Clone, Debug)]
enum Step {
    Write { offset: u64, data: Vec<u8> },
    Program { pin: u8, low: u32 },
    SetPin { pin: u8, asserted: bool },
    Eoi { vector: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    // Few vectors and pins, so that they meet.
    let low = (0x30u8..0x34, any::<bool>(), any::<bool>())
        .prop_map(|(vector, level, mask)| u32::from(vector) | u32::from(level) << 15 | u32::from(mask) << 16);
    prop_oneof![
        (0u8..4, low).prop_map(|(pin, low)| Step::Program { pin, low }),
        (0u8..4, any::<bool>()).prop_map(|(pin, asserted)| Step::SetPin { pin, asserted }),
        (0x30u8..0x34).prop_map(|vector| Step::Eoi { vector }),
    ]
}

/// The naive model of one pin.
#[derive(Clone, Copy, Default)]
struct Model {
    low: u32,
    asserted: bool,
    unfinished: bool,
}

impl Model {
    fn open(&self) -> bool {
        self.low & MASKED32 == 0
    }
    fn level(&self) -> bool {
        self.low & LEVEL32 != 0
    }
    fn due(&mut self) -> bool {
        let due = self.level() && self.open() && self.asserted && !self.unfinished;
        self.unfinished |= due;
        due
    }
}

proptest! {
    #[test]
    fn pins_deliver_exactly_what_the_model_says(steps in proptest::collection::vec(step(), 0..200)) {
        let mut ioapic = IoApic::new(0);
        let mut models = [Model { low: MASKED32, ..Model::default() }; 4];
        for step in steps {
            let (got, expected): (Vec<Message>, Vec<usize>) = match step {
                Step::Program { pin, low } => {
                    let model = &mut models[usize::from(pin)];
                    model.low = low;
                    model.unfinished &= model.level();
                    let due = model.due();
                    (program(&mut ioapic, pin, u32::from(pin), low), due.then_some(pin.into()).into_iter().collect())
                }
                Step::SetPin { pin, asserted } => {
                    let model = &mut models[usize::from(pin)];
                    let rising = asserted && !model.asserted;
                    model.asserted = asserted;
                    let due = if model.level() { model.due() } else { rising && model.open() };
                    let got = ioapic.set_pin(pin, asserted).into_iter().collect();
                    (got, due.then_some(pin.into()).into_iter().collect())
                }
                Step::Eoi { vector } => {
                    let mut due = Vec::new();
                    for (index, model) in models.iter_mut().enumerate() {
                        if model.level() && model.low as u8 == vector {
                            model.unfinished = false;
                            if model.due() {
                                due.push(index);
                            }
                        }
                    }
                    (ioapic.eoi(vector), due)
                }
                Step::Write { .. } => unreachable!("not drawn here"),
            };
            let expected: Vec<Message> =
                expected.into_iter().map(|pin| fixed(pin as u32, models[pin].low as u8, models[pin].level())).collect();
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn no_access_panics_and_masked_pins_stay_silent(
        steps in proptest::collection::vec(prop_oneof![
            (prop_oneof![Just(IOREGSEL), Just(IOWIN), Just(EOI), any::<u64>()], proptest::collection::vec(any::<u8>(), 0..9))
                .prop_map(|(offset, data)| Step::Write { offset, data }),
            (any::<u8>(), any::<bool>()).prop_map(|(pin, asserted)| Step::SetPin { pin, asserted }),
            any::<u8>().prop_map(|vector| Step::Eoi { vector }),
        ], 0..200),
        read in (prop_oneof![0u64..0x50, any::<u64>()], 0usize..9),
    ) {
        let mut ioapic = IoApic::new(0);
        for step in steps {
            let before = ioapic.clone();
            let sent = match step {
                Step::Write { offset, data } => ioapic.write(offset, &data),
                Step::SetPin { pin, asserted } => ioapic.set_pin(pin, asserted).into_iter().collect(),
                Step::Eoi { vector } => ioapic.eoi(vector),
                Step::Program { .. } => unreachable!("not drawn here"),
            };
            let open = |apic: &IoApic| apic.pins.iter().filter(|pin| pin.entry & MASKED == 0).count();
            prop_assert!(sent.len() <= open(&before).max(open(&ioapic)));
            ioapic.read(read.0, &mut vec![0; read.1]);
        }
    }
}
