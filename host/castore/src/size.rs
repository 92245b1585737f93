/// Powers of 1024, as powers of 2.
const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Why a text is not a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It isn't a number with or without a unit.
    #[error("write a number of bytes, or one with K, M, G or T: 2G")]
    NotANumber,
    /// It has more bytes than 64 bits can count.
    #[error("more than 64 bits can hold")]
    TooLarge,
    /// It is 0.
    #[error("must not be 0")]
    Zero,
}

/// A size in bytes: a number, with K, M, G or T for powers of 1024 (`2G`, `512MiB`), as in QEMU and systemd. The crate
/// `bytesize` takes `2G` for 2 × 10⁹ and cuts sizes that are too large.
///
/// # Errors
///
/// The text isn't such a number, or the number is 0 or too large.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let upper = text.to_ascii_uppercase();
    let plain = upper.trim_end_matches('B').trim_end_matches('I');
    let unit = UNITS.iter().find_map(|&(unit, shift)| plain.strip_suffix(unit).map(|number| (number, shift)));
    let (number, shift) = unit.unwrap_or((plain, 0));
    let number: u64 = number.trim().parse().map_err(|_| SizeError::NotANumber)?;
    match number.checked_mul(1 << shift) {
        None => Err(SizeError::TooLarge),
        Some(0) => Err(SizeError::Zero),
        Some(bytes) => Ok(bytes),
    }
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
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "1X"] {
            assert_eq!(parse_size(text), Err(SizeError::NotANumber), "{text}");
        }
        assert_eq!(parse_size("0G"), Err(SizeError::Zero));
        assert_eq!(parse_size("99999999T"), Err(SizeError::TooLarge));
    }
}
