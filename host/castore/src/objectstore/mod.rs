//! Blobs and directories as objects, in the layout of snix, so that both programs can work on one store.
//!
//! ```text
//!   blobs/b3/XXXX/HEX   a StatBlobResponse that names the blob's chunks; none for a blob of one chunk
//!   chunks/b3/XXXX/HEX  one chunk, zstd
//!   dirs/b3/XXXX/HEX    a whole tree by its root: zstd over u32be-length-delimited Directory messages, root first
//! ```
//!
//! HEX is the digest in hexadecimal, XXXX its first four digits. A blob's list is written after its chunks, and a tree
//! at once, so what is found is whole. Objects are seen by everyone as soon as they are written: there is no holding
//! back until a commit.
//!
//! All requests run on the stores' own threads, so that callers may wait with any executor.

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

/// Requests that one reader or writer has under way at a time.
const CONCURRENT_REQUESTS: usize = 8;

/// What an object holds.
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
    /// Where the objects are in the local file system, if they are.
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

    /// An object of at most so many bytes.
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

    /// Makes what was put durable, where putting alone does not.
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

/// What is in the store is not what it should be.
fn damaged(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{message}: the store is damaged"))
}
