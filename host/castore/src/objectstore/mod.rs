//! Blobs and directories as objects, in the layout of snix, so that both programs can use the same store.
//!
//! ```text
//!   blobs/b3/XXXX/HEX   a StatBlobResponse with the blob's chunks; missing for a blob of one chunk
//!   chunks/b3/XXXX/HEX  one chunk, zstd
//!   dirs/b3/XXXX/HEX    a whole tree by its root: zstd over u32be-length-delimited Directory messages, root first
//! ```
//!
//! HEX is the digest in hexadecimal, XXXX its first four digits. The list of chunks is written after the chunks, and a tree
//! in one piece, so everything that is found is complete. Objects are visible to everyone as soon as they are written: nothing
//! is held back until a commit.
//!
//! All requests run on the crate's own threads, so that callers may use any executor.

mod address;
mod blobs;
mod chunks;
mod compression;
mod directories;
pub(crate) mod fuzzing;
mod reader;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use address::{PREFIX, open, parse};
pub use blobs::ObjectStoreBlobService;
pub use directories::ObjectStoreDirectoryService;

use std::{fs::File, io, path::PathBuf, sync::Arc};

use bytes::Bytes;
use nix::unistd::syncfs;
use object_store::{ObjectStore, ObjectStoreExt as _, path::Path};

use crate::{B3Digest, runtime::spawn};

/// Concurrent requests of one reader or writer.
const CONCURRENT_REQUESTS: usize = 8;

/// The kind of an object.
#[derive(Debug, Clone, Copy)]
enum Kind {
    ChunkList,
    Chunk,
    Tree,
}

/// A place in an object store.
#[derive(Debug)]
pub(crate) struct Objects {
    store: Arc<dyn ObjectStore>,
    base: Path,
    /// The directory of the objects, if they are in the local file system.
    local: Option<PathBuf>,
}

impl Objects {
    fn path(&self, kind: Kind, digest: &B3Digest) -> Path {
        let kind = match kind {
            Kind::ChunkList => "blobs",
            Kind::Chunk => "chunks",
            Kind::Tree => "dirs",
        };
        let hex = digest.to_hex();
        self.base.clone().join(kind).join("b3").join(&hex[..4]).join(hex.as_str())
    }

    async fn has(&self, kind: Kind, digest: &B3Digest) -> io::Result<bool> {
        match self.store.head(&self.path(kind, digest)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Gets an object of at most `max_bytes`.
    async fn get(&self, kind: Kind, digest: &B3Digest, max_bytes: usize) -> io::Result<Option<Bytes>> {
        let path = self.path(kind, digest);
        let found = match self.store.get(&path).await {
            Ok(found) => found,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if found.meta.size > max_bytes as u64 {
            return Err(damaged(&format!("the object {path} is larger than {max_bytes} bytes")));
        }
        Ok(Some(found.bytes().await?))
    }

    async fn put(&self, kind: Kind, digest: &B3Digest, object: Vec<u8>) -> io::Result<()> {
        self.store.put(&self.path(kind, digest), object.into()).await?;
        Ok(())
    }

    /// Makes the objects durable, for the local file system. Other stores do so in `put`.
    fn sync(&self) -> io::Result<()> {
        let Some(local) = &self.local else { return Ok(()) };
        match File::open(local) {
            Ok(directory) => Ok(syncfs(&directory)?),
            // Nothing was put.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The error for damaged objects.
fn damaged(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{message}: the store is damaged"))
}
