//! Sizes, durations and counts as people write and read them, in flags and in the configuration.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, de};

const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// A size in bytes: a number, with K, M, G or T for powers of 1024 (`2G`, `512MiB`), as in QEMU and systemd. The crate
/// `bytesize` takes `2G` for 2 × 10⁹ and cuts sizes that are too large.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let upper = text.to_ascii_uppercase();
    let plain = upper.trim_end_matches('B').trim_end_matches('I');
    let unit = UNITS.iter().find_map(|&(unit, shift)| plain.strip_suffix(unit).map(|number| (number, shift)));
    let (number, shift) = unit.unwrap_or((plain, 0));
    let number: u64 =
        number.trim().parse().map_err(|_| "write a number of bytes, or one with K, M, G or T: 2G".to_owned())?;
    match number.checked_mul(1 << shift) {
        None => Err("more than 64 bits can hold".to_owned()),
        Some(0) => Err("must not be 0".to_owned()),
        Some(bytes) => Ok(bytes),
    }
}

/// A [`size`] within bounds.
pub(crate) fn size_within(text: &str, least: u64, most: u64) -> Result<u64, String> {
    match size(text)? {
        bytes if bytes < least => Err(format!("must be at least {}", show_size(least))),
        bytes if bytes > most => Err(format!("must be at most {}", show_size(most))),
        bytes => Ok(bytes),
    }
}

/// A duration with its unit: `90s`, `10m`, `1h 30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("must not be 0".to_owned()),
        // It would be 0 on the wire.
        Ok(duration) if duration < Duration::from_millis(1) => Err("must be at least 1ms".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!("{error}; write it with its unit: 90s, 10m, 1h")),
    }
}

/// In milliseconds, as clients and daemons send it.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Bytes: a number, or text such as "2G"; see [`size`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

/// A time with its unit, such as "10m".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Time(pub(crate) Duration);

/// A number that is not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count(pub(crate) u32);

impl From<Size> for u64 {
    fn from(Size(bytes): Size) -> Self {
        bytes
    }
}

impl From<Time> for Duration {
    fn from(Time(time): Time) -> Self {
        time
    }
}

impl From<Count> for u32 {
    fn from(Count(count): Count) -> Self {
        count
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        size(text).map(Self)
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        duration(text).map(Self)
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(0) => Err("must not be 0".to_owned()),
            Ok(count) => Ok(Self(count)),
            Err(error) => Err(format!("{error}")),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a size, such as \"2G\"")
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a time with its unit, such as \"10m\"")
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text_or_number(deserializer, "a number greater than 0")
    }
}

/// Parses a text, or a number as if it were text.
///
/// # Errors
///
/// It isn't one. The message quotes it and says that it is not `expected`.
pub(crate) fn text_or_number<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(
    deserializer: D,
    expected: &'static str,
) -> Result<T, D::Error> {
    struct Visitor<T>(&'static str, fn(&str) -> Result<T, String>);
    impl<T> de::Visitor<'_> for Visitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.1)(text).map_err(|rule| E::custom(format!("{text:?} is not {}: {rule}", self.0)))
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }
    }
    deserializer.deserialize_any(Visitor(expected, T::from_str))
}

/// Formats a size: `1.50 GiB`.
pub(crate) fn show_size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Formats a duration in seconds with two decimals.
pub(crate) fn show_duration(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

/// A time in its largest unit alone: `3h`, `2days`.
pub(crate) fn show_age(age: Duration) -> String {
    let text = humantime::format_duration(Duration::from_secs(age.as_secs())).to_string();
    text.split(' ').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("1", 1),
            ("4096B", 4096),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("2G", 2 << 30),
            ("2 GB", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "0G", "G", "-1", "1.5G", "1X", "99999999T"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bounds_are_named() {
        assert_eq!(size_within("1G", 1 << 30, 1 << 30), Ok(1 << 30));
        assert_eq!(size_within("1", 1 << 30, 1 << 31).unwrap_err(), "must be at least 1.00 GiB");
        assert_eq!(size_within("3G", 1 << 30, 1 << 31).unwrap_err(), "must be at most 2.00 GiB");
    }

    #[test]
    fn ages_have_one_unit() {
        for (seconds, shown) in [(0, "0s"), (59, "59s"), (3 * 3600 + 59, "3h"), (2 * 86400 + 1, "2days")] {
            assert_eq!(show_age(Duration::from_millis(seconds * 1000 + 999)), shown);
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(duration("1ms"), Ok(Duration::from_millis(1)));
        for text in ["", "90", "0s", "x", "999us"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
