//! Clients of the blob and directory services of a peer.
//!
//! ```text
//!   the caller, on any thread          the crate's own threads
//!   has, get ───────────────── spawn ─▶ request ─▶ answer
//!   reader, stream ◀── Download ─────── checks each message, and the whole before its end
//!   writer, putter ─── Upload ────────▶ watches that the peer takes the messages
//! ```
//!
//! Callers may be on threads without a runtime, or block a runtime's thread. So everything that needs a reactor or a clock is
//! a task on the crate's own threads.
//!
//! Each module uses only the ones after it: `blobs`, `directories`, `blob_reader`, `blob_writer`, `blob_client`, `download`,
//! `upload`, `peer`.

mod blob_client;
mod blob_reader;
mod blob_writer;
mod blobs;
mod directories;
mod download;
mod peer;
mod upload;

pub use blobs::GrpcBlobService;
pub use directories::GrpcDirectoryService;
pub use peer::{CERTIFICATE_VARIABLE, KEY_VARIABLE, Peer, PeerError, PeerOptions};
