//! Nix's base 32: digits of 5 bits from the end of the bytes to their begin, in an alphabet without e, o, t and u.

const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Characters that this many bytes take.
pub const fn encoded_length(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Encodes bytes.
///
/// ```
/// assert_eq!(cofferdam_nix::base32::encode(&[0x1f, 0]), "000z");
/// ```
pub fn encode(bytes: &[u8]) -> String {
    let digit = |at: usize| {
        let (byte, shift) = (at * 5 / 8, at * 5 % 8);
        let low = u16::from(bytes[byte]);
        let high = bytes.get(byte + 1).copied().map_or(0, u16::from);
        char::from(ALPHABET[usize::from((low | high << 8) >> shift & 31)])
    };
    (0..encoded_length(bytes.len())).rev().map(digit).collect()
}

/// Decodes so many bytes. `None` unless `text` is their one encoding.
pub fn decode(text: &str, bytes: usize) -> Option<Vec<u8>> {
    if text.len() != encoded_length(bytes) {
        return None;
    }
    let mut decoded = vec![0; bytes];
    for (at, character) in text.bytes().rev().enumerate() {
        let digit = ALPHABET.iter().position(|&known| known == character)?;
        let (byte, shift) = (at * 5 / 8, at * 5 % 8);
        let [low, high] = u16::try_from(digit << shift).ok()?.to_le_bytes();
        decoded[byte] |= low;
        match decoded.get_mut(byte + 1) {
            Some(next) => *next |= high,
            None if high != 0 => return None,
            None => {}
        }
    }
    Some(decoded)
}

/// Whether a byte is a digit.
pub fn is_digit(byte: u8) -> bool {
    ALPHABET.contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_encodings_are_these() {
        // The SHA-256 of the empty string, as `nix-hash --to-base32` prints it.
        let empty = data_encoding::HEXLOWER
            .decode(b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
            .unwrap();
        let text = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
        assert_eq!(encode(&empty), text);
        assert_eq!(decode(text, 32).unwrap(), empty);
    }

    #[test]
    fn what_is_not_an_encoding_is_refused() {
        for wrong in ["000", "00000", "000e", "000Z", "z000", "00\u{e9}"] {
            assert_eq!(decode(wrong, 2), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_come_back(bytes in proptest::collection::vec(any::<u8>(), 0..70)) {
            prop_assert_eq!(decode(&encode(&bytes), bytes.len()), Some(bytes));
        }
    }
}
