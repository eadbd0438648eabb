//! PCI hotplug: devices come and go while the guest runs, by AML that it executes (ACPI 6.5, 5.6.6 and 6.3).
//!
//! ```text
//! interrupt ──> GED0._EVT: while an event is in the register ──> PCxx.HPNT(slot, kind) ──> Notify (SLyy, kind)
//! guest lets go of the device ──> SLyy._EJ0 ──> number of the slot into the other register
//! ```
//!
//! Linux serves the notifications with `acpiphp`, which wants an object with `_ADR`, `_EJ0` and `_SUN` for
//! each slot, and the interrupt with the driver of the Generic Event Device (5.6.9), which stands for the
//! event registers that hardware-reduced ACPI does not have.

use super::bridge_name;
use crate::addresses::{HOTPLUG_GSI, HOTPLUG_PORT};
use crate::pci::{HOT_SLOTS, SLOTS};
use acpi_tables::aml::{
    And, Arg, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Interrupt, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate,
    ShiftRight, Store, While,
};
use acpi_tables::{Aml, AmlSink};

/// AML bytes for one bus at most: its slots, and what calls them.
pub(super) const BUS_BOUND: u64 = 64 + HOT_SLOTS as u64 * 88;

/// The register that events are read from.
const EVENT: &str = "HPEV";
/// The register that takes the slot that the guest has let go of.
const EJECT: &str = "HPEJ";
/// A bus's method that notifies the object of a slot.
const NOTIFY: &str = "HPNT";

/// The two registers, for the scope `\_SB`.
pub(super) fn registers() -> Vec<u8> {
    let len = 8u8;
    let region = OpRegion::new("HPIO".into(), OpRegionSpace::SystemIO, &HOTPLUG_PORT, &len);
    let fields = Field::new(
        "HPIO".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"HPEV", 32), FieldEntry::Named(*b"HPEJ", 32)],
    );
    let mut bytes = Vec::new();
    region.to_aml_bytes(&mut bytes);
    fields.to_aml_bytes(&mut bytes);
    bytes
}

/// The device whose interrupt says that there are events, for the scope `\_SB`.
pub(super) fn events(buses: usize) -> Vec<u8> {
    let interrupt = Interrupt::new(true, false, false, false, HOTPLUG_GSI);
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt]));
    let (event, slot, bus, kind) = (Local(0), Local(1), Local(2), Local(3));
    let register = Path::new(EVENT);
    let read = Store::new(&event, &register);
    let byte = 0xffu8;
    let (eight, sixteen) = (8u8, 16u8);
    let take_slot = And::new(&slot, &event, &byte);
    let (shift_bus, take_bus) = (ShiftRight::new(&bus, &event, &eight), And::new(&bus, &bus, &byte));
    let (shift_kind, take_kind) = (ShiftRight::new(&kind, &event, &sixteen), And::new(&kind, &kind, &byte));
    let numbers: Vec<u8> = (0..buses as u16).map(|bus| bus as u8).collect();
    let method = |bus: &u8| Path::new(&format!("\\_SB_.{}.{NOTIFY}", bridge_name(*bus)));
    let calls: Vec<_> = numbers.iter().map(|bus| MethodCall::new(method(bus), vec![&slot, &kind])).collect();
    let is_bus: Vec<_> = numbers.iter().map(|number| Equal::new(&bus, number)).collect();
    let choices: Vec<_> =
        is_bus.iter().zip(&calls).map(|(is_bus, call)| If::new(is_bus, vec![call])).collect();
    let mut steps: Vec<&dyn Aml> = vec![&take_slot, &shift_bus, &take_bus, &shift_kind, &take_kind];
    steps.extend(choices.iter().map(|choice| choice as &dyn Aml));
    steps.push(&read);
    let all = While::new(&event, steps);
    let serve = Method::new("_EVT".into(), 1, true, vec![&read, &all]);
    let mut bytes = Vec::new();
    Device::new("GED0".into(), vec![&hid, &crs, &serve]).to_aml_bytes(&mut bytes);
    bytes
}

/// The slots of a bus, for the scope of its host bridge.
pub(super) struct Slots {
    /// The bus.
    pub bus: u8,
}

impl Aml for Slots {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let numbers: Vec<u8> = (0..HOT_SLOTS).collect();
        let objects: Vec<Path> = numbers.iter().map(|slot| Path::new(&format!("SL{slot:02X}"))).collect();
        for slot in &numbers {
            self.slot(*slot, sink);
        }
        let (slot, kind) = (Arg(0), Arg(1));
        let is_slot: Vec<_> = numbers.iter().map(|number| Equal::new(&slot, number)).collect();
        let notes: Vec<_> = objects.iter().map(|object| Notify::new(object, &kind)).collect();
        let choices: Vec<_> =
            is_slot.iter().zip(&notes).map(|(is_slot, note)| If::new(is_slot, vec![note])).collect();
        let choices = choices.iter().map(|choice| choice as &dyn Aml).collect();
        Method::new(NOTIFY.into(), 2, false, choices).to_aml_bytes(sink);
    }
}

impl Slots {
    fn slot(&self, slot: u8, sink: &mut dyn AmlSink) {
        // Device in the upper, function in the lower half (6.1.1).
        let address = Name::new("_ADR".into(), &(u32::from(slot) << 16));
        // Linux names the slot after this number, which must be the machine's only one.
        let number = Name::new("_SUN".into(), &(u16::from(self.bus) * u16::from(SLOTS) + u16::from(slot)));
        let which = u16::from(self.bus) << 8 | u16::from(slot);
        let register = Path::new(EJECT);
        let store = Store::new(&register, &which);
        let eject = Method::new("_EJ0".into(), 1, false, vec![&store]);
        let name = format!("SL{slot:02X}");
        Device::new(name.as_str().into(), vec![&address, &number, &eject]).to_aml_bytes(sink);
    }
}
