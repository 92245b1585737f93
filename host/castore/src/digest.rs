use std::{fmt, str::FromStr};

use bytes::Bytes;
use data_encoding::{BASE64, BASE64_NOPAD, HEXLOWER};

const PREFIX: &str = "blake3-";

/// A BLAKE3 digest. Its text form is `blake3-` and padded base64 with the standard alphabet.
///
/// ```
/// # use cofferdam_castore::B3Digest;
/// let digest = B3Digest::of(b"hello");
/// let text = digest.to_string();
/// assert_eq!(text, "blake3-6o8WPbOGgpJeRJHF5Y1Ls1Bu+MFOt4qG6QjFYkpnIA8=");
/// assert_eq!(text.parse(), Ok(digest));
/// assert!("blake3-6o8W".parse::<B3Digest>().is_err());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct B3Digest([u8; B3Digest::LENGTH]);

/// The error for something that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Raw bytes of the wrong length.
    #[error("a digest has 32 bytes, not {0}")]
    Length(usize),
    /// Text in the wrong form.
    #[error("{text:?} is not a digest: write \"blake3-\" and 32 bytes in base64 (44 characters, the last one \"=\")")]
    Text {
        /// The text.
        text: String,
    },
}

impl B3Digest {
    /// Bytes in a digest.
    pub const LENGTH: usize = 32;

    /// The digest of no bytes: of the empty blob and, since its encoding is empty, of the empty directory.
    pub const EMPTY: Self = Self([
        0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6, 0xa0, 0x40, 0x4d, 0xea, 0x36, 0xdc, 0xc9, 0x49, 0x9b, 0xcb,
        0x25, 0xc9, 0xad, 0xc1, 0x12, 0xb7, 0xcc, 0x9a, 0x93, 0xca, 0xe4, 0x1f, 0x32, 0x62,
    ]);

    /// The digest of these contents.
    pub fn of(contents: &[u8]) -> Self {
        blake3::hash(contents).into()
    }

    /// The raw bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// The raw bytes.
    pub const fn as_bytes(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }

    /// Parses the output of [`to_hex`](Self::to_hex).
    pub(crate) fn from_hex(hex: &[u8]) -> Option<Self> {
        HEXLOWER.decode(hex).ok()?.as_slice().try_into().ok()
    }

    /// Lower-case hexadecimal, as in file names.
    pub fn to_hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }
}

impl fmt::Display for B3Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64.encode_display(&self.0))
    }
}

impl fmt::Debug for B3Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for B3Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        // With padding, the decoder would also accept `=` within the text, as in several joined texts.
        text.strip_prefix(PREFIX)
            .and_then(|base64| base64.strip_suffix('='))
            .and_then(|base64| BASE64_NOPAD.decode(base64.as_bytes()).ok())
            .and_then(|bytes| bytes.as_slice().try_into().ok())
            .ok_or_else(|| DigestError::Text { text: crate::escape(text.as_bytes()) })
    }
}

impl From<[u8; B3Digest::LENGTH]> for B3Digest {
    fn from(bytes: [u8; B3Digest::LENGTH]) -> Self {
        Self(bytes)
    }
}

impl From<blake3::Hash> for B3Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(hash.into())
    }
}

impl From<B3Digest> for Bytes {
    fn from(digest: B3Digest) -> Self {
        Self::copy_from_slice(&digest.0)
    }
}

impl TryFrom<&[u8]> for B3Digest {
    type Error = DigestError;

    fn try_from(bytes: &[u8]) -> Result<Self, DigestError> {
        bytes.try_into().map(Self).map_err(|_| DigestError::Length(bytes.len()))
    }
}

impl AsRef<[u8]> for B3Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_is_blake3_and_padded_base64() {
        let digest = B3Digest::of(b"");
        assert_eq!(digest.to_string(), "blake3-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest, B3Digest::EMPTY);
        assert_eq!(digest.to_hex(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "",
            "blake3-",
            "rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=",
            "blake3-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI",
            "blake3-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmJ=",
            "blake3-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQ=MmIT",
            "blake3-rxM=ufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=",
            "sha256-rxNJufX5oaagQE3qNtzJSZvLJcmtwRK3zJqTyuQfMmI=",
        ] {
            assert!(matches!(text.parse::<B3Digest>(), Err(DigestError::Text { .. })), "{text}");
        }
    }

    #[test]
    fn raw_bytes_of_another_size_are_refused() {
        assert_eq!(B3Digest::try_from([0; 31].as_slice()), Err(DigestError::Length(31)));
        assert_eq!(B3Digest::try_from([0; 32].as_slice()), Ok(B3Digest::from([0; 32])));
    }
}
