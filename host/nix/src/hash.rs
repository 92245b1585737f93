use std::fmt;

use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{base32, quoted};

/// A hash function of Nix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Algorithm {
    /// MD5, which is broken.
    Md5,
    /// SHA-1, which is broken.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 4] = [Self::Md5, Self::Sha1, Self::Sha256, Self::Sha512];

    /// Its name in Nix's formats.
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Bytes of a hash.
    pub const fn length(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    /// The function of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// A hash, and its function.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hash {
    algorithm: Algorithm,
    bytes: Vec<u8>,
}

/// Why a text is no hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be a hash of {} in base 16, 32 or 64, not {}", algorithm.name(), quoted(text.as_bytes()))]
pub struct HashError {
    /// The function.
    pub algorithm: Algorithm,
    /// The text.
    pub text: String,
}

impl Hash {
    /// A hash of SHA-256.
    pub fn sha256(bytes: [u8; 32]) -> Self {
        Self { algorithm: Algorithm::Sha256, bytes: bytes.into() }
    }

    /// A hash of this function; `None` if it has another length.
    pub fn new(algorithm: Algorithm, bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() == algorithm.length()).then_some(Self { algorithm, bytes })
    }

    /// Computes the SHA-256 of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::sha256(Sha256::digest(bytes).into())
    }

    /// Reads a hash of this function in base 16, 32 or 64.
    ///
    /// # Errors
    ///
    /// It is no such text.
    pub fn parse(algorithm: Algorithm, text: &str) -> Result<Self, HashError> {
        let bytes = algorithm.length();
        let decoded = match text.len() {
            length if length == 2 * bytes => HEXLOWER.decode(text.as_bytes()).ok(),
            length if length == base32::encoded_length(bytes) => base32::decode(text, bytes),
            _ => BASE64.decode(text.as_bytes()).ok(),
        };
        let hash = decoded.and_then(|decoded| Self::new(algorithm, decoded));
        hash.ok_or_else(|| HashError { algorithm, text: text.to_owned() })
    }

    /// The function.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hash itself.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// In base 16, without the function's name.
    pub fn base16(&self) -> String {
        HEXLOWER.encode(&self.bytes)
    }

    /// In base 32, without the function's name.
    pub fn base32(&self) -> String {
        base32::encode(&self.bytes)
    }
}

/// As in `sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=`.
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.algorithm.name(), BASE64.encode(&self.bytes))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_read_in_each_base() {
        let hash = Hash::of(b"");
        assert_eq!(hash.to_string(), "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
        let base64 = hash.to_string()["sha256-".len()..].to_owned();
        for text in [hash.base16(), hash.base32(), base64] {
            assert_eq!(Hash::parse(Algorithm::Sha256, &text).unwrap(), hash, "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_and_quoted() {
        for wrong in ["", "e3b0", "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9ce3", "\u{fffd}"] {
            let error = Hash::parse(Algorithm::Sha256, wrong).unwrap_err().to_string();
            assert!(error.starts_with("must be a hash of sha256 in base 16, 32 or 64, not \""), "{error}");
        }
        assert!(Hash::parse(Algorithm::Sha1, &Hash::of(b"").base16()).is_err());
    }
}
