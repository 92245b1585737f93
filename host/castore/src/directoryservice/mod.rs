//! Directories.

use std::io;

use async_trait::async_trait;
use futures::stream::BoxStream;

#[cfg(test)]
mod conformance;
mod memory;
mod order;
mod redb;
mod walk;

pub(crate) use self::redb::Reachable;
pub use self::redb::RedbDirectoryService;
pub use memory::MemoryDirectoryService;
pub(crate) use order::{LeavesFirst, MAX_TREE_BYTES, RootFirst, check_tree_size};
pub(crate) use walk::put_tree;

use crate::{B3Digest, Directory};
// For users of the crate: nothing in this module uses these.
pub use crate::{
    cache::CacheDirectoryService, from_addr::directory_service as from_addr, objectstore::ObjectStoreDirectoryService,
};

/// Holds directories, named by their digest.
#[async_trait]
pub trait DirectoryService: Send + Sync {
    /// The directory, checked against its digest; `None` when there is no such directory.
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>>;

    /// Adds one directory, durably. Its children need not be there, unless the service keeps whole trees only: then it
    /// is a `NotFound` error when one of them isn't.
    async fn put(&self, directory: Directory) -> io::Result<B3Digest>;

    /// Everything below the root and the root itself: parents before children, each directory once.
    ///
    /// Empty when there is no such root; a `NotFound` error when a directory below it is missing.
    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>>;

    /// Starts adding a whole tree, leaves first.
    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_>;
}

/// Adds a tree of directories, leaves first and the root last. Dropped before [`DirectoryPutter::close`], it may or may
/// not have added some of them.
#[async_trait]
pub trait DirectoryPutter: Send {
    /// Adds a directory.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when one of its children has not been put before, or has another size.
    async fn put(&mut self, directory: Directory) -> io::Result<()>;

    /// Makes everything put so remote durable and returns the root, which is the last directory put.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when nothing was put, or when a directory is not below the root, or after a close.
    async fn close(&mut self) -> io::Result<B3Digest>;
}

/// Bytes of encoded directories after which no more of a batch are decoded, which takes many times as much.
const BATCH_BYTES: usize = 1024 * 1024;

/// Decodes directories in the order asked; what comes after [`BATCH_BYTES`] of them is left out, but never the first.
fn decode_batch(
    digests: &[B3Digest],
    mut get: impl FnMut(&B3Digest) -> io::Result<Option<Vec<u8>>>,
) -> io::Result<Vec<Option<Directory>>> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    for digest in digests {
        if bytes >= BATCH_BYTES {
            break;
        }
        let encoded = get(digest)?;
        bytes += encoded.as_ref().map_or(0, Vec::len);
        found.push(encoded.map(|encoded| decode_verified(digest, &encoded)).transpose()?);
    }
    Ok(found)
}

/// Verifies and decodes what a store has under a digest.
pub(crate) fn decode_verified(digest: &B3Digest, encoded: &[u8]) -> io::Result<Directory> {
    let actual = B3Digest::of(encoded);
    if actual != *digest {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the store's directory {digest} has the digest {actual}: the store is damaged"),
        ));
    }
    Directory::decode(encoded).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
