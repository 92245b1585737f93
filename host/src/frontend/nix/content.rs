//! The hashes in content addresses.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use cofferdam_castore::{Node, Store, archive::read_blob, export::ExportError, nar};
use cofferdam_nix::{
    Algorithm, Hash, Method, StorePath,
    protocol::{ServeVersion, Version},
};
use md5::{Digest as _, Md5};
use ring::digest::{self, Context};

use super::rewrite::{Rewrites, Rewriting};

/// Most places in a path with its own hash part, which are remembered.
const MAX_PLACES: usize = 1_000_000;

/// Why a node has no such hash.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContentError {
    /// Only the bytes of a file can be hashed like this.
    #[error(
        "output path '{}' should be a non-executable regular file since recursive hashing is not enabled \
         (outputHashMode=flat)",
        .0.display()
    )]
    NotAFile(PathBuf),
    /// It has too many places with its own hash part.
    #[error("it must refer to itself at most {MAX_PLACES} times")]
    TooManyPlaces,
    /// The store failed.
    #[error(transparent)]
    Store(ExportError),
}

/// The hash of a node. Errors call it `name`.
///
/// # Errors
///
/// See [`ContentError`].
pub(super) fn hash(
    store: &Store,
    name: &Path,
    method: Method,
    algorithm: Algorithm,
    node: &Node,
) -> Result<Hash, ContentError> {
    let mut hasher = Hasher::new(algorithm);
    let hashed = match (method, node) {
        (Method::Recursive, _) => nar::write(store, node, name, &mut hasher, &|| false),
        (Method::Flat | Method::Text, Node::File { digest, size, executable: false }) => {
            read_blob(store, digest, *size, name, &|| false, &mut |bytes| {
                hasher.update(bytes);
                Ok(())
            })
        }
        _ => return Err(ContentError::NotAFile(name.to_owned())),
    };
    hashed.map_err(ContentError::Store)?;
    Ok(hasher.finish())
}

/// The hashes of the NAR of a path that refers to itself, with zeros for its own hash part: alone, as Nix from 2.17 to 2.34 has
/// it, and followed by the places of these zeros, as other versions do.
///
/// # Errors
///
/// See [`ContentError`].
pub(super) fn hash_of_itself(store: &Store, path: &StorePath, node: &Node) -> Result<[Hash; 2], ContentError> {
    let zeros = Rewrites::new([(path, [0; 32])]);
    let mut places = Vec::new();
    let mut is_full = false;
    let mut masked = Rewriting::new(&zeros, Hasher::new(Algorithm::Sha256), |place| {
        is_full = places.len() == MAX_PLACES;
        places.push(place);
        if is_full { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
    });
    let written = nar::write(store, node, Path::new(path.base_name()), &mut masked, &|| false);
    let hasher = masked.finish();
    if is_full {
        return Err(ContentError::TooManyPlaces);
    }
    written.map_err(ContentError::Store)?;
    let failed = |source| ExportError::Write { path: path.base_name().into(), action: "hash it", source };
    let hasher = hasher.map_err(failed).map_err(ContentError::Store)?;
    let mut with_places = hasher.clone();
    for place in places {
        with_places.update(format!("|{place}").as_bytes());
    }
    Ok([hasher, with_places].map(Hasher::finish))
}

/// Which of these hashes a client computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SelfHash {
    /// The one of the NAR alone.
    Alone,
    /// The one with the places.
    WithPlaces,
}

impl SelfHash {
    /// As Nix computes it that speaks this version of the worker protocol. Nix before 2.17 and from 2.35 on hashes the places, too,
    /// but 2.15, 2.16 and 2.35 speak versions that others speak as well.
    pub(super) fn of(version: Version) -> Self {
        if version < Version::minor(35) { Self::WithPlaces } else { Self::Alone }
    }

    /// As Nix computes it that speaks this version of the serve protocol.
    pub(super) fn of_served(version: ServeVersion) -> Self {
        if version < ServeVersion::minor(7) { Self::WithPlaces } else { Self::Alone }
    }

    /// Chooses.
    pub(super) fn of_both(self, [alone, with_places]: [Hash; 2]) -> Hash {
        match self {
            Self::Alone => alone,
            Self::WithPlaces => with_places,
        }
    }
}

#[derive(Clone)]
enum Hasher {
    /// The function, which ring doesn't have.
    Md5(Md5),
    Other(Algorithm, Context),
}

impl Hasher {
    fn new(algorithm: Algorithm) -> Self {
        let function = match algorithm {
            Algorithm::Md5 => return Self::Md5(Md5::new()),
            Algorithm::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Algorithm::Sha256 => &digest::SHA256,
            Algorithm::Sha512 => &digest::SHA512,
        };
        Self::Other(algorithm, Context::new(function))
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Md5(hasher) => hasher.update(bytes),
            Self::Other(_, hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> Hash {
        let (algorithm, bytes) = match self {
            Self::Md5(hasher) => (Algorithm::Md5, hasher.finalize().to_vec()),
            Self::Other(algorithm, hasher) => (algorithm, hasher.finish().as_ref().to_vec()),
        };
        Hash::new(algorithm, bytes).expect("the function makes hashes of its length")
    }
}

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_function_of_nix_is_there() {
        for (algorithm, expected) in [
            (Algorithm::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (Algorithm::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (Algorithm::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ] {
            let mut hasher = Hasher::new(algorithm);
            hasher.write_all(b"abc").unwrap();
            assert_eq!(hasher.finish().base16(), expected);
        }
    }
}
