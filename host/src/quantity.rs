//! Sizes, durations and counts as people write and read them, in flags and in the configuration.

use std::{fmt, str::FromStr, time::Duration};

use cofferdam_castore::parse_size;
use serde::{Deserialize, Deserializer, de};

/// A size in bytes, see [`parse_size`].
pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
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
