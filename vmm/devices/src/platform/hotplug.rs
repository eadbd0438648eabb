//! The hotplug registers, through which node 0 tells the guest which PCI devices have come and which should
//! go, and the guest says which it has let go of. The other side is AML in the DSDT (`firmware::acpi`).
//!
//! ```text
//!  announce(slot, Come | Leave) ──> queue ── line up ──> guest reads EVENT until it is 0 ──> line down
//!                                                            └ Notify(slot, 1 | 3): Linux' acpiphp scans or lets go
//!  gone(slot) <── guest writes EJECT ── _EJ0 of the slot <───────────────┘
//! ```

use std::collections::VecDeque;

use machine::control::{Change, SlotId};

use super::BusDevice;

/// Offset of the register that holds the next event. Reading all of it takes the event out of the queue.
pub const EVENT: u64 = 0;
/// Offset of the register that takes the slot that the guest has let go of: bus << 8 | slot.
pub const EJECT: u64 = 4;
/// Ports, from EVENT on.
pub const LEN: u64 = 8;

/// Bit of an event that makes it differ from "none".
const VALID: u32 = 1 << 31;

/// The ports. `line` sets the level of the interrupt line; `gone` is told what the guest has let go of, on
/// the thread of the CPU that says so.
pub struct HotPlug {
    events: VecDeque<(SlotId, Change)>,
    line: Box<dyn Fn(bool) + Send>,
    gone: Box<dyn Fn(SlotId) + Send>,
}

impl HotPlug {
    /// Nothing to say yet.
    pub fn new(line: impl Fn(bool) + Send + 'static, gone: impl Fn(SlotId) + Send + 'static) -> HotPlug {
        HotPlug { events: VecDeque::new(), line: Box::new(line), gone: Box::new(gone) }
    }

    /// Tells the guest. What it has not been told of the same slot yet no longer counts.
    pub fn announce(&mut self, slot: SlotId, change: Change) {
        self.events.retain(|(other, _)| *other != slot);
        self.events.push_back((slot, change));
        (self.line)(true);
    }

    fn next(&mut self) -> u32 {
        let event = self.events.pop_front();
        if self.events.is_empty() {
            (self.line)(false);
        }
        event.map_or(0, |(slot, change)| {
            VALID | (change as u32) << 16 | u32::from(slot.bus) << 8 | u32::from(slot.slot)
        })
    }
}

impl BusDevice for HotPlug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (EVENT, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *data = self.next().to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (EJECT, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            let [slot, bus, ..] = bytes;
            (self.gone)(SlotId { bus, slot });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn ports() -> (HotPlug, Receiver<bool>, Receiver<SlotId>) {
        let (line, levels) = channel();
        let (gone, ejected) = channel();
        // Not every test listens to both.
        let line = move |up| {
            let _ = line.send(up);
        };
        let gone = move |slot| {
            let _ = gone.send(slot);
        };
        let ports = HotPlug::new(line, gone);
        (ports, levels, ejected)
    }

    fn event(ports: &mut HotPlug) -> u32 {
        let mut data = [0; 4];
        ports.read(EVENT, &mut data);
        u32::from_le_bytes(data)
    }

    const A: SlotId = SlotId { bus: 1, slot: 5 };
    const B: SlotId = SlotId { bus: 0, slot: 15 };

    #[test]
    fn the_line_is_up_until_all_has_been_read() {
        let (mut ports, levels, _) = ports();
        ports.announce(A, Change::Come);
        ports.announce(B, Change::Leave);
        assert_eq!(levels.try_iter().collect::<Vec<_>>(), [true, true]);
        assert_eq!(event(&mut ports), 0x8001_0105);
        assert_eq!(levels.try_iter().count(), 0);
        assert_eq!(event(&mut ports), 0x8003_000f);
        assert_eq!(levels.try_iter().collect::<Vec<_>>(), [false]);
        assert_eq!(event(&mut ports), 0);
    }

    #[test]
    fn only_the_last_news_of_a_slot_counts() {
        let (mut ports, ..) = ports();
        for _ in 0..1000 {
            ports.announce(A, Change::Come);
            ports.announce(A, Change::Leave);
        }
        assert_eq!((event(&mut ports), event(&mut ports)), (0x8003_0105, 0));
    }

    #[test]
    fn what_the_guest_lets_go_is_told_and_odd_accesses_do_nothing() {
        let (mut ports, _, ejected) = ports();
        ports.announce(A, Change::Come);
        for len in [1, 2, 3] {
            ports.write(EJECT, &[5; 4][..len]);
            ports.read(EVENT, &mut [0; 4][..len]);
        }
        ports.write(EVENT, &[5; 4]);
        ports.read(EJECT, &mut [0; 4]);
        assert_eq!(ejected.try_iter().count(), 0);
        ports.write(EJECT, &0x0105u32.to_le_bytes());
        assert_eq!(ejected.try_iter().collect::<Vec<_>>(), [A]);
        assert_eq!(event(&mut ports), 0x8001_0105);
    }
}
