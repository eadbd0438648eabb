//! The clock as Linux's mc146818 driver reads and sets it.

use super::*;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// 2024-02-29 23:59:58 UTC, a Thursday.
const LEAP_DAY: i64 = 1_709_251_198;

fn clock(now: i64) -> (Rtc, Arc<AtomicI64>) {
    let host = Arc::new(AtomicI64::new(now));
    let read = host.clone();
    (Rtc::new(move || read.load(Ordering::Relaxed)), host)
}

fn read(rtc: &mut Rtc, register: u8) -> u8 {
    rtc.write(0, &[register]);
    let mut data = [0];
    rtc.read(1, &mut data);
    data[0]
}

fn write(rtc: &mut Rtc, register: u8, value: u8) {
    rtc.write(0, &[register]);
    rtc.write(1, &[value]);
}

/// Century, year, month, day, weekday, hour, minute, second.
fn read_all(rtc: &mut Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|register| read(rtc, register))
}

#[test]
fn power_on_is_24_hour_bcd_and_never_updating() {
    let (mut rtc, _host) = clock(LEAP_DAY);
    assert_eq!(read_all(&mut rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    assert_eq!(read(&mut rtc, STATUS_A) & A_UPDATE_IN_PROGRESS, 0);
    assert_eq!(
        (read(&mut rtc, STATUS_B), read(&mut rtc, STATUS_C), read(&mut rtc, STATUS_D)),
        (0x02, 0, 0x80)
    );
}

#[test]
fn the_host_clock_moves_it_over_the_end_of_a_month() {
    let (mut rtc, host) = clock(LEAP_DAY);
    host.store(LEAP_DAY + 3, Ordering::Relaxed);
    assert_eq!(read_all(&mut rtc), [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x01]);
}

#[test]
fn binary_and_twelve_hour_modes_show_the_same_time() {
    let (mut rtc, host) = clock(LEAP_DAY);
    write(&mut rtc, STATUS_B, B_BINARY | B_24_HOURS);
    assert_eq!(read_all(&mut rtc), [20, 24, 2, 29, 5, 23, 59, 58]);
    write(&mut rtc, STATUS_B, B_BINARY);
    assert_eq!(read(&mut rtc, HOURS), 11 | HOUR_PM);
    write(&mut rtc, STATUS_B, 0);
    for (hour, shown) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x12 | HOUR_PM), (13, 0x01 | HOUR_PM)] {
        host.store(hour * 3600, Ordering::Relaxed);
        assert_eq!(read(&mut rtc, HOURS), shown, "hour {hour}");
        write(&mut rtc, HOURS, shown);
        assert_eq!(rtc.offset, 0, "hour {hour} written back");
    }
}

#[test]
fn a_time_set_under_set_goes_on_from_there() {
    let (mut rtc, host) = clock(LEAP_DAY);
    write(&mut rtc, STATUS_B, B_24_HOURS | B_SET);
    host.store(LEAP_DAY + 5, Ordering::Relaxed);
    assert_eq!(read(&mut rtc, SECONDS), 0x58, "the registers stand still");
    // The last day of January: with February still in the month register, the day is out of range for a
    // moment.
    for (register, value) in
        [(DAY, 0x31), (MONTH, 0x01), (YEAR, 0x30), (HOURS, 0), (MINUTES, 0), (SECONDS, 0)]
    {
        write(&mut rtc, register, value);
    }
    write(&mut rtc, STATUS_B, B_24_HOURS);
    host.store(LEAP_DAY + 15, Ordering::Relaxed);
    assert_eq!(read_all(&mut rtc), [0x20, 0x30, 0x01, 0x31, 5, 0x00, 0x00, 0x10]);
}

#[test]
fn the_rest_is_memory() {
    let (mut rtc, _host) = clock(0);
    write(&mut rtc, 0x0f, 0x0a);
    write(&mut rtc, 0x7f, 0x55);
    assert_eq!((read(&mut rtc, 0x0f), read(&mut rtc, 0xff)), (0x0a, 0x55), "index bit 7 is the NMI mask");
    assert_eq!(read(&mut rtc, SECONDS), 0);
}

proptest! {
    #[test]
    fn dates_and_unix_times_are_each_others_inverse(unix in -60_000_000_000i64..250_000_000_000) {
        let fields = Fields::from_unix(unix);
        prop_assert_eq!(fields.to_unix(), unix);
        prop_assert!((1..=12).contains(&fields.month) && (1..=31).contains(&fields.day));
        prop_assert!((0..24).contains(&fields.hour) && (0..60).contains(&fields.minute));
    }

    #[test]
    fn no_access_panics(
        now in any::<i64>(),
        accesses in proptest::collection::vec((0u64..4, proptest::collection::vec(any::<u8>(), 0..9)), 0..100),
    ) {
        let (mut rtc, _host) = clock(now);
        for (offset, mut data) in accesses {
            rtc.write(offset, &data);
            rtc.read(offset, &mut data);
        }
    }
}
