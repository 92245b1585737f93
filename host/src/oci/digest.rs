//! SHA-256, by which images name their blobs.

use std::{
    fmt,
    io::{self, Read},
    str::FromStr,
};

use data_encoding::HEXLOWER;
use serde::{Deserialize, Deserializer, de::Error as _};
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "sha256:";

/// Bytes that are read at a time where only the digest counts.
const PIECE_BYTES: usize = 256 * 1024;

/// The SHA-256 of a blob, as text `sha256:HEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digits alone.
    pub(crate) fn hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }

    /// The digest with these digits.
    pub(crate) fn from_hex(hex: &str) -> Option<Self> {
        HEXLOWER.decode(hex.as_bytes()).ok()?.try_into().ok().map(Self)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digest = text.strip_prefix(PREFIX).and_then(Self::from_hex);
        digest.ok_or_else(|| {
            let shown: String = text.chars().take(80).collect();
            format!("the digest {shown:?} must be \"sha256:\" and 64 hexadecimal digits in lower case")
        })
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// Hashes what is read through it.
pub(super) struct Hashed<R> {
    inner: R,
    hasher: Sha256,
    /// Why it could not be read on.
    broken: Option<io::Error>,
}

impl<R: Read> Hashed<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new(), broken: None }
    }

    /// The digest of everything, for which the rest is read, unless it is to stop: then there is none.
    pub(super) fn digest(mut self, is_to_stop: impl Fn() -> bool) -> io::Result<Option<Digest>> {
        let mut piece = vec![0; PIECE_BYTES];
        while self.broken.is_none() {
            if is_to_stop() {
                return Ok(None);
            }
            if self.read(&mut piece).is_ok_and(|read| read == 0) {
                return Ok(Some(Digest(self.hasher.finalize().into())));
            }
        }
        Err(self.broken.unwrap_or_else(|| io::ErrorKind::Other.into()))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer).inspect_err(|error| {
            self.broken = Some(match error.raw_os_error() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new(error.kind(), error.to_string()),
            });
        })?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sha256_in_lower_case_is_a_digest() {
        let digest = Digest::of(b"");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
        let upper = text.to_uppercase();
        for wrong in
            ["", "sha256:", "sha512:00", &text[7..], &text[..70], &format!("{text}0"), &upper, "sha256:../../x"]
        {
            assert!(wrong.parse::<Digest>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_rest_counts_for_the_digest() {
        let mut hashed = Hashed::new(&b"contents"[..]);
        hashed.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(hashed.digest(|| false).unwrap(), Some(Digest::of(b"contents")));
        assert_eq!(Hashed::new(io::repeat(0)).digest(|| true).unwrap(), None);
    }

    #[test]
    fn what_broke_off_once_has_no_digest() {
        struct Broken(bool);
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                if std::mem::replace(&mut self.0, false) { Err(io::Error::other("broken")) } else { Ok(0) }
            }
        }
        let mut hashed = Hashed::new(Broken(true));
        hashed.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(hashed.digest(|| false).unwrap_err().to_string(), "broken");
    }
}
