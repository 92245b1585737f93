//! Directories.

use std::io;

use async_trait::async_trait;
use futures::{StreamExt as _, stream::BoxStream};

#[cfg(test)]
mod conformance;
mod memory;
mod memory_limit;
mod order;
mod redb;
mod walk;

pub(crate) use self::redb::Reachable;
pub use self::redb::RedbDirectoryService;
pub use memory::MemoryDirectoryService;
pub use memory_limit::{DirectoryMemory, DirectoryMemoryError};
pub(crate) use order::{LeavesFirst, MAX_TREE_BYTES, RootFirst, check_tree_size};
pub(crate) use walk::put_tree;

use crate::{B3Digest, Directory};
// For users of the crate: nothing in this module uses these.
pub use crate::{
    cache::CacheDirectoryService, from_addr::directory_service as from_addr, objectstore::ObjectStoreDirectoryService,
};

/// Stores directories, by their digest.
///
/// ```
/// # use cofferdam_castore::{Directory, directoryservice};
/// # use futures::TryStreamExt as _;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let directories = directoryservice::from_addr("memory://")?;
/// let leaf = Directory::new();
/// let root = Directory::try_from_iter([("empty".try_into()?, leaf.to_node())])?;
///
/// let mut putter = directories.put_multiple_start();
/// putter.put(leaf.clone()).await?;
/// putter.put(root.clone()).await?;
/// let digest = putter.close().await?;
///
/// let tree: Vec<_> = directories.get_recursive(&digest).try_collect().await?;
/// assert_eq!(tree, [root, leaf]);
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait DirectoryService: Send + Sync {
    /// The directory, checked against its digest; `None` when there is no such directory.
    async fn get(&self, digest: &B3Digest) -> io::Result<Option<Directory>>;

    /// Adds one directory, durably.
    ///
    /// # Errors
    ///
    /// `NotFound` when the service stores whole trees only, and lacks one of the children. Other services do not need them.
    async fn put(&self, directory: Directory) -> io::Result<B3Digest>;

    /// The root and all directories below it, parents before children, each once. Empty when there is no such root.
    ///
    /// # Errors
    ///
    /// `NotFound` when a directory below the root is missing.
    fn get_recursive(&self, root: &B3Digest) -> BoxStream<'_, io::Result<Directory>>;

    /// As [`get_recursive`](Self::get_recursive), within this memory: each directory is counted, before it is decoded if the
    /// service gets it encoded.
    ///
    /// # Errors
    ///
    /// `QuotaExceeded` with a [`DirectoryMemoryError`] at the first directory that doesn't fit.
    fn get_recursive_within(&self, root: &B3Digest, memory: &DirectoryMemory) -> BoxStream<'_, io::Result<Directory>> {
        let memory = memory.clone();
        let counted = move |directory: Directory| {
            memory.take_counted(directory.encode().len(), directory.len())?;
            Ok(directory)
        };
        self.get_recursive(root).map(move |directory| directory.and_then(&counted)).boxed()
    }

    /// Has garbage collection keep a tree as long as if it had been put now, by its root. Does nothing if there is no such tree,
    /// and in a service without garbage collection.
    async fn renew(&self, _root: &B3Digest) -> io::Result<()> {
        Ok(())
    }

    /// Starts adding a whole tree, leaves first.
    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_>;
}

/// Adds a tree of directories, leaves first and the root last. Dropping it before [`DirectoryPutter::close`] may leave some
/// of them in the service.
#[async_trait]
pub trait DirectoryPutter: Send {
    /// Adds a directory.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when one of its children was not put before, or has another size.
    async fn put(&mut self, directory: Directory) -> io::Result<()>;

    /// Makes the tree durable, and returns the digest of its root, the last directory that was put.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when nothing was put, a directory is not below the root, or the putter is closed already.
    async fn close(&mut self) -> io::Result<B3Digest>;
}

/// Encoded bytes after which no more directories of a batch are decoded: decoded, they take many times the memory.
const BATCH_BYTES: usize = 1024 * 1024;

/// Decodes directories in order. Stops after [`BATCH_BYTES`] and at one that `get` finds too large, but never before the first.
fn decode_batch(
    digests: &[B3Digest],
    mut get: impl FnMut(&B3Digest) -> io::Result<Option<Vec<u8>>>,
) -> io::Result<Vec<Option<Directory>>> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    for digest in digests {
        if bytes >= BATCH_BYTES {
            break;
        }
        let encoded = match get(digest) {
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded && !found.is_empty() => break,
            encoded => encoded?,
        };
        bytes += encoded.as_ref().map_or(0, Vec::len);
        found.push(encoded.map(|encoded| decode_verified(digest, &encoded)).transpose()?);
    }
    Ok(found)
}

/// Decodes a directory after checking its digest.
pub(crate) fn decode_verified(digest: &B3Digest, encoded: &[u8]) -> io::Result<Directory> {
    let actual = B3Digest::of(encoded);
    if actual != *digest {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the store is damaged: its directory {digest} has the digest {actual}"),
        ));
    }
    Directory::decode(encoded).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
