//! A cache: a store of limited size on this machine in front of a remote one.
//!
//! ```text
//!   read  ─▶ cached? ──yes──────────────────────────────────────────▶ file
//!               └no─▶ one download for everyone who waits for the blob; of its chunks only those that no cached
//!                     blob has, several at a time ─▶ digest right? ─▶ cache ──▶ file
//!   write ─▶ staging ─ commit ─▶ through: remote store, then cache
//!                                back:    cache, recorded as pending; later the remote store, blobs before directories
//!
//!   DIR/blobs                    a local blob service
//!   DIR/blobs/pending-blobs/HEX  the remote store lacks the blob HEX yet
//!   DIR/blobs/pending-trees/HEX  the remote store lacks the tree with the root HEX yet
//!   DIR/directories.redb         whole trees only: a root that is found has everything below it
//! ```
//!
//! Use renews the time of a cached blob, at most once a minute. When the blobs take more bytes than allowed, the least recently used ones are
//! evicted, except blobs that are open in any process, that a living [`batch`](crate::BlobService::batch) has used, or that
//! the remote store lacks. Several processes may share a cache.
//!
//! Each module uses only the ones after it: `directories`, `trees`, `blobs`, `download`, `evict`, `upload`, `pending`,
//! `address`.

mod address;
mod blobs;
mod directories;
mod download;
mod evict;
mod pending;
#[cfg(test)]
mod tests;
mod trees;
mod upload;

pub(crate) use address::{CacheAddress, SCHEME};
pub use blobs::CacheBlobService;
pub use directories::CacheDirectoryService;

/// When written data goes to the remote store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritePolicy {
    /// Before a commit returns.
    Through,
    /// Some time after the commit, and after a restart if need be. Blobs go before the directories that refer to them.
    Back,
}
