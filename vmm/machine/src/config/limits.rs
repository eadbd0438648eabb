//! Limits of a device: requests and bytes each second, of its own or as its part of what the devices of a
//! node may do together. The crate `devices` enforces them.
//!
//! ```text
//!  --disk x.img,iops=500,bandwidth=20M   gestalt device set disk0 iops=none
//!        └──────────> Limits <──────────────────┘
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::ConfigError;
use crate::config::units::parse_size;

/// The least bandwidth that can be asked for, in bytes a second: a page.
pub const MIN_BANDWIDTH: u64 = 4096;

/// A device's share if nothing is said. What counts is how shares compare.
pub const DEFAULT_SHARE: u32 = 100;
/// The largest share.
pub const MAX_SHARE: u32 = 10_000;

/// A share from a number, or `none` for the usual one.
///
/// # Errors
/// One sentence with the numbers that are possible.
pub fn parse_share(text: &str) -> Result<Option<u32>, ConfigError> {
    match text.parse() {
        _ if text == "none" => Ok(None),
        Ok(share) => check_share(share).map(|()| Some(share)),
        Err(_) => Err(ConfigError(format!("{text:?} is not a share: write a number from 1 to {MAX_SHARE}"))),
    }
}

/// Whether a share is possible.
///
/// # Errors
/// One sentence with the numbers that are.
pub fn check_share(share: u32) -> Result<(), ConfigError> {
    if (1..=MAX_SHARE).contains(&share) {
        return Ok(());
    }
    Err(ConfigError(format!("a share of {share} is not possible: choose 1 to {MAX_SHARE}")))
}

/// A node's capacity: the limits of all its devices together, split by their shares.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// All disks.
    pub disks: Limits,
    /// All network cards, in each direction.
    pub cards: Limits,
}

impl Capacity {
    /// Takes `disk_iops`, `disk_bandwidth`, `net_iops` or `net_bandwidth`; `false` if `key` is another.
    ///
    /// # Errors
    /// One sentence with the form that is understood.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, ConfigError> {
        match key.split_once('_') {
            Some(("disk", key)) => self.disks.set(key, value),
            Some(("net", key)) => self.cards.set(key, value),
            _ => Ok(false),
        }
    }

    /// Whether it can be kept.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.disks.check().and_then(|()| self.cards.check())
    }
}

/// A device's limits for each second; `None`: as much as it can.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests or packets each second, at least 1.
    pub iops: Option<u64>,
    /// Bytes each second, at least [`MIN_BANDWIDTH`].
    pub bandwidth: Option<u64>,
}

impl Limits {
    /// Takes `iops=500` or `bandwidth=20M`, or `none` for either; `false` if `key` is another.
    ///
    /// # Errors
    /// One sentence with the form that is understood.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, ConfigError> {
        let none = value == "none";
        match key {
            "iops" if none => self.iops = None,
            "bandwidth" if none => self.bandwidth = None,
            "iops" => {
                let iops = value.parse().map_err(|_| {
                    ConfigError(format!("{value:?} is not a number of requests each second, nor \"none\""))
                })?;
                self.iops = Some(iops);
            }
            "bandwidth" => self.bandwidth = Some(parse_size(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether they can be kept.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.iops == Some(0) {
            return Err(ConfigError(
                "0 requests each second is no limit but a stop: allow at least 1".into(),
            ));
        }
        if self.bandwidth.is_some_and(|bytes| bytes < MIN_BANDWIDTH) {
            return Err(ConfigError(format!(
                "a bandwidth of less than a page, {MIN_BANDWIDTH} bytes each second, is not possible: allow more"
            )));
        }
        Ok(())
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |value: Option<u64>| value.map_or("none".into(), |value| value.to_string());
        write!(f, "iops={} bandwidth={}", part(self.iops), part(self.bandwidth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_set_one_by_one_and_shown_as_they_are_written() {
        let mut limits = Limits::default();
        assert_eq!(limits.to_string(), "iops=none bandwidth=none");
        for (key, value) in [("iops", "500"), ("bandwidth", "1M")] {
            assert_eq!(limits.set(key, value), Ok(true));
        }
        assert_eq!(limits.to_string(), "iops=500 bandwidth=1048576");
        assert_eq!(limits.set("iops", "none"), Ok(true));
        assert_eq!(limits, Limits { iops: None, bandwidth: Some(1 << 20) });
        assert_eq!(limits.set("colour", "red"), Ok(false));
    }

    #[test]
    fn limits_that_cannot_be_are_refused_with_a_reason() {
        let mut limits = Limits::default();
        assert!(limits.set("iops", "many").unwrap_err().0.contains("\"many\""));
        assert!(limits.set("bandwidth", "wide").unwrap_err().0.contains("\"wide\""));
        assert!(Limits { iops: Some(0), bandwidth: None }.check().unwrap_err().0.contains("at least 1"));
        assert!(Limits { iops: None, bandwidth: Some(9) }.check().unwrap_err().0.contains("4096"));
        assert_eq!(Limits { iops: Some(1), bandwidth: Some(4096) }.check(), Ok(()));
    }
}
