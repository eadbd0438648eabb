//! The devices of node 0: what every PC has, as far as a hardware-reduced one needs it.

use std::time::{SystemTime, UNIX_EPOCH};

use base::lock;
use crossbeam::channel::Sender;
use firmware::addresses;

use super::console::{ConsoleOut, Input};
use crate::router::remote::LocalDevices;
use devices::irq::Message;
use devices::platform::BusDevice;
use devices::platform::bus::{Bus, BusError, Shared, share};
use devices::platform::hotplug::{self, HotPlug};
use devices::platform::ioapic::IoApicDevice;
use devices::platform::power::{self, Power, PowerEvent};
use devices::platform::rtc::Rtc;
use devices::platform::serial::Com1;
use machine::control::SlotId;

/// Node 0's devices.
pub struct Platform {
    /// Port and memory buses.
    pub buses: LocalDevices,
    /// The I/O APIC, to which EOIs go.
    pub ioapic: Shared<IoApicDevice>,
    /// What comes to and goes from PCI slots.
    pub hotplug: Shared<HotPlug>,
    com1: Shared<Com1<ConsoleOut>>,
}

impl Platform {
    /// COM1, the real-time clock, ACPI's registers and the I/O APIC. `route` delivers what the I/O APIC
    /// sends, `room` learns when COM1 can take more input, `power` what the guest wants of the power,
    /// `ejected` which PCI device it has let go of.
    ///
    /// # Errors
    /// [`BusError`] if two devices claim an address.
    pub fn new(
        console: ConsoleOut,
        room: Sender<Input>,
        route: impl Fn(Message) + Send + 'static,
        power: impl Fn(PowerEvent) + Send + 'static,
        ejected: impl Fn(SlotId) + Send + 'static,
    ) -> Result<Platform, BusError> {
        let ioapic = share(IoApicDevice::new(addresses::IOAPIC_ID, route));
        let pin = ioapic.clone();
        let com1 = share(Com1::new(
            move || lock(&pin).pulse(addresses::COM1_GSI as u8),
            // The feeding thread is gone only when the machine ends.
            move || drop(room.send(Input::Room)),
            console,
        ));
        let mut ports = Bus::new();
        ports.insert(addresses::COM1_PORT.into(), addresses::COM1_LEN.into(), com1.clone())?;
        ports.insert(addresses::RTC_PORT.into(), addresses::RTC_LEN.into(), share(Rtc::new(unix_seconds)))?;
        let power = Power::new(addresses::ACPI_POWER_OFF_VALUE, addresses::ACPI_RESET_VALUE, power);
        ports.insert(addresses::ACPI_SLEEP_CONTROL_PORT.into(), power::LEN, share(power))?;
        let pin = ioapic.clone();
        let line = move |up| lock(&pin).set_pin(addresses::HOTPLUG_GSI as u8, up);
        let hotplug = share(HotPlug::new(line, ejected));
        ports.insert(addresses::HOTPLUG_PORT.into(), hotplug::LEN, hotplug.clone())?;
        ports.insert(addresses::PIT_CHANNEL2_PORT.into(), 1, share(NoTimer))?;
        let mut memory = Bus::new();
        memory.insert(addresses::IOAPIC_ADDR, addresses::IOAPIC_LEN, ioapic.clone())?;
        Ok(Platform { buses: LocalDevices { ports, memory, pci: None }, ioapic, hotplug, com1 })
    }

    /// COM1, to offer input to.
    pub fn com1(&self) -> Shared<Com1<ConsoleOut>> {
        self.com1.clone()
    }
}

/// The data port of the timer that is not there. Linux on AMD tries to calibrate by it: as long as it reads
/// like an empty bus, 0xff, it tries a hundred thousand times.
struct NoTimer;

impl BusDevice for NoTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

/// Seconds since 1970 by the host's clock.
fn unix_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
