//! A content-addressed store with the names, semantics and formats of snix-castore.
//!
//! ```text
//!   path, tar, NAR ──import──▶ Node ──export──▶ path, tar, NAR
//!                               │ names by B3Digest
//!                    ┌──────────┴───────────┐
//!               BlobService          DirectoryService          = Store
//!               memory, local        memory, redb              local and redb: verify, gc
//!               object store, gRPC   object store, gRPC
//!               cache (in front of a remote store)
//! ```
//!
//! A [`Node`] is a file, a symbolic link or a directory. A [`Directory`] is a sorted list of named nodes, and its digest
//! covers everything below it. All bytes from outside go through the conversions in [`proto`], which enforce the rules of
//! the format.
//!
//! ```
//! # use cofferdam_castore::{Node, Store, export, import};
//! let dir = tempfile::tempdir()?;
//! std::fs::write(dir.path().join("hello.txt"), "hello")?;
//!
//! let store = Store::memory();
//! let node = import::import_path(&store, dir.path())?;
//! assert!(matches!(node, Node::Directory { size: 2, .. }));
//!
//! let copy = dir.path().join("copy");
//! export::export(&store, &node, &copy)?;
//! assert_eq!(std::fs::read_to_string(copy.join("hello.txt"))?, "hello");
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! Blob services do their file I/O in place, in async functions that never suspend, so callers run bulk work on blocking
//! threads. The redb service may have to wait for another process. It does so on a blocking thread if there is a tokio
//! runtime.
//!
//! Each module uses only the ones after it, with one exception: `blobservice` and `directoryservice` re-export the services
//! and `from_addr`, for the crate's users.
//!
//! - `copy`, `verify`, `gc`, `local_store`, `tar`, `nar`, `archive`, `import`, `export`: operations on stores
//! - `from_addr`: opens stores
//! - `cache`, `grpc`, `objectstore`: services that need others, or a network
//! - `views`: a store as each of its tenants sees it
//! - `blobservice`, `directoryservice`: the traits; services in memory and in files
//! - `proto`, `directory`, `node`, `name`, `digest`, `addr`, `size`, `runtime`, `durable`, `reopening`: the common base
//! - `refscan`: independent of the others

mod addr;
pub mod archive;
pub mod blobservice;
mod cache;
pub mod copy;
mod digest;
mod directory;
pub mod directoryservice;
pub mod durable;
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
pub mod reopening;
mod runtime;
mod size;
pub mod tar;
#[cfg(test)]
mod testing;
pub mod verify;
pub mod views;

pub use addr::AddrError;
pub(crate) use blobservice::{
    BlobReader, BlobService, BlobWriter, DigestBlobService, Lease, LocalBlobService, MemoryBlobService,
};
pub use cache::WritePolicy;
pub use digest::{B3Digest, DigestError};
pub use directory::{Directory, DirectoryError, DirectorySizes};
pub(crate) use directoryservice::{
    DirectoryMemory, DirectoryPutter, DirectoryService, MemoryDirectoryService, RedbDirectoryService,
};
pub use from_addr::{is_addr, local_path};
pub use local_store::{LocalStore, RootError};
pub use name::{NameError, PathComponent, SymlinkTarget, TargetError};
pub use node::Node;
pub use size::{SizeError, parse_size};
pub use views::Views;

use std::sync::Arc;

/// A blob service and a directory service.
#[derive(Clone)]
pub struct Store {
    /// The contents of files.
    pub blobs: Arc<dyn BlobService>,
    /// The directories that refer to them.
    pub directories: Arc<dyn DirectoryService>,
}

impl Store {
    /// An empty store in memory.
    pub fn memory() -> Self {
        Self { blobs: Arc::new(MemoryBlobService::default()), directories: Arc::new(MemoryDirectoryService::default()) }
    }

    /// A store that computes digests, and keeps no blobs.
    pub fn digests_only() -> Self {
        Self { blobs: Arc::new(DigestBlobService), directories: Arc::new(MemoryDirectoryService::default()) }
    }

    /// Opens the store with these two addresses.
    ///
    /// # Errors
    ///
    /// As [`blobservice::from_addr`] and [`directoryservice::from_addr`].
    pub fn from_addrs(blobs: &str, directories: &str) -> Result<Self, AddrError> {
        Ok(Self { blobs: blobservice::from_addr(blobs)?, directories: directoryservice::from_addr(directories)? })
    }

    /// The same store with a [batch](BlobService::batch) of its blob service. Directories need none: they are put through a
    /// [`DirectoryPutter`].
    pub fn batch(&self) -> Self {
        Self { blobs: self.blobs.batch(), directories: self.directories.clone() }
    }
}

/// The first 64 bytes with escapes, so that an error that quotes them stays on one line.
fn escape(bytes: &[u8]) -> String {
    const SHOWN_BYTES: usize = 64;
    let shown = bytes[..bytes.len().min(SHOWN_BYTES)].escape_ascii();
    if bytes.len() > SHOWN_BYTES { format!("{shown}…") } else { shown.to_string() }
}
