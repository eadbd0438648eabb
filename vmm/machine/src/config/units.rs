//! Sizes, durations and names, as machine files and the command line write them.

use std::time::Duration;

use super::{ConfigError, wrong};

/// Names appear in messages, file names and command lines: letters, digits, `.`, `_`, `-`, at most 64.
///
/// # Errors
/// A sentence about the first thing wrong.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    check_word("a node's", name, 64)
}

/// The same for the name of something else, such as "a device's", with at most `most` characters.
///
/// # Errors
/// A sentence about the first thing wrong.
pub fn check_word(whose: &str, name: &str, most: usize) -> Result<(), ConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > most || name.starts_with(['-', '.']) || !name.chars().all(plain) {
        return wrong(format!(
            "{name:?} cannot be {whose} name: use 1 to {most} letters, digits, '.', '_' and '-', beginning with a \
             letter or digit"
        ));
    }
    Ok(())
}

/// Bytes from `512M`, `2G`, `1.5G` or a plain number of bytes; K, M, G and T are powers of 1024, an `iB`
/// or `B` may follow.
///
/// # Errors
/// A sentence with the forms that are understood.
pub fn parse_size(text: &str) -> Result<u64, ConfigError> {
    let refused =
        || ConfigError(format!("{text:?} is not a size: write for example 512M, 2G or a number of bytes"));
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(refused()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(refused);
    }
    let fraction: f64 = number.parse().map_err(|_| refused())?;
    let bytes = fraction * (1u64 << shift) as f64;
    if shift == 0 || bytes.fract() != 0.0 || bytes >= u64::MAX as f64 {
        return Err(refused());
    }
    Ok(bytes as u64)
}

/// A duration from `3s`, `500ms`, `100us` or `2min`.
///
/// # Errors
/// A sentence with the forms that are understood.
pub fn parse_duration(text: &str) -> Result<Duration, ConfigError> {
    let refused =
        || ConfigError(format!("{text:?} is not a duration: write for example 3s, 500ms, 100us or 2min"));
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refused)?;
    let (number, unit) = trimmed.split_at(digits);
    let seconds = match unit.trim() {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "min" => 60.0,
        _ => return Err(refused()),
    };
    let number: f64 = number.parse().map_err(|_| refused())?;
    let nanos = number * seconds * 1e9;
    if nanos > 1e9 * 86_400.0 * 365.0 {
        return Err(refused());
    }
    Ok(Duration::from_nanos(nanos.round() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_bytes_and_binary_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("1.5g"), Ok(3 << 29));
        for bad in ["", "M", "-1M", "12Q", "1.5", "0.0001K", "99999999999T", "1..2G", "1 2"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(parse_duration("3s"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("2.5 s"), Ok(Duration::from_millis(2500)));
        assert_eq!(parse_duration("100us"), Ok(Duration::from_micros(100)));
        assert_eq!(parse_duration("2min"), Ok(Duration::from_secs(120)));
        for bad in ["", "3", "s", "-3s", "3h", "999999999999min"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
