//! The real-time clock: a Motorola MC146818 at ports 0x70 (index) and 0x71 (data), date and time in UTC.
//!
//! Time is the host's plus an offset. While the guest holds SET (status B, bit 7) the clock registers stand
//! still and take what is written; when it lets go, the offset becomes what makes the clock go on from there.
//! Alarms and periodic interrupts do not exist: their bits are kept and nothing comes of them. "Update in
//! progress" is never set, because every read sees a whole second. Register 0x32 is the century (the FADT
//! must say so).

use super::{BusDevice, offsets};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where the century is.
pub const CENTURY: u8 = 0x32;

/// Status A: 32.768 kHz time base; update never in progress.
const A_TIME_BASE: u8 = 0x20;
const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const HOUR_PM: u8 = 0x80;
/// Status D: the battery is good.
const D_VALID: u8 = 0x80;

const DAY_SECONDS: i64 = 86_400;
/// The years 0 to 9999, which is what the registers can hold.
const FIRST: i64 = -62_167_219_200;
const LAST: i64 = 253_402_300_799;

/// Date and time of day; any number may be out of its range while the guest writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fields {
    century: i64,
    year: i64,
    month: i64,
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Fields {
    /// Proleptic Gregorian date and time of a Unix time (the civil-from-days algorithm, with March as the
    /// first month).
    fn from_unix(unix: i64) -> Self {
        let (days, rest) = (unix.div_euclid(DAY_SECONDS), unix.rem_euclid(DAY_SECONDS));
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            century: year.div_euclid(100),
            year: year.rem_euclid(100),
            month,
            day: day_of_year - (153 * march_month + 2) / 5 + 1,
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// The Unix time; numbers out of range carry over. Every field is a byte's worth, so nothing overflows.
    fn to_unix(self) -> i64 {
        let months = (self.century * 100 + self.year) * 12 + self.month - 1 - 2;
        let (year, march_month) = (months.div_euclid(12), months.rem_euclid(12));
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * march_month + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * DAY_SECONDS + self.hour * 3600 + self.minute * 60 + self.second
    }
}

/// The clock and its 128 bytes of CMOS memory.
pub struct Rtc {
    now: Box<dyn Fn() -> i64 + Send>,
    index: u8,
    cmos: [u8; 128],
    /// Seconds that the guest's clock is ahead of the host's.
    offset: i64,
    /// The clock registers while the guest holds SET.
    frozen: Option<Fields>,
}

impl Rtc {
    /// A clock that shows `now()`, the Unix time in seconds; 24-hour BCD until the guest asks for something
    /// else.
    pub fn new(now: impl Fn() -> i64 + Send + 'static) -> Self {
        let mut cmos = [0; 128];
        cmos[usize::from(STATUS_A)] = A_TIME_BASE;
        cmos[usize::from(STATUS_B)] = B_24_HOURS;
        Self { now: Box::new(now), index: 0, cmos, offset: 0, frozen: None }
    }

    fn fields(&self) -> Fields {
        self.frozen
            .unwrap_or_else(|| Fields::from_unix((self.now)().saturating_add(self.offset).clamp(FIRST, LAST)))
    }

    fn set(&mut self, fields: Fields) {
        match &mut self.frozen {
            Some(frozen) => *frozen = fields,
            None => self.offset = fields.to_unix().saturating_sub((self.now)()),
        }
    }

    fn status_b(&self, bit: u8) -> bool {
        self.cmos[usize::from(STATUS_B)] & bit != 0
    }

    /// A number as status B says numbers are.
    fn encode(&self, number: i64) -> u8 {
        let number = number.clamp(0, 255) as u8;
        if self.status_b(B_BINARY) { number } else { ((number / 10 % 10) << 4) | (number % 10) }
    }

    fn decode(&self, value: u8) -> i64 {
        i64::from(if self.status_b(B_BINARY) { value } else { (value >> 4) * 10 + (value & 0xf) })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.status_b(B_24_HOURS) {
            return self.encode(hour);
        }
        self.encode((hour + 11) % 12 + 1) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.status_b(B_24_HOURS) {
            return self.decode(value);
        }
        self.decode(value & !HOUR_PM) % 12 + if value & HOUR_PM != 0 { 12 } else { 0 }
    }

    fn read_data(&self) -> u8 {
        match self.index {
            SECONDS => self.encode(self.fields().second),
            MINUTES => self.encode(self.fields().minute),
            HOURS => self.encode_hour(self.fields().hour),
            // Sunday is 1; the first of January 1970 was a Thursday.
            WEEKDAY => self.encode((self.fields().to_unix().div_euclid(DAY_SECONDS) + 4).rem_euclid(7) + 1),
            DAY => self.encode(self.fields().day),
            MONTH => self.encode(self.fields().month),
            YEAR => self.encode(self.fields().year),
            CENTURY => self.encode(self.fields().century),
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => self.cmos[usize::from(index)],
        }
    }

    fn write_data(&mut self, value: u8) {
        let fields = self.fields();
        let number = self.decode(value);
        match self.index {
            SECONDS => self.set(Fields { second: number, ..fields }),
            MINUTES => self.set(Fields { minute: number, ..fields }),
            HOURS => self.set(Fields { hour: self.decode_hour(value), ..fields }),
            DAY => self.set(Fields { day: number, ..fields }),
            MONTH => self.set(Fields { month: number, ..fields }),
            YEAR => self.set(Fields { year: number, ..fields }),
            CENTURY => self.set(Fields { century: number, ..fields }),
            STATUS_A => self.cmos[usize::from(STATUS_A)] = value & !A_UPDATE_IN_PROGRESS,
            STATUS_B => {
                self.cmos[usize::from(STATUS_B)] = value;
                if value & B_SET != 0 {
                    self.frozen = Some(fields);
                } else if self.frozen.take().is_some() {
                    self.set(fields);
                }
            }
            // The weekday follows from the date.
            WEEKDAY | STATUS_C | STATUS_D => {}
            index => self.cmos[usize::from(index)] = value,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(offsets(offset)) {
            *byte = match offset {
                0 => self.index,
                1 => self.read_data(),
                _ => 0xff,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (value, offset) in data.iter().zip(offsets(offset)) {
            match offset {
                // Bit 7 is the NMI mask of old, which masks nothing here.
                0 => self.index = value & 0x7f,
                1 => self.write_data(*value),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
