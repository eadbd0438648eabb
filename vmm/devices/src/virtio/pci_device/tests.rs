//! A virtio device by its PCI registers, as a driver finds, starts, uses and resets it.

use super::*;
use crate::virtio::entropy::Entropy;
use crate::virtio::testing::{DATA, Driver, INDIRECT, NEXT, RAM, SIZE, WRITE, rings};
use proptest::prelude::*;

#[test]
fn a_driver_finds_the_device_and_its_registers() {
    let driver = Driver::new(Box::new(Entropy));
    assert_eq!(driver.read_config(0, 4), 0x1044_1af4);
    assert_eq!(driver.read_config(0x10, 4), 0xc000_0000);
    let mut kinds = Vec::new();
    let mut at = driver.read_config(0x34, 1);
    while at != 0 {
        kinds.push((driver.read_config(at, 1), driver.read_config(at + 3, 1)));
        at = driver.read_config(at + 1, 1);
    }
    // Common, ISR, own, notification, access through configuration space; then MSI-X with two vectors.
    assert_eq!(kinds, [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5), (0x11, 0)]);
    let msix = driver.find_capability(0x11);
    assert_eq!(driver.read_config(msix + 2, 2), 1);
}

#[test]
fn registers_are_nowhere_until_memory_is_switched_on_and_follow_the_base_address() {
    let driver = Driver::new(Box::new(Entropy));
    assert_eq!(driver.transport.registers(), None);
    driver.write_config(4, &[2, 0]);
    assert_eq!(driver.transport.registers(), Some(0xc000_0000));
    driver.write_config(0x10, &0xc000_8000u32.to_le_bytes());
    assert_eq!(driver.transport.registers(), Some(0xc000_8000));
}

#[test]
fn a_request_is_answered_with_an_interrupt_and_again_after_a_reset() {
    let mut driver = Driver::new(Box::new(Entropy));
    for _ in 0..3 {
        driver.start(0);
        for _ in 0..40 {
            driver.put(DATA, &[0; 64]);
            assert_eq!(driver.request(0, &[(DATA, 64, true)]), 64);
            assert_ne!(driver.get(DATA, 64), [0; 64]);
        }
        driver.reset();
    }
}

#[test]
fn buffers_may_stand_in_a_table_of_their_own() {
    let mut driver = Driver::new(Box::new(Entropy));
    driver.start(0);
    let table = DATA + 0x1000;
    driver.descriptor(table, 0, DATA, 16, WRITE | NEXT, 1);
    driver.descriptor(table, 1, DATA + 100, 8, WRITE, 0);
    driver.descriptor(rings(0)[0], 5, table, 32, INDIRECT, 0);
    driver.offer(0, 5);
    assert_eq!(driver.wait(0), (5, 24));
}

#[test]
fn requests_made_before_the_driver_is_ready_are_served_when_it_is() {
    let mut driver = Driver::new(Box::new(Entropy));
    driver.configure(0);
    driver.chain(0, &[(DATA, 8, true)]);
    driver.offer(0, 0);
    driver.status(0xf);
    assert_eq!(driver.wait(0), (0, 8));
}

#[test]
fn registers_can_be_reached_through_configuration_space() {
    let driver = Driver::new(Box::new(Entropy));
    let mut at = driver.find_capability(9);
    while driver.read_config(at + 3, 1) != 5 {
        at = driver.read_config(at + 1, 1);
    }
    driver.write_config(at + 8, &0x14u32.to_le_bytes());
    driver.write_config(at + 12, &1u32.to_le_bytes());
    driver.write_config(at + 16, &[3, 0, 0, 0]);
    assert_eq!((driver.read(0x14, 1), driver.read_config(at + 16, 1)), (3, 3));
    driver.write_config(at + 8, &0xffff_fff0u32.to_le_bytes());
    assert_eq!(driver.read_config(at + 16, 4) & 0xff, 3, "beyond the registers: what was written stays");
}

#[test]
fn a_driver_that_is_not_sound_gets_a_device_that_needs_a_reset() {
    type Mistake = fn(&mut Driver);
    let mistakes: [(&str, Mistake); 6] = [
        ("a buffer beyond memory", |driver| driver.chain(0, &[(RAM - 8, 16, true)])),
        ("a buffer at the end of the address space", |driver| driver.chain(0, &[(u64::MAX, 16, true)])),
        ("readable after writable", |driver| driver.chain(0, &[(DATA, 8, true), (DATA, 8, false)])),
        ("a loop", |driver| driver.descriptor(rings(0)[0], 0, DATA, 8, WRITE | NEXT, 0)),
        ("a next that does not exist", |driver| driver.descriptor(rings(0)[0], 0, DATA, 8, NEXT, SIZE)),
        ("more requests than fit", |driver| driver.put(rings(0)[1] + 2, &(SIZE + 7).to_le_bytes())),
    ];
    for (what, mistake) in mistakes {
        eprintln!("{what}");
        let mut driver = Driver::new(Box::new(Entropy));
        driver.start(0);
        mistake(&mut driver);
        if !what.starts_with("more") {
            driver.offer(0, 0);
        } else {
            driver.write(DOORBELLS.start, &[0, 0]);
        }
        driver.wait_broken();
        driver.reset();
        driver.start(0);
        assert_eq!(driver.request(0, &[(DATA, 8, true)]), 8, "after {what}");
    }
}

#[test]
fn rings_outside_memory_are_refused_at_the_start() {
    let mut driver = Driver::new(Box::new(Entropy));
    driver.configure(0);
    driver.reset();
    driver.configure(0);
    driver.write(0x1c, &0u16.to_le_bytes());
    driver.reset();
    driver.status(3);
    driver.write(0x08, &1u32.to_le_bytes());
    driver.write(0x0c, &1u32.to_le_bytes());
    driver.status(0xb);
    driver.write(0x20, &(RAM - 16).to_le_bytes());
    driver.write(0x28, &0x1000u64.to_le_bytes());
    driver.write(0x30, &0x2000u64.to_le_bytes());
    driver.write(0x1c, &1u16.to_le_bytes());
    driver.status(0xf);
    assert_eq!(driver.read(0x14, 1) & 0x40, 0x40);
    driver.reset();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_accesses_whatever_harm_the_device(
        steps in proptest::collection::vec((0u8..6, 0u64..0x8000, any::<u64>(), 0usize..4), 0..120),
    ) {
        let mut driver = Driver::new(Box::new(Entropy));
        driver.start(0);
        for (kind, offset, value, len) in steps {
            let len = [1, 2, 4, 8][len];
            let bytes = value.to_le_bytes();
            let within = |end: u64| offset.min(end - len as u64);
            match kind {
                0 => driver.write_config(within(4096), &bytes[..len]),
                1 => drop(driver.read_config(within(4096), len)),
                2 => driver.write(within(0x8000), &bytes[..len]),
                3 => driver.write(within(0x40), &bytes[..len]),
                4 => driver.put(0x1000 + offset % 0xff8, &bytes),
                _ => drop(driver.read(within(0x8000), len)),
            }
        }
        // Whatever it was told, a reset brings it back.
        driver.reset();
        driver.write_config(0x10, &0xc000_0000u32.to_le_bytes());
        driver.start(0);
        prop_assert_eq!(driver.request(0, &[(DATA, 8, true)]), 8);
    }
}

#[test]
fn a_device_that_is_taken_away_ends_its_threads_and_hears_its_driver_no_more() {
    let mut driver = Driver::new(Box::new(Entropy));
    driver.start(0);
    assert_eq!(driver.request(0, &[(DATA, 64, true)]), 64);
    assert!(driver.transport.close(std::time::Duration::from_secs(10)));
    driver.status(0);
    driver.status(0xf);
    assert!(driver.transport.close(std::time::Duration::ZERO), "nothing has been started again");
}
