//! Two nodes in one process, each with a KVM virtual machine: what passes between them on lane 0.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use base::lock;
use crossbeam::channel;
use devices::platform::BusDevice;
use devices::platform::bus::share;
use devices::platform::ioapic::IoApicDevice;
use fabric::{Transport, sim};
use vmm::clock::thread::Aligner;
use vmm::router::LinkFailure;
use vmm::router::lane::{ControlLane, DeviceSide, LaneConfig};
use vmm::router::remote::{AllDevices, DeviceServer};
use vmm::testing::code16;
use vmm::vcpu::table::State;

use super::harness::{CODE, Guest, PATIENCE, Parts, host, node, places};
use super::interrupts::{enable_apic, eoi};
use super::startup::{AP_PAGE, ap_code, ap_handler, icr, start_ap};
use super::vcpu::report;

/// Node 0 with one CPU and node 1 with two, sharing no memory: each has its own copy of the guest's code.
struct Two {
    first: Guest,
    second: Guest,
    lanes: Vec<ControlLane>,
    servers: Vec<DeviceServer>,
    transports: Vec<Arc<dyn Transport>>,
}

impl Two {
    fn start(code: &[u8], prepare: impl FnOnce(&Parts)) -> Option<Two> {
        let host = host()?;
        let transports: Vec<Arc<dyn Transport>> =
            sim::cluster(2, 1).unwrap().into_iter().map(|transport| Arc::new(transport) as _).collect();
        let places = places(&[1, 2]);
        let all: Vec<Parts> =
            transports.iter().map(|transport| Parts::new(host, &places, transport.clone())).collect();
        for parts in &all {
            parts.load(CODE, code);
            parts.load(u16::from(AP_PAGE) << 12, ap_code());
            parts.load(0x2000, ap_handler());
            parts.handler(0x48, 0x2000);
        }
        prepare(&all[0]);
        let mut servers = Vec::new();
        let (pong, pongs) = channel::bounded(16);
        let sides: Vec<_> = [(&all[0], None), (&all[1], Some(pong))]
            .into_iter()
            .map(|(parts, pong)| {
                let devices = AllDevices::new(parts.router.clone(), 0, parts.devices.clone());
                let server = DeviceServer::start(parts.router.clone(), parts.devices.clone()).unwrap();
                let side = DeviceSide { served: server.queue(), asked: Arc::new(devices) };
                servers.push(server);
                (side, pong)
            })
            .collect();
        let remote = sides[1].0.asked.clone();
        let mut lanes = Vec::new();
        for ((parts, transport), (devices, pongs)) in all.iter().zip(&transports).zip(sides) {
            let config = LaneConfig {
                router: parts.router.clone(),
                clock: parts.clock.clone(),
                pongs,
                devices,
                spin: Duration::ZERO,
            };
            lanes.push(ControlLane::start(transport.take_receiver(0).unwrap(), config).unwrap());
        }
        let mut aligner = Aligner::new(all[1].clock.clone(), all[1].router.clone(), pongs);
        aligner.align(PATIENCE).unwrap();
        let mut all = all.into_iter();
        let (first, second) = (all.next().unwrap().run(), all.next().unwrap().run_with(remote));
        Some(Two { first, second, lanes, servers, transports })
    }

    fn stop(mut self) {
        self.first.parts.router.end();
        self.second.parts.router.end();
        self.first.vcpus.stop(PATIENCE).unwrap();
        self.second.vcpus.stop(PATIENCE).unwrap();
        self.lanes.into_iter().for_each(ControlLane::stop);
        self.servers.into_iter().for_each(DeviceServer::stop);
    }
}

#[test]
fn cpus_of_another_node_are_started_interrupted_and_use_node_0s_devices() {
    let code = code16!(
        enable_apic!(),
        start_ap!("0x10"),
        start_ap!("0x11"),
        "xor ebx, ebx",
        "20:",
        "in eax, 0x84",
        "cmp eax, ebx",
        "je 20b",
        "mov ebx, eax",
        icr!("0", "0xc4048"),
        "jmp 20b",
    );
    let Some(two) = Two::start(code, |parts| *parts.devices.answer.lock().unwrap() = Some(0)) else { return };
    let two_reports = || {
        let mut seen = [two.first.report(), two.first.report()];
        seen.sort_unstable();
        seen
    };
    let page = u64::from(AP_PAGE) << 8;
    assert_eq!(two_reports(), [0x10 << 16 | page, 0x11 << 16 | page]);
    for _ in 0..20 {
        two.second.wait_state(0, State::Halted);
        two.second.wait_state(1, State::Halted);
        two.first.tell(1);
        assert_eq!(two_reports(), [0x10 << 16 | 0x4800, 0x11 << 16 | 0x4800]);
    }
    let sent = two.transports[0].stats().frames_sent;
    assert!(sent > 20, "{sent}");
    two.stop();
}

#[test]
fn a_level_triggered_interrupt_finished_on_another_node_ends_at_node_0s_ioapic() {
    let code = code16!(enable_apic!(), start_ap!("0x10"), "hlt");
    let mut line = None;
    let two = Two::start(code, |parts| {
        let router = parts.router.clone();
        let ioapic = share(IoApicDevice::new(0, move |message| router.deliver_message(message)));
        parts.router.set_ioapic(&ioapic);
        {
            let mut ioapic = lock(&ioapic);
            ioapic.write(0, &(0x10u32 + 19).to_le_bytes());
            ioapic.write(0x10, &(0x10u32 << 24).to_le_bytes());
            ioapic.write(0, &(0x10u32 + 18).to_le_bytes());
            ioapic.write(0x10, &0x8048u32.to_le_bytes());
        }
        let (lower, rounds) = (ioapic.clone(), AtomicU32::new(0));
        // The AP's own report, then one for each interrupt; the line goes down in the third interrupt.
        let on_write = move |_: &super::harness::Write| {
            if rounds.fetch_add(1, Ordering::SeqCst) == 3 {
                lock(&lower).set_pin(9, false);
            }
        };
        assert!(parts.devices.on_write.set(Box::new(on_write)).is_ok());
        line = Some(ioapic);
    });
    let Some(two) = two else { return };
    assert_eq!(two.first.report() >> 16, 0x10);
    two.second.wait_state(0, State::Halted);
    lock(line.as_ref().unwrap()).set_pin(9, true);
    assert_eq!([0; 3].map(|_| two.first.report()), [0x10 << 16 | 0x4800; 3]);
    two.second.wait_state(0, State::Halted);
    lock(line.as_ref().unwrap()).set_pin(9, true);
    assert_eq!(two.first.report(), 0x10 << 16 | 0x4800);
    two.stop();
}

#[test]
fn a_device_access_ends_when_node_0_is_lost() {
    let code = code16!(start_ap!("0x10"), "hlt");
    let Some(two) = Two::start(code, |parts| {
        // The device never answers: the AP's report hangs in node 0's server until the machine ends.
        let (gate, wait) = std::sync::mpsc::channel::<()>();
        std::mem::forget(gate);
        let wait = std::sync::Mutex::new(wait);
        let on_write = move |_: &super::harness::Write| {
            let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(2));
        };
        assert!(parts.devices.on_write.set(Box::new(on_write)).is_ok());
    }) else {
        return;
    };
    while two.second.vcpus.counters()[0].pio_exits == 0 {
        std::thread::yield_now();
    }
    two.second.parts.router.peers().lost(node(0), "its process ended");
    let lost = LinkFailure::PeerLost { peer: node(0), why: "its process ended".into() };
    assert_eq!(two.second.parts.links.recv_timeout(PATIENCE).unwrap(), lost);
    two.second.wait_state(0, State::Halted);
    two.stop();
}

#[test]
fn a_malformed_message_loses_its_sender_and_harms_nothing() {
    let code = code16!(
        "mov eax, 1",
        report!(),
        "20:",
        "in eax, 0x84",
        "cmp eax, 1",
        "jne 20b",
        report!(),
        eoi!(),
        "hlt"
    );
    let Some(two) = Two::start(code, |parts| *parts.devices.answer.lock().unwrap() = Some(0)) else { return };
    assert_eq!(two.first.report(), 1);
    two.transports[1].send(node(0), 0, &[&[3, 1, 2, 3]]).unwrap();
    let failure = two.first.parts.links.recv_timeout(PATIENCE).unwrap();
    assert!(
        failure.to_string().contains("node 1 was lost: it sent a malformed control message"),
        "{failure}"
    );
    *two.first.parts.devices.answer.lock().unwrap() = Some(1);
    assert_eq!(two.first.report(), 1);
    two.stop();
}
