//! A content-addressed store with the names, semantics and formats of snix-castore.
//!
//! ```text
//!   path, tar, NAR ──import──▶ Node ──export──▶ path, tar, NAR
//!                               │ names by B3Digest
//!                    ┌──────────┴───────────┐
//!               BlobService          DirectoryService          = Store
//!               memory, local        memory, redb              local and redb: verify, gc
//!               object store, gRPC   object store, gRPC
//!               cache (in front of another one)
//! ```
//!
//! A [`Node`] is a file, a symbolic link or a directory; a [`Directory`] is a sorted list of named nodes, and its digest
//! covers everything below it. [`proto`] is the only door for bytes from elsewhere: what passes its conversions keeps
//! every rule of the format.
//!
//! Blob services do their file I/O in place, inside of async functions that never suspend. Callers run bulk work on
//! blocking threads. The redb service, which may have to wait for another process, finds such a thread itself where there
//! is a tokio runtime.

mod addr;
pub mod archive;
pub mod blobservice;
mod cache;
pub mod copy;
mod digest;
mod directory;
pub mod directoryservice;
pub mod export;
mod from_addr;
#[doc(hidden)]
pub mod fuzzing;
pub mod gc;
pub mod grpc;
pub mod import;
mod local_store;
mod name;
pub mod nar;
mod node;
mod objectstore;
pub mod proto;
pub mod refscan;
mod runtime;
pub mod tar;
#[cfg(test)]
mod testing;
pub mod verify;

pub use addr::AddrError;
pub(crate) use blobservice::{BlobReader, BlobService, BlobWriter, Lease, LocalBlobService, MemoryBlobService};
pub use cache::WritePolicy;
pub use digest::{B3Digest, DigestError};
pub use directory::{Directory, DirectoryError, DirectorySizes};
pub(crate) use directoryservice::{DirectoryPutter, DirectoryService, MemoryDirectoryService, RedbDirectoryService};
pub use from_addr::is_addr;
pub use local_store::{LocalStore, RootError};
pub use name::{NameError, PathComponent, SymlinkTarget, TargetError};
pub use node::Node;

use std::sync::Arc;

/// Where blobs and directories are kept.
#[derive(Clone)]
pub struct Store {
    /// The contents of files.
    pub blobs: Arc<dyn BlobService>,
    /// The directories that name them.
    pub directories: Arc<dyn DirectoryService>,
}

impl Store {
    /// An empty store that lives as long as the value.
    pub fn memory() -> Self {
        Self { blobs: Arc::new(MemoryBlobService::default()), directories: Arc::new(MemoryDirectoryService::default()) }
    }

    /// The store of these two addresses.
    ///
    /// # Errors
    ///
    /// As [`blobservice::from_addr`] and [`directoryservice::from_addr`].
    pub fn from_addrs(blobs: &str, directories: &str) -> Result<Self, AddrError> {
        Ok(Self { blobs: blobservice::from_addr(blobs)?, directories: directoryservice::from_addr(directories)? })
    }

    /// The same store for one job, see [`BlobService::batch`]. Directories have their own, the [`DirectoryPutter`].
    pub fn batch(&self) -> Self {
        Self { blobs: self.blobs.batch(), directories: self.directories.clone() }
    }
}

/// At most the first 64 bytes, printable, so that an error stays one line whatever it quotes.
fn escape(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 64;
    let shown = bytes[..bytes.len().min(SHOWN_BYTES)].escape_ascii();
    if bytes.len() > SHOWN_BYTES { format!("{shown}…") } else { shown.to_string() }
}
