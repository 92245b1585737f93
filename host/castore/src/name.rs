use std::fmt;

use bytes::Bytes;

use crate::escape;

/// The name of an entry in a directory: any bytes, at most 255 (`NAME_MAX`), except `/` and NUL. It is not empty, `.` or
/// `..`. Names are sorted bytewise, and displayed with escapes.
///
/// ```
/// # use cofferdam_castore::PathComponent;
/// let name = PathComponent::try_from("gr\u{fc}n").unwrap();
/// assert_eq!(name.to_string(), "gr\\xc3\\xbcn");
/// assert!(PathComponent::try_from("../etc").is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathComponent(Bytes);

/// The rule that a name breaks, as an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the name \"{name}\" {rule}")]
pub struct NameError {
    /// The name with escapes, its first 64 bytes.
    pub name: String,
    /// The rule, as in "holds a slash".
    pub rule: &'static str,
}

impl PathComponent {
    /// The maximum length of a name in bytes.
    pub const MAX_BYTES: usize = 255;

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn check_name(name: &[u8]) -> Result<(), NameError> {
    let rule = match name {
        b"" => "is empty",
        b"." | b".." => "is reserved",
        _ if name.len() > PathComponent::MAX_BYTES => "is longer than 255 bytes",
        _ if name.contains(&b'/') => "holds a slash",
        _ if name.contains(&0) => "holds a NUL",
        _ => return Ok(()),
    };
    Err(NameError { name: escape(name), rule })
}

/// The target of a symbolic link: any bytes except NUL, from 1 to 4095 of them (`PATH_MAX` less its NUL).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SymlinkTarget(Bytes);

/// The rule that the target of a symbolic link breaks, as an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the target \"{target}\" {rule}")]
pub struct TargetError {
    /// The target with escapes, its first 64 bytes.
    pub target: String,
    /// The rule, as in "holds a NUL".
    pub rule: &'static str,
}

impl SymlinkTarget {
    /// The maximum length of a target in bytes.
    pub const MAX_BYTES: usize = 4095;

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn check_target(target: &[u8]) -> Result<(), TargetError> {
    let rule = match target {
        b"" => "is empty",
        _ if target.len() > SymlinkTarget::MAX_BYTES => "is longer than 4095 bytes",
        _ if target.contains(&0) => "holds a NUL",
        _ => return Ok(()),
    };
    Err(TargetError { target: escape(target), rule })
}

macro_rules! checked_bytes {
    ($type:ident, $error:ident, $check:ident) => {
        impl TryFrom<Bytes> for $type {
            type Error = $error;

            fn try_from(bytes: Bytes) -> Result<Self, $error> {
                $check(&bytes)?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<Vec<u8>> for $type {
            type Error = $error;

            fn try_from(bytes: Vec<u8>) -> Result<Self, $error> {
                Self::try_from(Bytes::from(bytes))
            }
        }

        impl TryFrom<&[u8]> for $type {
            type Error = $error;

            fn try_from(bytes: &[u8]) -> Result<Self, $error> {
                $check(bytes)?;
                Ok(Self(Bytes::copy_from_slice(bytes)))
            }
        }

        impl TryFrom<&str> for $type {
            type Error = $error;

            fn try_from(text: &str) -> Result<Self, $error> {
                Self::try_from(text.as_bytes())
            }
        }

        impl From<$type> for Bytes {
            fn from(value: $type) -> Self {
                value.0
            }
        }

        impl AsRef<[u8]> for $type {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl std::borrow::Borrow<[u8]> for $type {
            fn borrow(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.escape_ascii().fmt(f)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "\"{self}\"")
            }
        }
    };
}

checked_bytes!(PathComponent, NameError, check_name);
checked_bytes!(SymlinkTarget, TargetError, check_target);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_breaks_a_rule_is_refused_with_the_rule() {
        let long = [b'a'; PathComponent::MAX_BYTES + 1];
        for (name, rule) in [
            (b"".as_slice(), "is empty"),
            (b".", "is reserved"),
            (b"..", "is reserved"),
            (b"a/b", "holds a slash"),
            (b"a\0b", "holds a NUL"),
            (&long, "is longer than 255 bytes"),
        ] {
            assert_eq!(PathComponent::try_from(name).unwrap_err().rule, rule);
            assert_eq!(PathComponent::try_from(name.to_vec()).unwrap_err().rule, rule);
        }
    }

    #[test]
    fn every_other_name_is_taken() {
        for name in [b"...".as_slice(), b"\xff\xfe", b" ", b"a\nb", &[b'a'; PathComponent::MAX_BYTES]] {
            assert_eq!(PathComponent::try_from(name).unwrap().as_bytes(), name);
        }
        assert_eq!(PathComponent::try_from(b"\xff\n".as_slice()).unwrap().to_string(), "\\xff\\n");
    }

    #[test]
    fn targets_are_held_to_their_rules() {
        let long = [b'a'; SymlinkTarget::MAX_BYTES + 1];
        for (target, rule) in
            [(b"".as_slice(), "is empty"), (b"a\0b", "holds a NUL"), (&long, "is longer than 4095 bytes")]
        {
            assert_eq!(SymlinkTarget::try_from(target).unwrap_err().rule, rule);
        }
        assert!(SymlinkTarget::try_from("../../\u{fc}/.").is_ok());
    }
}
