//! Secrets: files that only a build's command sees.

use std::{collections::BTreeSet, fmt, sync::Arc};

use cofferdam_castore::PathComponent;
use cofferdam_protocol as protocol;
use zeroize::Zeroizing;

use crate::request::{RequestError, RequestErrorKind};

pub(crate) use cofferdam_protocol::{MAX_SECRET_BYTES, MAX_SECRETS};

/// A secret. Its contents are never printed.
#[derive(PartialEq, Eq)]
pub(crate) struct Secret {
    /// Its file's name.
    pub name: String,
    /// What the file holds.
    pub contents: Zeroizing<Vec<u8>>,
}

/// The secrets of one build. Copies share one memory, which is overwritten when the last one is dropped.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Secrets(Arc<[Secret]>);

impl Secrets {
    /// Checks names, sizes and the number.
    ///
    /// # Errors
    ///
    /// The first rule that is broken. No error shows contents.
    pub(crate) fn new(secrets: Vec<Secret>) -> Result<Self, RequestError> {
        let wrong = |field: &str, rule: String| RequestError::new(RequestErrorKind::Invalid, field, rule);
        if secrets.len() > MAX_SECRETS {
            return Err(wrong("secrets", format!("must not be more than {MAX_SECRETS}")).got(secrets.len()));
        }
        let mut names = BTreeSet::new();
        for (index, Secret { name, contents }) in secrets.iter().enumerate() {
            let field = format!("secrets[{index}].name");
            let broken = |rule: String| Err(wrong(&field, rule).got_quoted(name.as_bytes()));
            if let Err(error) = PathComponent::try_from(name.as_str()) {
                return broken(format!("must be a file name; this one {}", error.rule));
            }
            if !names.insert(name) {
                return broken("must not be a duplicate".to_owned());
            }
            if contents.len() > MAX_SECRET_BYTES {
                let rule = format!("must not be longer than {MAX_SECRET_BYTES} bytes");
                let field = format!("secrets[{index}].contents");
                return Err(wrong(&field, rule).got(format_args!("{} bytes", contents.len())));
            }
        }
        Ok(Self(secrets.into()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Secret> {
        self.0.iter()
    }

    /// Their names, which are no secrets.
    pub(crate) fn names(&self) -> Vec<String> {
        self.iter().map(|secret| secret.name.clone()).collect()
    }

    /// As the guest is told.
    pub(super) fn to_protocol(&self) -> Vec<protocol::Secret> {
        let secret = |Secret { name, contents }: &Secret| protocol::Secret {
            name: name.clone(),
            contents: contents.to_vec().into(),
        };
        self.iter().map(secret).collect()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENTS: &str = "correct horse";

    fn secret(name: &str, contents: &[u8]) -> Secret {
        Secret { name: name.to_owned(), contents: contents.to_vec().into() }
    }

    #[test]
    fn broken_rules_are_named_and_contents_are_not() {
        let named = |name: &str| secret(name, CONTENTS.as_bytes());
        let many = (0..=MAX_SECRETS).map(|index| named(&index.to_string())).collect();
        let large = secret("large", &[b'x'; MAX_SECRET_BYTES + 1]);
        for (secrets, expected) in [
            (many, "secrets must not be more than 16 (got 17)"),
            (vec![named("a"), named("a")], "secrets[1].name must not be a duplicate (got \"a\")"),
            (vec![named("")], "secrets[0].name must be a file name; this one is empty (got \"\")"),
            (vec![named("a/b")], "secrets[0].name must be a file name; this one holds a slash (got \"a/b\")"),
            (vec![named("..")], "secrets[0].name must be a file name; this one is reserved (got \"..\")"),
            (vec![large], "secrets[0].contents must not be longer than 1048576 bytes (got 1048577 bytes)"),
        ] {
            assert_eq!(Secrets::new(secrets).unwrap_err().to_string(), expected);
        }
        let most = (0..MAX_SECRETS).map(|index| secret(&index.to_string(), &[0; MAX_SECRET_BYTES])).collect();
        assert_eq!(Secrets::new(most).unwrap().iter().count(), MAX_SECRETS);
    }

    #[test]
    fn nothing_prints_contents() {
        let secrets = Secrets::new(vec![secret("token", CONTENTS.as_bytes())]).unwrap();
        for printed in [format!("{secrets:?}"), format!("{:#?}", secrets.to_protocol())] {
            assert!(printed.contains("token") && !printed.contains(CONTENTS), "{printed}");
            let bytes = format!("{:?}", CONTENTS.as_bytes());
            assert!(!printed.contains(&bytes[1..bytes.len() - 1]), "{printed}");
        }
    }
}
