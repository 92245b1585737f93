//! JSON as Nix writes it: sorted keys, no space, and numbers as C++ has them.

use std::io::{self, Write};

use serde::Serialize as _;
use serde_json::{Map, Serializer, Value, ser::Formatter};

pub(super) fn written(object: &Map<String, Value>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, LikeNix);
    object.serialize(&mut serializer).expect("memory has room, and keys are strings");
    bytes
}

struct LikeNix;

impl Formatter for LikeNix {
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float(value).as_bytes())
    }
}

/// The shortest digits that are this number: with an exponent of at least two digits below 10⁻⁴ and from 10¹⁵ on.
fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if (-4..15).contains(&exponent) {
        return format!("{value:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_nix() {
        for (value, shown) in [
            (1.0e100, "1e+100"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (123_456.789, "123456.789"),
            (3.0, "3.0"),
            (-0.0, "-0.0"),
            (1.0e14, "100000000000000.0"),
            (1.0e15, "1e+15"),
        ] {
            assert_eq!(float(value), shown);
        }
    }
}
