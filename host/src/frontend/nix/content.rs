//! The hashes in content addresses.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use cofferdam_castore::{Node, Store, archive::read_blob, export::ExportError, nar};
use cofferdam_nix::{Algorithm, Hash, Method, StorePath};
use md5::{Digest as _, Md5};
use ring::digest::{self, Context};

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

/// The hashes of the NAR of a path that refers to itself, with zeros for its own hash part: alone, as newer versions of Nix have
/// it, and followed by the places of these zeros, as older ones do.
///
/// # Errors
///
/// See [`ContentError`].
pub(super) fn hash_of_itself(store: &Store, path: &StorePath, node: &Node) -> Result<[Hash; 2], ContentError> {
    let part = path.hash_part().as_bytes();
    let mut hasher =
        Masked { hasher: Context::new(&digest::SHA256), part, held: Vec::new(), at: 0, places: Vec::new() };
    let written = nar::write(store, node, Path::new(path.base_name()), &mut hasher, &|| false);
    if hasher.places.len() > MAX_PLACES {
        return Err(ContentError::TooManyPlaces);
    }
    written.map_err(ContentError::Store)?;
    Ok(hasher.finish())
}

/// Hashes bytes with zeros instead of a hash part.
struct Masked<'a> {
    hasher: Context,
    part: &'a [u8],
    /// The last bytes, which may begin the hash part.
    held: Vec<u8>,
    /// The place of the first of them.
    at: u64,
    /// Where the hash part was.
    places: Vec<u64>,
}

impl Masked<'_> {
    /// The hash without the places, and the one with them.
    fn finish(mut self) -> [Hash; 2] {
        self.hasher.update(&self.held);
        let mut with_places = self.hasher.clone();
        for place in self.places {
            with_places.update(format!("|{place}").as_bytes());
        }
        [self.hasher, with_places].map(|hasher| {
            let mut bytes = [0; 32];
            bytes.copy_from_slice(hasher.finish().as_ref());
            Hash::sha256(bytes)
        })
    }
}

impl Write for Masked<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(found) = self.held[from..].windows(self.part.len()).position(|window| window == self.part) {
            let begin = from + found;
            from = begin + self.part.len();
            self.held[begin..from].fill(0);
            self.places.push(self.at + begin as u64);
            if self.places.len() > MAX_PLACES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        let done = self.held.len().saturating_sub(self.part.len() - 1);
        self.hasher.update(&self.held[..done]);
        self.held.drain(..done);
        self.at += done as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

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
    fn a_hash_part_is_masked_wherever_it_is_cut() {
        let part = b"ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48";
        let bytes = [b"a", &part[..], &part[..], b"b", &part[..31]].concat();
        let masked = [b"a", &[0; 64][..], b"b", &part[..31]].concat();
        let with_places = [&*masked, b"|1|33"].concat();
        for length in 1..=bytes.len() {
            let hasher = Context::new(&digest::SHA256);
            let mut hasher = Masked { hasher, part, held: Vec::new(), at: 0, places: Vec::new() };
            bytes.chunks(length).for_each(|chunk| hasher.write_all(chunk).unwrap());
            assert_eq!(hasher.finish(), [Hash::of(&masked), Hash::of(&with_places)], "{length}");
        }
    }

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
