use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Algorithm, Hash, StorePath, StorePathError, quoted};

/// What a content address is the hash of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Method {
    /// The bytes of a file, by `text:`. Only such paths may be a derivation's.
    Text,
    /// The bytes of a file, by `fixed:`.
    Flat,
    /// The NAR of a tree, by `fixed:r:`.
    Recursive,
}

/// A path's content address, as in `fixed:r:sha256:0mdqa9w1…`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentAddress {
    /// What is hashed.
    pub method: Method,
    /// The hash.
    pub hash: Hash,
}

impl Method {
    /// What stands before the function's name in a derivation's output.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Text => "text:",
            Self::Flat => "",
            Self::Recursive => "r:",
        }
    }

    /// Reads `text:sha256`, `fixed:sha256` or `fixed:r:sha256`: a content address without its hash.
    ///
    /// # Errors
    ///
    /// It is none of these.
    pub fn parse_address(text: &str) -> Result<(Self, Algorithm), String> {
        let parsed = match text.split_once(':') {
            Some(("text", name)) => Algorithm::named(name).map(|algorithm| (Self::Text, algorithm)),
            Some(("fixed", rest)) => Self::parse(rest).filter(|(method, _)| *method != Self::Text),
            _ => None,
        };
        parsed.ok_or_else(|| format!("must be a method such as \"fixed:r:sha256\", not {}", quoted(text.as_bytes())))
    }

    /// Reads `r:sha256` and the like.
    pub(crate) fn parse(text: &str) -> Option<(Self, Algorithm)> {
        let (method, name) = match text.split_once(':') {
            None => (Self::Flat, text),
            Some(("r", name)) => (Self::Recursive, name),
            Some(("text", name)) => (Self::Text, name),
            Some(_) => return None,
        };
        Some((method, Algorithm::named(name)?))
    }
}

impl ContentAddress {
    /// Computes the path of something with this address.
    ///
    /// # Errors
    ///
    /// The name breaks a rule, or the address can't have these references.
    pub fn path(
        &self,
        name: &str,
        references: &BTreeSet<StorePath>,
        refers_to_itself: bool,
    ) -> Result<StorePath, StorePathError> {
        let wrong = |rule| StorePathError { rule, text: name.to_owned() };
        let is_sha256 = self.hash.algorithm() == Algorithm::Sha256;
        match self.method {
            Method::Text if !is_sha256 || refers_to_itself => {
                Err(wrong("must be of SHA-256 and not refer to itself, being a text"))
            }
            Method::Text => StorePath::compute_with("text", references, false, &self.hash, name),
            Method::Recursive if is_sha256 => {
                StorePath::compute_with("source", references, refers_to_itself, &self.hash, name)
            }
            _ if !references.is_empty() || refers_to_itself => {
                Err(wrong("must refer to nothing, having such a content address"))
            }
            Method::Flat | Method::Recursive => {
                let (prefix, function) = (self.method.prefix(), self.hash.algorithm().name());
                let inner = Hash::of(format!("fixed:out:{prefix}{function}:{}:", self.hash.base16()).as_bytes());
                StorePath::compute("output:out", &inner, name)
            }
        }
    }
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.method {
            Method::Text => "text:",
            Method::Flat => "fixed:",
            Method::Recursive => "fixed:r:",
        };
        write!(f, "{kind}{}:{}", self.hash.algorithm().name(), self.hash.base32())
    }
}

impl FromStr for ContentAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = || {
            let (method, hash) = text.rsplit_once(':')?;
            let (method, algorithm) = Method::parse_address(method).ok()?;
            Some(Self { method, hash: Hash::parse(algorithm, hash).ok()? })
        };
        parts().ok_or_else(|| {
            format!("must be a content address such as \"fixed:r:sha256:HASH\", not {}", quoted(text.as_bytes()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_displayed_and_nothing_else_is_one() {
        let hash = Hash::of(b"").base32();
        for text in [format!("text:sha256:{hash}"), format!("fixed:sha256:{hash}"), format!("fixed:r:sha256:{hash}")] {
            assert_eq!(text.parse::<ContentAddress>().unwrap().to_string(), text);
        }
        for wrong in
            ["", "fixed", "fixed:sha256", &format!("fixed:text:sha256:{hash}"), &format!("text:r:sha256:{hash}")]
        {
            assert!(wrong.parse::<ContentAddress>().unwrap_err().contains("not \""), "{wrong}");
        }
    }

    #[test]
    fn paths_are_those_that_nix_computes() {
        let address = |method| ContentAddress { method, hash: Hash::of(b"hello\n") };
        let path = |method| address(method).path("f", &BTreeSet::new(), false).unwrap().base_name().to_owned();
        assert_eq!(path(Method::Flat), "1p9q0bz6f22dyxh4lw8xs08p4201vyq4-f");
        assert_eq!(path(Method::Recursive), "msi30g1fhgcrkhiq6v78vccz0p2ignny-f");
        assert_eq!(path(Method::Text), "552f5r0wi8frys43livdhkagpkyfvjrv-f");
    }
}
