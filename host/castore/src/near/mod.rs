//! A bounded store on this machine in front of one that is far away.
//!
//! ```text
//!   read  ─▶ near? ──yes──────────────────────────────────────────▶ file
//!              └no─▶ one download a blob, however many wait: chunks that are not in other near blobs,
//!                    several at a time ─▶ digest right? ─▶ near ──▶ file
//!   write ─▶ near's staging ─ commit ─▶ through: far, then near
//!                                       back:    near, with a note; far some time later, directories after their blobs
//!
//!   DIR/blobs                    a local blob service
//!   DIR/blobs/pending-blobs/HEX  the near blob HEX is not in the far store yet
//!   DIR/blobs/pending-trees/HEX  nor is the tree with the root HEX
//!   DIR/directories.redb         whole trees only: whoever finds a root has all that is below it
//! ```
//!
//! A near blob that was used is touched, and when there are too many bytes those go that were touched longest ago; but
//! none that is open, in this process or another, none that a living [`batch`](crate::BlobService::batch) has used, and
//! none that the far store lacks. Several processes may share a near store.

mod address;
mod blobs;
mod directories;
mod download;
mod notes;
mod room;
#[cfg(test)]
mod tests;
mod trees;
mod upload;

pub(crate) use address::{SCHEME, blob_service, directory_service, parse};
pub use blobs::NearBlobService;
pub use directories::NearDirectoryService;

/// When the far store gets what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritePolicy {
    /// Before a commit returns.
    Through,
    /// After it, and after a restart if need be: first blobs, then the directories that refer to them.
    Back,
}
