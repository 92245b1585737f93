use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{Hash, base32, quoted};

/// The directory of every store path.
pub const STORE_DIR: &str = "/nix/store";

/// Bytes of a store path's digest.
const DIGEST_BYTES: usize = 20;

/// Characters of it.
const HASH_PART: usize = base32::encoded_length(DIGEST_BYTES);

/// Most characters of the name after it.
const MAX_NAME: usize = 211;

/// A path directly below [`STORE_DIR`], as in `ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-name`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StorePath(String);

/// Why a text is no store path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rule}, not {}", quoted(text.as_bytes()))]
pub struct StorePathError {
    /// The rule, as in "must be …".
    pub rule: &'static str,
    /// The text.
    pub text: String,
}

impl StorePath {
    /// Reads a base name: 32 digits, a dash and a name.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub fn from_base_name(text: &str) -> Result<Self, StorePathError> {
        let wrong = |rule| StorePathError { rule, text: text.to_owned() };
        let bytes = text.as_bytes();
        if bytes.len() <= HASH_PART || !bytes[..HASH_PART].iter().copied().all(base32::is_digit) {
            return Err(wrong("must begin with 32 digits of Nix's base 32"));
        }
        if bytes[HASH_PART] != b'-' {
            return Err(wrong("must have a dash after its 32 digits"));
        }
        check_name(&text[HASH_PART + 1..]).map_err(wrong)?;
        Ok(Self(text.to_owned()))
    }

    /// Reads a whole path.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub fn parse(path: &str) -> Result<Self, StorePathError> {
        let base = path.strip_prefix(STORE_DIR).and_then(|rest| rest.strip_prefix('/'));
        let base = base.ok_or_else(|| StorePathError { rule: "must lie in /nix/store", text: path.to_owned() })?;
        Self::from_base_name(base)
    }

    /// The path with this digest of a fingerprint.
    fn new(digest: &[u8; DIGEST_BYTES], name: &str) -> Result<Self, StorePathError> {
        check_name(name).map_err(|rule| StorePathError { rule, text: name.to_owned() })?;
        Ok(Self(format!("{}-{name}", base32::encode(digest))))
    }

    /// Computes the path for a kind, as in `output:out`, and a hash.
    ///
    /// # Errors
    ///
    /// The name breaks a rule.
    pub fn compute(kind: &str, hash: &Hash, name: &str) -> Result<Self, StorePathError> {
        let fingerprint = format!(
            "{kind}:{}:{}:{STORE_DIR}:{name}",
            hash.algorithm().name(),
            data_encoding::HEXLOWER.encode(hash.as_bytes())
        );
        let mut digest = [0; DIGEST_BYTES];
        for (at, byte) in Sha256::digest(fingerprint).into_iter().enumerate() {
            digest[at % DIGEST_BYTES] ^= byte;
        }
        Self::new(&digest, name)
    }

    /// Computes a path whose fingerprint has references in it, and the path itself if it refers to itself.
    ///
    /// # Errors
    ///
    /// The name breaks a rule.
    pub(crate) fn compute_with(
        kind: &str,
        references: &BTreeSet<Self>,
        refers_to_itself: bool,
        hash: &Hash,
        name: &str,
    ) -> Result<Self, StorePathError> {
        let mut whole = kind.to_owned();
        for reference in references {
            whole = format!("{whole}:{reference}");
        }
        if refers_to_itself {
            whole.push_str(":self");
        }
        Self::compute(&whole, hash, name)
    }

    /// The name below [`STORE_DIR`].
    pub fn base_name(&self) -> &str {
        &self.0
    }

    /// Its 32 digits, which occur in everything that refers to it.
    pub fn hash_part(&self) -> &str {
        &self.0[..HASH_PART]
    }

    /// What follows the dash.
    pub fn name(&self) -> &str {
        &self.0[HASH_PART + 1..]
    }

    /// Whether it is a derivation's.
    pub fn is_derivation(&self) -> bool {
        self.0.ends_with(".drv")
    }
}

/// The whole path.
impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{STORE_DIR}/{}", self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The rules of the part after the dash.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("must have a name after its dash");
    }
    if name.len() > MAX_NAME {
        return Err("must have a name of at most 211 characters");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte)) {
        return Err("must have a name of letters, digits and the characters + - . _ ? =");
    }
    // Components like `.` and `..` must not appear, alone or before a dash.
    let first = name.split('-').next().unwrap_or_default();
    if first == "." || first == ".." {
        return Err("must have a name that does not begin with . or .. alone");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second";

    #[test]
    fn a_path_has_its_parts() {
        let path = StorePath::parse(&format!("/nix/store/{BASE}")).unwrap();
        assert_eq!(path.hash_part(), "ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48");
        assert_eq!((path.name(), path.base_name()), ("second", BASE));
        assert_eq!(path.to_string(), format!("/nix/store/{BASE}"));
    }

    #[test]
    fn other_texts_are_refused_with_the_rule() {
        let long = format!("/nix/store/{}-{}", &BASE[..32], "a".repeat(212));
        for (wrong, rule) in [
            ("", "must lie in /nix/store"),
            ("/nix/store", "must lie in /nix/store"),
            ("/nix/storeifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second", "must lie in /nix/store"),
            ("/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay4-second", "32 digits"),
            ("/nix/store/efd3pw9mq9a6wpq6c1jc7lgkdcdlay48-second", "32 digits"),
            ("/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48second", "a dash"),
            ("/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-", "a name after"),
            ("/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-a/b", "letters, digits"),
            ("/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-a\0b", "letters, digits"),
            ("/nix/store/ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48-..", "begin with . or .."),
            (&long, "at most 211"),
        ] {
            let error = StorePath::parse(wrong).unwrap_err();
            assert!(error.rule.contains(rule), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_derivation_has_the_path_that_nix_gives_it() {
        let text = "Derive([(\"out\",\"/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first\",\"\",\"\")],[],[],\"x86_64-linux\",\
            \"/bin/sh\",[\"-c\",\"echo hi > $out\"],[(\"builder\",\"/bin/sh\"),(\"name\",\"first\"),(\"out\",\
            \"/nix/store/rwfshijbhhchwxcmqy4ijrqa7jccs8qz-first\"),(\"system\",\"x86_64-linux\")])";
        let path = StorePath::compute_with("text", &BTreeSet::new(), false, &Hash::of(text.as_bytes()), "first.drv");
        assert_eq!(path.unwrap().base_name(), "0sbm8kqi5zyp3iyc6allh3lj0rygk0fw-first.drv");
    }
}
