//! The hashes in content addresses.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use cofferdam_castore::{Node, Store, archive::read_blob, export::ExportError, nar};
use cofferdam_nix::{Algorithm, Hash, Method};
use ring::digest::{self, Context};

/// Why a node has no such hash.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContentError {
    /// The function is not supported.
    #[error("contents are not checked by {} here", .0.name())]
    Unsupported(Algorithm),
    /// Only the bytes of a file can be hashed like this.
    #[error(
        "output path '{}' should be a non-executable regular file since recursive hashing is not enabled \
         (outputHashMode=flat)",
        .0.display()
    )]
    NotAFile(PathBuf),
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
    let function = match algorithm {
        Algorithm::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        Algorithm::Sha256 => &digest::SHA256,
        Algorithm::Sha512 => &digest::SHA512,
        Algorithm::Md5 => return Err(ContentError::Unsupported(algorithm)),
    };
    let mut hasher = Hasher(Context::new(function));
    let hashed = match (method, node) {
        (Method::Recursive, _) => nar::write(store, node, name, &mut hasher, &|| false),
        (Method::Flat | Method::Text, Node::File { digest, size, executable: false }) => {
            read_blob(store, digest, *size, name, &|| false, &mut |bytes| {
                hasher.0.update(bytes);
                Ok(())
            })
        }
        _ => return Err(ContentError::NotAFile(name.to_owned())),
    };
    hashed.map_err(ContentError::Store)?;
    let hash = Hash::new(algorithm, hasher.0.finish().as_ref().to_vec());
    hash.ok_or(ContentError::Unsupported(algorithm))
}

struct Hasher(Context);

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
