use crate::{Algorithm, ContentAddress, Hash, Method, StorePath, quoted};

/// One output of a derivation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Its path follows from the derivation.
    InputAddressed(StorePath),
    /// Its contents are known beforehand.
    Fixed {
        /// Its path, which follows from the address.
        path: StorePath,
        /// What its contents must have.
        address: ContentAddress,
    },
    /// Its path follows from its contents.
    Floating {
        /// What will be hashed.
        method: Method,
        /// How.
        algorithm: Algorithm,
    },
    /// Its path follows from the derivation, once the contents of its inputs are known.
    Deferred,
}

impl Output {
    /// Reads the three texts that stand for an output.
    pub(super) fn parse(path: &str, algorithm: &str, hash: &str) -> Result<Self, String> {
        let parsed = || StorePath::parse(path).map_err(|error| format!("has a path that {error}"));
        if algorithm.is_empty() {
            return match (path, hash) {
                ("", "") => Ok(Self::Deferred),
                (_, "") => parsed().map(Self::InputAddressed),
                (..) => Err(format!("must not have the hash {} without a function", quoted(hash.as_bytes()))),
            };
        }
        let Some((method, algorithm)) = Method::parse(algorithm) else {
            let algorithm = quoted(algorithm.as_bytes());
            return Err(format!("must have a hash function such as \"sha256\" or \"r:sha256\", not {algorithm}"));
        };
        match (path, hash) {
            ("", "") => Ok(Self::Floating { method, algorithm }),
            (_, "impure") => Err("must not be impure".to_owned()),
            _ => {
                let hash = Hash::parse(algorithm, hash).map_err(|error| format!("has a hash that {error}"))?;
                Ok(Self::Fixed { path: parsed()?, address: ContentAddress { method, hash } })
            }
        }
    }

    /// The three texts that stand for it: path, hash function and hash.
    pub(super) fn texts(&self) -> [String; 3] {
        let none = String::new;
        let function = |method: Method, algorithm: Algorithm| format!("{}{}", method.prefix(), algorithm.name());
        match self {
            Self::InputAddressed(path) => [path.to_string(), none(), none()],
            Self::Fixed { path, address: ContentAddress { method, hash } } => {
                [path.to_string(), function(*method, hash.algorithm()), hash.base16()]
            }
            Self::Floating { method, algorithm } => [none(), function(*method, *algorithm), none()],
            Self::Deferred => [none(), none(), none()],
        }
    }

    /// Its path, if that is known.
    pub fn path(&self) -> Option<&StorePath> {
        match self {
            Self::InputAddressed(path) | Self::Fixed { path, .. } => Some(path),
            Self::Floating { .. } | Self::Deferred => None,
        }
    }
}
